"""What a model must at least do for a token, by count, and how long that takes at measured rates. Pure
arithmetic over a configuration: knows no device, no tensor and no clock.

A product of m x k by k x n counts 2 m k n operations. Notation: d = dim, f = width of the SwiGLU, V =
vocabulary, H heads of d_h = d / H, N_p = persistent tokens, C = segment, W = window, L = chunk; a head's
memory has D matrices of P weights together, P' of them in all matrices but the first (D = 2 and width h:
P = 2 d_h h and P' = d_h h), and sum(in + out) = D (d_h + h) numbers go in and out of its products. What is
causal counts half of its length. Everything elementwise is left out, norms, convolutions and the decays of a
chunk too.

What is counted is the block of spec/memory.md as the engine must compute it, not an implementation: nothing
is recomputed, no tile is padded, every number is moved once. A limit is the larger of operations over the
GEMM rate and bytes over the copy rate, both measured in the same run.
"""

from __future__ import annotations

from dataclasses import dataclass

from mnemosyne.engine.config import ModelConfig

FP32 = 4
PROJECTIONS = {"mac": 12, "mag": 9, "mal": 9, "lmm": 5}
"""Matrices of d x d in a layer: q, k, v, output gate and output of the memory; attention's q, k, v and output
besides; MAC also has q' and makes keys and values of h."""


@dataclass(frozen=True)
class Part:
    """One term of a count, over all layers."""

    name: str
    formula: str
    """Of one layer, in the letters above."""
    value: int


@dataclass(frozen=True)
class Work:
    operations: float
    nbytes: float


@dataclass(frozen=True)
class Rates:
    """Measured; operations and bytes a second."""

    gemm: float
    copy: float
    """Within the device's memory, bytes read and written counted both."""
    host: float
    """From pinned host memory to the device."""


def seconds(work: Work, rates: Rates) -> float:
    """The least time that the work can take."""
    return max(work.operations / rates.gemm, work.nbytes / rates.copy)


def explained(work: Work, rates: Rates) -> str:
    """The quotient that ``seconds`` is, in words."""
    if work.operations / rates.gemm >= work.nbytes / rates.copy:
        return f"{_short(work.operations)}FLOP / {_short(rates.gemm)}FLOP/s"
    return f"{_short(work.nbytes)}B / {_short(rates.copy)}B/s"


def ingest_operations(config: ModelConfig) -> list[Part]:
    """Of one ingested token. No logits are made of it."""
    weights, later, widths = _memory(config)
    H, L = config.heads, config.chunk
    return [
        *_dense(config),
        *_attention(config),
        *_recall(config),
        _part(config, "update", "H (2 P + 2 P' + 4 P)", H * (6 * weights + 2 * later)),
        _part(config, "read", "H (4 P + 2 (L / 2) sum(in + out))", H * (4 * weights + L * widths)),
    ]


def ingest(config: ModelConfig, operand: int, sessions: int = 1) -> Work:
    """Of one ingested token while ``sessions`` read; ``operand`` is the bytes of a dense weight.

    MAC can't begin a segment before its memory has the one before, so a diagonal of layers has one segment of
    each session, and reads all weights and reads and writes all of M, S and M* for it. The other forms may
    take as many tokens at once as there are: nothing is counted for them.
    """
    operations = sum(part.value for part in ingest_operations(config))
    moved = 0.0
    if config.variant == "mac":
        weights, _, _ = _memory(config)
        state = (2 * FP32 + operand) * weights * config.heads * config.layers
        moved = (_weight_bytes(config, operand) / sessions + 2 * state) / config.segment
    return Work(operations, moved)


def decode_operations(config: ModelConfig) -> list[Part]:
    """Of one decoded token, without what committing its chunk costs later."""
    weights, later, widths = _memory(config)
    H, L = config.heads, config.chunk
    return [
        *_dense(config),
        *_attention(config),
        *_recall(config),
        _part(config, "inner gradient", "H (2 P + 2 P')", H * (2 * weights + 2 * later)),
        _part(config, "read", "H (4 P + 2 (L / 2) sum(in + out))", H * (4 * weights + L * widths)),
        Part("logits", "2 V d, once", 2 * config.vocab_size * config.dim),
    ]


def decode_bytes(config: ModelConfig, operand: int) -> tuple[list[Part], list[Part]]:
    """Of one step: what is read once for all sessions, and what is read of each. ``operand`` is the bytes of
    a number in the precision of the dense products, written b below."""
    weights, _, widths = _memory(config)
    d, H, L = config.dim, config.heads, config.chunk
    shared = [
        Part("weights", "b (n d^2 + 3 d f) + 4 (3 H D d)", _weight_bytes(config, operand)),
        Part("head", "4 V d, once", FP32 * config.vocab_size * d),
    ]
    mac = config.variant == "mac"
    copies, memories = (2, "M*, M and S") if mac else (1, "M and S")
    held = FP32 * copies + operand
    of_each = [_part(config, memories, f"(4 * {copies} + b) H P", held * H * weights)]
    if mac:
        rows = 4 * (config.segment // 2) * d * operand
        of_each.append(_part(config, "keys and values of x and h", "b 4 d (C / 2)", rows))
    elif config.variant != "lmm":
        of_each.append(_part(config, "keys and values", "b 2 d W", 2 * config.window * d * operand))
    if config.variant != "lmm":
        persistent = _part(config, "persistent tokens", "b 2 d N_p", 2 * config.persistent * d * operand)
        shared.append(persistent)
    of_each.append(_part(config, "open chunk", "b H (L / 2) sum(in + out)", H * L // 2 * widths * operand))
    return shared, of_each


def decode(config: ModelConfig, operand: int, batch: int) -> Work:
    """Of one step in which ``batch`` sessions decode a token each, without the commits."""
    shared, of_each = decode_bytes(config, operand)
    moved = sum(part.value for part in shared) + batch * sum(part.value for part in of_each)
    return Work(batch * sum(part.value for part in decode_operations(config)), moved)


def _memory(config: ModelConfig) -> tuple[int, int, int]:
    """P, P' and sum(in + out) of one head."""
    shapes = config.memory_shapes
    weights = [out * inn for out, inn in shapes]
    return sum(weights), sum(weights[1:]), sum(map(sum, shapes))


def _part(config: ModelConfig, name: str, formula: str, of_a_layer: int) -> Part:
    return Part(name, formula, config.layers * of_a_layer)


def _dense(config: ModelConfig) -> list[Part]:
    d, n = config.dim, PROJECTIONS[config.variant]
    return [
        _part(config, "projections", f"2 * {n} d^2", 2 * n * d * d),
        _part(config, "SwiGLU", "2 * 3 d f", 6 * d * config.ffn),
        _part(config, "gates", "2 * 3 H D d", 6 * config.heads * config.memory.depth * d),
    ]


def _attention(config: ModelConfig) -> list[Part]:
    d, p = config.dim, config.persistent
    if config.variant == "lmm":
        return []
    if config.variant == "mac":
        formula, keys = "4 d (N_p + 2 (C / 2))", p + config.segment
    else:
        formula, keys = "4 d (N_p + W)", p + config.window
    return [_part(config, "attention", formula, 4 * d * keys)]


def _recall(config: ModelConfig) -> list[Part]:
    weights, _, _ = _memory(config)
    return [_part(config, "recall", "H 2 P", config.heads * 2 * weights)] if config.variant == "mac" else []


def _weight_bytes(config: ModelConfig, operand: int) -> int:
    """Of the blocks, as they are read for a token."""
    d, n = config.dim, PROJECTIONS[config.variant]
    dense = n * d * d + 3 * d * config.ffn
    return config.layers * (operand * dense + FP32 * 3 * config.heads * config.memory.depth * d)


def _short(value: float) -> str:
    for size, name in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if value >= size:
            return f"{value / size:.3g} {name}"
    return f"{value:.3g} "
