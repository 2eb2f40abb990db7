"""Each rule against its equations, written out in numpy for one matrix; and what a rule can't be.

Nothing of `kernels.rules` is used to make what is expected: loops over tokens, gradients by hand. Sources:
Titans (arXiv 2501.00663) eq. 12-14; MIRAS (arXiv 2504.13173) eq. 24-27; spec/memory.md 4.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import Tensor

from mnemosyne.kernels.rules.registry import RULES, make_rule
from mnemosyne.kernels.rules.rule import Architecture
from mnemosyne.kernels.rules.yaad import Huber
from tests.kernels.cases import Case, error, make_case, rule_of

LINEAR = Architecture(residual=False, norm=False)
FLOOR = 1.0
"""eps in Moneta's (||A||_q + eps)^(q-2), as kernels/rules/moneta.py says."""


def tokens(case: Case) -> Iterator[tuple[bool, dict[str, np.ndarray]]]:
    """Per token: whether it begins a chunk, and q, k, v `[d]` and its gates of the one memory layer."""
    rows = {name: getattr(case, name).numpy() for name in ("q", "k", "v")}
    for name, gate in case.gates._asdict().items():
        if gate is not None:
            rows[name] = gate.numpy().reshape(len(case.q))
    for t in range(len(case.q)):
        yield t % case.length == 0, {name: x[t] for name, x in rows.items()}


def check(case: Case, reads: list[np.ndarray], kept: np.ndarray) -> None:
    y = torch.from_numpy(np.stack(reads))
    got, scanned, _ = case.chunked()
    for form, memory in ((got, scanned.memory[0][0, 0]), (case.decoded(), None), case.reference()[:2]):
        assert error(form, y) < 1e-12
        if memory is not None:
            final = memory[0] if isinstance(memory, list) else memory
            assert error(final, torch.from_numpy(kept)) < 1e-12


def test_titans():
    case = make_case(rule_of("titans"), 1)
    M, S, reads = case.memory[0].numpy(), case.momentum[0].numpy(), []
    for begins, x in tokens(case):
        if begins:
            start = M
        gradient = 2 * np.outer(start @ x["k"] - x["v"], x["k"])
        S = x["eta"] * S - x["theta"] * gradient
        M = (1 - x["alpha"]) * M + S
        reads.append(M @ x["q"])
    check(case, reads, M)


def test_titans_with_two_layers():
    """By hand through GELU (tanh form), layer norm and residual: M(x) = x + LN(W_2 gelu(W_1 x))."""
    case = make_case(rule_of("titans", 2, residual=True, norm=True), 2)
    W, S, reads = [m.numpy() for m in case.memory], [s.numpy() for s in case.momentum], []
    c, b = np.sqrt(2 / np.pi), 0.044715

    def forward(weights, x):
        z = weights[0] @ x
        a = 0.5 * z * (1 + np.tanh(c * (z + b * z**3)))
        o = weights[1] @ a
        std = np.sqrt(o.var() + 1e-6)
        return z, a, (o - o.mean()) / std, std

    theta, eta, alpha = (gate.numpy() for gate in case.gates[:3])
    for t in range(len(case.q)):
        if t % case.length == 0:
            start = list(W)
        k, v = case.k[t].numpy(), case.v[t].numpy()
        z, a, n, std = forward(start, k)
        dy = 2 * (k + n - v)
        do = (dy - dy.mean() - n * (dy * n).mean()) / std
        u = np.tanh(c * (z + b * z**3))
        dz = (start[1].T @ do) * (0.5 * (1 + u) + 0.5 * z * (1 - u**2) * c * (1 + 3 * b * z**2))
        for i, gradient in enumerate((np.outer(dz, k), np.outer(do, a))):
            S[i] = eta[i, t] * S[i] - theta[i, t] * gradient
            W[i] = (1 - alpha[i, t]) * W[i] + S[i]
        reads.append(case.q[t].numpy() + forward(W, case.q[t].numpy())[2])
    got, scanned, _ = case.chunked()
    assert error(got, torch.from_numpy(np.stack(reads))) < 1e-11
    for memory, expected in zip(scanned.memory, W, strict=True):
        assert error(memory[0, 0], torch.from_numpy(expected)) < 1e-11


@pytest.mark.parametrize("length", [1, 6])
def test_delta(length):
    case = make_case(rule_of("delta"), 1, length=length, chunks=18 // length)
    W, reads = case.memory[0].numpy(), []
    for begins, x in tokens(case):
        if begins:
            start = W
        W = W - 2 * x["theta"] * np.outer(start @ x["k"] - x["v"], x["k"])
        reads.append(W @ x["q"])
    check(case, reads, W)


def test_gated_delta_is_one_linear_step_where_a_chunk_is_a_token():
    """W_t = W_{t-1} ((1 - alpha) I - 2 theta k k^T) + 2 theta v k^T."""
    case = make_case(rule_of("gated_delta"), 1, length=1, chunks=18)
    W, reads, eye = case.memory[0].numpy(), [], np.eye(8)
    for _, x in tokens(case):
        step = 2 * x["theta"] * np.outer(x["k"], x["k"])
        W = W @ ((1 - x["alpha"]) * eye - step) + 2 * x["theta"] * np.outer(x["v"], x["k"])
        reads.append(W @ x["q"])
    check(case, reads, W)


def test_gated_delta():
    case = make_case(rule_of("gated_delta"), 1)
    W, reads = case.memory[0].numpy(), []
    for begins, x in tokens(case):
        if begins:
            start = W
        gradient = 2 * np.outer(start @ x["k"] - x["v"], x["k"])
        W = (1 - x["alpha"]) * W - x["theta"] * gradient
        reads.append(W @ x["q"])
    check(case, reads, W)


def test_yaad():
    """2 e within the threshold, 2 threshold e / |e| beyond."""
    case = make_case(rule_of("yaad"), 1)
    W, reads, beyond = case.memory[0].numpy(), [], 0
    for begins, x in tokens(case):
        if begins:
            start = W
        e = start @ x["k"] - x["v"]
        size = np.sqrt((e**2).sum())
        slope = 2 * e if size <= x["threshold"] else 2 * x["threshold"] * e / size
        beyond += size > x["threshold"]
        W = (1 - x["alpha"]) * W - x["theta"] * np.outer(slope, x["k"])
        reads.append(W @ x["q"])
    assert 0 < beyond < len(case.q), "both sides of the threshold"
    check(case, reads, W)


def test_yaad_is_continuous_at_the_threshold_and_bounded_beyond():
    direction = torch.nn.functional.normalize(torch.randn(5, 8, dtype=torch.float64), dim=-1)
    zero, threshold = torch.zeros_like(direction), torch.full((5,), 0.7, dtype=torch.float64)

    def gradient(size: float) -> Tensor:
        return Huber().gradient(size * direction, zero, threshold)

    assert torch.allclose(gradient(0.7 - 1e-9), gradient(0.7 + 1e-9), atol=1e-8)
    assert torch.allclose(gradient(0.3), 0.6 * direction, atol=1e-15)
    for size in (0.0, 0.3, 0.7, 0.71, 5.0, 1e6):
        assert (gradient(size).norm(dim=-1) <= 2 * 0.7 * (1 + 1e-12)).all(), size


def test_yaad_with_a_large_threshold_is_gated_delta():
    case = make_case(rule_of("yaad"), 1)
    case = case.gated(threshold=torch.full_like(case.gates.alpha[0], 1e9))
    plain = replace(case, rule=rule_of("gated_delta"), gates=case.gates._replace(threshold=None))
    assert error(case.chunked()[0], plain.chunked()[0]) < 1e-14


def moneta_factor(A: np.ndarray, q: float) -> float:
    return ((np.abs(A) ** q).sum() ** (1 / q) + FLOOR) ** (2 - q)


@pytest.mark.parametrize(("p", "q"), [(3.0, 4.0), (1.0, 2.0), (1.5, 3.0), (4.0, 2.0)])
def test_moneta(p, q):
    """The weights' norm is that of the chunk's start, in reads within the chunk too."""
    case = make_case(rule_of("moneta", p=p, q=q), 1)
    A, reads = case.memory[0].numpy(), []
    for begins, x in tokens(case):
        if begins:
            factor = moneta_factor(A, q)
            start = A * factor
        e = start @ x["k"] - x["v"]
        slope = p * np.tanh(10 * e) * np.sqrt(e**2 + 1e-6) ** (p - 1)
        A = (1 - x["alpha"]) * A - x["theta"] * np.outer(slope, x["k"])
        reads.append(A * factor @ x["q"])
    check(case, reads, A)


def test_moneta_defaults_are_the_papers():
    case = make_case(rule_of("moneta"), 1)
    named = replace(case, rule=rule_of("moneta", p=3.0, q=4.0))
    assert torch.equal(case.chunked()[0], named.chunked()[0])


def test_moneta_with_p_2_and_q_2_is_gated_delta():
    """As far as the smoothing of sign and absolute value allows: errors here are larger than 1."""
    case = make_case(rule_of("moneta", p=2.0, q=2.0), 1)
    case = replace(case, v=4 * case.v.sign(), memory=[0.1 * m for m in case.memory])
    case = case.gated(theta=0.1 * case.gates.theta)
    plain = replace(case, rule=rule_of("gated_delta"))
    assert error(case.chunked()[0], plain.chunked()[0]) < 1e-6


@pytest.mark.parametrize("p", [1.0, 2.0, 3.0, 4.0])
def test_monetas_gradient_is_that_of_the_power_away_from_zero(p):
    errors = torch.cat([torch.linspace(-3, -0.6, 9), torch.linspace(0.6, 3, 9)]).double()
    leaf = errors.clone().requires_grad_(True)
    (exact,) = torch.autograd.grad(leaf.abs().pow(p).sum(), leaf)
    smooth = rule_of("moneta", p=p).bias.gradient(errors, torch.zeros_like(errors), None)
    assert torch.allclose(smooth, exact, rtol=2e-5)


def test_monetas_weights_neither_blow_up_nor_outgrow_what_is_kept():
    """As forgetting shrinks A, the paper's bare A / ||A||^(q-2) would grow without bound."""
    kept = torch.randn(3, 8, 8, dtype=torch.float64)
    retention = rule_of("moneta").retention
    for size in (1e3, 1.0, 1e-3, 1e-12, 0.0):
        weights = retention.weights(size * kept)
        assert (weights.abs() <= size * kept.abs()).all()
    far = retention.weights(1e6 * kept)[0].numpy()
    A = 1e6 * kept[0].numpy()
    assert np.allclose(far, A / (np.abs(A) ** 4).sum() ** 0.5, rtol=1e-4)


def softmax(z: np.ndarray) -> np.ndarray:
    e = np.exp(z - z.max(1, keepdims=True))
    return e / e.sum(1, keepdims=True)


def test_memora():
    """z moves linearly, W is its softmax, exact in every read."""
    case = make_case(rule_of("memora"), 1)
    z, reads = case.memory[0].numpy(), []
    for begins, x in tokens(case):
        if begins:
            start = softmax(z)
        z = (1 - x["alpha"]) * z - x["theta"] * 2 * np.outer(start @ x["k"] - x["v"], x["k"])
        reads.append(softmax(z) @ x["q"])
    check(case, reads, z)


def test_every_row_of_memoras_weights_is_a_distribution_at_every_token():
    case = make_case(rule_of("memora"), 1)
    case = case.gated(theta=30 * case.gates.theta)
    ones = replace(case, q=torch.ones_like(case.q))
    for reads in (ones.chunked()[0], ones.decoded()):
        assert torch.allclose(reads, torch.ones_like(reads), rtol=0, atol=1e-14)
    column = torch.eye(8, dtype=torch.float64)
    for j in range(8):
        reads = replace(case, q=column[j].expand_as(case.q).contiguous()).chunked()[0]
        assert (reads >= 0).all() and (reads <= 1).all()
    weights = case.rule.retention.weights(case.memory[0])
    assert torch.allclose(weights.sum(1), torch.ones(8, dtype=torch.float64), atol=1e-14)


@pytest.mark.parametrize(
    ("name", "depth", "architecture", "options", "said"),
    [
        ("hopfield", 1, LINEAR, {}, "there is no rule 'hopfield'; there are titans, moneta, yaad"),
        ("delta", 2, LINEAR, {}, "the delta rule's memory is one matrix: depth must be 1, got 2"),
        ("gated_delta", 3, LINEAR, {}, "the gated_delta rule's memory is one matrix: depth must be 1, got 3"),
        ("delta", 1, Architecture(residual=True, norm=False), {}, "residual and norm must be false"),
        ("gated_delta", 1, Architecture(residual=False, norm=True), {}, "residual and norm must be false"),
        ("titans", 1, LINEAR, {"p": 3.0}, "the titans rule has no option p"),
        ("moneta", 1, LINEAR, {"p": 3.0, "r": 1.0}, "the moneta rule has no option r; it has p, q"),
        ("moneta", 1, LINEAR, {"p": 0.5}, "moneta's p must be at least 1, got 0.5"),
        ("moneta", 1, LINEAR, {"q": 1.9}, "moneta's q must be at least 2, got 1.9"),
    ],
)
def test_a_rule_that_cannot_be_is_refused_with_the_reason(name, depth, architecture, options, said):
    with pytest.raises(ValueError) as refused:
        make_rule(name, depth=depth, architecture=architecture, clip=None, options=options)
    assert said in str(refused.value)


def test_the_edges_of_what_can_be_are_allowed():
    make_rule("moneta", depth=1, architecture=LINEAR, clip=None, options={"p": 1.0, "q": 2.0})
    for name in RULES:
        rule = make_rule(name, depth=1, architecture=LINEAR, clip=0.5, options={})
        assert rule.algorithm.clip == 0.5 and rule.algorithm.momentum == (name == "titans")
        assert rule.retention.forgets == (name != "delta") and rule.bias.threshold == (name == "yaad")
