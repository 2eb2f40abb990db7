"""What rows' sessions have read before: carried from step to step, restarted, and left out where asked."""

from __future__ import annotations

import dataclasses
import json

import numpy as np
import pytest
import torch

from mnemosyne.training.feed import draw, draw_before, sampler
from mnemosyne.training.history import History
from mnemosyne.training.settings import Settings
from mnemosyne.training.step import Step
from mnemosyne.training.train import build, train


def text(seed: int) -> torch.Tensor:
    return torch.randint(0, 4096, (3, 64), generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("variant", ["mag", "mac"])
def test_sessions_go_on_and_restart(variant: str, settings: Settings) -> None:
    model = build(dataclasses.replace(settings, variant=variant, depth=1))
    history = History(model, 3)
    history.read(text(1), torch.tensor([False, False, False]))
    history.read(text(2), torch.tensor([False, True, False]))
    # What attention and the convolutions see begins with every text; the memory goes on.
    both = model(text(1)).layers
    for layer, fresh in zip(both, model.initial_layers(3), strict=True):
        kept = {name for name in layer if name.startswith(("memory.", "momentum."))}
        layer |= {name: tensor for name, tensor in fresh.items() if name not in kept}
        if variant == "mac":
            layer["segment_memory.0"] = layer["memory.0"]
    both, anew = model(text(2), both).layers, model(text(2)).layers
    found = history.layers(torch.tensor([True, False, False]))
    for i, layer in enumerate(found):
        for name in ("memory.0", "momentum.0", *(("segment_memory.0",) if variant == "mac" else ())):
            kept = name.removeprefix("segment_")
            assert torch.equal(layer[name][0], model.initial_layers(3)[i][name][0])
            assert torch.equal(layer[name][1], anew[i][kept][1])
            assert torch.equal(layer[name][2], both[i][kept][2])
            assert not torch.equal(layer[name][2], layer[name][1])


def test_a_session_that_is_not_finite_begins_anew(settings: Settings) -> None:
    """It would take every step's gradient with it until it restarts, which may be millions of tokens."""
    model = build(dataclasses.replace(settings, depth=1))
    history = History(model, 3)
    none = torch.tensor([False, False, False])
    history.read(text(1), none)
    history._layers[-1]["momentum.0"][1, 0, 2, 3] = torch.inf
    found, fresh = history.layers(none), model.initial_layers(3)
    for i, layer in enumerate(found):
        for name in ("memory.0", "momentum.0"):
            assert torch.equal(layer[name][1], fresh[i][name][1])
            assert torch.equal(layer[name][[0, 2]], history._layers[i][name][[0, 2]])
    history.read(text(2), none)
    assert all(x.isfinite().all() for layer in history.layers(none) for x in layer.values())


def test_a_history_changes_what_a_row_is_read_with(settings: Settings) -> None:
    settings = dataclasses.replace(settings, theta_max=0.5, norm=False, depth=1)
    step, rows = Step(build(settings), settings), sampler(settings, 1)
    initial = step.model.blocks[0].mixer.memory.initial[0]
    batch, before = draw(rows, 512, 128, 0.0), draw_before(rows, 4, 128, 0.5, 1000)
    assert before.tokens.shape == batch.tokens.shape and before.begins.dtype == before.restarts.dtype == bool
    found = []
    for begins in (True, False, False):
        step(batch, 0.0, before._replace(begins=np.full(4, begins), restarts=np.full(4, False)))
        assert initial.grad is not None and bool((initial.grad != 0).any()) == begins
        found.append(step.read()["loss"])
    step(batch, 0.0)
    assert found[0] == step.read()["loss"]
    assert len(set(found)) == 3  # the third read more than the second


def test_a_run_with_histories(settings: Settings) -> None:
    train(dataclasses.replace(settings, minutes=0.03, history=0.5))
    assert json.loads((settings.out / "run.json").read_text())["step"] > 0
