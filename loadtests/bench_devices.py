"""What several devices give beside one: ingest and decode of many sessions, and sessions that move.

Drives ``engine.fleet`` over real engine processes, without a server, on a checkpoint with random weights.
The sessions' states and answers must be the same on one device and on all, bit for bit, or there is no
number. The last line of the output is JSON. loadtests/README.md has the parts.

Exit status: 0, whatever the speeds; 1 where a result was wrong.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from bench_devices_sessions import Plan, Session, decode, ingest, read
from bench_gpu_card import commit_of, version
from bench_presets import TRIAL, config_of
from tokenizers import Tokenizer
from tokenizers.models import WordLevel

from mnemosyne.checkpoints.weights import save_checkpoint
from mnemosyne.engine.client import EngineClient
from mnemosyne.engine.config import PRESETS, ModelConfig
from mnemosyne.engine.errors import MnemosyneError
from mnemosyne.engine.fleet import Fleet
from mnemosyne.engine.messages import INITIAL
from mnemosyne.engine.model import Titans

PROMPT = {"system": "{content}", "user": "{content}", "assistant": "{content}", "end_of_turn": "", "stop": []}
Result = dict[str, Any]
MOVES = 5
SETTLED = 3.0
"""Seconds after which the load of what came before counts no more."""


class Wrong(Exception):
    """A result isn't what it must be, so no speed means anything."""


def make_checkpoint(folder: Path, config: ModelConfig) -> int:
    """A checkpoint's folder with random weights and a tokenizer of as many words; returns its parameters."""
    torch.manual_seed(0)
    model = Titans(config)
    words = Tokenizer(WordLevel({f"w{i}": i for i in range(config.vocab_size)}, unk_token="w0"))
    save_checkpoint(folder, config, model.state_dict(), words.to_str(), PROMPT)
    return model.parameter_count()


def fleet_over(devices: list[str], checkpoint: Path, plan: Plan, options: argparse.Namespace) -> Fleet:
    """An engine process for each device, all of them able to queue what the bench sends at once."""
    command = [sys.executable, "-m", "mnemosyne.server.engine_main", "--checkpoint", str(checkpoint)]
    command += ["--dtype", options.dtype, "--max-queued-tokens", str(plan.most_queued)]
    if options.threads is not None:
        command += ["--threads", str(options.threads)]
    return Fleet(
        {f"{device}#{i}": EngineClient([*command, "--device", device]) for i, device in enumerate(devices)}
    )


async def measure(devices: list[str], checkpoint: Path, plan: Plan, options: argparse.Namespace) -> Result:
    """What these devices do together. Raises Wrong."""
    fleet = fleet_over(devices, checkpoint, plan, options)
    began = time.perf_counter()

    def tell(what: str) -> None:
        print(f"    {what} after {time.perf_counter() - began:.1f} s", flush=True)

    await fleet.start()
    try:
        tell("ready")
        warm = [Session(f"warm {i}", plan, seed=10_000 + i) for i in range(plan.sessions)]
        await ingest(fleet, warm, plan, tokens=min(plan.tokens, 2 * plan.piece))
        await decode(fleet, warm, plan)
        for session in warm:
            fleet.release(session.handle)
        tell("warm")
        sessions = [Session(f"s{i}", plan, seed=i) for i in range(plan.sessions)]
        found: Result = {"ingest_tokens_per_second": await ingest(fleet, sessions, plan)}
        found["decode_tokens_per_second"] = await decode(fleet, sessions, plan)
        tell("all read and answered")
        found["answers"] = [list(session.answer) for session in sessions]
        found["digests"] = [await session.digest(fleet) for session in sessions[: plan.checked]]
        held = [fleet.device_of(session.handle) for session in sessions]
        found["sessions_by_device"] = {str(name): held.count(name) for name in dict.fromkeys(held)}
        found["state_bytes"], found["numerics"] = fleet.info.state_bytes, fleet.info.numerics
        for session in sessions[1:]:
            fleet.release(session.handle)
        if len(devices) > 1:
            tell("states known")
            found["move"] = await measure_move(fleet, sessions[0])
            tell("one moved")
            found["balance"] = await measure_balance(fleet, plan)
        tell("done")
        return found
    finally:
        await fleet.close()


async def measure_move(fleet: Fleet, session: Session) -> Result:
    """A state from the device it is on to another and back, nothing else running: Export there, Load here."""
    clients = fleet.engines
    here = str(fleet.device_of(session.handle))
    there = next(name for name in clients if name != here)
    loop, seconds, expected = asyncio.get_running_loop(), [], await session.digest(fleet)
    for i in range(MOVES):
        began = loop.time()
        data = await clients[here].export(session.handle)
        await clients[there].load(f"moved {i}", data)
        seconds.append(loop.time() - began)
        if await clients[there].export(f"moved {i}") != data:
            raise Wrong("a state that was moved isn't the same there")
        clients[there].release(f"moved {i}")
    if await session.digest(fleet) != expected:
        raise Wrong("a state changed where it stayed")
    best = min(seconds)
    return {"bytes": len(data), "seconds": best, "bytes_per_second": len(data) / best}


async def measure_balance(fleet: Fleet, plan: Plan) -> Result:
    """All sessions begin on one device and read on; the others are idle until the fleet moves some there."""
    crowd = [Session(f"c{i}", plan, seed=i) for i in range(plan.sessions * len(fleet.engines))]
    start = plan.tokens // 4
    for session in crowd:
        session.handle = await read(fleet, session, session.ids[:start], INITIAL, plan.piece)
    first = fleet.device_of(crowd[0].handle)
    stayed = [session for session in crowd if fleet.device_of(session.handle) == first]
    for session in crowd:
        if session not in stayed:
            fleet.release(session.handle)
    await asyncio.sleep(SETTLED)
    before = await fleet.device_stats()
    loop = asyncio.get_running_loop()
    began = loop.time()

    async def read_on(session: Session) -> None:
        session.handle = await read(fleet, session, session.ids[start:], session.handle, plan.piece)

    await asyncio.gather(*map(read_on, stayed))
    seconds, after = loop.time() - began, await fleet.device_stats()
    held = [fleet.device_of(session.handle) for session in stayed]
    checked = {session.seed: await session.digest(fleet) for session in stayed[: plan.checked]}
    return {
        "sessions": len(stayed),
        "tokens_per_second": len(stayed) * (plan.tokens - start) / seconds,
        "moves": sum(
            after[name]["device_moves_in_total"] - before[name]["device_moves_in_total"] for name in after
        ),
        "sessions_by_device": {name: held.count(name) for name in after},
        "digests": checked,
    }


def check(one: Result, several: Result) -> None:
    """Raises Wrong unless all devices together made the same of every session as one did."""
    if one["numerics"] != several["numerics"]:
        raise Wrong(f"the engines compute otherwise: {one['numerics']} and {several['numerics']}")
    for what in ("digests", "answers"):
        wrong = sum(a != b for a, b in zip(one[what], several[what], strict=True))
        if wrong:
            raise Wrong(
                f"{wrong} of {len(one[what])} sessions have other {what} on several devices than on one"
            )
    for seed, digest in several["balance"]["digests"].items():
        if seed < len(one["digests"]) and one["digests"][seed] != digest:
            raise Wrong(f"session {seed} has another state after it read beside others that moved")


def table_of(one: Result, several: Result, count: int) -> str:
    rows = [("", "1 device", f"{count} devices", "ratio")]
    for name, what in (
        ("ingest_tokens_per_second", "ingest, tokens/s of all sessions"),
        ("decode_tokens_per_second", "decode, tokens/s of all sessions"),
    ):
        rows.append((what, f"{one[name]:,.0f}", f"{several[name]:,.0f}", f"{several[name] / one[name]:.2f}"))
    move, balance = several["move"], several["balance"]
    rate, share = balance["tokens_per_second"], balance["tokens_per_second"] / one["ingest_tokens_per_second"]
    rows.append(("ingest, begun on one of them", "", f"{rate:,.0f}", f"{share:.2f}"))
    rows.append((f"    moves; then {balance['sessions_by_device']}", "", f"{balance['moves']:,.0f}", ""))
    rows.append((f"a move of {move['bytes']:,} bytes, ms", "", f"{1000 * move['seconds']:,.1f}", ""))
    widths = [max(len(row[i]) for row in rows) for i in range(4)]
    aligned = [(row[0].ljust(widths[0]), *(row[i].rjust(widths[i]) for i in (1, 2, 3))) for row in rows]
    return "\n".join("  ".join(row).rstrip() for row in aligned)


async def run(options: argparse.Namespace, result: Result) -> None:
    config = config_of(options.preset, options.variant)
    plan = Plan(
        config.vocab_size, options.sessions, options.tokens, options.piece, options.answer, options.checked
    )
    devices = options.devices.split(",")
    with tempfile.TemporaryDirectory(prefix="mnemosyne-bench-") as folder:
        result["parameters"] = make_checkpoint(Path(folder) / "random", config)
        found = []
        for part in (devices[:1], devices):
            print(f"{plan.sessions} sessions on {', '.join(part)} ...", flush=True)
            found.append(await measure(part, Path(folder) / "random", plan, options))
    one, several = found
    check(one, several)
    print(
        f"{options.preset} {options.variant.upper()}, {result['parameters']:,} parameters, {plan.sessions}"
        f" sessions of {plan.tokens:,} tokens, {plan.answer} tokens answered; {one['numerics']}; commit"
        f" {result['commit']}; {len(one['digests'])} states and all answers the same on one device and on"
        f" {len(devices)}\n"
    )
    print(table_of(one, several, len(devices)))
    for told in (one, several, several["balance"]):
        told.pop("digests")
        told.pop("answers", None)
    result |= {"correct": True, "one": one, "several": several}


def main(arguments: list[str] | None = None) -> int:
    options = _parse(arguments)
    torch.set_num_threads(options.threads or 1)
    result: Result = {
        "correct": False,
        "commit": options.commit or commit_of(Path(__file__).resolve().parent),
    }
    result |= {
        name: getattr(options, name) for name in ("devices", "preset", "variant", "sessions", "tokens")
    }
    result |= {"torch": torch.__version__, "triton": version("triton")}
    try:
        asyncio.run(run(options, result))
    except (Wrong, MnemosyneError) as error:
        print(f"the bench stopped: {error}")
        result["error"] = str(error)
    print(json.dumps(result), flush=True)
    return 0 if result["correct"] else 1


def _parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--devices", default="cuda:0,cuda:1", help="two or more; cpu,cpu to try the bench")
    parser.add_argument("--preset", choices=(*PRESETS, TRIAL), default="170M")
    parser.add_argument("--variant", choices=("mac", "mag", "mal", "lmm"), default="mac")
    parser.add_argument("--sessions", type=int, default=64)
    parser.add_argument("--tokens", type=int, default=65_536, help="that each session reads")
    parser.add_argument("--piece", type=int, default=16_384, help="of these, in one request")
    parser.add_argument("--answer", type=int, default=128, help="tokens that each session emits")
    parser.add_argument("--checked", type=int, default=16, help="sessions whose states are compared")
    parser.add_argument("--dtype", choices=("auto", "float32", "bfloat16"), default="auto")
    parser.add_argument("--threads", type=int, help="of each engine")
    parser.add_argument("--commit", help="what this is a copy of, where that can't be asked of git")
    options = parser.parse_args(arguments)
    if options.devices.count(",") < 1:
        parser.error("--devices: two at least")
    return options


if __name__ == "__main__":
    sys.exit(main())
