"""Sessions with an open chunk for the kernels of decode, beside the reference's, in memory full of NaN."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from mnemosyne.engine.config import MemoryConfig, ModelConfig
from mnemosyne.engine.gpu.blob import BlobLayout, gpu_layout
from mnemosyne.engine.gpu.open_cache import BlobChunk, open_layout
from mnemosyne.engine.model import Titans
from mnemosyne.engine.open_chunk import GroupedChunk, OpenChunk
from mnemosyne.engine.state import SessionState

OWN_ROWS = ("keys", "values", "memory_keys", "memory_values", "inputs", "deltas", "rows")
"""What has a row for every token of a chunk, in its last dimension but one; ``rows`` in its last."""


def tiny(
    variant: str,
    *,
    dim: int = 64,
    head_dim: int = 32,
    layers: int = 2,
    gate: str = "default",
    window: int = 32,
    chunk: int = 16,
    **memory: object,
) -> ModelConfig:
    return ModelConfig(
        variant=variant,
        layers=layers,
        dim=dim,
        head_dim=head_dim,
        vocab_size=80,
        chunk=chunk,
        segment=2 * chunk,
        window=max(window, chunk),
        persistent=3,
        gate=gate,
        memory=MemoryConfig(**{"expansion": 2, "theta_max": 0.3, "alpha_max": 0.2, **memory}),
    )


def sessions(model: Titans, lengths: Sequence[tuple[int, int]], seed: int = 0) -> list[SessionState]:
    """For each pair a session that has committed so many chunks and has so many input tokens pending."""
    g = torch.Generator().manual_seed(seed)
    made = []
    for chunks, pending in lengths:
        count = chunks * model.config.chunk
        ids = torch.randint(0, model.config.vocab_size, (1, count + pending), generator=g)
        state = model.initial_state()
        if chunks:
            (state,), _ = model.prefill([state], ids[:, :count].to(model.device))
        made.append(
            SessionState(state.position, state.tensors, tuple(ids[0, count:].tolist()), b"\0" * pending)
        )
    return made


def unread_rows(config: ModelConfig, position: int) -> slice:
    """Rows of a state's keys that no token stands in."""
    if config.variant == "mac":
        return slice(position % config.segment, None)
    return slice(0, max(config.window - position, 0))


def blob_chunk(model: Titans, opened: OpenChunk) -> BlobChunk:
    """``opened`` by the reference, as the kernels take it; what nobody may read is NaN."""
    assert isinstance(opened, GroupedChunk)
    config, device = model.config, model.device
    committed, length = opened.committed, opened.length
    layout = gpu_layout(config, model.compute)
    state = nan_blob(layout, device)
    for name, view in layout.views(state).items():
        view.copy_(committed.tensors[name])
        if name in OWN_ROWS[:4]:
            view[:, :, unread_rows(config, committed.position)] = float("nan")
    layout = open_layout(config, model.compute)
    blob = nan_blob(layout, device)
    if length:
        for name, view in layout.views(blob).items():
            cached = torch.stack([layer[name][opened.row] for layer in opened.group])
            if name in OWN_ROWS[:4]:
                first = committed.position % config.segment if config.variant == "mac" else config.window
                cached = cached[:, :, first : first + config.chunk]
            if name == "rows":
                view[..., :length] = cached[..., :length]
            elif name.partition(".")[0] in OWN_ROWS:
                view[:, :, :length] = cached[:, :, :length]
            else:
                view.copy_(cached)
    return BlobChunk(committed, opened.tokens, opened.kinds, state, blob)


def nan_blob(layout: BlobLayout, device: torch.device) -> Tensor:
    return torch.full((layout.nbytes,), 255, dtype=torch.uint8, device=device)  # NaN in every float


def error(got: Tensor, want: Tensor) -> float:
    """The worst session's, relative, in the Frobenius norm; infinite where a number isn't finite."""
    difference = (got.double() - want.double()).norm(dim=-1) / want.double().norm(dim=-1)
    return float(difference.nan_to_num(nan=float("inf")).max())
