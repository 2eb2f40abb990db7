"""The example of docs/adding-a-rule.md, as it stands there, in every block form."""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

from mnemosyne.engine.advance import advance
from mnemosyne.engine.config import ModelConfig
from mnemosyne.engine.errors import ConfigError
from mnemosyne.kernels.rules.registry import RULES
from tests.engine.models import VARIANTS, random_tokens, small_model
from tests.engine.reference_model import reference

PAGE = (Path(__file__).parents[2] / "docs" / "adding-a-rule.md").read_text(encoding="utf-8")
SIZES = {"layers": 1, "dim": 16, "head_dim": 8, "vocab_size": 320, "chunk": 16, "segment": 48, "window": 32}


def block(language: str, which: int = 0) -> str:
    return re.findall(rf"```{language}\n(.*?)```", PAGE, re.DOTALL)[which]


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> Iterator[dict[str, Any]]:
    """The page's rule, registered as it says; what its ``config.json`` asks for."""
    before = dict(RULES)
    # Dataclasses look their module up.
    module = ModuleType("hebb_of_the_page")
    monkeypatch.setitem(sys.modules, module.__name__, module)
    exec(block("python"), module.__dict__)
    exec(block("python", 1), {"RULES": RULES, "hebb": module.__dict__["hebb"]})
    assert set(RULES) - set(before) == {"hebb"}
    yield json.loads(block("json"))["memory"]
    RULES.clear()
    RULES.update(before)


@pytest.mark.parametrize("variant", VARIANTS)
def test_the_example_works_in_every_form(variant, asked):
    memory = asked | {"expansion": 2, "theta_max": 0.5, "alpha_max": 0.2}
    config = ModelConfig.from_dict({"variant": variant, "persistent": 4, "memory": memory, **SIZES})
    assert ModelConfig.from_dict(json.loads(config.to_json())) == config
    model = small_model(config, torch.float64)
    tokens = random_tokens(config.segment + config.chunk + 5, seed=1)
    expected, _ = reference(model, tokens)
    whole = advance(model, model.initial_state(), tokens, chunk=config.chunk)
    split = advance(model, model.initial_state(), tokens[:21], chunk=config.chunk)
    split = advance(model, split, tokens[21:], chunk=config.chunk)
    assert split.digest() == whole.digest()
    assert not any(name.startswith("momentum") for name in whole.tensors)
    logits, _ = model.open_chunk([whole])
    assert float((logits[0] - expected[-1]).norm() / expected[-1].norm()) < 1e-8


def test_the_example_refuses_what_it_cannot_have(asked):
    with pytest.raises(ConfigError, match="memory: the hebb rule's loss has no bottom"):
        ModelConfig.from_dict({"variant": "lmm", "memory": asked | {"norm": True}, **SIZES})
    with pytest.raises(ConfigError, match="the hebb rule has no option gian; it has gain"):
        ModelConfig.from_dict({"variant": "lmm", "memory": asked | {"options": {"gian": 1}}, **SIZES})
