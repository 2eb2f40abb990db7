"""Runs ``train_interpreted.py`` and ``train_chains_interpreted.py`` where triton is told to interpret."""

from __future__ import annotations

from pathlib import Path

from tests.kernels.triton.interpreter import passes_in_the_interpreter


def test_the_kernels_of_a_training_step_in_the_interpreter() -> None:
    passes_in_the_interpreter(Path(__file__).with_name("train_interpreted.py"))


def test_the_kernels_between_its_products_in_the_interpreter() -> None:
    passes_in_the_interpreter(Path(__file__).with_name("train_chains_interpreted.py"))
