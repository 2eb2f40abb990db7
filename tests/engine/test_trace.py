"""Surprise and movement: the token-by-token reference's values, the same bits alone and in any batch."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch

from mnemosyne.engine import trace
from mnemosyne.engine.advance import advance
from mnemosyne.engine.model import Titans
from mnemosyne.engine.pyramid import FIELDS, Pyramid
from mnemosyne.engine.state import SessionState
from mnemosyne.kernels.health import gain
from mnemosyne.kernels.rules.registry import RULES
from tests.engine.models import VARIANTS, random_tokens, small_config, small_model
from tests.engine.reference_model import reference

SURPRISE, MOMENTARY, MOVED = (FIELDS.index(name) for name in ("surprise", "momentary", "moved"))
COMPUTE = [pytest.param(torch.float32, id="fp32"), pytest.param(torch.bfloat16, id="bf16")]
FORMS = [
    *((variant, "titans", 2) for variant in VARIANTS),
    *(("mag", "titans", depth) for depth in (1, 3)),
    *(("mag", rule, 1) for rule in RULES if rule != "titans"),
]


GAIN = FIELDS.index("gain")
OFTEN = 2


@pytest.fixture(autouse=True)
def often(monkeypatch: pytest.MonkeyPatch) -> None:
    """So that few chunks are enough to see the gain."""
    monkeypatch.setattr(trace, "GAIN_EVERY", OFTEN)


def per_chunk(state: SessionState) -> np.ndarray:
    """`[n, layers, fields]` of all committed chunks, where all are kept."""
    points = list(state.pyramid.cover(0, state.pyramid.chunks, 0))
    assert [point.last - point.first for point in points] == [1] * state.pyramid.chunks
    return np.stack([point.values for point in points])


@pytest.mark.parametrize(("variant", "rule", "depth"), FORMS)
def test_the_trace_is_the_references(variant, rule, depth):
    config = small_config(variant, dim=16, depth=depth, rule=rule)
    # Clipping changes what is learned; what is told is the norm before it.
    config = dataclasses.replace(config, memory=dataclasses.replace(config.memory, clip=0.3))
    model = small_model(config, torch.float64)
    length, count = config.chunk, config.segment // config.chunk + 2
    tokens = random_tokens(count * length, seed=2)
    _, layers = reference(model, tokens)
    each = torch.stack([torch.cat(layer.surprise, -1).mean(0) for layer in layers]).numpy()
    start = model.initial_state()
    [state], told = model.prefill([start], torch.tensor([tokens]), per_token=True)
    assert told.tokens is not None
    np.testing.assert_allclose(told.tokens[0].transpose(1, 2, 0), each, rtol=1e-6)
    means = each.reshape(len(layers), 2, count, length).mean(-1)
    found = per_chunk(state)
    np.testing.assert_allclose(found[..., [SURPRISE, MOMENTARY]].transpose(1, 2, 0), means, rtol=1e-6)
    assert means.min() > 1e-3 and np.ptp(means[:, 0], axis=-1).min() > 1e-3, "there is something to tell"
    before = [initial(model, i) for i in range(len(layers))]
    for chunk in range(count):
        _, layers = reference(model, tokens[: (chunk + 1) * length])
        for i, layer in enumerate(layers):
            after = torch.cat([w.flatten() for matrices in layer.M for w in matrices])
            moved = float((after - before[i]).norm() / before[i].norm())
            assert found[chunk, i, MOVED] == pytest.approx(moved, rel=1e-5)
            before[i] = after


def initial(model: Titans, layer: int) -> torch.Tensor:
    return torch.cat([p.flatten() for p in model.blocks[layer].mixer.memory.initial])


@pytest.mark.parametrize("compute", COMPUTE)
@pytest.mark.parametrize("variant", VARIANTS)
def test_the_same_bits_for_any_split_and_in_any_batch(variant, compute):
    config = small_config(variant, dim=256)
    model, count = small_model(config, compute), 7
    texts = [random_tokens(3 * config.segment, seed=i) for i in range(count)]
    start = model.initial_state()
    alone, each = [], []
    for text in texts:
        [state], told = model.prefill([start], torch.tensor([text]), per_token=True)
        alone.append(state)
        each.append(told.tokens[0].tobytes())
        split = advance(model, start, text[:50], chunk=config.chunk)
        split = advance(model, split, [*text[50:], 0], chunk=config.chunk)
        assert split.pyramid.array().tobytes() == state.pyramid.array().tobytes()
    assert len(set(each)) == count
    for size in (2, 3, count):
        states, told = model.prefill([start] * size, torch.tensor(texts[:size]), per_token=True)
        assert [row.tobytes() for row in told.tokens] == each[:size]
        for state, expected in zip(states, alone, strict=False):
            assert state.pyramid.array().tobytes() == expected.pyramid.array().tobytes()


def test_states_that_differ_in_their_trace_alone_have_other_digests():
    """So every test that compares digests holds the trace too."""
    config = small_config()
    model = small_model(config)
    state = advance(model, model.initial_state(), random_tokens(100, 1), chunk=config.chunk)
    values = per_chunk(state)
    values[1, 0, SURPRISE] *= 1 + 1e-6
    other = dataclasses.replace(state, pyramid=Pyramid.blank(config.layers).extended(values))
    assert other.digest() != state.digest()
    again = dataclasses.replace(state, pyramid=Pyramid.blank(config.layers).extended(per_chunk(state)))
    assert again.digest() == state.digest()


@pytest.mark.parametrize(("variant", "rule"), [*((v, "titans") for v in VARIANTS), ("mag", "moneta")])
def test_the_gain_of_every_other_chunk_whatever_stands_beside_it(variant, rule, monkeypatch):
    config = dataclasses.replace(small_config(variant, rule=rule), segment=16)
    model = small_model(config)
    start, length, count = model.initial_state(), config.chunk, 6
    texts = [random_tokens(count * length, seed=i) for i in range(3)]
    # Sessions that stand at an even and at an odd chunk, beside each other.
    states = [advance(model, start, random_tokens(i * length + 1, i), chunk=length) for i in range(3)]
    states = [dataclasses.replace(state, pending=(), kinds=b"") for state in states]
    after, _ = model.prefill(states, torch.tensor(texts))
    monkeypatch.setattr(trace, "GAIN_EVERY", 1)
    seen: list[torch.Tensor] = []
    monkeypatch.setattr(trace, "gain", lambda *given: seen.append(gain(*given)) or seen[-1])
    for i, (state, text) in enumerate(zip(states, texts, strict=True)):
        at = state
        for c in range(count):
            [at], _ = model.prefill([at], torch.tensor([text[c * length : (c + 1) * length]]))
            expected = seen.pop().view(config.layers, -1).amax(1).numpy()
            found = per_chunk(after[i])[i + c, :, GAIN]
            if (i + c + 1) % OFTEN:
                assert np.isnan(found).all()
            else:
                assert (found == expected).all() and (expected > 0).all()


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_chunks_values_are_the_means_of_its_tokens(variant):
    config = small_config(variant)
    model = small_model(config)
    tokens = torch.tensor([random_tokens(4 * config.chunk, seed=4)])
    _, told = model.prefill([model.initial_state()], tokens, per_token=True)
    means = told.tokens[0].reshape(4, config.chunk, config.layers, 2).mean(1, dtype=np.float64)
    np.testing.assert_allclose(told.chunks[0, :, :, :2], means, rtol=1e-6)
    assert model.prefill([model.initial_state()], tokens)[1].tokens is None
