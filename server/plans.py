"""From request bodies to plans. Owns what a field means for a turn; knows no engine and no answer's shape."""

from __future__ import annotations

import asyncio
import secrets
from collections.abc import Sequence
from functools import partial

from fastapi import Request

from mnemosyne.engine.errors import ContextTooLong, RequestError
from mnemosyne.engine.messages import Sampling
from mnemosyne.server.deps import body_of, check_model, idempotency
from mnemosyne.server.generation import Plan
from mnemosyne.server.history import past_turns, split_resent
from mnemosyne.server.runtime import Runtime
from mnemosyne.server.schemas.chat import ChatRequest
from mnemosyne.server.schemas.completions import CompletionRequest
from mnemosyne.server.schemas.generation import GenerationRequest
from mnemosyne.server.sessions.views import TurnRequest

COMPLETION_MAX_TOKENS = 16
"""OpenAI's default for ``/v1/completions``."""
MAX_TURNS = 1024
"""Most choices of one request, over all its prompts."""
LONG_TEXT = 50_000
"""Characters from which a text is tokenized beside the event loop."""


def session_of(request: Request, body: GenerationRequest) -> str | None:
    """The session a request names; the first of its names that is given holds (docs/http-api.md)."""
    headers = request.headers
    conversation = body.conversation
    if isinstance(conversation, dict):
        conversation = conversation.get("id")
        if not isinstance(conversation, str):
            raise RequestError("conversation must be an id or an object with one", param="conversation")
    for name in (
        headers.get("x-session-id"),
        headers.get("x-dynamo-session-id"),
        body.session_id,
        conversation,
    ):
        if name:
            return name
    return None


async def completion_plan(
    runtime: Runtime,
    tenant: str,
    request: Request,
    body: CompletionRequest,
    if_match: int | None,
    key: str | None,
) -> Plan:
    """Raises RequestError for what can't be served, ContextTooLong, and UnknownModel."""
    session_id = _checked(runtime, request, body)
    prompts = [await _encode(runtime, p) if isinstance(p, str) else tuple(p) for p in body.prompts]
    if session_id is not None and body.learns and len(prompts) > 1:
        raise RequestError("a session learns one prompt at a time", param="prompt")
    for prompt in prompts:
        if prompt and max(prompt) >= runtime.tokenizer.vocab_size:
            raise RequestError(f"token id {max(prompt)} isn't in the vocabulary", param="prompt")
    turn = _turn(request, body, session_id, if_match, key)
    samplings = _samplings(runtime, body, body.max_tokens or COMPLETION_MAX_TOKENS, body.logprobs)
    turns = [turn(prompt=p, sampling=s, stop=body.stops) for p in prompts for s in samplings]
    _check_size(runtime, turns, "prompt")
    return Plan(tenant=tenant, session_id=session_id, turns=tuple(turns), choices=body.choices)


async def chat_plan(
    runtime: Runtime,
    tenant: str,
    request: Request,
    body: ChatRequest,
    if_match: int | None,
    key: str | None,
) -> Plan:
    """Raises RequestError for what can't be served, ContextTooLong, and UnknownModel."""
    session_id = _checked(runtime, request, body)
    template = runtime.template
    messages = [(message.role, message.text(i)) for i, message in enumerate(body.messages)]
    if messages[-1][0] == "assistant":
        raise RequestError("the last message must not be the assistant's", param="messages")
    known = await _known(runtime, tenant, session_id, body, messages)
    ids = [await _encode(runtime, template.render(role, text)) for role, text in messages]
    prompt = tuple(token for message in ids[known:] for token in message)
    room = runtime.settings.max_request_tokens - len(prompt)
    budget = body.max_completion_tokens or body.max_tokens
    if budget is None:
        budget = max(1, min(runtime.settings.default_max_tokens, room))
    stop = body.stops if body.ignore_eos else (*body.stops, *template.stop)
    end = runtime.tokenizer.encode(template.end_of_turn) if session_id is not None else ()
    turn = _turn(request, body, session_id, if_match, key)
    samplings = _samplings(runtime, body, budget, body.logprobs_wanted)
    turns = [turn(prompt=prompt, sampling=s, stop=stop, end_of_turn=end) for s in samplings]
    _check_size(runtime, turns, "messages")
    return Plan(
        tenant=tenant,
        session_id=session_id,
        turns=tuple(turns),
        choices=body.choices,
        cached_tokens=sum(len(message) for message in ids[:known]),
    )


async def _encode(runtime: Runtime, text: str) -> tuple[int, ...]:
    if len(text) < LONG_TEXT:
        return runtime.tokenizer.encode(text)
    return await asyncio.to_thread(runtime.tokenizer.encode, text)


def _checked(runtime: Runtime, request: Request, body: GenerationRequest) -> str | None:
    """The session of a request whose fields go together."""
    body.refuse_unserved()
    check_model(runtime, body.model)
    session_id = session_of(request, body)
    if body.choices > 1 and session_id is not None and body.learns:
        raise RequestError("n: a session learns one answer at a time", param="n")
    if body.version is not None and (session_id is None or body.learns):
        raise RequestError("version goes with a session and learn: false", param="version")
    return session_id


async def _known(
    runtime: Runtime,
    tenant: str,
    session_id: str | None,
    body: ChatRequest,
    messages: Sequence[tuple[str, str]],
) -> int:
    """How many of the messages the session has read before; all are new without a session."""
    resent = any(role == "assistant" for role, _ in messages)
    if session_id is None or not resent:
        return 0
    if body.history != "auto":
        raise RequestError(
            'a session remembers its turns: send the new messages alone, or "history": "auto"',
            param="messages",
            code="history_resent",
        )
    transcript = await runtime.service.transcript(tenant, session_id)
    return split_resent(messages, past_turns(transcript), runtime.template)


def _samplings(
    runtime: Runtime, body: GenerationRequest, max_tokens: int, logprobs: int | None
) -> list[Sampling]:
    """One for each choice of a prompt; absent fields have OpenAI's defaults."""
    seed = secrets.randbits(63) if body.seed is None else body.seed % 2**63
    return [
        Sampling(
            max_tokens=max_tokens,
            temperature=1.0 if body.temperature is None else body.temperature,
            top_p=1.0 if body.top_p is None else body.top_p,
            top_k=max(0, body.top_k or 0),
            min_p=body.min_p or 0.0,
            presence_penalty=body.presence_penalty or 0.0,
            frequency_penalty=body.frequency_penalty or 0.0,
            repetition_penalty=1.0 if body.repetition_penalty is None else body.repetition_penalty,
            logit_bias=body.biases(runtime.tokenizer.vocab_size),
            seed=seed,
            choice=choice,
            logprobs=logprobs,
            stop_ids=tuple(body.stop_token_ids or ()),
            ignore_eos=bool(body.ignore_eos),
        )
        for choice in range(body.choices)
    ]


def _turn(
    request: Request, body: GenerationRequest, session_id: str | None, if_match: int | None, key: str | None
) -> partial[TurnRequest]:
    """What all turns of a request have in common. Only one that learns changes something and can be keyed."""
    if session_id is None or not body.learns:
        return partial(TurnRequest, learn=False, version=body.version)
    content = body_of(body, "stream", "stream_options")  # how an answer is sent may differ between repeats
    return partial(TurnRequest, if_match=if_match, idempotency=idempotency(request, key, content, session_id))


def _check_size(runtime: Runtime, turns: Sequence[TurnRequest], param: str) -> None:
    if len(turns) > MAX_TURNS:
        raise RequestError(f"more than {MAX_TURNS} answers in one request", param="n")
    limit = runtime.settings.max_request_tokens
    longest = max(len(turn.prompt) + turn.sampling.max_tokens for turn in turns)
    if longest > limit:
        raise ContextTooLong(
            f"{longest} tokens of prompt and answer are more than a request's limit of {limit}; "
            "send a long text as a document of a session",
            param=param,
        )
