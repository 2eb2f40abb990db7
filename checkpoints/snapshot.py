"""A session's state as bytes, and back. Owns what a state file says of a state; knows no place."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass

import torch

from mnemosyne.checkpoints import format
from mnemosyne.engine.config import ModelConfig
from mnemosyne.engine.errors import NotFinite, SnapshotCorrupt, StateIncompatible
from mnemosyne.engine.pyramid import Pyramid
from mnemosyne.engine.state import GENERATED, INPUT, SessionState, check_layout, state_layout

PYRAMID = "pyramid"
"""The name beside those of the state's own tensors; nothing of it enters a computation, so it may be NaN."""


@dataclass(frozen=True)
class Manifest:
    """What a state file says of itself."""

    model_fingerprint: str
    numerics: dict[str, str]
    """Of the engine that computed the state. Another engine's differs: it goes on equal within a bound, not
    to the bit, and the caller says so."""
    position: int
    pending: int
    """Tokens after the last commit."""
    compute_dtype: torch.dtype
    """Of the tails, keys and values as they were stored, before any conversion."""
    created_at: int | None
    """Unix seconds, where the writer said them."""

    @property
    def tokens_seen(self) -> int:
        return self.position + self.pending


def dump_state(
    state: SessionState,
    *,
    model_fingerprint: str,
    numerics: Mapping[str, str],
    created_at: int | None = None,
) -> bytes:
    """A state file; equal arguments give equal bytes. Raises NotFinite: no file that can't be loaded."""
    for name, tensor in state.tensors.items():
        if not bool(torch.isfinite(tensor).all()):
            raise NotFinite(f"state tensor {name} holds a value that isn't finite")
    metadata = {
        "model_fingerprint": model_fingerprint,
        "numerics": json.dumps(dict(numerics), sort_keys=True, separators=(",", ":")),
        "position": str(state.position),
        "pending": json.dumps(state.pending, separators=(",", ":")),
        "kinds": state.kinds.hex(),
    }
    if created_at is not None:
        metadata["created_at"] = str(created_at)
    return format.encode(metadata, {**state.tensors, PYRAMID: torch.from_numpy(state.pyramid.array())})


def load_state(
    data: bytes,
    *,
    config: ModelConfig,
    dtype: torch.dtype,
    momentum: torch.dtype = torch.float32,
    model_fingerprint: str,
    device: torch.device | str = "cpu",
) -> tuple[SessionState, Manifest]:
    """The state in a file, for a model of ``config`` that computes in ``dtype`` and keeps ``momentum`` so.

    A file of other dtypes is converted; that the numerics differ is for the caller to see in the
    manifest. Raises SnapshotCorrupt, SnapshotUnsupported (a later format), StateIncompatible (other weights).
    """
    metadata, tensors = format.decode(data)
    found = metadata.get("model_fingerprint", "")
    if found != model_fingerprint:
        raise StateIncompatible(
            f"the state belongs to model {found}, and this is model {model_fingerprint}",
            state_model=found,
            model=model_fingerprint,
        )
    trace = tensors.pop(PYRAMID, None)
    try:
        stored = tensors["tails"].dtype
        numerics = json.loads(metadata["numerics"])
        pending = tuple(json.loads(metadata["pending"]))
        kinds = bytes.fromhex(metadata["kinds"])
        position = int(metadata["position"])
        created_at = int(metadata["created_at"]) if "created_at" in metadata else None
    except (KeyError, ValueError, TypeError) as error:
        raise SnapshotCorrupt(f"a field of the state file is missing or can't be read: {error}") from error
    _check_tokens(position, pending, kinds, config)
    # Momentum is fp32, or of the compute dtype where the file's writer kept it so.
    kept = tensors.get("momentum.0", tensors["tails"]).dtype
    kept = stored if kept == stored else torch.float32
    check_layout(tensors, state_layout(config, stored, momentum_dtype=kept))
    wanted = state_layout(config, dtype, momentum_dtype=momentum)
    state = SessionState(
        position=position,
        tensors={name: t.to(device=device, dtype=wanted[name][1]) for name, t in tensors.items()},
        pending=pending,
        kinds=kinds,
        pyramid=_pyramid(trace, position // config.chunk, config.layers),
    )
    return state, Manifest(model_fingerprint, numerics, position, len(pending), stored, created_at)


def _pyramid(stored: torch.Tensor | None, chunks: int, layers: int) -> Pyramid:
    """Raises SnapshotCorrupt unless these are the points of ``chunks`` chunks under a model of ``layers``."""
    shape = Pyramid.shape(layers)
    if stored is None or stored.dtype != torch.float32 or tuple(stored.shape) != shape:
        raise SnapshotCorrupt(f"the state file's pyramid isn't {shape} numbers of torch.float32")
    levels = stored.numpy()
    if (levels < 0).any():
        raise SnapshotCorrupt("the state file's pyramid holds a negative norm")
    return Pyramid.of(chunks, levels)


def _check_tokens(position: int, pending: tuple[object, ...], kinds: bytes, config: ModelConfig) -> None:
    """Raise SnapshotCorrupt unless these are a state's tokens under ``config``."""
    ids_ok = all(type(token) is int and 0 <= token < config.vocab_size for token in pending)
    ok = (
        position >= 0
        and position % config.chunk == 0
        and len(pending) <= config.chunk
        and (len(pending) > 0 or position == 0)
        and len(kinds) == len(pending)
        and set(kinds) <= {INPUT, GENERATED}
    )
    if not (ids_ok and ok):
        raise SnapshotCorrupt("the state file's position and unfinished tokens don't belong to this model")
