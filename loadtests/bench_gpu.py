"""``make bench-gpu``: how fast a CUDA device ingests, decodes and switches sessions, beside what it could do.

For every model: random weights, then the checks (against float32, and bit for bit alone, among others and in
pieces), then its numbers. A wrong result has no number. Rates of the device are measured in the same run; a
limit is what was counted over them. The last line of the output is JSON. loadtests/README.md has the parts.

Exit status: 0, whatever the speeds; 1 where a result was wrong or a part failed.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import roofline
import torch
from bench_gpu_card import Card, commit_of, version
from bench_gpu_decode import measure_decode
from bench_gpu_ingest import measure_long, measure_many, measure_single
from bench_gpu_model import Subject, make
from bench_gpu_peers import NAMES, Ours, measure_ours, measure_peer, remaining
from bench_gpu_plan import FULL, QUICK, SECONDS, TOY, Plan
from bench_gpu_report import Line, failed, left_out, table_of
from bench_gpu_switch import measure_switch
from bench_presets import TRIAL
from rich.console import Console
from roofline import Rates

from mnemosyne.engine.config import PRESETS, Variant

Measure = Callable[[Subject, Rates, Plan, float], list[Line]]
PARTS: dict[str, Measure] = {
    "ingest": measure_single,
    "aggregate": measure_many,
    "decode": measure_decode,
    "switch": measure_switch,
    "long": measure_long,
}
NAMED = (*PARTS, "peers")
VARIANTS: tuple[Variant, ...] = ("mac", "mag")
FOR_BOTH = ("ingest", "aggregate")
"""Parts that MAG goes through too."""

console = Console(soft_wrap=True, width=200)


class Bench:
    def __init__(self, card: Card, plan: Plan, only: list[str], presets: list[str], until: float) -> None:
        self._card, self._plan, self._only, self._presets, self._until = card, plan, only, presets, until
        self.lines: list[Line] = []
        self.facts: dict[str, Any] = {"models": {}, "peers": {}}
        self._rates = card.rates()
        self._ours: list[Ours] = []

    def run(self) -> None:
        self.facts |= self._card.facts(self._rates)
        for name in self._presets:
            for variant in VARIANTS:
                self._model(name, variant)
        if "peers" in self._only:
            for ours in self._ours:
                for peer in NAMES:
                    self._try(f"{peer} beside {ours.name}", partial(self._peer, peer, ours))

    def _parts(self, name: str, variant: Variant) -> list[str]:
        """Which of the parts this model goes through."""
        wanted = [part for part in PARTS if part in self._only]
        if variant != "mac":
            wanted = [part for part in wanted if part in FOR_BOTH]
        kept = {"long": self._presets[0], "aggregate": self._presets[-1]}
        return [part for part in wanted if kept.get(part, name) == name]

    def _model(self, name: str, variant: Variant) -> None:
        parts = self._parts(name, variant)
        peers = "peers" in self._only and variant == "mac"
        what = f"{name} {variant.upper()}"
        if not parts and not peers:
            return
        made: list[Subject] = []
        began = time.perf_counter()
        self._try(f"{what}: making it, and its checks", lambda: made.append(make(name, variant, self._card)))
        if not made:
            return
        subject = made.pop()
        self._tell(subject, time.perf_counter() - began)
        for part in parts:
            self._try(f"{what}: {part}", partial(self._part, subject, part))
        if peers:
            self._try(f"{what}: what peers are compared with", partial(self._own, subject))

    def _part(self, subject: Subject, part: str) -> None:
        until = min(self._until, time.perf_counter() + SECONDS[part])
        self._add(PARTS[part](subject, self._rates, self._plan, until))

    def _own(self, subject: Subject) -> None:
        self._ours.append(measure_ours(subject, self._plan))

    def _peer(self, peer: str, ours: Ours) -> None:
        seconds = remaining(self._until, SECONDS["peers"])
        found, lines = measure_peer(peer, ours, self._plan, self._card.device.type, seconds)
        self.facts["peers"][f"{peer} beside {ours.name}"] = found
        self._add(lines)

    def _try(self, what: str, run: Callable[[], object]) -> None:
        """Begin it while there is time; where it fails, say so and go on."""
        if time.perf_counter() > self._until:
            self._add([left_out(what, "the time was up")])
            return
        console.print(f"{what} ...", highlight=False)
        try:
            self._card.clean()
            run()
        except Exception as error:
            self._add([failed(what, error)])

    def _tell(self, subject: Subject, seconds: float) -> None:
        self.facts["models"][subject.name] = {
            "parameters": subject.parameters,
            "state_bytes": subject.state_bytes,
            "served_by": subject.path,
            "from_float32": subject.distances,
        }
        far = ", ".join(f"{what} {value:.2g}" for what, value in subject.distances.items())
        console.print(
            f"    {subject.parameters:,} parameters, {subject.state_bytes:,} bytes a session, served by"
            f" {subject.path}; right in {seconds:.0f} s; from float32: {far}",
            highlight=False,
        )
        shared, of_each = roofline.decode_bytes(subject.config, subject.operand)
        for name, unit, parts in (
            ("an ingested token", "MFLOP", roofline.ingest_operations(subject.config)),
            ("a decoded token", "MFLOP", roofline.decode_operations(subject.config)),
            ("a decoding step", "MB", shared),
            ("and of each session in it", "MB", of_each),
        ):
            terms = "; ".join(f"{part.name} {part.formula}: {part.value / 1e6:,.1f}" for part in parts)
            total = sum(part.value for part in parts) / 1e6
            console.print(f"    {name}, {unit}: {total:,.1f} = {terms}", highlight=False, markup=False)

    def _add(self, lines: list[Line]) -> None:
        """Aims are of the GPU: a trial has none."""
        if self._card.trial:
            lines = [line.without_aims() for line in lines]
        self.lines += lines
        for line in lines:
            told = line.why if line.value is None else line.form.format(line.value)
            console.print(f"    {line.what}: {told}", highlight=False, markup=False)


def title_of(facts: dict[str, Any], trial: bool, quick: bool) -> str:
    label = "TRIAL on a CPU at toy size: these numbers say nothing of a GPU" if trial else "The GPU bench"
    versions = ", ".join(f"{name} {facts[name]}" for name in ("torch", "cuda", "triton") if facts.get(name))
    models = "; ".join(f"{name} {told['parameters']:,} parameters" for name, told in facts["models"].items())
    rates = (
        f"measured: {facts['gemm_flops'] / 1e12:.4g} TFLOP/s in {facts['compute']},"
        f" {facts['copy_bytes_per_second'] / 1e12:.3g} TB/s within the device,"
        f" {facts['host_bytes_per_second'] / 1e9:.3g} GB/s from pinned memory"
    )
    first = f"{label}{', quick' if quick else ''}; commit {facts['commit']}; {facts['card']}; {versions}"
    return "\n".join(part for part in (first, rates, models) if part)


def formulas() -> str:
    return (roofline.__doc__ or "").partition("\n\n")[2]


def main(arguments: list[str] | None = None) -> int:
    options = _parse(arguments)
    card = Card(options.device)
    if card.trial:
        torch.set_num_threads(1)
    presets = options.presets or ([TRIAL] if card.trial else ["760M", "170M"])
    plan = TOY if card.trial else QUICK if options.quick else FULL
    if options.wheels:
        # After the machine's own, and for the peers' processes too.
        wheels = str(options.wheels.resolve())
        sys.path.append(wheels)
        os.environ["PYTHONPATH"] = os.pathsep.join([*filter(None, [os.environ.get("PYTHONPATH")]), wheels])
    if card.trial:
        console.print("Not on a CUDA device: a trial at toy size, whose numbers say nothing of a GPU\n")
    console.print(formulas(), highlight=False, markup=False)
    bench = Bench(card, plan, options.only or list(NAMED), presets, time.perf_counter() + options.seconds)
    bench.facts["commit"] = options.commit or commit_of(Path(__file__).resolve().parent)
    bench.facts["transformers"] = version("transformers")
    bench.run()
    console.print(table_of(title_of(bench.facts, card.trial, options.quick), bench.lines))
    correct = not any(line.failed for line in bench.lines)
    result = {"correct": correct, "trial": card.trial, "quick": options.quick} | bench.facts
    print(json.dumps(result | {"lines": [line.facts() for line in bench.lines]}), flush=True)
    return 0 if correct else 1


def _parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    default = "cuda" if torch.cuda.is_available() else "cpu"
    parser.add_argument("--device", default=default, help="cuda, or cpu for a trial at toy size")
    parser.add_argument("--only", type=_names(NAMED), help=f"some of {','.join(NAMED)}")
    parser.add_argument("--presets", type=_names((*PRESETS, TRIAL)), help="760M,170M if not given")
    parser.add_argument("--seconds", type=float, default=3600.0, help="begin no part after so many")
    parser.add_argument("--quick", action="store_true", help="less of everything; its numbers scatter")
    parser.add_argument("--wheels", type=Path, help="folder of unpacked packages, for the peers")
    parser.add_argument("--commit", help="what to call the code where git can't tell")
    return parser.parse_args(arguments)


def _names(known: tuple[str, ...]) -> Callable[[str], list[str]]:
    def parse(text: str) -> list[str]:
        names = [name.strip() for name in text.split(",")]
        for name in names:
            if name not in known:
                raise argparse.ArgumentTypeError(f"{name!r} isn't one of {', '.join(known)}")
        return names

    return parse


if __name__ == "__main__":
    sys.exit(main())
