"""What a training step's kernels take and give, by name, beside the reference with autograd in float64."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from mnemosyne.kernels import chunk, gates
from mnemosyne.kernels.chunk import Scan
from mnemosyne.kernels.gates import Decays, Gates, Past
from mnemosyne.kernels.rules.rule import MemoryRule
from tests.kernels.triton.cases import Case

Tensors = dict[str, Tensor]
Run = Callable[[Tensors], Tensors]


def taken(part: str, case: Case) -> Tensors:
    """The leaves of ``decays``, ``scan`` or ``read`` of a case, in float64."""
    case = case.map(lambda x: x.double())
    if part == "decays":
        return {name: x for name, x in case.gates._asdict().items() if x is not None}
    with torch.no_grad():
        decay = gates.decays(case.gates)
        scanned = chunk.scan(case.k, case.v, None, decay, case.memory, case.momentum, case.rule)
    scalars = named(decay)
    if part == "scan":
        states = {"memory": case.memory, "momentum": case.momentum}
        return {"k": case.k, "v": case.v, **scalars, **{n: x[0] for n, x in states.items() if x}}
    left = {name: getattr(scanned, name)[0] for name in ("starts", "inputs", "deltas")}
    return {"q": case.q, **left, **{name: x for name, x in scalars.items() if name in "AFG"}}


def named(decay: Decays, end: bool = False) -> Tensors:
    past = {} if decay.past is None else decay.past._asdict()
    return {"A": decay.A, "G": decay.G, **past, **(decay.end._asdict() if end else {})}


def decay_of(leaves: Tensors) -> Decays:
    if "F" not in leaves:
        return Decays(leaves["A"], leaves["G"], None)
    past = Past(leaves["F"], leaves.get("E", leaves["F"]), leaves.get("P", leaves["G"]))
    return Decays(leaves["A"], leaves["G"], past)


def run_of(part: str, rule: MemoryRule, fused: bool) -> Run:
    """``fused``: by the kernels, whatever the device; else by the reference, on a CPU: on a GPU it would
    choose the kernels."""
    if fused:
        from mnemosyne.kernels.triton import train_decay, train_read, train_scan

    def decays(leaves: Tensors) -> Tensors:
        given = Gates(**leaves)
        return named(train_decay.decays(given) if fused else gates.decays(given), end=True)

    def scan(leaves: Tensors) -> Tensors:
        k, v, decay = leaves["k"], leaves["v"], decay_of(leaves)
        state = [leaves["memory"]], [leaves[name] for name in ("momentum",) if name in leaves]
        scanned = (
            train_scan.scan(k, v, decay, *state, rule)
            if fused
            else chunk.scan(k, v, None, decay, *state, rule)
        )
        made = {} if scanned.rstd is None else {"rstd": scanned.rstd}
        for part in ("memory", "momentum", "starts", "inputs", "deltas"):
            if tensors := getattr(scanned, part):
                (made[part],) = tensors
        return {"norms": scanned.norms, **made}

    def read(leaves: Tensors) -> Tensors:
        left = [[leaves[name]] for name in ("starts", "inputs", "deltas")]
        scanned = Scan([leaves["starts"][:, :, 0, 0]], [], *left, norms=leaves["A"], rstd=None)
        return {"y": (train_read.read if fused else chunk.read)(leaves["q"], decay_of(leaves), scanned, rule)}

    return {"decays": decays, "scan": scan, "read": read}[part]


def differentiated(run: Run, leaves: Tensors, only: Sequence[str] = ()) -> tuple[Tensors, Tensors]:
    """The outputs, and the gradients of the leaves of a sum over all outputs, or over ``only`` some."""
    leaves = {name: x.detach().requires_grad_(True) for name, x in leaves.items()}
    found = run(leaves)
    g = torch.Generator().manual_seed(5)
    parts = []
    for name, x in found.items():
        factor = torch.randn(x.shape, generator=g, dtype=torch.float64).to(x)
        if not only or name in only:
            parts.append((x * factor).sum())
    slopes = torch.autograd.grad(
        torch.stack(parts).sum(), list(leaves.values()), allow_unused=True, materialize_grads=True
    )
    return {name: x.detach() for name, x in found.items()}, dict(zip(leaves, slopes, strict=True))


def differences(got: Tensors, want: Tensors) -> dict[str, float]:
    """Relative, in the Frobenius norm; of what should be 0 the norm itself."""
    assert got.keys() == want.keys()
    found = {}
    for name, x in got.items():
        size = float(want[name].norm())
        found[name] = float((x.to(want[name]) - want[name]).norm()) / (size or 1.0)
    return found


def largest(made: Sequence[dict[str, Tensor]], right: Sequence[dict[str, Tensor]]) -> tuple[float, str]:
    """The largest difference of results and of their gradients, and where; infinite where a number isn't
    finite."""
    found: dict[str, float] = {}
    for kind, got, want in zip(("", "gradient of "), made, right, strict=True):
        got = {name: x.cpu() for name, x in got.items()}
        for name, error in differences(got, want).items():
            found[kind + name] = error if bool(torch.isfinite(got[name]).all()) else float("inf")
    where = max(found, key=lambda name: found[name])
    return found[where], where


def worst(
    part: str, case: Case, change: Callable[[Tensor], Tensor], only: Sequence[str] = ()
) -> tuple[float, str]:
    """The largest difference of the kernels, on leaves changed by ``change``, from the reference, and where;
    infinite where a number isn't finite."""
    leaves = taken(part, case)
    right = differentiated(run_of(part, case.rule, fused=False), leaves, only)
    made = differentiated(
        run_of(part, case.rule, fused=True), {name: change(x.float()) for name, x in leaves.items()}, only
    )
    return largest(made, right)
