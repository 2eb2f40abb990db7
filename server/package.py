"""The installed package's version. Knows nothing else."""

from __future__ import annotations

from functools import cache
from importlib.metadata import PackageNotFoundError, version


@cache
def package_version() -> str:
    """The version the package was installed as, or that of a bare checkout."""
    try:
        return version("mnemosyne")
    except PackageNotFoundError:
        return "0.0.0+checkout"
