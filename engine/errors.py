"""The one error tree. Owns every failure that Mnemosyne names; knows no HTTP status and no transport.

MnemosyneError
├── ConfigError               a configuration, checkpoint or setting that can't be used
├── RequestError              the caller asked for something that can't be done (``param`` names the field)
│   ├── UnknownModel          no such model is served
│   └── ContextTooLong        one request is longer than a request may be
├── CapacityError             nothing is wrong, there is no room now; retry later
│   ├── QueueFull             too much work is queued
│   ├── StatesFull            the engine holds as many states as it has room for
│   ├── DeviceFull            the device's memory isn't enough for this session's step now
│   └── QuotaExceeded         this tenant's limit is reached
├── SessionError
│   ├── SessionNotFound       unknown, erased, or another tenant's: the caller can't tell which
│   ├── SessionBusy           another writer (a document, a turn) holds the session
│   ├── VersionNotFound       that version was never made, or retention took it
│   ├── VersionMismatch       ``If-Match`` named a version that is not the newest
│   ├── OffsetMismatch        an upload went on at the wrong byte
│   ├── DocumentNotFound
│   └── DocumentRejected      the document can't be read (not UTF-8, wrong length, wrong checksum)
├── IdempotencyError
│   ├── IdempotencyMismatch   the key was used with another body
│   └── IdempotencyRunning    the first request under this key still runs
├── SnapshotError
│   ├── SnapshotCorrupt       truncated, bit-flipped, or not a snapshot
│   ├── SnapshotUnsupported   a format of the future
│   └── StateIncompatible     a state of other weights
├── StoreError
│   ├── StoreUnavailable      the store can't be reached or written; nothing was acknowledged
│   └── LeaseLost             another owner holds the session; a stale owner's write was refused
└── EngineError
    ├── EngineUnavailable     the engine process is gone or not ready
    ├── UnknownHandle         a state that the engine doesn't hold: never bound, released, lost in a restart
    ├── NotFinite             a state or logit stopped being a finite number
    └── Cancelled             the request was cancelled
"""

from __future__ import annotations


class MnemosyneError(Exception):
    """Base of every named failure. ``message`` is for the person who reads the answer."""

    retryable: bool = False
    """Whether the same call may succeed later without being changed."""

    def __init__(self, message: str, **attributes: object) -> None:
        super().__init__(message)
        self.message = message
        self.attributes = attributes

    @property
    def param(self) -> str | None:
        """The field of the request that is at fault, where one is."""
        value = self.attributes.get("param")
        return value if isinstance(value, str) else None


class ConfigError(MnemosyneError): ...


class RequestError(MnemosyneError): ...


class UnknownModel(RequestError): ...


class ContextTooLong(RequestError): ...


class CapacityError(MnemosyneError):
    retryable = True


class QueueFull(CapacityError): ...


class StatesFull(CapacityError): ...


class DeviceFull(CapacityError): ...


class QuotaExceeded(CapacityError): ...


class SessionError(MnemosyneError): ...


class SessionNotFound(SessionError): ...


class SessionBusy(SessionError):
    retryable = True


class VersionNotFound(SessionError): ...


class VersionMismatch(SessionError): ...


class OffsetMismatch(SessionError): ...


class DocumentNotFound(SessionError): ...


class DocumentRejected(SessionError): ...


class IdempotencyError(MnemosyneError): ...


class IdempotencyMismatch(IdempotencyError): ...


class IdempotencyRunning(IdempotencyError):
    retryable = True


class SnapshotError(MnemosyneError): ...


class SnapshotCorrupt(SnapshotError): ...


class SnapshotUnsupported(SnapshotError): ...


class StateIncompatible(SnapshotError): ...


class StoreError(MnemosyneError):
    retryable = True


class StoreUnavailable(StoreError): ...


class LeaseLost(StoreError): ...


class EngineError(MnemosyneError): ...


class EngineUnavailable(EngineError):
    retryable = True


class UnknownHandle(EngineError): ...


class NotFinite(EngineError): ...


class Cancelled(EngineError): ...
