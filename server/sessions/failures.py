"""A failure as data, for events and for what is kept of a rejected document. Knows no HTTP."""

from __future__ import annotations

from typing import Any

from mnemosyne.engine import errors
from mnemosyne.engine.errors import MnemosyneError


def told(error: MnemosyneError) -> dict[str, Any]:
    """``code`` is the name of a class of ``engine.errors``, whatever finer class a store has of its own."""
    named = next(cls for cls in type(error).__mro__ if cls.__module__ == errors.__name__)
    return {**error.attributes, "code": named.__name__, "message": error.message}
