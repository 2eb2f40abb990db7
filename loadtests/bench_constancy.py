"""Whether speed, memory and state stay what they were while a session reads a million tokens.

Two sessions of one server: one that has read few tokens and one that has read many. Each window is a small
document read by a fork of the one and a fork of the other, in turns; the ratio is of the median speeds.
"""

from __future__ import annotations

import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import psutil
from bench_ingest import server_for
from bench_reading import Reading, long_text, read, windows
from bench_report import CheckFailed, Row, row
from demo_server import ServerProcess

from mnemosyne.checkpoints.weights import Checkpoint
from mnemosyne.server.cli.client import Client
from mnemosyne.server.sessions.tokens import TextTokenizer

FEW, WINDOW_TOKENS, WARM = 10_000, 4_000, 50_000
LEAST_RATIO, MOST_BYTES = 0.95, 32 * 2**20


def measure_constancy(checkpoint: Checkpoint, many: int, count: int) -> tuple[dict[str, Any], list[Row]]:
    """``count`` windows after ``FEW`` and after ``many`` tokens. Raises CheckFailed."""
    tokenizer = TextTokenizer.from_file(checkpoint.tokenizer_path)
    texts = windows(tokenizer, count, WINDOW_TOKENS)
    with tempfile.TemporaryDirectory(prefix="mnemosyne-bench-") as folder:
        server = server_for(checkpoint, folder)
        try:
            server.start()
            with Client(server.url) as client:
                return _measure(client, server, tokenizer, many, texts)
        finally:
            server.kill()


def _measure(
    client: Client, server: ServerProcess, tokenizer: TextTokenizer, many: int, texts: list[str]
) -> tuple[dict[str, Any], list[Row]]:
    # What is made at first use, and the size of pieces, which follows the speed, settle before memory is
    # looked at.
    warm = str(client.create_session()["id"])
    read(client, warm, long_text(tokenizer, WARM))
    client.delete_session(warm, erase=True)
    sessions, resident, stored = [], [], []
    for tokens in (FEW, many):
        session_id = str(client.create_session()["id"])
        read(client, session_id, long_text(tokenizer, tokens))
        sessions.append(client.session(session_id))
        resident.append(_resident(server))
        stored.append(_stored(server.data_dir))
    states = [int(session["state_bytes"]) for session in sessions]
    if states[0] != states[1]:
        raise CheckFailed(f"constancy: the states have {states[0]} and {states[1]} bytes")
    speeds: list[list[float]] = [[], []]
    for i, text in enumerate(texts):
        order = (0, 1) if i % 2 == 0 else (1, 0)
        taken = {which: _window(client, str(sessions[which]["id"]), text) for which in order}
        for which in order:
            speeds[which].append(taken[which].tokens_per_second)
        if taken[0].tokens != taken[1].tokens:
            raise CheckFailed("constancy: the same text was read as different numbers of tokens")
    first, last = map(statistics.median, speeds)
    grown = resident[1] - resident[0]
    seen = [int(session["tokens_seen"]) for session in sessions]
    result = {
        "tokens": seen,
        "windows": len(texts),
        "tokens_per_second": [round(first, 1), round(last, 1)],
        "ratio": round(last / first, 4),
        "resident_bytes": resident,
        "resident_bytes_grown": grown,
        "stored_bytes": stored,
        "state_bytes": states[0],
    }
    rows = [
        row(f"tokens/s at token {seen[0]:,}, median of {len(texts)} windows", first, "{:,.0f}"),
        row(f"tokens/s at token {seen[1]:,}", last, "{:,.0f}"),
        row("ratio of the speeds", last / first, "{:.3f}", LEAST_RATIO),
        row("resident memory at the first point, MB", resident[0] / 2**20, "{:,.1f}"),
        row("    grown at the second, MB", grown / 2**20, "{:,.1f}", MOST_BYTES / 2**20, at_most=True),
        Row("bytes on disk at both", " and ".join(f"{each:,}" for each in stored)),
        Row("bytes of a state, equal at both", f"{states[0]:,}"),
    ]
    return result, rows


def _window(client: Client, session_id: str, text: str) -> Reading:
    """A fork of the session reads the text and is erased, so the session stays where it is."""
    fork_id = str(client.call("POST", f"/v1/sessions/{session_id}/fork", json={}).json()["id"])
    reading = read(client, fork_id, text)
    seen = int(client.session(fork_id)["tokens_seen"])
    if seen != int(client.session(session_id)["tokens_seen"]) + reading.tokens:
        raise CheckFailed(f"constancy: the fork has {seen} tokens after reading {reading.tokens}")
    client.delete_session(fork_id, erase=True)
    return reading


def _resident(server: ServerProcess) -> int:
    """Bytes of the server and every process that it started, the median of some looks once it is idle."""
    assert server.process is not None
    parent = psutil.Process(server.process.pid)
    time.sleep(1.0)
    looks = []
    for _ in range(5):
        looks.append(sum(p.memory_info().rss for p in [parent, *parent.children(recursive=True)]))
        time.sleep(0.2)
    return int(statistics.median(looks))


def _stored(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
