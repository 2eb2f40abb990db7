"""The bytes of a state file: a safetensors file in one canonical form (docs/snapshot-format.md).

Owns the header, the checksum and the versions of the format; knows names, dtypes and bytes, no session and no
model. The header is written here and not by the library, whose metadata has no fixed order: equal states are
equal bytes.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping

import torch
from safetensors import SafetensorError
from safetensors.torch import load
from torch import Tensor

from mnemosyne.engine.errors import SnapshotCorrupt, SnapshotUnsupported
from mnemosyne.engine.pyramid import Pyramid

FORMAT = "mnemosyne.state"
VERSION = 2
_DTYPES = {torch.float64: "F64", torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16"}

Metadata = dict[str, str]
Migration = Callable[[Metadata, dict[str, Tensor]], tuple[Metadata, dict[str, Tensor]]]


def _without_pyramid(metadata: Metadata, tensors: dict[str, Tensor]) -> tuple[Metadata, dict[str, Tensor]]:
    """Version 1 kept no trace of what was read: nothing is known of it."""
    if "memory.0" not in tensors:
        raise SnapshotCorrupt("the state file has no memory")
    blank = Pyramid.blank(len(tensors["memory.0"]))
    return metadata, tensors | {"pyramid": torch.from_numpy(blank.array())}


MIGRATIONS: dict[int, Migration] = {1: _without_pyramid}
"""From a version to the next one."""


def encode(metadata: Mapping[str, str], tensors: Mapping[str, Tensor]) -> bytes:
    """A state file of the present version; the same bytes for equal arguments."""
    parts = {name: _raw(tensor) for name, tensor in tensors.items()}
    entries: dict[str, object] = {}
    # Wide elements first, as the library does: each tensor then starts at a multiple of its element.
    order = sorted(tensors, key=lambda name: (-tensors[name].element_size(), name))
    end = 0
    for name in order:
        start, end = end, end + len(parts[name])
        shape, dtype = list(tensors[name].shape), _DTYPES[tensors[name].dtype]
        entries[name] = {"dtype": dtype, "shape": shape, "data_offsets": [start, end]}
    full = {**metadata, "format": FORMAT, "format_version": str(VERSION)}
    full["sha256"] = _checksum(full, tensors)
    return b"".join([_header(full, entries), *(parts[name] for name in order)])


def decode(data: bytes) -> tuple[Metadata, dict[str, Tensor]]:
    """Metadata and tensors, of the present version after any migration.

    Raises SnapshotCorrupt for bytes that ``encode`` can't have written, SnapshotUnsupported for a later
    version.
    """
    header, entries = _parse(data)
    version = header.get("format_version", "")
    if header.get("format") != FORMAT or not (
        version.isascii() and version.isdecimal() and len(version) < 19
    ):
        raise SnapshotCorrupt("this isn't a Mnemosyne state file")
    if int(version) > VERSION:
        raise SnapshotUnsupported(
            f"a state file of format {version}; this version of Mnemosyne reads up to {VERSION}",
            found=version,
            newest=VERSION,
        )
    try:
        tensors = load(data)
    except (SafetensorError, ValueError, TypeError, KeyError, RuntimeError) as error:
        raise SnapshotCorrupt(f"the state file is corrupt: {error}") from error
    claimed = header.get("sha256", "")
    # The header must be the canonical one, so that no bit of it is free to change unseen.
    if claimed != _checksum(header, tensors) or not data.startswith(_header(header, entries)):
        raise SnapshotCorrupt("the state file is corrupt: its bytes don't match its checksum")
    metadata, at = header, int(version)
    while at < VERSION:
        if at not in MIGRATIONS:
            raise SnapshotUnsupported(f"a state file of format {at} can't be read any more", found=str(at))
        metadata, tensors = MIGRATIONS[at](metadata, tensors)
        at += 1
    return metadata, tensors


def _header(metadata: Mapping[str, str], entries: Mapping[str, object]) -> bytes:
    text = json.dumps({"__metadata__": metadata, **entries}, sort_keys=True, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def _parse(data: bytes) -> tuple[Metadata, dict[str, object]]:
    length = int.from_bytes(data[:8], "little")
    if len(data) < 8 or length > len(data) - 8:
        raise SnapshotCorrupt("the state file is cut short")
    try:
        entries = json.loads(data[8 : 8 + length].decode())
        metadata = entries.pop("__metadata__")
        if all(isinstance(value, str) for value in metadata.values()):
            return metadata, entries
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError):
        pass
    raise SnapshotCorrupt("this isn't a Mnemosyne state file")


def _checksum(metadata: Mapping[str, str], tensors: Mapping[str, Tensor]) -> str:
    """SHA-256 over the metadata without the checksum, then each tensor in the order of names."""
    rest = {key: value for key, value in metadata.items() if key != "sha256"}
    digest = hashlib.sha256(json.dumps(rest, sort_keys=True, separators=(",", ":")).encode())
    for name in sorted(tensors):
        tensor = tensors[name]
        about = [name, _DTYPES.get(tensor.dtype, str(tensor.dtype)), list(tensor.shape)]
        digest.update(json.dumps(about, separators=(",", ":")).encode())
        digest.update(_raw(tensor))
    return digest.hexdigest()


def _raw(tensor: Tensor) -> bytes:
    flat = tensor.detach().cpu().contiguous().reshape(-1)
    return flat.view(torch.uint8).numpy().tobytes()
