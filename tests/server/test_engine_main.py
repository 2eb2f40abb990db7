"""The engine's own process over a real, tiny checkpoint: states, failures to start, death amid a document."""

from __future__ import annotations

import asyncio
import os
import signal
import sys
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel

from mnemosyne.checkpoints.snapshot import load_state
from mnemosyne.checkpoints.weights import Checkpoint, save_checkpoint
from mnemosyne.engine.advance import advance
from mnemosyne.engine.client import EngineClient
from mnemosyne.engine.errors import (
    ConfigError,
    EngineUnavailable,
    SnapshotCorrupt,
    StateIncompatible,
    UnknownHandle,
)
from mnemosyne.engine.messages import INITIAL, Finished, Progress, Sampling
from mnemosyne.engine.scheduler import Limits
from mnemosyne.server import engine_main
from mnemosyne.server.engine_main import make_engine
from tests.engine.fakes import FakeModel
from tests.engine.models import random_tokens, small_config, small_model

VOCAB = small_config().vocab_size
PROMPT = {"system": "{content}", "user": "{content}", "assistant": "{content}", "end_of_turn": "", "stop": []}


def make_checkpoint(folder: Path, seed: int = 1) -> Checkpoint:
    model = small_model(small_config("mag"), seed=seed)
    words = Tokenizer(WordLevel({f"w{i}": i for i in range(VOCAB)}, unk_token="w0"))
    return save_checkpoint(folder, model.config, model.state_dict(), words.to_str(), PROMPT)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    return make_checkpoint(tmp_path_factory.mktemp("checkpoint"))


def client(checkpoint: Path, *options: str, **settings: float) -> EngineClient:
    command = [sys.executable, "-m", "mnemosyne.server.engine_main", "--checkpoint", str(checkpoint)]
    return EngineClient([*command, "--threads", "1", *options], **settings)


async def answer(engine: EngineClient, base: str) -> tuple[int, ...]:
    async for event in engine.generate(base, None, (1, 2), Sampling(max_tokens=30, seed=4)):
        if isinstance(event, Finished):
            return event.tokens
    raise AssertionError


async def test_a_killed_engine_reads_on_from_an_exported_state(checkpoint: Checkpoint) -> None:
    tokens = tuple(random_tokens(5000, seed=1))
    engine = client(checkpoint.path, "--dtype", "float32", first_delay=0.05)
    await engine.start()
    assert engine.info.model_fingerprint == checkpoint.fingerprint
    assert engine.info.config["vocab_size"] == VOCAB and engine.info.dtype == "float32"
    await engine.advance(INITIAL, "a", tokens[:1000])
    data = await engine.export("a")
    progress: list[Progress] = []
    reading = asyncio.create_task(engine.advance("a", "b", tokens[1000:] * 40, on_progress=progress.append))
    while not progress:
        await asyncio.sleep(0.002)
    assert engine.pid is not None
    os.kill(engine.pid, signal.SIGKILL)
    with pytest.raises(EngineUnavailable):
        await reading
    while engine.incarnation < 2:
        await asyncio.sleep(0.02)
    with pytest.raises(UnknownHandle):
        await engine.advance("a", "b", tokens[1000:])
    assert (await engine.load("a", data)).tokens_seen == 1000
    await engine.advance("a", "b", tokens[1000:])
    after = await engine.export("b")
    written = await answer(engine, "b")
    await engine.close()

    model = small_model(small_config("mag"))
    never_killed = advance(model, model.initial_state(), tokens, chunk=model.config.chunk)
    restored, manifest = load_state(
        after, config=model.config, dtype=torch.float32, model_fingerprint=checkpoint.fingerprint
    )
    assert restored.digest() == never_killed.digest()
    assert manifest.numerics == engine.info.numerics
    assert len(set(written)) > 3


async def test_states_are_checked_as_they_come_in(checkpoint: Checkpoint, tmp_path: Path) -> None:
    engine, other = client(checkpoint.path), client(make_checkpoint(tmp_path / "other", seed=2).path)
    await asyncio.gather(engine.start(), other.start())
    await other.advance(INITIAL, "a", (1, 2, 3))
    foreign = await other.export("a")
    with pytest.raises(StateIncompatible):
        await engine.load("a", foreign)
    await engine.advance(INITIAL, "a", (1, 2, 3))
    data = await engine.export("a")
    with pytest.raises(SnapshotCorrupt):
        await engine.load("b", data[:-1])
    await engine.load("b", data)
    assert await answer(engine, "a") == await answer(engine, "b")
    await asyncio.gather(engine.close(), other.close())


async def test_signals_to_the_whole_service_leave_the_engine_to_its_server(checkpoint: Checkpoint) -> None:
    engine = client(checkpoint.path)
    await engine.start()
    assert engine.pid is not None
    for number in (signal.SIGINT, signal.SIGTERM):
        os.kill(engine.pid, number)
    assert (await engine.advance(INITIAL, "a", (1, 2, 3))).tokens_seen == 3
    assert engine.incarnation == 1
    await engine.close()


async def test_why_it_cannot_start_is_said(checkpoint: Checkpoint, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"config\.json is missing"):
        await client(tmp_path).start()
    with pytest.raises(ConfigError, match="host_state_bytes are for a CUDA device"):
        await client(checkpoint.path, "--host-state-bytes", "1000").start()
    if not torch.cuda.is_available():
        with pytest.raises(ConfigError, match="no CUDA device"):
            await client(checkpoint.path, "--device", "cuda").start()


def test_what_computes_is_part_of_the_numerics(
    checkpoint: Checkpoint, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On one kind of GPU the kernels may run or, without a compiler for them, the reference."""
    reference = make_engine(checkpoint.path, precision="float32", threads=1).info
    monkeypatch.setattr(engine_main, "served", lambda titans: FakeModel())
    other = make_engine(checkpoint.path, precision="float32", threads=1).info
    differing = {name for name, fact in reference.numerics.items() if other.numerics[name] != fact}
    assert differing == {"kernels"} and reference.numerics_fingerprint != other.numerics_fingerprint
    monkeypatch.setattr("importlib.metadata.version", lambda name: f"another {name}")
    newer = make_engine(checkpoint.path, precision="float32", threads=1).info
    assert newer.numerics_fingerprint != other.numerics_fingerprint, "another compiler, other bits"


def test_the_precision_is_part_of_the_numerics(checkpoint: Checkpoint) -> None:
    facts = {}
    for precision in ("float32", "bfloat16"):
        info = make_engine(checkpoint.path, precision=precision, threads=1).info  # type: ignore[arg-type]
        assert (info.dtype, info.numerics["compute"], info.numerics["threads"]) == (precision, precision, "1")
        facts[info.numerics_fingerprint] = info.state_bytes
        assert (info.max_queued_tokens, info.room_bytes) == (Limits.max_queued_tokens, None)
    assert len(facts) == 2 and len(set(facts.values())) == 2
    assert make_engine(checkpoint.path, threads=1).info.dtype in ("float32", "bfloat16")
