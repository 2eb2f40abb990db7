"""What a configuration refuses, and the papers' presets."""

from __future__ import annotations

import json

import pytest
import torch

from mnemosyne.engine.config import PRESETS, MemoryConfig, ModelConfig, preset
from mnemosyne.engine.errors import ConfigError
from mnemosyne.engine.model import Titans
from mnemosyne.engine.state import state_layout
from tests.engine.models import VARIANTS

GOOD = {"variant": "mag", "layers": 2, "dim": 128, "vocab_size": 100}


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
