"""A decode step by the kernels in Triton's interpreter, on a CPU, in fp32, against the model's modules.

``test_decode.py`` runs this in a process of its own, since triton decides when it is imported."""

from __future__ import annotations

import pytest
import torch

from mnemosyne.engine.config import ModelConfig
from mnemosyne.engine.gpu.decode import Decoder
from mnemosyne.engine.gpu.weights import Weights
from mnemosyne.engine.model import Titans
from mnemosyne.kernels.triton import step_attention, support
from mnemosyne.kernels.triton.step_product import GateProduct, grouped, product
from tests.engine.gpu.guessed import check_steps_begun_ahead
from tests.engine.gpu.opened import blob_chunk, error, sessions, tiny
from tests.engine.models import small_model

BOUND = 1e-5
STEPS = 2
LENGTHS = [(3, 13), (0, 0), (1, 1)]
"""Chunks committed and tokens pending, one session has read nothing. Three leave a column of a step empty."""

CONFIGS = {
    "mac": tiny("mac"),
    "mac, linear": tiny("mac", layers=1, depth=1, clip=None),
    "mac, plain": tiny("mac", layers=1, gate="paper", residual=False, norm=False, clip=0.05),
    "mag": tiny("mag", expansion=4),
    "mag, linear": tiny("mag", layers=1, gate="paper", depth=1, residual=False),
    "mal": tiny("mal", layers=1, head_dim=16),
    "mal, linear": tiny("mal", layers=1, depth=1, norm=False, clip=0.3),
    "lmm": tiny("lmm", layers=1, expansion=1, clip=None),
}


@pytest.fixture(autouse=True)
def exact_products(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(support.PRECISIONS, torch.float32, "ieee")


def make(config: ModelConfig) -> tuple[Titans, Decoder]:
    model = small_model(config)
    return model, Decoder(config, Weights.of(model), graphs=False)


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_equal_to_the_modules(config: ModelConfig) -> None:
    model, decoder = make(config)
    _, opened = model.open_chunk(sessions(model, LENGTHS))
    chunks = [blob_chunk(model, chunk) for chunk in opened]
    g = torch.Generator().manual_seed(5)
    for _ in range(STEPS):
        tokens = torch.randint(0, config.vocab_size, (len(chunks),), generator=g)
        want = model.decode(opened, tokens)
        assert error(decoder.decode(chunks, tokens), want) < BOUND
    assert [chunk.state for chunk in chunks] == [chunk.state for chunk in opened]


def test_the_same_bits_alone_in_a_batch_and_in_another_order() -> None:
    model, decoder = make(CONFIGS["mac, plain"])
    _, opened = model.open_chunk(sessions(model, LENGTHS))
    tokens = torch.arange(len(LENGTHS))

    def decoded(order: list[int]) -> torch.Tensor:
        return decoder.decode([blob_chunk(model, opened[b]) for b in order], tokens[order])

    together = decoded([0, 1, 2])
    assert torch.equal(decoded([2, 0, 1]), together[[2, 0, 1]])
    for b in range(len(LENGTHS)):
        assert torch.equal(decoded([b])[0], together[b])


@pytest.mark.parametrize("config", [tiny("mac", layers=1), tiny("mag", layers=1)], ids=lambda c: c.variant)
def test_the_same_bits_by_any_share(config: ModelConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a head's parts of keys, in one program."""
    monkeypatch.setattr(step_attention, "TILE", 8)
    model, _ = make(config)
    _, opened = model.open_chunk(sessions(model, LENGTHS))
    tokens = torch.arange(len(LENGTHS))
    want = None
    for programs in (1, 20, 1 << 20):
        monkeypatch.setattr(step_attention, "PROGRAMS", programs)
        decoder = Decoder(config, Weights.of(model), graphs=False)
        found = decoder.decode([blob_chunk(model, chunk) for chunk in opened], tokens)
        want = found if want is None else want
        assert torch.equal(found, want)
    assert error(found, model.decode(opened, tokens)) < BOUND


def test_the_same_bits_begun_ahead(monkeypatch: pytest.MonkeyPatch) -> None:
    model, _ = make(CONFIGS["lmm"])
    _, opened = model.open_chunk(sessions(model, [(3, 1), (0, 0), (1, 2), (2, 3)]))
    check_steps_begun_ahead(monkeypatch, model, opened, graphs=False)


def test_a_committed_state_is_not_written() -> None:
    model, decoder = make(CONFIGS["mac, plain"])
    _, opened = model.open_chunk(sessions(model, LENGTHS[:2]))
    chunks = [blob_chunk(model, chunk) for chunk in opened]
    before = [chunk.state_blob.clone() for chunk in chunks]
    decoder.decode(chunks, torch.tensor([1, 2]))
    assert all(torch.equal(chunk.state_blob, old) for chunk, old in zip(chunks, before, strict=True))


def test_a_full_chunk_takes_no_token() -> None:
    model, decoder = make(CONFIGS["lmm"])
    _, opened = model.open_chunk(sessions(model, [(1, 16), (1, 2)]))
    chunks = [blob_chunk(model, chunk) for chunk in opened]
    with pytest.raises(ValueError, match="1 chunks have no room"):
        decoder.decode(chunks, torch.tensor([1, 2]))
    assert [chunk.length for chunk in chunks] == [16, 2]


def test_gates_are_the_sum_of_their_parts() -> None:
    g = torch.Generator().manual_seed(0)
    a, weight = (torch.randn(rows, 48, generator=g) for rows in (3, 128))
    parts, bias = torch.randn(1, 2, 64, 48, generator=g), torch.randn(64, generator=g)
    out, logits = torch.zeros(3, 128), torch.zeros(3, 64)
    product(a, weight, out, gates=GateProduct(grouped(parts)[0], bias, logits))
    assert error(out, a @ weight.T) < BOUND
    assert error(logits, a @ parts[0].sum(0).T + bias) < BOUND
