"""Messages as bytes on a stream: a 4-byte length, a JSON header, an 8-byte length, a raw payload;
little-endian.

Bytes fields, token ids and traces travel in the payload (ids as int32, of a chunk's trace every number as
float64, NaN for None), everything else in the header. Plain data only: what arrives is checked against the
message's declared types, and nothing but the messages listed here can be made of it. Knows no socket; a
reader is any function that gives exactly n bytes.
"""

from __future__ import annotations

import dataclasses
import json
import types
from collections.abc import Callable
from functools import cache, partial
from typing import Any, BinaryIO, Literal, Union, get_args, get_origin, get_type_hints

import numpy as np

from mnemosyne.engine import chunk_trace, messages
from mnemosyne.engine.chunk_trace import ChunkTraces
from mnemosyne.engine.errors import EngineError, RequestError
from mnemosyne.engine.ids import within
from mnemosyne.engine.messages import EngineInfo, Event, Request

Message = Request | Event | EngineInfo

MAX_HEADER = 1 << 24
"""Bytes; logit biases and log probabilities are the largest things in it."""
MAX_PAYLOAD = 1 << 32
"""Bytes; the state of the largest preset is a small part of it."""

_TYPES: dict[str, type[Any]] = {cls.__name__: cls for cls in get_args(Message)}
_HINTS = {cls: get_type_hints(cls) for cls in (*_TYPES.values(), messages.Sampling)}
_IDS = tuple[int, ...]


def encode(message: Message) -> bytes:
    """One frame. Raises RequestError for a token id beyond 32 bits, EngineError for a frame beyond the
    bounds."""
    hints = _HINTS[type(message)]
    fields: dict[str, Any] = {}
    parts: list[bytes] = []
    lengths: dict[str, int] = {}
    for field in dataclasses.fields(message):
        value = getattr(message, field.name)
        if isinstance(value, bytes):
            parts.append(value)
        elif hints[field.name] == _IDS:
            parts.append(_pack_ids(value, field.name))
        elif isinstance(value, ChunkTraces):
            parts.append(value.values.astype("<f8").tobytes())
        else:
            fields[field.name] = value
            continue
        lengths[field.name] = len(parts[-1])
    header = {"type": type(message).__name__, "fields": fields, "payload": lengths}
    head = json.dumps(header, default=_plain, separators=(",", ":")).encode()
    size = sum(map(len, parts))
    if len(head) > MAX_HEADER or size > MAX_PAYLOAD:
        raise EngineError(f"a message of {len(head)} + {size} bytes is larger than a frame may be")
    return b"".join([len(head).to_bytes(4, "little"), head, size.to_bytes(8, "little"), *parts])


def header_size(prefix: bytes) -> int:
    """Of the first 4 bytes of a frame."""
    return _bounded(prefix, MAX_HEADER)


def payload_size(prefix: bytes) -> int:
    """Of the 8 bytes after the header."""
    return _bounded(prefix, MAX_PAYLOAD)


def decode(head: bytes, payload: bytes) -> Message:
    """The message of a frame. Raises EngineError for whatever isn't one."""
    try:
        header = json.loads(head)
        cls, fields, lengths = _TYPES[header["type"]], header["fields"], header["payload"]
        hints = _HINTS[cls]
        start = 0
        values = {name: _builder(hints[name])(value) for name, value in fields.items()}
        for field, length in lengths.items():
            part = payload[start : start + length]
            if length < 0 or len(part) != length or field in fields:
                raise ValueError(f"{field} isn't in the payload")
            values[field] = _of_payload(hints[field], part)
            start += length
        if start != len(payload):
            raise ValueError(f"{len(payload) - start} bytes too many")
        message: Message = cls(**values)
        return message
    except (ValueError, KeyError, TypeError, AttributeError, OverflowError, RecursionError) as error:
        raise EngineError(f"a malformed message: {type(error).__name__}: {error}") from error


def read(stream: BinaryIO) -> Message | None:
    """The next message of a blocking stream, None at its end. Raises EngineError if it ends inside a
    frame."""
    prefix = stream.read(4)
    if not prefix:
        return None
    head = _exactly(stream, header_size(_whole(prefix, 4)))
    return decode(head, _exactly(stream, payload_size(_exactly(stream, 8))))


def _exactly(stream: BinaryIO, size: int) -> bytes:
    return _whole(stream.read(size), size)


def _whole(data: bytes, size: int) -> bytes:
    if len(data) != size:
        raise EngineError(f"the connection ended inside a message ({len(data)} of {size} bytes)")
    return data


def _bounded(prefix: bytes, most: int) -> int:
    size = int.from_bytes(prefix, "little")
    if size > most:
        raise EngineError(f"a malformed message: {size} bytes announced, at most {most} are allowed")
    return size


def _pack_ids(ids: tuple[int, ...], name: str) -> bytes:
    try:
        return within(ids, -(1 << 31), 1 << 31).astype("<i4").tobytes()
    except OverflowError as error:
        raise RequestError(f"a token id in {name} is far outside any vocabulary", param=name) from error


def _of_payload(hint: Any, part: bytes) -> Any:
    if hint == _IDS:
        return tuple(np.frombuffer(part, dtype="<i4").tolist())
    if hint is ChunkTraces:
        rows = np.frombuffer(part, dtype="<f8").reshape(-1, len(chunk_trace.FIELDS))
        found = ChunkTraces(rows.astype(np.float64))
        if not np.isfinite(found.column("position")).all():
            raise ValueError("a chunk's position isn't a number")
        return found
    return _builder(hint)(part)


def _plain(value: object) -> Any:
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return vars(value)
    return str(value)


@cache
def _builder(hint: Any) -> Callable[[Any], Any]:
    """What makes a value (of JSON, or from the payload) the declared type, and raises TypeError or ValueError
    if it isn't one. Made once a type."""
    if hint is Any:
        return lambda value: value
    if dataclasses.is_dataclass(hint):
        return _dataclass(hint, {name: _builder(kind) for name, kind in _HINTS[hint].items()})  # type: ignore[index]
    origin, args = get_origin(hint), get_args(hint)
    if origin is Literal:
        return partial(_one_of, args)
    if origin in (Union, types.UnionType):
        some = _builder(next(arg for arg in args if arg is not type(None)))
        return lambda value: None if value is None and type(None) in args else some(value)
    if origin is tuple:
        items = tuple(_builder(arg) for arg in args if arg is not Ellipsis)
        return partial(_tuple, items, Ellipsis in args)
    if origin is dict:
        key, item = args[0], _builder(args[1])
        return lambda value: {(int(k) if key is int else str(k)): item(v) for k, v in value.items()}
    return partial(_plain_value, hint)


def _dataclass(cls: Any, fields: dict[str, Callable[[Any], Any]]) -> Callable[[Any], Any]:
    def build(value: Any) -> Any:
        if not isinstance(value, dict):
            raise TypeError(f"a {cls.__name__} expected")
        return cls(**{name: fields[name](item) for name, item in value.items()})

    return build


def _one_of(choices: tuple[Any, ...], value: Any) -> Any:
    if value not in choices:
        raise ValueError(f"{value!r} is not one of {choices}")
    return value


def _tuple(items: tuple[Callable[[Any], Any], ...], many: bool, value: Any) -> tuple[Any, ...]:
    if not isinstance(value, list | tuple):
        raise TypeError("a list expected")
    if many:
        return tuple(map(items[0], value))
    return tuple(build(item) for build, item in zip(items, value, strict=True))


def _plain_value(cls: type[Any], value: Any) -> Any:
    if type(value) is cls:
        return value
    if cls is float and type(value) is int:
        return float(value)
    raise TypeError(f"a {cls.__name__} expected, not {type(value).__name__}")
