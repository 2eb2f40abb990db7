"""Completions as OpenAI's JSON. Owns the shape of chunks and of whole answers; knows no HTTP and no session
store.

A stream has no chunk with choices before the first token. Its last chunks are each choice's finish reason
(with the session, where there is one), then the usage where it was asked for.
"""

from __future__ import annotations

import abc
import time
import uuid
from collections.abc import AsyncGenerator, AsyncIterator, Sequence
from typing import Any, Literal

from mnemosyne.engine.messages import Token
from mnemosyne.server import sse
from mnemosyne.server.errors import describe
from mnemosyne.server.generation import Piece, Plan
from mnemosyne.server.logprobs import chat_logprobs, completion_logprobs
from mnemosyne.server.prompt import ChatTemplate
from mnemosyne.server.schemas.chat import AssistantMessage, ChatChoice, ChatCompletion
from mnemosyne.server.schemas.common import PromptDetails, SessionReport, Usage
from mnemosyne.server.schemas.completions import Completion, CompletionChoice
from mnemosyne.server.sessions.tokens import TextTokenizer
from mnemosyne.server.sessions.views import Answer, Delta, SessionUsage

UsageIn = Literal["none", "last", "all"]


class Writer(abc.ABC):
    """What the two endpoints have in common; a subclass gives the shape of a choice."""

    id_prefix: str
    chunk_object: str

    def __init__(self, plan: Plan, model: str, tokenizer: TextTokenizer) -> None:
        self.plan, self.tokenizer = plan, tokenizer
        self.with_logprobs = plan.turns[0].sampling.logprobs is not None
        self.head: dict[str, Any] = {
            "id": f"{self.id_prefix}-{uuid.uuid4().hex}",
            "object": self.chunk_object,
            "created": int(time.time()),
            "model": model,
        }

    @abc.abstractmethod
    def piece(self, index: int, text: str, tokens: Sequence[Token]) -> dict[str, Any]:
        """A choice of a chunk."""

    @abc.abstractmethod
    def end(self, index: int, answer: Answer) -> dict[str, Any]:
        """The choice that carries the finish reason."""

    def usage(self, completion_tokens: int) -> Usage:
        return Usage(
            prompt_tokens=self.plan.prompt_tokens,
            completion_tokens=completion_tokens,
            total_tokens=self.plan.prompt_tokens + completion_tokens,
            prompt_tokens_details=PromptDetails(cached_tokens=self.plan.cached_tokens),
        )

    async def stream(
        self, pieces: AsyncGenerator[Piece, None], usage: UsageIn
    ) -> AsyncGenerator[bytes, None]:
        """The events of the whole answer. A failure after the first event is one more event, then the end."""
        began, so_far, exact = False, 0, 0
        try:
            async for index, item in pieces:
                message: dict[str, Any] = dict(self.head)
                if isinstance(item, Delta):
                    if not item.tokens and not item.text:
                        continue
                    so_far += len(item.tokens)
                    message["choices"] = [self.piece(index, item.text, item.tokens)]
                else:
                    exact += item.completion_tokens
                    message["choices"] = [self.end(index, item)]
                    if item.session is not None:
                        message["session"] = report(item.session)
                if usage != "none":
                    message["usage"] = self.usage(max(so_far, exact)) if usage == "all" else None
                began = True
                yield sse.data(message)
            if usage != "none":
                yield sse.data({**self.head, "choices": [], "usage": self.usage(exact)})
        except Exception as error:
            if not began:
                raise
            yield failed(error)
        finally:
            await pieces.aclose()
        yield sse.DONE

    async def collect(self, pieces: AsyncIterator[Piece]) -> list[Answer]:
        """The answers of all choices, by index."""
        answers: dict[int, Answer] = {}
        async for index, item in pieces:
            if isinstance(item, Answer):
                answers[index] = item
        return [answers[index] for index in sorted(answers)]


class CompletionWriter(Writer):
    id_prefix, chunk_object = "cmpl", "text_completion"

    def __init__(self, plan: Plan, model: str, tokenizer: TextTokenizer) -> None:
        super().__init__(plan, model, tokenizer)
        self._offsets: dict[int, int] = {}

    def piece(self, index: int, text: str, tokens: Sequence[Token]) -> dict[str, Any]:
        offset = self._offsets.get(index, 0)
        self._offsets[index] = offset + len(text)
        logprobs = completion_logprobs(self.tokenizer, tokens, offset) if self.with_logprobs else None
        return {"index": index, "text": text, "logprobs": logprobs, "finish_reason": None}

    def end(self, index: int, answer: Answer) -> dict[str, Any]:
        return {"index": index, "text": "", "logprobs": None, "finish_reason": answer.finish_reason}

    def whole(self, answers: Sequence[Answer]) -> Completion:
        return Completion(
            **self.head,
            choices=[
                CompletionChoice(
                    index=index,
                    text=answer.text,
                    logprobs=completion_logprobs(self.tokenizer, answer.tokens, 0)
                    if self.with_logprobs
                    else None,
                    finish_reason=answer.finish_reason,
                )
                for index, answer in enumerate(answers)
            ],
            usage=self.usage(sum(answer.completion_tokens for answer in answers)),
            session=report(answers[0].session),
        )


class ChatWriter(Writer):
    id_prefix, chunk_object = "chatcmpl", "chat.completion.chunk"

    def __init__(self, plan: Plan, model: str, tokenizer: TextTokenizer, template: ChatTemplate) -> None:
        super().__init__(plan, model, tokenizer)
        self._prefix = template.answer_prefix
        self._left: dict[int, str] = {}
        """What of the template's own text before an answer hasn't come yet, by choice."""
        self._greeted: set[int] = set()

    def piece(self, index: int, text: str, tokens: Sequence[Token]) -> dict[str, Any]:
        logprobs = chat_logprobs(self.tokenizer, tokens) if self.with_logprobs else None
        delta = {**self._role(index), "content": self._content(index, text)}
        return {"index": index, "delta": delta, "logprobs": logprobs, "finish_reason": None}

    def end(self, index: int, answer: Answer) -> dict[str, Any]:
        role = self._role(index)
        delta = {**role, "content": ""} if role else {}
        return {"index": index, "delta": delta, "logprobs": None, "finish_reason": answer.finish_reason}

    def whole(self, answers: Sequence[Answer]) -> ChatCompletion:
        return ChatCompletion(
            **{**self.head, "object": "chat.completion"},
            choices=[
                ChatChoice(
                    index=index,
                    message=AssistantMessage(content=self._content(index, answer.text)),
                    logprobs=chat_logprobs(self.tokenizer, answer.tokens) if self.with_logprobs else None,
                    finish_reason=answer.finish_reason,
                )
                for index, answer in enumerate(answers)
            ],
            usage=self.usage(sum(answer.completion_tokens for answer in answers)),
            session=report(answers[0].session),
        )

    def _role(self, index: int) -> dict[str, str]:
        if index in self._greeted:
            return {}
        self._greeted.add(index)
        return {"role": "assistant"}

    def _content(self, index: int, text: str) -> str:
        """``text`` without what the template puts before an answer."""
        left = self._left.get(index, self._prefix)
        common = 0
        while common < min(len(left), len(text)) and left[common] == text[common]:
            common += 1
        self._left[index] = left[common:] if common == len(text) else ""
        return text[common:]


def report(session: SessionUsage | None) -> SessionReport | None:
    if session is None:
        return None
    return SessionReport(
        id=session.id,
        version=session.version,
        tokens_seen=session.tokens_seen,
        reused_tokens=session.reused_tokens,
        recomputed_tokens=session.recomputed_tokens,
    )


def failed(error: Exception) -> bytes:
    """A failure as the event that stands before ``[DONE]``."""
    return sse.data(describe(error)[1])
