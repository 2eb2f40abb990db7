"""What the server adds to the engine: time to first token and inter-token latency of 1, 64 and 256 streams,
without and with a session that reads beside them, and ten million tokens of one session.

A checkpoint with random weights is made, and the same requests go to the engine's process and through HTTP
to ``mnemosyne serve``, one after the other. First a text that was read both ways must have become the same
state, bit for bit. The last line of the output is JSON. loadtests/README.md has the details.

Exit status: 0, whatever the times; 1 where a result was wrong or a part failed.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import sys
import tempfile
import time
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from bench_gpu_card import Card, commit_of, version
from bench_gpu_checkpoint import random_checkpoint
from bench_gpu_engine import Reader, measure_engine
from bench_gpu_plan import MANY
from bench_gpu_report import Line, failed, table_of
from bench_gpu_server import measure_server
from bench_gpu_streams import TOY, Asked, Measured
from bench_presets import TRIAL
from bench_reading import long_text, read
from bench_report import CheckFailed
from rich.console import Console
from rich.table import Table

from mnemosyne.checkpoints.snapshot import load_state
from mnemosyne.checkpoints.weights import Checkpoint
from mnemosyne.engine.config import PRESETS
from mnemosyne.engine.interface import EngineLike
from mnemosyne.engine.messages import INITIAL
from mnemosyne.server.cli.client import Client
from mnemosyne.server.cli.own_server import own_server
from mnemosyne.server.parts import make_engine
from mnemosyne.server.sessions.tokens import TextTokenizer
from mnemosyne.server.settings import Settings

PARTS = ("streams", "long")
DEFAULTS = {"streams": "170M", "long": "760M"}
WORD = " the"
"""What every answer consists of: one token, and text of its own in every piece."""
CHECKED, BESIDE = 40_000, 4_000_000
"""Tokens of the text that is read both ways, and of the one that is read again and again."""
ALONE = 2_000_000
"""Of the long session's tokens, those that the engine reads by itself: its speed doesn't change (`long` of
``make bench-gpu``)."""
LEAST_SECONDS, AIM_SECONDS = 120.0, 60.0

console = Console(soft_wrap=True, width=160)


@dataclass
class Result:
    lines: list[Line] = field(default_factory=list)
    streams: list[tuple[Measured, Measured]] = field(default_factory=list)
    """At the engine, and through HTTP."""
    facts: dict[str, Any] = field(default_factory=dict)


class Bench:
    """One checkpoint, engine and server after one another."""

    def __init__(self, checkpoint: Checkpoint, card: Card, many: int, folder: Path) -> None:
        self._checkpoint, self._card, self._folder = checkpoint, card, folder
        self._tokenizer = TextTokenizer.from_file(checkpoint.tokenizer_path)
        self._vocab = checkpoint.config.vocab_size
        (self._word,) = self._tokenizer.encode(WORD)
        self._asked = TOY if card.trial else Asked()
        self._many = many
        self._checked = long_text(self._tokenizer, 500 if card.trial else CHECKED)

    async def of_engine(self, parts: list[str]) -> tuple[bytes, list[Measured], float]:
        """The checked text's state; the streams; tokens a second of the long session."""
        engine = make_engine(Settings.load(checkpoint=self._checkpoint.path, device=self._card.device.type))
        await engine.start()
        try:
            ids = self._tokenizer.encode_document(self._checked)
            await engine.advance(INITIAL, "checked", ids)
            state = await engine.export("checked")
            engine.release("checked")
            found, speed = [], 0.0
            if "streams" in parts:
                for streams in self._asked.counts:
                    for beside in (False, True):
                        console.print(f"the engine, {streams} streams{' beside reading' * beside} ...")
                        found.append(await self._streams(engine, streams, beside))
            if "long" in parts:
                console.print(f"the engine, {self._many:,} tokens ...")
                speed = await self._long(engine)
            return state, found, speed
        finally:
            await engine.close()

    async def _streams(self, engine: EngineLike, streams: int, beside: bool) -> Measured:
        return await measure_engine(engine, self._asked, self._vocab, self._word, streams, beside)

    async def _long(self, engine: EngineLike) -> float:
        await Reader(engine, self._vocab, self._asked.piece).read(2 * self._asked.piece)
        count = min(self._many, ALONE)
        began = time.perf_counter()
        await Reader(engine, self._vocab, self._asked.piece).read(count)
        return count / (time.perf_counter() - began)

    def of_server(self, parts: list[str], state: bytes, at_engine: list[Measured], speed: float) -> Result:
        """Raises CheckFailed before anything is timed."""
        result = Result()
        log = self._folder / "server.log"
        with own_server(self._checkpoint.path, log, self._card.device.type) as url:
            self._check(url, state)
            if "streams" in parts:
                text = long_text(self._tokenizer, 2000 if self._card.trial else BESIDE)
                for expected in at_engine:
                    console.print(
                        f"HTTP, {expected.streams} streams{' beside reading' * expected.beside} ..."
                    )
                    beside = text if expected.beside else None
                    args = (url, self._asked, self._vocab, self._word, expected.streams, beside)
                    result.streams.append((expected, measure_server(*args)))
                    console.print(told(*result.streams[-1]), highlight=False)
            if "long" in parts:
                console.print(
                    f"HTTP, {self._many:,} tokens; the engine alone: {speed:,.0f} tokens/s ...",
                    highlight=False,
                )
                result.lines += self._read_long(url, speed)
        return result

    def _check(self, url: str, state: bytes) -> None:
        """The checked text through HTTP ends in the state that the engine made of it."""
        with Client(url) as client:
            session = str(client.create_session()["id"])
            read(client, session, self._checked)
            file = self._folder / "state"
            client.export_state(session, file)
            client.delete_session(session, erase=True)
        load = partial(
            load_state, config=self._checkpoint.config, model_fingerprint=self._checkpoint.fingerprint
        )
        engine, served = (load(data, dtype=self._card.compute)[0] for data in (state, file.read_bytes()))
        if engine.digest() != served.digest():
            raise CheckFailed("the state of a text that was read through HTTP isn't the engine's own")

    def _read_long(self, url: str, speed: float) -> list[Line]:
        text = long_text(self._tokenizer, self._many)
        with Client(url) as client:
            session = str(client.create_session()["id"])
            reading = read(client, session, text)
            told = client.session(session)
            client.delete_session(session, erase=True)
        if int(told["tokens_seen"]) != reading.tokens:
            raise CheckFailed(f"{told['tokens_seen']} tokens were seen of {reading.tokens}")
        # The text has about as many tokens as it should; the time is of exactly as many.
        seconds = self._many / reading.tokens_per_second
        told_bytes = f"{len(text.encode()) / 1e6:,.1f} MB of text"
        full = self._many == MANY
        return [
            Line(
                f"{self._many:,} tokens of one session through HTTP, seconds",
                seconds,
                "{:,.1f}",
                least=LEAST_SECONDS if full else None,
                aim=AIM_SECONDS if full else None,
                at_most=True,
                why=told_bytes,
            ),
            Line("    tokens/s", reading.tokens_per_second, limit=speed, limit_is="the engine alone"),
        ]


def told(engine: Measured, http: Measured) -> str:
    """What came of it, at once: a bench that is ended early has shown what it had."""
    pairs = (
        ("TTFT, ms", 1e3 * engine.first, 1e3 * http.first),
        ("ITL, ms", 1e3 * engine.between, 1e3 * http.between),
        ("read beside, tokens/s", engine.read, http.read),
    )
    shown = pairs if engine.beside else pairs[:2]
    return f"    engine / HTTP: {'; '.join(f'{name} {a:,.2f} / {b:,.2f}' for name, a, b in shown)}"


def streams_table(pairs: list[tuple[Measured, Measured]]) -> Table:
    table = Table(title="Streams: medians in ms, at the engine and through HTTP", title_justify="left")
    for name in ("streams", "beside", *("TTFT engine", "HTTP", "added"), *("ITL engine", "HTTP", "added")):
        table.add_column(name, justify="right")
    for engine, http in pairs:
        beside = f"{engine.read:,.0f} / {http.read:,.0f} tokens/s" if engine.beside else "nothing"
        numbers = [
            f"{value * 1e3:,.2f}"
            for before, after in ((engine.first, http.first), (engine.between, http.between))
            for value in (before, after, after - before)
        ]
        table.add_row(str(engine.streams), beside, *numbers)
    return table


def measure(name: str, parts: list[str], card: Card, many: int) -> Result:
    """Raises CheckFailed and whatever keeps an engine or a server from working."""
    with tempfile.TemporaryDirectory(prefix="mnemosyne-bench-gpu-") as folder:
        console.print(f"{name}: making a checkpoint ...")
        checkpoint = random_checkpoint(Path(folder) / f"random-{name}", name, "mac", card.device)
        card.clean()
        bench = Bench(checkpoint, card, many, Path(folder))
        state, streams, speed = asyncio.run(bench.of_engine(parts))
        result = bench.of_server(parts, state, streams, speed)
    result.facts = {
        "streams": [
            {"streams": e.streams, "beside": e.beside, "engine": e.facts(), "http": h.facts()}
            for e, h in result.streams
        ],
    }
    return result


def main(arguments: list[str] | None = None) -> int:
    options = _parse(arguments)
    card = Card(options.device)
    if card.trial:
        torch.set_num_threads(1)
    many = options.tokens or (2048 if card.trial else MANY)
    title = "TRIAL on a CPU at toy size: these times say nothing of a GPU" if card.trial else "Through HTTP"
    facts = {"card": card.name, "torch": torch.__version__, "triton": version("triton")}
    facts["commit"] = options.commit or commit_of(Path(__file__).resolve().parent)
    console.print(
        f"{title}; {', '.join(f'{name} {value}' for name, value in facts.items())}", highlight=False
    )
    wanted: dict[str, list[str]] = {}
    for part in options.only or PARTS:
        name = options.preset or (TRIAL if card.trial else DEFAULTS[part])
        wanted.setdefault(name, []).append(part)
    result: dict[str, Any] = {"correct": True, "trial": card.trial} | facts
    for name, parts in wanted.items():
        try:
            found = measure(name, parts, card, many)
        except Exception as error:
            found = Result([failed(f"{name} MAC: {', '.join(parts)}", error)])
            result["correct"] = False
        if found.streams:
            console.print(streams_table(found.streams))
        if found.lines:
            lines = [line.without_aims() for line in found.lines] if card.trial else found.lines
            console.print(table_of(f"{name} MAC", lines))
        result[name] = found.facts | {"lines": [line.facts() for line in found.lines]}
    print(json.dumps(result), flush=True)
    return 0 if result["correct"] else 1


def _parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    default = "cuda" if torch.cuda.is_available() else "cpu"
    parser.add_argument("--device", default=default, help="cuda, or cpu for a trial at toy size")
    parser.add_argument("--only", choices=PARTS, nargs="+", help="both if not given")
    parser.add_argument(
        "--preset", choices=(*PRESETS, TRIAL), help="170M for streams, 760M for long if not given"
    )
    parser.add_argument("--tokens", type=int, help=f"what the long session reads ({MANY:,})")
    parser.add_argument("--commit", help="what to call the code where git can't tell")
    return parser.parse_args(arguments)


if __name__ == "__main__":
    sys.exit(main())
