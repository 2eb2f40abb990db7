"""Log probabilities in OpenAI's two shapes. Knows tokens and their bytes, no request."""

from __future__ import annotations

from collections.abc import Sequence

from mnemosyne.engine.messages import Token
from mnemosyne.server.schemas.chat import ChatLogprobs, ChatTokenLogprob, TokenLogprob
from mnemosyne.server.schemas.completions import CompletionLogprobs
from mnemosyne.server.sessions.tokens import TextTokenizer


def completion_logprobs(tokenizer: TextTokenizer, tokens: Sequence[Token], offset: int) -> CompletionLogprobs:
    """The shape of ``/v1/completions``; ``offset`` is the first token's place in the answer's text."""
    texts = [_text(tokenizer.token_bytes(token.token)) for token in tokens]
    offsets = []
    for text in texts:
        offsets.append(offset)
        offset += len(text)
    return CompletionLogprobs(
        tokens=texts,
        token_logprobs=[token.logprob for token in tokens],
        top_logprobs=[
            {_text(tokenizer.token_bytes(other)): logprob for other, logprob in reversed(token.top_logprobs)}
            for token in tokens
        ],
        text_offset=offsets,
    )


def chat_logprobs(tokenizer: TextTokenizer, tokens: Sequence[Token]) -> ChatLogprobs:
    """The shape of ``/v1/chat/completions``."""

    def one(token: int, logprob: float) -> TokenLogprob:
        raw = tokenizer.token_bytes(token)
        return TokenLogprob(token=_text(raw), logprob=logprob, bytes=list(raw))

    return ChatLogprobs(
        content=[
            ChatTokenLogprob(
                **one(token.token, token.logprob or 0.0).model_dump(),
                top_logprobs=[one(other, logprob) for other, logprob in token.top_logprobs],
            )
            for token in tokens
        ]
    )


def _text(raw: bytes) -> str:
    return raw.decode("utf-8", "replace")
