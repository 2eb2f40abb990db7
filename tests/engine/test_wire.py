"""Frames: every message comes back as it was, and nothing else comes through."""

from __future__ import annotations

import io
import json
import math
import random
import struct

import pytest

from mnemosyne.engine import wire
from mnemosyne.engine.chunk_trace import NO_CHUNKS, ChunkTrace, ChunkTraces
from mnemosyne.engine.errors import EngineError, RequestError
from mnemosyne.engine.messages import (
    Advance,
    Advanced,
    Cancel,
    EngineInfo,
    Export,
    Exported,
    Failed,
    Finished,
    Generate,
    Load,
    Loaded,
    Progress,
    ReadTrace,
    Release,
    Sampling,
    Stats,
    StatsReport,
    Token,
    TokenTrace,
    TraceReport,
    TraceTokens,
)

TRACE = ChunkTrace(position=64, surprise=0.1, momentary=1e-300, moved=2.0, gain=0.5, written=1 / 3)
SAMPLING = Sampling(logit_bias={3: -1.5, 70_000: 2.0}, stop_ids=(1, 2), seed=2**63, logprobs=5)
MESSAGES: list[wire.Message] = [
    Advance(request_id="1", tenant="t", base="a", result="b", tokens=(0, 1, 2**31 - 1, -(2**31))),
    Advance(request_id="1", tenant="", base="a", result="b", tokens=(), kinds=b""),
    Advance(request_id="ü\n", tenant="☃", base="a", result="b", tokens=(5, 6), kinds=b"\0\1"),
    Generate(request_id="2", tenant="t", base="a", result=None, prompt=(9,), sampling=SAMPLING),
    Generate(request_id="2", tenant="t", base="a", result="b", prompt=(), sampling=Sampling()),
    Export(request_id="3", handle="h"),
    Load(request_id="4", handle="h", data=bytes(range(256)) * 10),
    Release(handle="h"),
    Cancel(request_id="4"),
    Stats(request_id="5"),
    ReadTrace(request_id="6", handle="h"),
    TraceTokens(request_id="7", tenant="t", base="a", tokens=(5, 6)),
    Progress(request_id="1", tokens_done=64, trace=ChunkTraces.of([TRACE, TRACE])),
    Progress(request_id="1", tokens_done=64, trace=ChunkTraces.of([TRACE, TRACE._replace(gain=None)])),
    Progress(request_id="1", tokens_done=64, trace=NO_CHUNKS),
    Advanced(request_id="1", position=64, tokens_seen=66),
    Token(request_id="2", index=0, token=7, logprob=-0.25, top_logprobs=((7, -0.25), (1, -3.0))),
    Token(request_id="2", index=1, token=8),
    Finished(request_id="2", reason="stop", tokens=(7, 8), tokens_seen=99),
    Exported(request_id="3", data=b""),
    Loaded(request_id="4", position=0, tokens_seen=0),
    StatsReport(request_id="5", values={"steps": 1.0}),
    TraceReport(request_id="6", chunks=3, layers=2, data=bytes(range(64))),
    TokenTrace(request_id="7", layers=2, data=bytes(32)),
    Failed(request_id="1", error="QueueFull", message="full", attributes={"param": "x", "n": 1}),
    EngineInfo(
        model_fingerprint="m",
        numerics_fingerprint="n",
        numerics={"device": "cpu"},
        config={"layers": 2, "memory": {"depth": 2}},
        device="cpu",
        dtype="float32",
        parameters=10,
        state_bytes=10,
        max_queued_tokens=10,
    ),
]


@pytest.mark.parametrize("message", MESSAGES, ids=lambda m: type(m).__name__)
def test_round_trip(message: wire.Message) -> None:
    assert wire.read(io.BytesIO(wire.encode(message))) == message


def test_a_stream_of_frames_ends_where_it_ends() -> None:
    stream = io.BytesIO(b"".join(map(wire.encode, MESSAGES)))
    assert [wire.read(stream) for _ in MESSAGES] == MESSAGES
    assert wire.read(stream) is None


@pytest.mark.parametrize("message", MESSAGES[:6], ids=lambda m: type(m).__name__)
def test_every_cut_is_named(message: wire.Message) -> None:
    frame = wire.encode(message)
    for cut in range(1, len(frame)):
        with pytest.raises(EngineError, match="ended inside"):
            wire.read(io.BytesIO(frame[:cut]))


def test_no_garbage_gets_through_as_anything_but_an_engine_error() -> None:
    rng = random.Random(1)
    for _ in range(3000):
        frame = bytearray(wire.encode(rng.choice(MESSAGES)))
        for _ in range(rng.randint(1, 4)):
            frame[rng.randrange(len(frame))] ^= 1 << rng.randrange(8)
        try:
            message = wire.read(io.BytesIO(bytes(frame)))
        except EngineError:
            continue
        assert isinstance(message, wire.Message)
        wire.encode(message)


def header(message: str, payload: object, **fields: object) -> bytes:
    return json.dumps({"type": message, "fields": fields, "payload": payload}).encode()


@pytest.mark.parametrize(
    ("head", "payload"),
    [
        (b"", b""),
        (b"null", b""),
        (b"{}", b""),
        (b'{"type": [], "fields": {}, "payload": {}}', b""),
        (b'{"type": "Cancel", "fields": [], "payload": {}}', b""),
        (b"[" * 100_000, b""),
        (b"\xff\xfe", b""),
        (header(message="Sampling", payload={}), b""),
        (header(message="os", payload={}), b""),
        (header(message="Cancel", payload={}), b""),
        (header(message="Cancel", payload={}, request_id=7), b""),
        (header(message="Cancel", payload={}, request_id="1", more=1), b""),
        (header(message="Cancel", payload={}, request_id="1"), b"x"),
        (header(message="Release", payload={"handle": 1}), b"x"),
        (header(message="Load", payload={"data": 9}, request_id="1", handle="h"), b"x"),
        (header(message="Load", payload={"data": -1}, request_id="1", handle="h"), b""),
        (header(message="Load", payload={"data": 1e400}, request_id="1", handle="h"), b""),
        (header(message="Load", payload={"data": 1, "nothing": 0}, request_id="1", handle="h"), b"x"),
        (header(message="Load", payload=[], request_id="1", handle="h"), b""),
        (header(message="Loaded", payload={}, request_id="1", position=True, tokens_seen=0), b""),
        (
            header(message="Finished", payload={"tokens": 3}, request_id="1", reason="stop", tokens_seen=0),
            b"xyz",
        ),
        (header(message="Finished", payload={"tokens": 0}, request_id="1", reason="why", tokens_seen=0), b""),
        (header(message="Progress", payload={}, request_id="1", tokens_done=0, trace=[{"position": 1}]), b""),
        (header(message="Progress", payload={"trace": 8}, request_id="1", tokens_done=0), bytes(8)),
        (
            header(message="Progress", payload={"trace": 48}, request_id="1", tokens_done=0),
            struct.pack("<6d", math.nan, 0, 0, 0, 0, 0),
        ),
    ],
)
def test_malformed_messages(head: bytes, payload: bytes) -> None:
    with pytest.raises(EngineError, match="malformed"):
        wire.decode(head, payload)


def test_sizes_are_bounded_before_anything_is_read() -> None:
    with pytest.raises(EngineError, match="at most"):
        wire.read(io.BytesIO(b"\xff\xff\xff\xff" + bytes(100)))
    head = header(message="Cancel", payload={}, request_id="1")
    frame = len(head).to_bytes(4, "little") + head + b"\xff" * 8
    with pytest.raises(EngineError, match="at most"):
        wire.read(io.BytesIO(frame))
    with pytest.raises(EngineError, match="larger"):
        wire.encode(Cancel(request_id="x" * (wire.MAX_HEADER + 1)))


@pytest.mark.parametrize("token", [2**31, -(2**31) - 1, 2**63, 10**30])
def test_a_token_id_beyond_32_bits_is_the_requests_fault(token: int) -> None:
    with pytest.raises(RequestError) as refused:
        wire.encode(Advance(request_id="1", tenant="", base="a", result="b", tokens=(token,)))
    assert refused.value.param == "tokens"
