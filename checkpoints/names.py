"""Names of sessions and documents as parts of paths and keys. Owns the check; knows no place."""

from __future__ import annotations

import hashlib
import re

from mnemosyne.engine.errors import DocumentNotFound, SessionNotFound, VersionNotFound

_ID = re.compile(r"[0-9A-Za-z_-]{1,64}")


def is_id(text: str) -> bool:
    return _ID.fullmatch(text) is not None


def session_name(session_id: str) -> str:
    """The id itself, safe in a path or key. Raises SessionNotFound: nothing has a name of another form."""
    if not is_id(session_id):
        raise SessionNotFound("no such session")
    return session_id


def document_name(document_id: str) -> str:
    """The id itself, safe in a path or key. Raises DocumentNotFound otherwise."""
    if not is_id(document_id):
        raise DocumentNotFound("no such document")
    return document_id


def version_name(version: int) -> str:
    """Decimal digits. Raises VersionNotFound for a negative number."""
    if version < 0:
        raise VersionNotFound(f"no version {version}")
    return str(version)


def hashed(text: str) -> str:
    """64 hex digits for a name of any form (a tenant, an idempotency key)."""
    return hashlib.sha256(text.encode()).hexdigest()
