"""A model's weights as kernels take them: one tensor for all layers, products that share an operand as
one. Owns that order; knows no kernel and no session."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from mnemosyne.engine.mixers import Gated, MemoryAsLayer, Mixer
from mnemosyne.engine.model import Titans

GATE_COLUMNS = 64
"""Gate logits of a token come in multiples of this."""


@dataclass(frozen=True)
class Weights:
    """Layers first in each; ``dim`` d, heads H, head_dim D, ffn f. Dense products in the compute precision,
    the rest fp32.

    ``first`` `[N, d]` is what is made of the normed input: for MAC the memory's query, then attention's q, k,
    v; for MAG attention's q, k, v, then the memory's q, k, v, output gate; for MAL and LMM the memory's q, k,
    v, output gate.
    """

    first: Tensor
    streams: Tensor | None
    """MAC: k, q', v of the memory and the output gate, of what attention made, `[4 d, d]`."""
    attention: Tensor | None
    """MAC: k, v of h, `[2 d, d]`. MAL: q, k, v, `[3 d, d]`."""
    attended: Tensor | None
    """Attention's output, `[d, d]`."""
    output: Tensor
    """The memory's output, `[d, d]`."""
    up: Tensor
    """SwiGLU, values then gates, `[2 f, d]`."""
    down: Tensor
    """`[d, f]`."""
    gates: Tensor
    """Of theta, eta, alpha (heads, then memory layers), as a sum of ``parts`` in the compute precision,
    because they are wanted in fp32: `[parts, G, d]`, G a multiple of ``GATE_COLUMNS``."""
    gate_bias: Tensor
    """`[G]`."""
    conv: Tensor
    """`[K, S d]`, streams as in the module (``engine.memory``): q, k, v, or for MAC q, k, q', v."""
    head_norm: Tensor
    """`[D]`."""
    norm_mixer: Tensor
    """`[d]`, as the norms below."""
    norm_ffn: Tensor
    norm_attention: Tensor | None
    """MAG, MAC: of the gate; MAL: between memory and attention."""
    norm_memory: Tensor | None
    persistent_k: Tensor | None
    """`[H, P, D]`, projected already."""
    persistent_v: Tensor | None
    embedding: Tensor
    """`[vocab, d]`, of the whole model, as the last norm."""
    norm: Tensor

    @classmethod
    @torch.no_grad()
    def of(cls, model: Titans) -> Weights:
        """``model`` is prepared already, and keeps its own."""
        variant = model.config.variant

        def each(pick: Callable[[Any], Tensor]) -> Tensor:
            return torch.stack([pick(block.mixer) for block in model.blocks]).contiguous()

        def of_block(pick: Callable[[Any], Tensor]) -> Tensor:
            return torch.stack([pick(block) for block in model.blocks]).contiguous()

        def some(there: bool, pick: Callable[[Any], Tensor]) -> Tensor | None:
            return each(pick) if there else None

        attends, gated = variant != "lmm", variant in ("mag", "mac")
        return cls(
            first=each(_first),
            streams=some(variant == "mac", _streams),
            attention=some(variant in ("mac", "mal"), _attention),
            attended=some(attends, lambda m: m.attention.output.weight),
            output=each(lambda m: m.memory.output.weight),
            up=of_block(lambda b: b.ffn.up.weight),
            down=of_block(lambda b: b.ffn.down.weight),
            gates=each(lambda m: _parts(_padded(m.memory.gate_weight), m.memory.project.compute)),
            gate_bias=each(lambda m: _padded(m.memory.gate_bias)),
            conv=each(lambda m: m.memory.conv),
            head_norm=each(lambda m: m.memory.norm.weight),
            norm_mixer=of_block(lambda b: b.norm_mixer.weight),
            norm_ffn=of_block(lambda b: b.norm_ffn.weight),
            norm_attention=some(attends, _norm_attention),
            norm_memory=some(gated, lambda m: m.norm_memory.weight),
            persistent_k=some(attends, lambda m: m.attention.persistent_heads()[0]),
            persistent_v=some(attends, lambda m: m.attention.persistent_heads()[1]),
            embedding=model.embedding,
            norm=model.norm.weight,
        )


def _first(mixer: Mixer) -> Tensor:
    memory: list[Tensor] = [mixer.memory.project.weight, mixer.memory.output_gate.weight]
    if not isinstance(mixer, Gated):
        return torch.cat(memory)
    if mixer.memory.query is not None:
        return torch.cat([mixer.memory.query.weight, mixer.attention.project.weight])
    return torch.cat([mixer.attention.project.weight, *memory])


def _streams(mixer: Mixer) -> Tensor:
    return torch.cat([mixer.memory.project.weight, mixer.memory.output_gate.weight])


def _attention(mixer: Mixer) -> Tensor:
    if isinstance(mixer, MemoryAsLayer):
        return mixer.attention.project.weight
    assert isinstance(mixer, Gated)
    project = mixer.attention.project.weight
    return project[project.shape[1] :]


def _norm_attention(mixer: Mixer) -> Tensor:
    if isinstance(mixer, MemoryAsLayer):
        return mixer.between.weight
    assert isinstance(mixer, Gated)
    return mixer.norm_attention.weight


def _padded(x: Tensor) -> Tensor:
    """The first dimension to whole ``GATE_COLUMNS``."""
    missing = -x.shape[0] % GATE_COLUMNS
    return torch.cat([x, x.new_zeros(missing, *x.shape[1:])])


def _parts(weight: Tensor, compute: torch.dtype) -> Tensor:
    """fp32 as a sum of two numbers of the compute precision: products with operands of it are then
    exact to 2^-17."""
    if compute == weight.dtype:
        return weight.unsqueeze(0)
    high = weight.to(compute)
    return torch.stack([high, (weight - high).to(compute)])
