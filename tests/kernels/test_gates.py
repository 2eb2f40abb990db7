"""Gates and decays by their definitions, products written out; where they end, and how they come back."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from mnemosyne.kernels.gates import Gates, decays, gate

L = 7


def some_gates(kind: str, momentum: bool) -> Gates:
    g = torch.Generator().manual_seed(2)
    theta, eta, alpha = (torch.rand(L, generator=g, dtype=torch.float64) for _ in range(3))
    if kind == "ends":
        theta[2] = eta[1] = eta[4] = alpha[5] = 0
        eta[3] = alpha[4] = 1
    return Gates(theta, eta if momentum else None, alpha)


def product(factors: Tensor, after: int, to: int) -> float:
    """Over (after, to]; tokens count from 0."""
    return math.prod(factors[after + 1 : to + 1].tolist())


@pytest.mark.parametrize("momentum", [True, False])
@pytest.mark.parametrize("kind", ["plain", "ends"])
def test_decays_are_the_products_they_are_named_for(kind, momentum):
    gates = some_gates(kind, momentum)
    assert gates.alpha is not None
    made, keep = decays(gates), 1 - gates.alpha
    assert (made.past is not None) == momentum
    for t in range(L):
        assert made.A[t] == pytest.approx(product(keep, -1, t), rel=1e-12, abs=0)
        if made.past is not None and gates.eta is not None:
            eta = gates.eta
            reached = sum(product(keep, i, t) * product(eta, -1, i) for i in range(t + 1))
            assert made.past.E[t] == pytest.approx(product(eta, -1, t), rel=1e-12, abs=0)
            assert made.past.F[t] == pytest.approx(reached, rel=1e-12, abs=0)
        for j in range(L):
            theta = float(gates.theta[j]) if j <= t else 0.0
            if made.past is None or gates.eta is None:
                assert made.G[t, j] == pytest.approx(theta * product(keep, j, t), rel=1e-12, abs=0)
                continue
            spread = sum(product(keep, i, t) * product(gates.eta, j, i) for i in range(j, t + 1))
            assert made.past.P[t, j] == pytest.approx(theta * product(gates.eta, j, t), rel=1e-12, abs=0)
            assert made.G[t, j] == pytest.approx(theta * spread, rel=1e-12, abs=0)


def test_without_a_forget_gate_nothing_is_forgotten():
    theta = torch.rand(L, dtype=torch.float64)
    made = decays(Gates(theta))
    assert torch.equal(made.A, torch.ones(L, dtype=torch.float64))
    assert torch.equal(made.G, theta.expand(L, L).tril())


def test_strong_forgetting_keeps_every_factor_finite():
    gates = torch.full((1, 1, 1, 1, 128), 0.7)
    made = decays(Gates(gates, gates, gates))
    assert made.past is not None
    assert all(torch.isfinite(x).all() for x in (made.A, made.G, *made.past))
    assert made.past.P.max() <= 0.7 and made.A.max() <= 0.3 + 1e-6


def test_gate_reaches_zero_and_opens_again():
    z = torch.tensor([-9.0, 0.0, 9.0], requires_grad=True)
    value = gate(z, 0.5, 0.004)
    assert value[0] == 0 and 0.2 < value[1] < 0.3 and value[2] < 0.5
    value.sum().backward()
    assert z.grad is not None and z.grad[0] > 0, "a closed gate that can't learn stays closed for ever"


def test_gate_is_the_formula():
    z = torch.linspace(-8, 8, 33, dtype=torch.float64)
    expected = [0.5 * max(1 / (1 + math.exp(-x)) - 0.004, 0) / 0.996 for x in z.tolist()]
    assert torch.allclose(gate(z, 0.5, 0.004), torch.tensor(expected, dtype=torch.float64), atol=1e-15)


def test_chunks_are_joined_again():
    gates = Gates(torch.rand(1, 2, 3, 12), None, torch.rand(1, 2, 3, 12), torch.rand(1, 2, 12))
    joined = Gates.joined(
        [gates.map(lambda x: x[..., :4]).chunks(4), gates.map(lambda x: x[..., 4:]).chunks(4)]
    )
    for a, b in zip(joined, gates, strict=True):
        assert (a is None) == (b is None)
        assert a is None or b is None or torch.equal(a, b)
