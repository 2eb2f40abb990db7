"""A training step's kernels beside autograd through the reference."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from mnemosyne.kernels import chunk
from mnemosyne.kernels.chunk import Scan
from mnemosyne.kernels.gates import Decays, Past, decays
from tests.kernels.triton.cases import Case

Run = Callable[[Case, Decays], Scan]


def fused(case: Case, decay: Decays) -> Scan:
    from mnemosyne.kernels.triton.train_scan import scan

    return scan(case.k, case.v, decay, case.memory, case.momentum, case.rule)


def looped(case: Case, decay: Decays) -> Scan:
    """On a CPU; a GPU would take the kernels."""
    return chunk.scan(case.k, case.v, None, decay, case.memory, case.momentum, case.rule)


def named(decay: Decays) -> dict[str, Tensor]:
    past = {} if decay.past is None else decay.past._asdict()
    return {"A": decay.A, "G": decay.G, **past}


def outputs(scanned: Scan) -> dict[str, Tensor]:
    made: dict[str, Tensor] = {"norms": scanned.norms}
    for part in ("memory", "momentum", "starts", "inputs", "deltas"):
        if tensors := getattr(scanned, part):
            (made[part],) = tensors
    return made if scanned.rstd is None else made | {"rstd": scanned.rstd}


def differentiated(
    run: Run, case: Case, only: tuple[str, ...] = ()
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """The outputs of a scan, and the gradients of a sum over all of them, or over ``only`` some, in what it
    takes."""
    case = case.map(lambda x: x.detach().clone().requires_grad_(True))
    with torch.no_grad():
        made = named(decays(case.gates.map(lambda x: x.double())))
    scalars = {name: x.to(case.k.dtype).requires_grad_(True) for name, x in made.items()}
    past = Past(*(scalars[name] for name in Past._fields)) if "F" in scalars else None
    found = outputs(run(case, Decays(scalars["A"], scalars["G"], past)))
    g = torch.Generator().manual_seed(5)
    parts = []
    for name, x in found.items():
        factor = torch.randn(x.shape, generator=g, dtype=torch.float64).to(x)
        if not only or name in only:
            parts.append((x * factor).sum())
    leaves = {"k": case.k, "v": case.v, "memory": case.memory[0], **scalars}
    if case.momentum:
        leaves["momentum"] = case.momentum[0]
    slopes = torch.autograd.grad(
        torch.stack(parts).sum(), list(leaves.values()), allow_unused=True, materialize_grads=True
    )
    return {name: x.detach() for name, x in found.items()}, dict(zip(leaves, slopes, strict=True))


def differences(got: dict[str, Tensor], want: dict[str, Tensor]) -> dict[str, float]:
    """Relative, in the Frobenius norm; of what should be 0 the norm itself."""
    assert got.keys() == want.keys()
    found = {}
    for name, x in got.items():
        size = float(want[name].norm())
        found[name] = float((x.to(want[name]) - want[name]).norm()) / (size or 1.0)
    return found
