"""Scalars of the chunk form: gates and the decays made of them. Tensors in, tensors out; knows no module.

Notation (Titans, arXiv 2501.00663, eq. 13-14; alpha is the FORGET rate): in a chunk that begins at (M_0, S_0)

    M_t = A_t M_0 + F_t S_0 - sum_{j<=t} G_tj g_j          S_t = E_t S_0 - sum_{j<=t} P_tj theta_j g_j

with A_t, E_t the products of 1 - alpha and eta up to t, P_tj = E_t / E_j, F_t = sum_i (A_t / A_i) E_i and
G_tj = theta_j sum_{i=j..t} (A_t / A_i) P_ij. Everything is a product of numbers in [0, 1]. M is what the rule
keeps (``rules.rule``); without momentum F, E and P fall away.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from mnemosyne.kernels import elementwise


def gate(z: Tensor, maximum: float, epsilon: float) -> Tensor:
    """maximum * relu(sigmoid(z) - eps) / (1 - eps): reaches exactly 0 (spec/memory.md 2).

    Below the threshold the gradient is sigmoid's (straight-through), so that a closed gate can open again.
    """
    s = elementwise.sigmoid(z)
    value = torch.relu(s - epsilon) * (maximum / (1 - epsilon))
    if torch.is_grad_enabled() and z.requires_grad:
        soft = s * (maximum / (1 - epsilon))
        return soft + (value - soft).detach()
    return value


class Gates(NamedTuple):
    """What a token decides of its own store, per head and memory layer (D); None: the rule has no such
    gate."""

    theta: Tensor
    """`[B, H, D, ...]`, learning rate."""
    eta: Tensor | None = None
    """`[B, H, D, ...]`, momentum decay."""
    alpha: Tensor | None = None
    """`[B, H, D, ...]`, forget gate."""
    threshold: Tensor | None = None
    """`[B, H, ...]`, where the loss takes one."""

    def map(self, change: Callable[[Tensor], Tensor]) -> Gates:
        rest = [None if gate is None else change(gate) for gate in self[1:]]
        return Gates(change(self.theta), *rest)

    def chunks(self, length: int) -> Gates:
        """The last dimension cut into chunks of ``length`` tokens."""
        return self.map(lambda gate: gate.unflatten(-1, (-1, length)))

    @classmethod
    def joined(cls, parts: Sequence[Gates]) -> Gates:
        """Gates in chunks `[..., n, L]`, one after the other, as tokens `[..., T]`."""
        flat = [part.map(lambda gate: gate.flatten(-2)) for part in parts]
        theta, *rest = (
            None if pieces[0] is None else torch.cat(pieces, -1) for pieces in zip(*flat, strict=True)
        )
        assert theta is not None
        return cls(theta, *rest)


class Past(NamedTuple):
    """What momentum adds to the decays of a chunk of L tokens."""

    F: Tensor
    """`[..., L]`: what of S_0 has reached M after token t."""
    E: Tensor
    """`[..., L]`: what is left of S_0."""
    P: Tensor
    """`[..., L, L]`: theta_j E_t / E_j, token j's weight in S after token t."""


class End(NamedTuple):
    """All of a chunk's decays that moves the state: those of its last token."""

    scalars: Tensor
    """`[..., 1 or 3]`: A, and F and E."""
    rows: Tensor
    """`[..., 1 or 2, L]`: the last row of G, w, and of P, s."""


class Decays(NamedTuple):
    """Per chunk of L tokens; leading dimensions are those of the gates."""

    A: Tensor
    """`[..., L]`: what is left of M_0 after token t."""
    G: Tensor
    """`[..., L, L]`: weight of token j's gradient in M after token t; lower triangular."""
    past: Past | None
    """None: the rule has no momentum, S is nothing and isn't kept."""
    own_end: End | None = None
    """``end``, where it was made with the rest: a gradient that comes back through it is a row's alone."""

    @property
    def end(self) -> End:
        if self.own_end is not None:
            return self.own_end
        scalars, rows = [self.A[..., -1]], [self.G[..., -1, :]]
        if self.past is not None:
            scalars += [self.past.F[..., -1], self.past.E[..., -1]]
            rows += [self.past.P[..., -1, :]]
        return End(torch.stack(scalars, -1), torch.stack(rows, -2))


def _ratios(factor: Tensor) -> tuple[Tensor, Tensor]:
    """Products of ``factor`` over (j, t] as `[..., L, L]`, 0 above the diagonal, and over [1, t], `[..., L]`.

    Differences of logs, since ratios of cumulative products underflow. A factor that is exactly 0 is a reset:
    logs leave it out and a running count of resets masks every product that spans one.
    """
    reset = factor <= 0
    logs = elementwise.log(torch.where(reset, torch.ones_like(factor), factor)).cumsum(-1)
    count = reset.to(factor.dtype).cumsum(-1)
    length = factor.shape[-1]
    lower = torch.ones(length, length, dtype=torch.bool, device=factor.device).tril()
    spanned = count.unsqueeze(-1) - count.unsqueeze(-2)
    difference = logs.unsqueeze(-1) - logs.unsqueeze(-2)
    if torch.is_grad_enabled() and factor.requires_grad:
        # A product that spans one reset is 0 and its slope in that factor is the product of the others:
        # without it a gate that reached its end would never leave it.
        zeros = torch.where(reset, factor, torch.zeros_like(factor)).cumsum(-1)
        others = elementwise.exp(difference.masked_fill(~lower, float("-inf")))
        once = (spanned == 1) * (zeros.unsqueeze(-1) - zeros.unsqueeze(-2))
        rest = elementwise.exp(logs)
        return others * ((spanned == 0) + once), rest * ((count == 0) + (count == 1) * zeros)
    ratios = elementwise.exp(difference.masked_fill(~(lower & (spanned == 0)), float("-inf")))
    whole = elementwise.exp(logs) * (count == 0)
    return ratios, whole


def decays(gates: Gates) -> Decays:
    """Decays of chunks from gates `[..., L]` (L tokens of one chunk each)."""
    if gates.theta.is_cuda and not torch.is_grad_enabled():
        from mnemosyne.kernels.triton import support

        if support.takes(gates.theta):
            from mnemosyne.kernels.triton.decay import decays as launch

            return launch(gates)
    if _trains_on_device(gates.theta):
        from mnemosyne.kernels.triton.train_decay import decays as train

        return train(gates)
    theta, alpha = gates.theta, gates.alpha
    keep, A = _ratios(torch.ones_like(theta) if alpha is None else 1 - alpha)
    weight = theta.unsqueeze(-2)
    if gates.eta is None:
        return Decays(A, keep * weight, None)
    carry, E = _ratios(gates.eta)
    shape = keep.shape
    flat = (-1, shape[-2], shape[-1])
    C = torch.bmm(keep.reshape(flat), carry.reshape(flat)).view(shape)
    F = torch.matmul(keep, E.unsqueeze(-1)).squeeze(-1)
    return Decays(A, C * weight, Past(F, E, carry * weight))


def _trains_on_device(theta: Tensor) -> bool:
    """Whether the differentiable kernels make the decays of gates like ``theta``: on a GPU, with
    gradients."""
    if not theta.is_cuda or not torch.is_grad_enabled():
        return False
    from mnemosyne.kernels.triton import train_support

    return train_support.takes(theta)
