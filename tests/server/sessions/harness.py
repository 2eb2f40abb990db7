"""A session service on a small real model, and the words that tests say to it."""

from __future__ import annotations

import asyncio
import dataclasses
import hashlib
from collections.abc import Callable
from functools import cache, partial
from typing import Any

import torch
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

from mnemosyne.checkpoints.snapshot import dump_state, load_state
from mnemosyne.checkpoints.store import SessionStore
from mnemosyne.engine.config import MemoryConfig, ModelConfig
from mnemosyne.engine.copies import Copier
from mnemosyne.engine.engine import Engine
from mnemosyne.engine.inline import InlineEngine
from mnemosyne.engine.interface import EngineLike
from mnemosyne.engine.messages import EngineInfo, Sampling, Token
from mnemosyne.engine.model import Titans
from mnemosyne.engine.scheduler import Limits
from mnemosyne.engine.state import SessionState
from mnemosyne.engine.tiers import Budgets
from mnemosyne.server.sessions.service import ServiceSettings, SessionService
from mnemosyne.server.sessions.tokens import TextTokenizer
from mnemosyne.server.sessions.turns import TurnStream
from mnemosyne.server.sessions.views import Answer, Delta, DocumentInfo, Idempotency, TurnRequest
from tests.engine.models import small_model

TENANT = "acme"
VOCABULARY = 320
FINGERPRINT = hashlib.sha256(b"the tests' model").hexdigest()
CONFIG = ModelConfig(
    variant="mag",
    layers=1,
    dim=32,
    head_dim=16,
    vocab_size=VOCABULARY,
    chunk=16,
    segment=32,
    window=32,
    persistent=2,
    memory=MemoryConfig(depth=1, theta_max=0.5, alpha_max=0.2),
)
TEXT = (
    "The river Ostrava runs past seven mills. Each mill has a keeper, and each keeper has a name;\n"
    "the first is called Größe, the second 你好, the third simply Ann.  They meet on Mondays.\n\n"
    "\tNobody knows why. It has been so for 1,024 years — or 1,025?\r\n"
)


@cache
def tokenizer() -> TextTokenizer:
    """Byte-level BPE like the shipped one, with a few merges."""
    made = Tokenizer(models.BPE())
    pieces = r" ?\p{L}{1,31}| ?\p{N}| ?[^\s\p{L}\p{N}]{1,31}|\s{1,32}(?!\S)|\s"
    made.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(pieces), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    made.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=VOCABULARY, initial_alphabet=alphabet, show_progress=False)
    made.train_from_iterator([TEXT * 3], trainer)
    return TextTokenizer(made)


def make_engine(
    limits: Limits | None = None,
    fingerprint: str = FINGERPRINT,
    budgets: Budgets | None = None,
    copier: Copier | None = None,
) -> InlineEngine:
    model: Titans = small_model(CONFIG)
    numerics = {"device": "cpu", "compute": "float32"}
    info = EngineInfo(
        model_fingerprint=fingerprint,
        numerics_fingerprint="tests",
        numerics=numerics,
        config=dataclasses.asdict(CONFIG),
        device="cpu",
        dtype="float32",
        parameters=0,
        state_bytes=model.initial_state().nbytes,
        max_queued_tokens=0,
    )

    def load(data: bytes) -> SessionState:
        return load_state(data, config=CONFIG, dtype=torch.float32, model_fingerprint=fingerprint)[0]

    dump = partial(dump_state, model_fingerprint=fingerprint, numerics=numerics)
    return InlineEngine(Engine(model, info, limits or Limits(), dump, load, budgets, copier))


def make_service(
    store: SessionStore, engine: EngineLike, owner: str = "one", **settings: Any
) -> SessionService:
    return SessionService(store, engine, tokenizer(), ServiceSettings(model="test", owner=owner, **settings))


def ask(text: str, max_tokens: int = 8, **fields: Any) -> TurnRequest:
    """A turn with a prompt; sampled, so that a wrong state or position shows."""
    sampling = Sampling(max_tokens=max_tokens, temperature=1.0, seed=7)
    return TurnRequest(prompt=tokenizer().encode(text), sampling=sampling, **fields)


def key(name: str, body: str = "body") -> Idempotency:
    return Idempotency(route="POST /turn", key=name, body_hash=body)


async def answer(stream: TurnStream) -> Answer:
    """Read a turn to its end; what was streamed must be what the answer says."""
    text, tokens = "", list[Token]()
    async for item in stream:
        if isinstance(item, Delta):
            text, tokens = text + item.text, [*tokens, *item.tokens]
        else:
            assert (item.text, item.tokens) == (text, tuple(tokens))
            return item
    raise AssertionError("the stream ended without an answer")


async def turn(service: SessionService, session_id: str, text: str, **fields: Any) -> Answer:
    return await answer(await service.turn(TENANT, session_id, ask(text, **fields)))


async def state(service: SessionService, session_id: str, version: int | None = None) -> bytes:
    """The state as a file: equal states, equal bytes."""
    return await service.export_state(TENANT, session_id, version=version)


async def new_session(service: SessionService, **fields: Any) -> str:
    return (await service.create(TENANT, **fields)).id


async def read_document(service: SessionService, session_id: str, text: str | bytes) -> DocumentInfo:
    """Upload a document in one go and wait until it was read."""
    data = text.encode() if isinstance(text, str) else text
    made = await service.create_document(TENANT, session_id, name="a document")
    await service.append_document(TENANT, session_id, made.id, offset=0, data=data, complete=True)
    return await until_ended(service, session_id, made.id)


async def until_ended(service: SessionService, session_id: str, document_id: str) -> DocumentInfo:
    async def ended() -> DocumentInfo | None:
        found = await service.document(TENANT, session_id, document_id)
        # The journal says so a moment before the newest state is the session's.
        settling = any(live.settling for live in service._core.registry.all() if live.id == session_id)
        return found if found.status in ("absorbed", "rejected", "cancelled") and not settling else None

    return await until(ended)


async def until(condition: Callable[[], Any], seconds: float = 30.0) -> Any:
    """Wait for a condition, which may be awaitable; its value."""
    deadline = asyncio.get_running_loop().time() + seconds
    while True:
        value = condition()
        if asyncio.iscoroutine(value):
            value = await value
        if value:
            return value
        assert asyncio.get_running_loop().time() < deadline, "it didn't happen in time"
        await asyncio.sleep(0.01)
