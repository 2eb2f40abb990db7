"""Who asks. Owns API keys and the tenant each stands for; knows no route, session or quota."""

from __future__ import annotations

import hashlib
import hmac
import json
import logging
import re
from pathlib import Path

from mnemosyne.engine.errors import ConfigError
from mnemosyne.server.errors import Unauthenticated

log = logging.getLogger("mnemosyne.server")
DEFAULT_TENANT = "default"
SHA256_HEX = re.compile(r"^[0-9a-f]{64}$")


class KeyRing:
    """The keys file: SHA-256 of a key (hex) -> tenant. Read again when it changes, so that keys rotate."""

    def __init__(self, path: Path | None) -> None:
        self._path = path
        self._stamp: tuple[int, int] | None = None
        self._tenants: dict[str, str] = {}
        if path is not None:
            self._read(path)

    @property
    def tenants(self) -> list[str]:
        """Every tenant that has a key."""
        return sorted(set(self._tenants.values())) if self._path is not None else [DEFAULT_TENANT]

    def tenant(self, authorization: str | None) -> str:
        """The tenant of an ``Authorization`` header. Raises Unauthenticated; without a keys file anyone is
        one."""
        if self._path is None:
            return DEFAULT_TENANT
        self._refresh(self._path)
        scheme, _, key = (authorization or "").partition(" ")
        if scheme.lower() != "bearer" or not key.strip():
            raise Unauthenticated("this server needs a key: send it as 'Authorization: Bearer KEY'")
        given = hashlib.sha256(key.strip().encode()).hexdigest()
        found = None
        for known, tenant in self._tenants.items():
            if hmac.compare_digest(known, given):
                found = tenant
        if found is None:
            raise Unauthenticated("this key isn't known")
        return found

    def _refresh(self, path: Path) -> None:
        try:
            stat = path.stat()
            if (stat.st_mtime_ns, stat.st_size) != self._stamp:
                self._read(path)
        except (OSError, ConfigError) as error:
            log.error("the keys file can't be read again, the keys of before stay: %s", error)

    def _read(self, path: Path) -> None:
        try:
            stat = path.stat()
            content = json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise ConfigError(f"can't read the keys file {path}: {error}") from error
        self._stamp = (stat.st_mtime_ns, stat.st_size)
        if not isinstance(content, dict) or not all(isinstance(v, str) and v for v in content.values()):
            raise ConfigError(f"the keys file {path} must be one JSON object of hash: tenant")
        wrong = [key for key in content if not SHA256_HEX.match(key)]
        if wrong:
            raise ConfigError(
                f"the keys file {path} has {len(wrong)} key(s) that aren't a SHA-256 in small hex digits"
            )
        self._tenants = content
