"""Who may import whom: kernels <- engine <- server, and nothing that serves imports training."""

from __future__ import annotations

import sys

import pytest

ALLOWED_FIRST_PARTY = {
    "kernels": ("mnemosyne.kernels",),
    "engine": ("mnemosyne.engine", "mnemosyne.kernels"),
    "checkpoints": (
        "mnemosyne.checkpoints",
        "mnemosyne.engine.state",
        "mnemosyne.engine.pyramid",
        "mnemosyne.engine.config",
        "mnemosyne.engine.errors",
    ),
    "server": ("mnemosyne.server", "mnemosyne.engine", "mnemosyne.checkpoints"),
    "training": ("mnemosyne.training", "mnemosyne.engine", "mnemosyne.kernels", "mnemosyne.checkpoints"),
}
PORTABLE = {"torch", "triton", "numpy", "safetensors", "tokenizers"}
ALLOWED_THIRD_PARTY = {
    "kernels": PORTABLE - {"safetensors", "tokenizers"},
    "engine": PORTABLE - {"tokenizers"},
    "checkpoints": PORTABLE | {"redis"},
    "training": PORTABLE | {"httpx", "matplotlib"},
}


EVALUATIONS = "server/cli/eval.py"
"""The command that measures: beside what serves, not of it, and training comes in only when it runs."""


def is_within(name: str, prefixes: tuple[str, ...]) -> bool:
    return any(name == prefix or name.startswith(prefix + ".") for prefix in prefixes)


@pytest.mark.parametrize("folder", ALLOWED_FIRST_PARTY)
def test_first_party_imports_follow_the_directions(
    folder: str, imports: dict[str, dict[str, set[str]]]
) -> None:
    assert imports[folder], f"no Python file in {folder}/"
    wrong = {
        (file, name)
        for file, names in imports[folder].items()
        for name in names
        if is_within(name, ("mnemosyne",)) and not is_within(name, ALLOWED_FIRST_PARTY[folder])
    }
    if folder == "server":
        wrong = {(f, n) for f, n in wrong if f != EVALUATIONS or not is_within(n, ("mnemosyne.training",))}
    assert not wrong


@pytest.mark.parametrize("folder", ALLOWED_THIRD_PARTY)
def test_a_machine_with_only_torch_can_import_it(
    folder: str, imports: dict[str, dict[str, set[str]]]
) -> None:
    wrong = {
        (file, top)
        for file, names in imports[folder].items()
        for top in {name.partition(".")[0] for name in names}
        if top != "mnemosyne"
        and top not in sys.stdlib_module_names
        and top not in ALLOWED_THIRD_PARTY[folder]
    }
    assert not wrong


def test_redis_is_known_in_one_place_of_checkpoints(imports: dict[str, dict[str, set[str]]]) -> None:
    users = [f for f, names in imports["checkpoints"].items() if any(is_within(n, ("redis",)) for n in names)]
    assert all("redis" in file for file in users), users


def test_matplotlib_is_known_in_one_module_of_training(imports: dict[str, dict[str, set[str]]]) -> None:
    users = {
        f for f, names in imports["training"].items() if any(is_within(n, ("matplotlib",)) for n in names)
    }
    assert users == {"training/experiments/figures.py"}


def test_nothing_is_imported_by_its_bare_folder_name(imports: dict[str, dict[str, set[str]]]) -> None:
    wrong = {
        (file, name)
        for files in imports.values()
        for file, names in files.items()
        for name in names
        if name.partition(".")[0] in imports
    }
    assert not wrong


def test_no_pickle_anywhere(imports: dict[str, dict[str, set[str]]]) -> None:
    wrong = {
        (file, name)
        for files in imports.values()
        for file, names in files.items()
        for name in names
        if name.partition(".")[0] in {"pickle", "marshal", "shelve", "dill", "cloudpickle"}
    }
    assert not wrong
