"""Who owns a session of a directory: a record with a fencing token, and whether its process still lives.

Knows the record and the processes of this machine; the caller holds the session's lock.
"""

from __future__ import annotations

import json
import os
from dataclasses import asdict, dataclass
from pathlib import Path

from mnemosyne.checkpoints import framing
from mnemosyne.checkpoints.files import replace
from mnemosyne.engine.errors import SnapshotCorrupt


@dataclass(frozen=True)
class Process:
    """A process, told from a later one with the same number."""

    boot: str
    """The machine's boot; empty where the system doesn't say."""
    namespace: str
    """Where the number counts: containers number their processes on their own."""
    pid: int
    started: str

    @classmethod
    def this(cls) -> Process:
        pid = os.getpid()
        return cls(_boot(), _namespace(), pid, _started(pid) or "")

    def is_gone(self) -> bool:
        """True only where that is certain: a process of another container counts as alive."""
        if self.boot != _boot():
            return True
        if self.namespace != _namespace():
            return False
        started = _started(self.pid)
        return started is None or started != self.started


@dataclass(frozen=True)
class LeaseRecord:
    owner: str = ""
    """Empty: nobody's."""
    fence: int = 0
    expires_at: float = 0.0
    process: Process | None = None

    def is_of(self, owner: str) -> bool:
        """Whether this very process holds it under that name."""
        return self.owner == owner and self.process == Process.this()

    def is_free(self, now: float) -> bool:
        return (
            not self.owner or self.expires_at <= now or (self.process is not None and self.process.is_gone())
        )


def read_lease(path: Path) -> LeaseRecord:
    """Fence 0 for a session that was never owned. Raises SnapshotCorrupt."""
    try:
        data = path.read_bytes()
    except FileNotFoundError:
        return LeaseRecord()
    try:
        values = json.loads(framing.decode(data, "the lease")[1])
        process = values.pop("process")
        return LeaseRecord(**values, process=Process(**process) if process else None)
    except (ValueError, TypeError, KeyError) as error:
        raise SnapshotCorrupt("the lease is corrupt") from error


def write_lease(path: Path, record: LeaseRecord) -> None:
    replace(path, framing.encode(record.fence, 1, json.dumps(asdict(record), sort_keys=True).encode()))


def _boot() -> str:
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    except OSError:
        return ""


def _namespace() -> str:
    try:
        return os.readlink("/proc/self/ns/pid")
    except OSError:
        return ""


def _started(pid: int) -> str | None:
    """When a process started, in the system's own unit; None where none lives, a zombie included."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return _alive_without_proc(pid)
    # The name stands in brackets and may hold spaces and brackets; the state follows it, the start is field
    # 22.
    fields = stat.rpartition(")")[2].split()
    return None if fields[0] in ("Z", "X") else fields[19]


def _alive_without_proc(pid: int) -> str | None:
    """Empty for a live process of a system without /proc (or one that hides others'), None for no process."""
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return None
    except PermissionError:
        pass
    return ""
