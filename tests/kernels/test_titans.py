"""The chunk form and the decode form of the Titans rule against the token-by-token reference in float64."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from mnemosyne.kernels import chunk as chunk_form
from mnemosyne.kernels import decode, network
from mnemosyne.kernels.gates import decays, gate
from mnemosyne.kernels.reference import titans_reference

HEAD, HIDDEN, CHUNK, CHUNKS = 8, 12, 6, 3
OPTIONS = [
    (depth, residual, norm) for depth in (1, 2, 3, 4) for residual in (False, True) for norm in (False, True)
]


class Case:
    """One head's memory and T tokens; ``gates`` plain, or with exact zeros and resets among them."""

    def __init__(self, depth: int, gates: str, seed: int = 0) -> None:
        g = torch.Generator().manual_seed(seed)

        def normal(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=g, dtype=torch.float64)

        def uniform(*shape: int) -> Tensor:
            return torch.rand(*shape, generator=g, dtype=torch.float64)

        T, widths = CHUNK * CHUNKS, [HEAD] + [HIDDEN] * (depth - 1) + [HEAD]
        self.memory = [normal(widths[i + 1], widths[i]) / widths[i] ** 0.5 for i in range(depth)]
        self.momentum = [0.02 * normal(*m.shape) for m in self.memory]
        self.q, self.k = network.unit(normal(T, HEAD)), network.unit(normal(T, HEAD))
        self.v = normal(T, HEAD)
        self.theta, self.eta, self.alpha = (
            0.05 * uniform(depth, T),
            uniform(depth, T),
            0.1 * uniform(depth, T),
        )
        if gates == "ends":
            self.theta[uniform(depth, T) < 0.3] = 0
            self.eta[uniform(depth, T) < 0.3] = 0
            self.alpha[uniform(depth, T) < 0.2] = 1

    def reference(self, **options):
        return titans_reference(
            self.q,
            self.k,
            self.v,
            self.theta,
            self.eta,
            self.alpha,
            self.memory,
            self.momentum,
            chunk=CHUNK,
            **options,
        )

    def chunked(self, dtype: torch.dtype, *, clip: float | None, **options):
        def rows(x: Tensor) -> Tensor:
            return x.to(dtype).view(1, 1, CHUNKS, CHUNK, HEAD)

        def per_chunk(x: Tensor) -> Tensor:
            return x.to(dtype).view(1, 1, len(self.memory), CHUNKS, CHUNK)

        decay = decays(per_chunk(self.theta), per_chunk(self.eta), per_chunk(self.alpha))
        lift = [[w.to(dtype)[None, None] for w in ws] for ws in (self.memory, self.momentum)]
        scanned = chunk_form.scan(rows(self.k), rows(self.v), decay, *lift, clip=clip, **options)
        return chunk_form.read(rows(self.q), decay, scanned, **options).view(-1, HEAD), scanned, decay


def error(a: Tensor, b: Tensor) -> float:
    return float((a.double() - b).norm() / b.norm())


@pytest.mark.parametrize("clip", [None, 0.5], ids=["unclipped", "clipped"])
@pytest.mark.parametrize("gates", ["plain", "ends"])
@pytest.mark.parametrize(("depth", "residual", "norm"), OPTIONS)
def test_chunk_form(depth, residual, norm, gates, clip):
    case = Case(depth, gates)
    y, memory, momentum, norms = case.reference(residual=residual, norm=norm, clip=clip)
    got, scanned, _ = case.chunked(torch.float64, residual=residual, norm=norm, clip=clip)
    assert error(got, y) < 1e-10
    assert error(scanned.norms[0, 0].reshape(depth, -1), norms) < 1e-10
    for i in range(depth):
        assert error(scanned.memory[i][0, 0], memory[i]) < 1e-10
        assert (scanned.momentum[i][0, 0] - momentum[i]).abs().max() < 1e-10 * case.momentum[i].abs().max()


def test_chunk_form_fp32():
    case = Case(2, "plain")
    y, memory, _, _ = case.reference(residual=True, norm=True, clip=None)
    got, scanned, _ = case.chunked(torch.float32, residual=True, norm=True, clip=None)
    assert error(got, y) < 1e-5
    assert error(scanned.memory[1][0, 0], memory[1]) < 1e-5


@pytest.mark.parametrize("depth", [1, 2, 3])
def test_decode_step_equals_read(depth):
    case = Case(depth, "ends")
    options = {"residual": True, "norm": False, "clip": 0.5}
    y, _, _, _ = case.reference(**options)
    memory, momentum = case.memory, case.momentum
    shapes = [tuple(m.shape) for m in memory]
    cache = {
        n: torch.zeros(1, *s, dtype=torch.float64) for n, s in decode.cache_shapes(1, CHUNK, shapes).items()
    }
    cache["decay"][:, [0, 2]] = 1
    for t in range(CHUNK):
        gates = torch.stack([g[:, t] for g in (case.theta, case.eta, case.alpha)])[:, None, None]
        row = decode.step(
            case.q[t].view(1, 1, -1),
            case.k[t].view(1, 1, -1),
            case.v[t].view(1, 1, -1),
            gates,
            [m[None, None] for m in memory],
            [m[None, None] for m in momentum],
            cache,
            torch.tensor([t]),
            **options,
        )
        assert error(row.view(-1), y[t]) < 1e-10


def test_closed_gates_leave_the_memory_alone_to_the_bit():
    case = Case(2, "plain")
    case.theta.zero_()
    case.alpha.zero_()
    case.momentum = [torch.zeros_like(m) for m in case.momentum]
    _, scanned, _ = case.chunked(torch.float32, residual=True, norm=True, clip=1.0)
    for now, before in zip(scanned.memory, case.memory, strict=True):
        assert torch.equal(now[0, 0], before.float())


def test_momentum_never_becomes_denormal():
    case = Case(2, "plain")
    case.theta.zero_()
    case.momentum = [torch.full_like(m, 1e-28) for m in case.momentum]
    _, scanned, _ = case.chunked(torch.float32, residual=True, norm=True, clip=None)
    assert all(torch.equal(s, torch.zeros_like(s)) for s in scanned.momentum)


def test_strong_forgetting_keeps_every_factor_finite():
    gates = torch.full((1, 1, 1, 1, 128), 0.7)
    made = decays(gates, gates, gates)
    assert all(torch.isfinite(x).all() for x in made)
    assert made.P.max() <= 0.7 and made.A.max() <= 0.3 + 1e-6


def test_a_key_of_zero_norm_writes_nothing():
    case = Case(2, "plain")
    case.k.zero_()
    case.momentum = [torch.zeros_like(m) for m in case.momentum]
    case.alpha.zero_()
    _, scanned, _ = case.chunked(torch.float64, residual=True, norm=False, clip=None)
    assert all(torch.equal(m[0, 0], b) for m, b in zip(scanned.memory, case.memory, strict=True))


def test_gate_reaches_zero_and_opens_again():
    z = torch.tensor([-9.0, 0.0, 9.0], requires_grad=True)
    value = gate(z, 0.5, 0.004)
    assert value[0] == 0 and 0.2 < value[1] < 0.3 and value[2] < 0.5
    value.sum().backward()
    assert z.grad is not None and z.grad[0] > 0, "a closed gate that can't learn stays closed for ever"


def test_training_gradient_goes_through_the_inner_loop():
    case = Case(2, "plain")
    options = {"residual": True, "norm": True, "clip": 0.5}

    def loss(v: Tensor) -> Tensor:
        case.v = v
        return case.chunked(torch.float64, **options)[0].square().sum()

    v = case.v.clone().requires_grad_(True)
    (analytic,) = torch.autograd.grad(loss(v), v)
    direction = torch.randn(v.shape, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    step = 1e-6
    numeric = (loss(v.detach() + step * direction) - loss(v.detach() - step * direction)) / (2 * step)
    assert abs(float((analytic * direction).sum() - numeric) / float(numeric)) < 1e-5
