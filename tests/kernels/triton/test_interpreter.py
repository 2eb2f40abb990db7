"""Runs ``interpreted.py`` where triton is told to interpret."""

from __future__ import annotations

import pytest

from tests.kernels.triton.interpreter import passes_in_the_interpreter


@pytest.mark.interpreted("interpreted.py")
def test_the_kernels_in_the_interpreter(request: pytest.FixtureRequest) -> None:
    passes_in_the_interpreter(request.node)
