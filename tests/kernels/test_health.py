"""The health measure against the eigenvalue it stands for, and against what a disturbance really does."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from mnemosyne.kernels import chunk as chunk_form
from mnemosyne.kernels import network
from mnemosyne.kernels.gates import Gates, decays
from mnemosyne.kernels.health import gain
from mnemosyne.kernels.rules.registry import RULES, make_rule
from mnemosyne.kernels.rules.rule import Architecture, MemoryRule

HEAD, CHUNK = 16, 32
MATRIX = Architecture(residual=False, norm=False)


def one_chunk(
    rule: MemoryRule, theta: float, alpha: float, memory: list[Tensor], keys: Tensor | None = None
) -> tuple[float, list[Tensor]]:
    """Its gain, and the memory after it; constant gates, no momentum to speak of."""
    g = torch.Generator().manual_seed(2)
    k = torch.randn(1, 1, 1, CHUNK, HEAD, generator=g, dtype=torch.float64) if keys is None else keys
    v = torch.randn(1, 1, 1, CHUNK, HEAD, generator=g, dtype=torch.float64)
    ones = torch.ones(1, 1, len(memory), 1, CHUNK, dtype=torch.float64)
    gates = Gates(
        theta * ones,
        0 * ones if rule.algorithm.momentum else None,
        alpha * ones if rule.retention.forgets else None,
        ones[:, :, 0] if rule.bias.threshold else None,
    )
    decay = decays(gates)
    momentum = [torch.zeros_like(m) for m in memory] if rule.algorithm.momentum else []
    scanned = chunk_form.scan(network.unit(k), v, gates.threshold, decay, memory, momentum, rule)
    return float(gain(scanned, decay, rule)), scanned.memory


def test_equal_keys_have_the_arithmetic_of_the_paper():
    """2 (sum of theta) / (1 + A): the edge is where one chunk overshoots by as much as it was wrong."""
    rule = make_rule("delta", depth=1, architecture=MATRIX, clip=None, options={})
    keys = torch.ones(1, 1, 1, CHUNK, HEAD, dtype=torch.float64)
    memory = [torch.zeros(1, 1, HEAD, HEAD, dtype=torch.float64)]
    for total in (0.3, 1.0, 1.1):
        found, _ = one_chunk(rule, total / CHUNK, 0, memory, keys)
        assert found == pytest.approx(total, rel=1e-5)


@pytest.mark.parametrize("name", ["titans", "gated_delta"])
def test_a_disturbance_grows_beyond_one_and_shrinks_below(name):
    rule = make_rule(name, depth=1, architecture=MATRIX, clip=None, options={})
    torch.manual_seed(1)
    memory = [torch.randn(1, 1, HEAD, HEAD, dtype=torch.float64)]
    for theta, alpha in ((0.02, 0.002), (0.05, 0.002), (0.6, 0.01)):
        found, after = one_chunk(rule, theta, alpha, memory)
        # The map is linear here: its norm is the largest singular value of what it does to a basis.
        rows = []
        for i in range(HEAD):
            nudged = memory[0].clone()
            nudged[0, 0, 0, i] += 1.0
            rows.append((one_chunk(rule, theta, alpha, [nudged])[1][0] - after[0])[0, 0, 0])
        grows = float(torch.linalg.matrix_norm(torch.stack(rows), 2))
        kept = (1 - alpha) ** CHUNK
        # |A - lambda| of the largest eigenvalue, which the weighted mean doesn't pass.
        assert found * (1 + kept) - kept <= grows + 1e-9 or grows <= kept
        assert (found > 1) == (grows > 1), (found, grows)


@pytest.mark.parametrize("norm", [False, True])
@pytest.mark.parametrize("clip", [None, 0.5])
def test_it_is_the_mean_eigenvalue(norm, clip):
    """Of sum_j w_j c_j a_j a_j^T, weighted by themselves; c_j by the layer norm's Jacobian."""
    rule = make_rule("titans", depth=2, architecture=Architecture(norm=norm), clip=clip, options={})
    torch.manual_seed(3)
    memory = [
        torch.randn(1, 1, 24, HEAD, dtype=torch.float64),
        torch.randn(1, 1, HEAD, 24, dtype=torch.float64),
    ]
    memory = [m / m.shape[-1] ** 0.5 for m in memory]
    found, _ = one_chunk(rule, 0.05, 0.01, memory)
    g = torch.Generator().manual_seed(2)
    k = network.unit(torch.randn(1, 1, 1, CHUNK, HEAD, generator=g, dtype=torch.float64))[0, 0, 0]
    v = torch.randn(1, 1, 1, CHUNK, HEAD, generator=g, dtype=torch.float64)[0, 0, 0]
    total = torch.zeros(24, 24, dtype=torch.float64)
    for j in range(CHUNK):
        a = torch.nn.functional.gelu(memory[0][0, 0] @ k[j], approximate="tanh")
        z = memory[1][0, 0] @ a
        std = (z.var(unbiased=False) + 1e-6).sqrt()
        out = (z - z.mean()) / std if norm else z
        error = 2 * (k[j] + out - v[j])
        if norm:
            error = (error - error.mean() - out * (error * out).mean()) / std
        shrunk = min(1.0, clip / float(error.norm() * a.norm())) if clip else 1.0
        weight = 0.05 * 0.99 ** (CHUNK - 1 - j)
        total += weight * 2 / (float(std) ** 2 if norm else 1) * shrunk * torch.outer(a, a)
    eigenvalues = torch.linalg.eigvalsh(total)
    mean = float(eigenvalues.square().sum() / eigenvalues.sum())
    assert found == pytest.approx(mean / (1 + 0.99**CHUNK), rel=1e-6)


@pytest.mark.parametrize("name", RULES)
def test_every_rule_has_one(name):
    """Finite, and more where theta is more."""
    architecture = MATRIX if "delta" in name else Architecture()
    rule = make_rule(name, depth=1, architecture=architecture, clip=None, options={})
    torch.manual_seed(1)
    memory = [rule.retention.initial(1, 1, HEAD, HEAD).double()]
    low, high = (one_chunk(rule, theta, 0.01, memory)[0] for theta in (0.01, 0.1))
    assert high == pytest.approx(10 * low, rel=1e-6) and low > 0
