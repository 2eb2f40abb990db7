"""Runs ``train_interpreted.py`` and ``train_chains_interpreted.py`` where triton is told to interpret."""

from __future__ import annotations

import pytest

from tests.kernels.triton.interpreter import passes_in_the_interpreter


@pytest.mark.interpreted("train_interpreted.py")
def test_the_kernels_of_a_training_step_in_the_interpreter(request: pytest.FixtureRequest) -> None:
    passes_in_the_interpreter(request.node)


@pytest.mark.interpreted("train_chains_interpreted.py")
def test_the_kernels_between_its_products_in_the_interpreter(request: pytest.FixtureRequest) -> None:
    passes_in_the_interpreter(request.node)
