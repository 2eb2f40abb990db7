"""The whole model's chunk form against the token-by-token reference, and decode against the chunk form."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from mnemosyne.engine.advance import advance
from mnemosyne.engine.state import GENERATED, SessionState
from mnemosyne.kernels.rules.registry import RULES
from tests.engine.models import VARIANTS, every_rule_and_depth, random_tokens, small_config, small_model
from tests.engine.reference_model import reference


@pytest.mark.parametrize(("rule", "depth"), every_rule_and_depth())
@pytest.mark.parametrize("variant", VARIANTS)
def test_chunk_form_equals_reference(variant, rule, depth):
    # Norm and none take turns, so that either is seen with every rule, form and half of the depths.
    norm = (depth + VARIANTS.index(variant)) % 2 == 0
    config = small_config(variant, dim=16, depth=depth, norm=norm, rule=rule)
    config = dataclasses.replace(config, layers=2 if rule == "titans" else 1)
    model = small_model(config, torch.float64)
    tokens = random_tokens(config.segment + config.chunk + 5, seed=depth)
    expected, layers = reference(model, tokens)
    state = advance(model, model.initial_state(), tokens, chunk=config.chunk)
    logits, _ = model.open_chunk([state])
    assert error(logits[0], expected[-1]) < 1e-8
    # The reference went on into the open chunk; run it again over what is committed.
    _, layers = reference(model, tokens[: state.position])
    for i in range(depth):
        want = torch.stack([torch.stack(layer.M[i]) for layer in layers])
        assert error(state.tensors[f"memory.{i}"], want) < 1e-8
        assert (f"momentum.{i}" in state.tensors) == (rule == "titans")
        if rule == "titans":
            want = torch.stack([torch.stack(layer.S[i]) for layer in layers])
            assert error(state.tensors[f"momentum.{i}"], want) < 1e-8
        start = model.initial_state().tensors[f"memory.{i}"]
        assert error(start, state.tensors[f"memory.{i}"]) > 1e-2, (
            "the memory has to change for this to mean anything"
        )


@pytest.mark.parametrize(
    ("compute", "bound"), [(torch.float32, 1e-3), (torch.bfloat16, 3e-2)], ids=["fp32", "bf16"]
)
@pytest.mark.parametrize(
    ("variant", "rule"), [*((variant, "titans") for variant in VARIANTS), *(("mag", rule) for rule in RULES)]
)
def test_decode_equals_chunk_path(variant, rule, compute, bound):
    config = small_config(variant, rule=rule)
    model = small_model(config, compute)
    base = advance(model, model.initial_state(), random_tokens(100, seed=3), chunk=config.chunk)
    for length in (1, 7, config.chunk):
        ids = tuple(random_tokens(length, seed=length))
        as_input = SessionState(base.position, base.tensors, ids, bytes(length))
        as_generated = SessionState(base.position, base.tensors, ids, bytes([GENERATED]) * length)
        chunked, decoded = model.open_chunk([as_input])[0], model.open_chunk([as_generated])[0]
        assert (chunked - decoded).abs().max() < bound * chunked.square().mean().sqrt()


def error(a: torch.Tensor, b: torch.Tensor) -> float:
    return float((a - b).norm() / b.norm())
