"""Other people's implementations, taken as they are published. Tests must not run without them."""

from __future__ import annotations

import importlib
import importlib.util
import warnings
from pathlib import Path
from types import ModuleType

import pytest


def titans_pytorch() -> ModuleType:
    """The module of its NeuralMemory."""
    with warnings.catch_warnings():
        # One of what it needs, assoc-scan, compiles a function at import in a way that torch is giving up.
        warnings.filterwarnings("ignore", "`torch.jit.script", DeprecationWarning)
        try:
            return importlib.import_module("titans_pytorch.neural_memory")
        except ModuleNotFoundError as missing:
            pytest.fail(f"titans-pytorch can't be imported ({missing}); `make test` installs it")


def fla_naive(folder: str) -> ModuleType:
    """``fla/ops/<folder>/naive.py``, plain torch, by its path: its packages start Triton when they are
    imported, and ask for a device."""
    package = importlib.util.find_spec("fla")
    places = package.submodule_search_locations if package else None
    if not places:
        pytest.fail("fla-core is not installed; `make test` installs it")
    path = Path(places[0]) / "ops" / folder / "naive.py"
    spec = importlib.util.spec_from_file_location(f"fla_{folder}_naive", path)
    assert spec is not None and spec.loader is not None and path.is_file(), f"fla-core has no {path}"
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
