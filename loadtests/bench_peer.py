"""titans-pytorch beside this model: the same vocabulary, as many parameters, random weights, one precision.

The peer is its MemoryAsContextTransformer with heads of 64, segments and memory chunks of 64, the depth of
this model's memory, one residual stream, and otherwise its own defaults, which keep the inner gradient at the
initial weights; it makes the logits of the last position alone. All of that is in its favour. Its prefill is
one call without a state; the only call that carries a state takes one token. Here both are ``Titans.prefill``
in super-chunks, each on the state of the one before, timed in turns with the peer.
"""

from __future__ import annotations

import importlib
import importlib.metadata
import statistics
import time
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from bench_machine import THREADS
from bench_model import SUPER_CHUNK, load_model
from bench_report import CheckFailed, Row, row
from torch import Tensor, nn

from mnemosyne.engine.config import ModelConfig
from mnemosyne.engine.model import Titans
from mnemosyne.engine.state import SessionState

NAME, VERSION = "titans-pytorch", "0.5.5"
HEAD, SEGMENT, STEP_CONTEXT = 64, 64, 1024
NEAR = 0.05
PREFILL_AIM, STEP_AIM = 2.0, 50.0


def why_missing() -> str | None:
    """Why the peer can't be measured here; None where it can."""
    try:
        found = importlib.metadata.version(NAME)
        importlib.import_module("titans_pytorch")
    except Exception as error:  # whatever an import of somebody else's code may raise
        return f"{NAME} {VERSION} can't be used here ({type(error).__name__}: {error})"
    return None if found == VERSION else f"{NAME} is {found}, not {VERSION}"


@dataclass(frozen=True)
class Shape:
    dim: int
    depth: int
    parameters: int


def _build(config: ModelConfig, dim: int, depth: int) -> nn.Module:
    library, heads = importlib.import_module("titans_pytorch"), dim // HEAD
    memory = library.MemoryMLP(
        HEAD, depth=config.memory.depth, expansion_factor=float(config.memory.expansion)
    )
    peer: nn.Module = library.MemoryAsContextTransformer(
        num_tokens=config.vocab_size,
        dim=dim,
        depth=depth,
        segment_len=SEGMENT,
        heads=heads,
        dim_head=HEAD,
        num_persist_mem_tokens=config.persistent,
        num_longterm_mem_tokens=0,
        neural_memory_segment_len=SEGMENT,
        num_residual_streams=1,
        neural_memory_model=memory,
        neural_memory_kwargs={"dim_head": HEAD, "heads": heads, "momentum": True, "qk_rmsnorm": True},
    )
    return peer


def peer_shape(config: ModelConfig, parameters: int) -> Shape:
    """Of the shapes with as many parameters within 5 %, the one whose dim is nearest; the nearest of all
    where there is none."""
    shapes = []
    for dim in range(HEAD, 2 * config.dim + 1, HEAD):
        with torch.device("meta"):
            two, three = (sum(p.numel() for p in _build(config, dim, n).parameters()) for n in (2, 3))
        layer = three - two  # every layer after the first has the same
        depth = max(2, round((parameters - two) / layer) + 2)
        shapes.append(Shape(dim, depth, two + (depth - 2) * layer))

    def rank(shape: Shape) -> tuple[bool, float]:
        off = abs(shape.parameters / parameters - 1)
        return off > NEAR, off if off > NEAR else abs(shape.dim - config.dim)

    return min(shapes, key=rank)


def measure_peer(
    checkpoint: Path, tokens: int, steps: int, rounds: int
) -> tuple[dict[str, Any] | None, list[Row]]:
    """``rounds`` turns of each, in both precisions. Raises CheckFailed."""
    missing = why_missing()
    if missing is not None:
        return None, [Row(f"left out: {missing}", "")]
    torch.set_num_threads(THREADS)
    ours = load_model(checkpoint, torch.float32)
    shape = peer_shape(ours.config, ours.parameter_count())
    off = shape.parameters / ours.parameter_count() - 1
    name = f"{NAME} {VERSION}, dim {shape.dim}, {shape.depth} layers"
    rows = [
        row("our parameters", ours.parameter_count(), "{:,}"),
        Row(f"parameters of {name}", f"{shape.parameters:,} ({off:+.1%})", "± 5%", abs(off) <= NEAR),
    ]
    result: dict[str, Any] = {
        "peer": {"name": NAME, "version": VERSION, "parameters": shape.parameters}
        | {"dim": shape.dim, "depth": shape.depth},
        "parameters": ours.parameter_count(),
        "prefill_tokens": tokens,
    }
    for dtype in (torch.float32, torch.bfloat16):
        precision = str(dtype).removeprefix("torch.")
        result[precision], more = _measure(
            precision,
            load_model(checkpoint, dtype),
            _peer(ours.config, shape, dtype),
            tokens,
            steps,
            rounds,
        )
        rows += more
    return result, rows


def _peer(config: ModelConfig, shape: Shape, dtype: torch.dtype) -> nn.Module:
    torch.manual_seed(0)
    peer = _build(config, shape.dim, shape.depth).to(dtype).eval().requires_grad_(False)
    logits = peer.get_submodule("to_logits")
    logits.register_forward_pre_hook(lambda _, inputs: (inputs[0][:, -1:],))
    return peer


@torch.inference_mode()
def _measure(
    precision: str, ours: Titans, peer: nn.Module, tokens: int, steps: int, rounds: int
) -> tuple[dict[str, float], list[Row]]:
    ids = torch.randint(ours.config.vocab_size, (1, tokens), generator=torch.Generator().manual_seed(0))
    _check(ours, peer, ids[:, : 2 * SUPER_CHUNK * ours.config.chunk])
    mine: list[float] = []
    prefill: list[float] = []
    carried: list[float] = []
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the peer's own
        for _ in range(rounds):
            began = time.perf_counter()
            _prefill(ours, ids)
            mine.append(tokens / (time.perf_counter() - began))
            began = time.perf_counter()
            peer(ids, disable_flex_attn=True, return_cache=True)
            prefill.append(tokens / (time.perf_counter() - began))
            carried.append(_one_by_one(peer, ids[:, : STEP_CONTEXT + steps], steps))
    ours_speed, theirs, stepping = (statistics.median(each) for each in (mine, prefill, carried))
    result = {
        "tokens_per_second": round(ours_speed, 1),
        "peer_prefill_tokens_per_second": round(theirs, 1),
        "peer_carrying_tokens_per_second": round(stepping, 2),
        "prefill_ratio": round(ours_speed / theirs, 2),
        "carrying_ratio": round(ours_speed / stepping, 1),
    }
    rows = [
        row(f"{precision}: our prefill of {tokens:,} tokens, tokens/s", ours_speed, "{:,.0f}"),
        row("    the peer's in one call, tokens/s", theirs, "{:,.0f}"),
        row("    ratio", ours_speed / theirs, "{:.2f}", PREFILL_AIM),
        row("    the peer carrying its state, tokens/s", stepping, "{:,.1f}"),
        row("    ratio", ours_speed / stepping, "{:.1f}", STEP_AIM),
    ]
    return result, rows


def _prefill(model: Titans, ids: Tensor, chunks: int = SUPER_CHUNK) -> SessionState:
    state = model.initial_state()
    for piece in ids.split(chunks * model.config.chunk, 1):
        (state,), _ = model.prefill([state], piece)
    return state


def _one_by_one(peer: nn.Module, ids: Tensor, steps: int) -> float:
    """Tokens a second of the last ``steps`` tokens, each in a call with the state of the one before."""
    _, cache = peer(ids[:, :-steps], disable_flex_attn=True, return_cache=True)
    began = time.perf_counter()
    for end in range(ids.shape[1] - steps + 1, ids.shape[1] + 1):
        _, cache = peer(ids[:, :end], disable_flex_attn=True, cache=cache, return_cache=True)
    return steps / (time.perf_counter() - began)


def _check(ours: Titans, peer: nn.Module, ids: Tensor) -> None:
    """Super-chunks and single chunks must end in the same bits, and the peer's numbers be finite."""
    if _prefill(ours, ids).digest() != _prefill(ours, ids, chunks=1).digest():
        raise CheckFailed("peer: our state depends on how many chunks a call commits")
    logits, _ = peer(ids, disable_flex_attn=True, return_cache=True)
    if not bool(torch.isfinite(logits).all()):
        raise CheckFailed("peer: its logits aren't finite")
