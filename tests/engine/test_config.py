"""What a configuration refuses, and the papers' presets."""

from __future__ import annotations

import json

import pytest
import torch

from mnemosyne.engine.config import PRESETS, MemoryConfig, ModelConfig, preset
from mnemosyne.engine.errors import ConfigError
from mnemosyne.engine.model import Titans
from mnemosyne.engine.state import state_layout
from mnemosyne.kernels.rules.registry import RULES
from mnemosyne.kernels.rules.rule import MemoryRule
from tests.engine.models import VARIANTS

GOOD = {"variant": "mag", "layers": 2, "dim": 128, "vocab_size": 100}
MATRIX = {"depth": 1, "residual": False, "norm": False}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"variant": "mix"}, "variant"),
        ({"layers": 0}, "layers"),
        ({"dim": 100}, "head_dim"),
        ({"segment": 500}, "segment"),
        ({"window": 100}, "window"),
        ({"colour": "red"}, "colour"),
        ({"memory": {"depth": 5}}, "depth"),
        ({"memory": {"depth": 0}}, "depth"),
        ({"memory": {"theta_max": 0}}, "theta_max"),
        ({"memory": {"alpha_max": 1.5}}, "alpha_max"),
        ({"memory": {"eta_max": -0.1}}, "eta_max"),
        ({"memory": {"clip": 0}}, "clip"),
        ({"memory": {"width": 3}}, "width"),
        ({"segment": 32}, "chunk 64 is longer than the segment, 32"),
        ({"window": 32}, "chunk 64 is longer than the window, 32"),
        ({"memory": {"theta_max": 1.5}}, r"theta_max must be above 0 and at most 1 for titans, got 1\.5"),
        ({"memory": {"rule": "memora", "theta_max": 101}}, "at most 100 for memora"),
        (
            {"memory": {"rule": "hopfield"}},
            "no rule 'hopfield'; there are titans, moneta, yaad, memora, delta",
        ),
        ({"memory": {"rule": "delta"}}, "the delta rule's memory is one matrix: depth must be 1, got 2"),
        ({"memory": {"rule": "gated_delta", "depth": 1}}, "gated_delta.*residual and norm must be false"),
        (
            {"memory": {"rule": "yaad", "eta_max": 0.5}},
            r"yaad rule has no momentum: leave memory\.eta_max out",
        ),
        (
            {"memory": MATRIX | {"rule": "delta", "alpha_max": 0.1}},
            r"no forget gate: leave memory\.alpha_max",
        ),
        ({"memory": {"rule": "yaad", "options": {"p": 3}}}, "the yaad rule has no option p"),
        ({"memory": {"rule": "moneta", "options": {"r": 3}}}, "has no option r; it has p, q"),
        ({"memory": {"rule": "moneta", "options": {"p": 0.5}}}, "p must be at least 1"),
        ({"memory": {"rule": "moneta", "options": {"q": 1.5}}}, "q must be at least 2"),
        ({"memory": {"rule": "moneta", "options": {"p": "three"}}}, "type"),
        ({"memory": {"norm": False, "clip": None}}, "diverges where its gates open"),
        ({"memory": MATRIX | {"clip": None, "eta_max": 0}}, r"theta_max at most 0\.015625"),
    ],
)
def test_a_bad_configuration_is_refused_by_name(change, message):
    with pytest.raises(ConfigError, match=message):
        ModelConfig.from_dict(GOOD | change)


def test_an_incomplete_configuration_is_refused():
    with pytest.raises(ConfigError, match="vocab_size"):
        ModelConfig.from_dict({k: v for k, v in GOOD.items() if k != "vocab_size"})


def test_json_round_trip():
    config = ModelConfig.from_dict(GOOD | {"memory": {"depth": 3, "clip": None}})
    assert ModelConfig.from_dict(json.loads(config.to_json())) == config


@pytest.mark.parametrize("rule", RULES)
def test_every_rule_is_chosen_by_name_and_kept_by_the_file(rule, tmp_path):
    memory = {"rule": rule} | (MATRIX if "delta" in rule else {})
    config = ModelConfig.from_dict(GOOD | {"memory": memory})
    (tmp_path / "config.json").write_text(config.to_json())
    again = ModelConfig.from_file(tmp_path / "config.json")
    assert again == config and again.memory.make_rule() == config.memory.make_rule()
    assert (again.memory.eta_max is None) == (rule != "titans")
    assert (again.memory.alpha_max is None) == (rule == "delta")


def test_the_papers_options_reach_the_rule():
    def moneta(**options: float) -> MemoryRule:
        return MemoryConfig(rule="moneta", options=options).make_rule()

    assert moneta(p=2, q=3) != moneta() == moneta(p=3, q=4)


def test_a_checkpoint_from_before_there_were_rules_keeps_its_hash():
    config = ModelConfig.from_dict(GOOD)
    assert "rule" not in json.loads(config.to_json())["memory"]
    assert json.loads(config.to_json())["memory"]["eta_max"] == 1.0
    other = ModelConfig.from_dict(GOOD | {"memory": {"rule": "yaad"}})
    assert json.loads(other.to_json())["memory"]["rule"] == "yaad"


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("name", PRESETS)
def test_presets_have_the_papers_shapes_and_are_built(name, variant):
    config = preset(name, variant)
    assert (config.layers, config.dim) == PRESETS[name]
    with torch.device("meta"):
        count = Titans(config).parameter_count()
    # The names are the papers'; with gates, convolutions, a tied embedding of 32k the true count is near.
    nominal = {"170M": 170e6, "340M": 340e6, "760M": 760e6, "1.3B": 1.3e9}[name]
    assert 0.6 * nominal < count < 1.6 * nominal


def test_an_unknown_preset_names_the_known_ones():
    with pytest.raises(ConfigError, match=r"170M, 340M, 760M, 1\.3B"):
        preset("7B")


def test_the_state_is_as_large_as_the_papers_arithmetic():
    """W and S in fp32 of the 170M preset at E = 4: 37.7 MB, whatever was read (research: kernels 2.2)."""
    layout = state_layout(preset("170M", "lmm", memory=MemoryConfig(expansion=4)), torch.bfloat16)
    memory = [shape for name, (shape, _) in layout.items() if name.startswith(("memory.", "momentum."))]
    assert sum(4 * torch.Size(shape).numel() for shape in memory) == pytest.approx(37.7e6, rel=0.01)
