"""The chunk form of every rule: equal to the rule token by token, in any split and any batch; how precise."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from mnemosyne.kernels.rules.registry import RULES
from tests.kernels.cases import FORMS, Case, clipped, error, make_case, rule_of, stack_chunked, usual_case

# Relative errors against the reference in float64; 3 chunks of 64 tokens, matrices of 64 x 64, two layers
# with residual and norm where the rule may have them. About three times the worst of six seeds.
BOUNDS = {
    # rule: fp32 (reads, memory); q, k and v rounded to bf16 (reads, memory)
    "titans": (6e-6, 1e-5, 3e-2, 3e-2),
    "moneta": (2e-6, 3e-6, 3e-2, 3e-2),
    "yaad": (2e-6, 2e-6, 2e-2, 3e-2),
    "memora": (1e-5, 5e-5, 6e-3, 1.2e-2),
    "delta": (5e-7, 2e-7, 6e-3, 6e-4),
    "gated_delta": (6e-7, 6e-7, 6e-3, 8e-3),
}


@pytest.mark.parametrize("clip", [False, True], ids=["unclipped", "clipped"])
@pytest.mark.parametrize("gates", ["plain", "ends"])
@pytest.mark.parametrize(("name", "depth", "residual", "norm"), FORMS)
def test_equals_the_rule_token_by_token(name, depth, residual, norm, gates, clip):
    case = make_case(rule_of(name, depth, residual=residual, norm=norm), depth, gates=gates)
    case = clipped(case) if clip else case
    y, memory, momentum, norms = case.reference()
    got, scanned, _ = case.chunked()
    assert error(got, y) < 1e-10
    assert error(scanned.norms[0, 0].reshape(depth, -1), norms) < 1e-10
    assert len(scanned.memory) == depth and len(scanned.momentum) == len(momentum)
    for i in range(depth):
        assert error(scanned.memory[i][0, 0], memory[i], case.memory[i]) < 1e-10
    for i in range(len(momentum)):
        assert error(scanned.momentum[i][0, 0], momentum[i], case.momentum[i]) < 1e-10


def large(name: str) -> Case:
    return usual_case(name, head=64, hidden=64, length=64)


def single(case: Case, inputs: torch.dtype = torch.float32) -> Case:
    """In fp32, with q, k and v rounded to ``inputs``: how the engine computes."""
    rounded = {name: getattr(case, name).to(inputs) for name in ("q", "k", "v")}
    return replace(case, **rounded).map(Tensor.float)


@pytest.mark.parametrize("name", RULES)
def test_precision(name, record_property):
    case = large(name)
    y, memory, _, _ = case.reference()
    errors: list[float] = []
    for inputs in (torch.float32, torch.bfloat16):
        got, scanned, _ = single(case, inputs).chunked()
        moved = [error(m[0, 0], b) for m, b in zip(scanned.memory, memory, strict=True)]
        errors += [error(got, y), max(moved)]
    record_property("errors", errors)
    assert all(e < bound for e, bound in zip(errors, BOUNDS[name], strict=True)), errors


@pytest.mark.parametrize("name", RULES)
@torch.no_grad()
def test_any_split_of_the_chunks_gives_the_same_bits(name):
    case = single(usual_case(name, head=16, hidden=32, length=16, chunks=5))
    y, whole, _ = case.chunked()
    for cuts in ((1, 5), (2, 3, 5), (1, 2, 3, 4, 5)):
        reads, norms, first = [], [], 0
        memory, momentum = case.memory, case.momentum
        for last in cuts:
            part = case.tokens(first * case.length, last * case.length)
            got, scanned, _ = replace(part, memory=memory, momentum=momentum).chunked()
            memory, momentum = ([x[0, 0] for x in xs] for xs in (scanned.memory, scanned.momentum))
            reads.append(got)
            norms.append(scanned.norms)
            first = last
        assert torch.equal(torch.cat(reads), y)
        assert torch.equal(torch.cat(norms, 3), whole.norms)
        assert all(torch.equal(a, b[0, 0]) for a, b in zip(memory, whole.memory, strict=True))
        assert all(torch.equal(a, b[0, 0]) for a, b in zip(momentum, whole.momentum, strict=True))


@pytest.mark.parametrize("name", RULES)
@torch.no_grad()
def test_neighbours_in_the_batch_change_no_bit(name):
    cases = [single(usual_case(name, head=16, hidden=32, length=16, seed=seed)) for seed in range(5)]
    y, together, _ = stack_chunked(cases)
    for i, case in enumerate(cases):
        alone, scanned, _ = case.chunked()
        assert torch.equal(y.view(len(cases), -1, y.shape[-1])[i], alone)
        assert torch.equal(together.norms[i], scanned.norms[0])
        for kind in ("memory", "momentum"):
            pairs = zip(getattr(together, kind), getattr(scanned, kind), strict=True)
            assert all(torch.equal(a[i], b[0]) for a, b in pairs)


@pytest.mark.parametrize("name", RULES)
def test_a_token_sees_nothing_that_comes_after_it(name):
    """So a partial chunk may be filled up with anything: what is read before stays."""
    case = clipped(usual_case(name, gates="ends"))
    y, _, _ = case.chunked()
    known = case.length + 2
    other = usual_case(name, seed=1)
    later = torch.arange(len(case.q)) >= known

    def filled(ours: Tensor, theirs: Tensor) -> Tensor:
        mask = later if ours.shape[0] != len(later) or ours.dim() == 1 else later.unsqueeze(-1)
        return torch.where(mask, theirs, ours)

    gates = {
        gate: filled(ours, getattr(other.gates, gate))
        for gate, ours in case.gates._asdict().items()
        if ours is not None
    }
    tokens = {part: filled(getattr(case, part), getattr(other, part)) for part in ("q", "k", "v")}
    got, _, _ = replace(case, **tokens).gated(**gates).chunked()
    assert error(got[:known], y[:known]) < 1e-12
    assert error(got[known:], y[known:]) > 1e-3


@pytest.mark.parametrize("name", RULES)
def test_closed_gates_leave_the_memory_alone_to_the_bit(name):
    case = single(clipped(usual_case(name)))
    closed = {"theta": torch.zeros_like(case.gates.theta)}
    if case.gates.alpha is not None:
        closed["alpha"] = torch.zeros_like(case.gates.alpha)
    still = replace(case.gated(**closed), momentum=[torch.zeros_like(s) for s in case.momentum])
    _, scanned, _ = still.chunked()
    assert all(torch.equal(now[0, 0], b) for now, b in zip(scanned.memory, case.memory, strict=True))
    assert all(torch.equal(now, torch.zeros_like(now)) for now in scanned.momentum)


@pytest.mark.parametrize("name", RULES)
def test_a_key_of_zero_norm_writes_nothing(name):
    case = usual_case(name)
    silent = replace(case, k=torch.zeros_like(case.k), momentum=[torch.zeros_like(s) for s in case.momentum])
    if case.gates.alpha is not None:
        silent = silent.gated(alpha=torch.zeros_like(case.gates.alpha))
    _, scanned, _ = silent.chunked()
    assert all(torch.equal(now[0, 0], b) for now, b in zip(scanned.memory, case.memory, strict=True))
    assert torch.equal(scanned.norms, torch.zeros_like(scanned.norms))


def test_momentum_never_becomes_denormal():
    case = single(usual_case("titans"))
    fading = replace(case, momentum=[torch.full_like(m, 1e-28) for m in case.memory])
    _, scanned, _ = fading.gated(theta=torch.zeros_like(case.gates.theta)).chunked()
    assert all(torch.equal(s, torch.zeros_like(s)) for s in scanned.momentum)
