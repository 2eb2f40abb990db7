"""Durable files: fsync, write-aside, locks between processes. Knows bytes and paths, no session."""

from __future__ import annotations

import errno
import fcntl
import os
import secrets
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from mnemosyne.engine.errors import StoreUnavailable

FILE_MODE = 0o600
FOLDER_MODE = 0o700
ASIDE = ".aside"
"""Suffix of a file that is being written and isn't valid yet."""
LOCK_SECONDS = 10.0
"""How long a lock is waited for before the store counts as unavailable."""


@contextmanager
def disk(what: str) -> Iterator[None]:
    """Turn every OSError (a full disk, a lost mount, a forbidden folder) into StoreUnavailable."""
    try:
        yield
    except OSError as error:
        reason = error.strerror or str(error)
        raise StoreUnavailable(f"can't {what}: {reason}", errno=error.errno) from error


def sync(fd: int) -> None:
    """Return when the file is on the disk, not in the drive's cache, where the system tells these apart."""
    full = getattr(fcntl, "F_FULLFSYNC", None)
    if full is not None:
        fcntl.fcntl(fd, full)
    else:
        os.fsync(fd)


def sync_folder(path: Path) -> None:
    """Make the names in a folder (what was created, renamed, removed) durable."""
    fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        sync(fd)
    finally:
        os.close(fd)


def make_folder(path: Path) -> None:
    path.mkdir(mode=FOLDER_MODE, exist_ok=True)


def write_at(fd: int, data: bytes, offset: int) -> None:
    """Write all of ``data``; a short write without an error is gone on with."""
    view = memoryview(data)
    while view:
        written = os.pwrite(fd, view, offset)
        if written == 0:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        view, offset = view[written:], offset + written


def write_new(path: Path, *parts: bytes) -> None:
    """Make a file that didn't exist, whole and on disk; the folder's entry isn't synced yet.

    No file on failure.
    """
    fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, FILE_MODE)
    try:
        offset = 0
        for part in parts:
            write_at(fd, part, offset)
            offset += len(part)
        sync(fd)
    except BaseException:
        with suppress(OSError):
            path.unlink()
        raise
    finally:
        os.close(fd)


def write_aside(path: Path, *parts: bytes) -> Path:
    """Write what shall become ``path`` beside it; returns the name to rename from."""
    aside = path.with_name(f"{path.name}.{secrets.token_hex(8)}{ASIDE}")
    write_new(aside, *parts)
    return aside


def publish(aside: Path, path: Path) -> None:
    """Rename a finished file into its place, durably."""
    try:
        os.replace(aside, path)
    except OSError:
        with suppress(OSError):
            aside.unlink()
        raise
    sync_folder(path.parent)


def replace(path: Path, *parts: bytes) -> None:
    """The file has the old or the new content at every moment, and the new one on return."""
    publish(write_aside(path, *parts), path)


def remove(path: Path) -> None:
    """Remove a file, durably; one that isn't there is fine."""
    with suppress(FileNotFoundError):
        path.unlink()
        sync_folder(path.parent)


def lock(path: Path, *, shared: bool = False) -> int:
    """Lock the file ``path`` against other threads and processes; closing the returned descriptor lets go.

    Raises FileNotFoundError when the file is gone, also when it went while waiting, and TimeoutError. The
    kernel lets go of the lock of a process that dies.
    """
    fd = os.open(path, os.O_RDWR | os.O_CLOEXEC)
    try:
        deadline = time.monotonic() + LOCK_SECONDS
        while True:
            try:
                fcntl.flock(fd, (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if time.monotonic() > deadline:
                    raise TimeoutError(errno.ETIMEDOUT, f"{path.name} stayed locked") from None
                time.sleep(0.001)
        if os.fstat(fd).st_ino != os.stat(path).st_ino:
            raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), str(path))
    except BaseException:
        os.close(fd)
        raise
    return fd


@contextmanager
def locked(path: Path) -> Iterator[int]:
    """Hold a lock alone; its file's descriptor is given."""
    fd = lock(path)
    try:
        yield fd
    finally:
        os.close(fd)
