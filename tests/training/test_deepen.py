"""One more layer for a trained model."""

from __future__ import annotations

import dataclasses
import json
import sys
from pathlib import Path

import pytest
import torch

from mnemosyne.engine.config import Variant
from mnemosyne.engine.model import Titans
from mnemosyne.training import deepen, shards
from mnemosyne.training.settings import Settings
from mnemosyne.training.step import Step
from mnemosyne.training.train import build, train


@pytest.mark.parametrize("variant", ["mag", "mac", "mal", "lmm"])
def test_the_new_layer_changes_nothing_and_the_first_learns_nothing(
    settings: Settings, variant: Variant
) -> None:
    shallow = Titans(dataclasses.replace(settings.model, variant=variant, layers=2))
    tokens = torch.randint(0, shallow.config.vocab_size, (1, 256), generator=torch.Generator().manual_seed(1))
    deep = deepen.deeper(shallow)
    assert len(deep.blocks) == 3
    with torch.no_grad():
        for parameter in (
            shallow.blocks[0].mixer.memory.gate_weight,
            shallow.blocks[0].mixer.memory.gate_bias,
        ):
            parameter.copy_(deep.get_parameter(name_of(shallow, parameter)))
        own, made = shallow(tokens), deep(tokens)
    torch.testing.assert_close(made.hidden, own.hidden)
    assert made.gates[0].theta.max() == 0 < made.gates[1].theta.max()
    torch.testing.assert_close(
        made.layers[0]["memory.0"][0], deep.blocks[0].mixer.memory.get_parameter("initial.0"), rtol=0, atol=0
    )


def name_of(model: Titans, parameter: torch.nn.Parameter) -> str:
    return next(name for name, other in model.named_parameters() if other is parameter)


def test_a_run_goes_on_with_the_layer_and_teaches_it(
    settings: Settings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    step = Step(build(settings), settings)
    facts = {"step": 7, "noise": 3.0, "model": dataclasses.asdict(settings.model)}
    shards.save(tmp_path / "run", step.model, step.optimizer, facts)
    names = ["deepen", "--run", str(tmp_path / "run"), "--out", str(tmp_path / "deeper")]
    monkeypatch.setattr(sys, "argv", names)
    deepen.main()
    assert json.loads((tmp_path / "deeper" / "run.json").read_text()) == {"step": 7, "noise": 0.0}
    more = dataclasses.replace(settings, layers=settings.layers + 1)
    model = build(more)
    shards.load(tmp_path / "deeper", model)
    new = model.blocks[settings.layers]
    assert new.ffn.down.weight.abs().max() == 0
    model(torch.arange(128).view(1, -1)).hidden[..., 0].sum().backward()
    assert new.ffn.down.weight.grad is not None and new.ffn.down.weight.grad.abs().max() > 0


def test_a_run_with_the_last_layer_free_keeps_the_first_shut(settings: Settings) -> None:
    train(dataclasses.replace(settings, layers=3, free="last", minutes=0.03))
    model = Titans(dataclasses.replace(settings.model, layers=3))
    assert json.loads((settings.out / "run.json").read_text())["step"] > 0
    shards.load(settings.out, model)
    first, second = (model.blocks[i].mixer.memory for i in (0, 1))
    assert (first.gate_weight == 0).all() and (first.gate_bias == deepen.SHUT).all()
    assert (second.gate_weight != 0).any()
