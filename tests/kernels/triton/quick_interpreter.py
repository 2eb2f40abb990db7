"""Makes triton's interpreter a third faster: a pytest plugin (``interpreter.py``), for a process that
interprets."""

from __future__ import annotations

import inspect
from functools import cache

from triton import language as tl
from triton.runtime import interpreter


@cache
def builtins_of(package: object) -> list[str]:
    return [name for name, member in inspect.getmembers(package) if tl.core.is_builtin(member)]


def patch_builtin(package: object, builder: object, scope: object) -> None:
    """As the interpreter's own, which looks through all of ``triton.language`` at every call."""
    for name in builtins_of(package):
        member = getattr(package, name)
        if tl.core.is_builtin(member):
            interpreter._patch_attr(package, name, member, builder, scope)


interpreter._patch_builtin = patch_builtin
