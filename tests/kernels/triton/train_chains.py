"""What the kernels of a training step do between its products, by name, beside the reference in float64."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from mnemosyne.kernels import attention, gates, network
from mnemosyne.kernels.positions import causal_conv, rotary_angles, rotate
from tests.kernels.triton.train_cases import Tensors, differentiated, largest

EPSILON = 1e-5


class Chain(NamedTuple):
    leaves: Tensors
    """In float64."""
    fused: Callable[[Tensors], Tensors]
    reference: Callable[[Tensors], Tensors]


def normal(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64)


def normed(x: Tensor, weight: Tensor) -> Tensor:
    return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + EPSILON) * weight


def norm(*shape: int, dtype: torch.dtype = torch.float32) -> Chain:
    def fused(leaves: Tensors) -> Tensors:
        from mnemosyne.kernels.triton import train_norm

        return {"y": train_norm.norm(leaves["x"], leaves["weight"], EPSILON, dtype)}

    def reference(leaves: Tensors) -> Tensors:
        return {"y": normed(leaves["x"], leaves["weight"])}

    return Chain({"x": normal(*shape), "weight": normal(shape[-1])}, fused, reference)


def add(*shape: int, dtype: torch.dtype = torch.float32) -> Chain:
    def fused(leaves: Tensors) -> Tensors:
        from mnemosyne.kernels.triton import train_norm

        made = train_norm.add(leaves["x"].float(), leaves["more"], leaves["weight"], EPSILON, dtype)
        return dict(zip(("total", "y"), made, strict=True))

    def reference(leaves: Tensors) -> Tensors:
        total = leaves["x"] + leaves["more"]
        return {"total": total, "y": normed(total, leaves["weight"])}

    leaves = {"x": normal(*shape), "more": normal(*shape), "weight": normal(shape[-1])}
    return Chain(leaves, fused, reference)


def swiglu(*shape: int) -> Chain:
    def fused(leaves: Tensors) -> Tensors:
        from mnemosyne.kernels.triton import train_swiglu

        return {"y": train_swiglu.swiglu(leaves["up"])}

    def reference(leaves: Tensors) -> Tensors:
        value, gate = leaves["up"].chunk(2, -1)
        return {"y": F.silu(gate) * value}

    return Chain({"up": 3 * normal(*shape)}, fused, reference)


def features(T: int, heads: int, head_dim: int, streams: int, keys: int, K: int = 4) -> Chain:
    def fused(leaves: Tensors) -> Tensors:
        from mnemosyne.kernels.triton import train_features

        made = train_features.features(
            leaves["streams"], leaves["tail"], leaves["weight"], heads, head_dim, keys
        )
        return {str(i): x for i, x in enumerate(made)}

    def reference(leaves: Tensors) -> Tensors:
        rows = torch.cat([leaves["tail"], leaves["streams"]], 1)
        mixed = F.silu(causal_conv(rows, leaves["weight"]))
        split = mixed.unflatten(-1, (streams, heads, head_dim)).permute(2, 0, 3, 1, 4)
        return {str(i): network.unit(x) if i < keys else x for i, x in enumerate(split)}

    C = streams * heads * head_dim
    leaves = {"streams": normal(2, T, C), "tail": normal(2, K - 1, C), "weight": normal(K, C)}
    leaves["streams"][1, T // 2 : T // 2 + K] = 0  # a key of norm 0
    return Chain(leaves, fused, reference)


def gate(*shape: int, paper: bool = False) -> Chain:
    def fused(leaves: Tensors) -> Tensors:
        from mnemosyne.kernels.triton import train_gate

        y, m, *weights = leaves.values()
        return {"o": train_gate.gate(y, m, *weights, EPSILON, paper)}

    def reference(leaves: Tensors) -> Tensors:
        y, m = normed(leaves["y"], leaves["weight_y"]), normed(leaves["m"], leaves["weight_m"])
        gated = y * torch.sigmoid(m)
        return {"o": gated if paper else gated + m}

    leaves = {"y": normal(*shape), "m": normal(*shape)}
    return Chain(leaves | {f"weight_{n}": normal(shape[-1]) for n in "ym"}, fused, reference)


def emit(T: int, heads: int, head_dim: int, sessions: int = 2) -> Chain:
    def fused(leaves: Tensors) -> Tensors:
        from mnemosyne.kernels.triton import train_emit

        return {"merged": train_emit.emit(*leaves.values(), EPSILON)}

    def reference(leaves: Tensors) -> Tensors:
        merged = normed(leaves["y"], leaves["weight"]).transpose(1, 2).flatten(2)
        return {"merged": torch.sigmoid(leaves["z"]) * merged}

    y, z = normal(sessions, heads, T, head_dim), normal(sessions, T, heads * head_dim)
    return Chain({"y": y, "z": z, "weight": normal(head_dim)}, fused, reference)


def heads(T: int, W: int, heads: int, head_dim: int) -> Chain:
    positions = torch.tensor([[0], [1000]]) + torch.arange(T)
    cos, sin = (x.unsqueeze(1) for x in rotary_angles(positions, head_dim, 100.0, torch.float64))

    def fused(leaves: Tensors) -> Tensors:
        from mnemosyne.kernels.triton import train_heads

        angles = (x.float().to(leaves["product"].device) for x in (cos, sin))
        return dict(zip("qkv", train_heads.heads(*leaves.values(), *angles), strict=True))

    def reference(leaves: Tensors) -> Tensors:
        q, k, v = leaves["product"].unflatten(-1, (3, heads, head_dim)).permute(2, 0, 3, 1, 4)
        k = torch.cat([leaves["past_k"], rotate(k, cos, sin)], 2)
        return {"q": rotate(q, cos, sin), "k": k, "v": torch.cat([leaves["past_v"], v], 2)}

    past = {f"past_{n}": normal(2, heads, W, head_dim) for n in "kv"}
    return Chain({"product": normal(2, T, 3 * heads * head_dim)} | past, fused, reference)


def window(T: int, W: int, heads: int, head_dim: int, block: int, persistent: int) -> Chain:
    start = torch.tensor([0, block, 10 * W])

    def fused(leaves: Tensors) -> Tensors:
        from mnemosyne.kernels.triton import train_window

        return {"y": train_window.window_blocks(*leaves.values(), start.to(leaves["q"].device), block)}

    def reference(leaves: Tensors) -> Tensors:
        return {"y": attention.window_blocks(*leaves.values(), start, block)}

    leaves = {"q": normal(3, heads, T, head_dim)}
    leaves |= {n: normal(3, heads, W + T, head_dim) for n in "kv"}
    return Chain(
        leaves | {f"persistent_{n}": normal(heads, persistent, head_dim) for n in "kv"}, fused, reference
    )


def token_gates(T: int, dim: int, cells: int, kinds: int) -> Chain:
    tops, epsilon = (0.5, 1.0, 0.9)[:kinds], 0.2

    def fused(leaves: Tensors) -> Tensors:
        from mnemosyne.kernels.triton import train_token_gates

        made = train_token_gates.token_gates(*leaves.values(), tops, epsilon)
        return {str(i): x for i, x in enumerate(made)}

    def reference(leaves: Tensors) -> Tensors:
        z = (leaves["u"] @ leaves["weight"].T + leaves["bias"]).transpose(1, 2)
        parts = zip(z.chunk(kinds, 1), tops, strict=True)
        return {str(i): gates.gate(x, top, epsilon) for i, (x, top) in enumerate(parts)}

    leaves = {"u": normal(2, T, dim), "weight": 0.3 * normal(kinds * cells, dim)}
    return Chain(leaves | {"bias": normal(kinds * cells)}, fused, reference)


def worst(chain: Chain, change: Callable[[Tensor], Tensor], only: tuple[str, ...] = ()) -> tuple[float, str]:
    """The largest difference of the kernels, on leaves changed by ``change``, from the reference on the same,
    and where; infinite where a number isn't finite."""
    leaves = {name: change(x.float()) for name, x in chain.leaves.items()}
    exact = {name: x.cpu().double() for name, x in leaves.items()}
    right = differentiated(chain.reference, exact, only)
    made = differentiated(chain.fused, leaves, only)
    return largest(made, right)
