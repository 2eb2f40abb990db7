"""Decode by kernels: in the interpreter on any machine, and on a GPU with graphs and in bf16."""

from __future__ import annotations

import pytest
import torch

from mnemosyne.engine.config import ModelConfig
from mnemosyne.engine.model import Titans
from mnemosyne.engine.open_chunk import OpenChunk
from tests.engine.gpu.opened import blob_chunk, error, sessions, tiny
from tests.engine.models import small_model
from tests.kernels.triton.interpreter import passes_in_the_interpreter

BOUNDS = {torch.float32: 1e-4, torch.bfloat16: 4e-2}
STEPS = 3
RESIDENT = tiny("mac", head_dim=64, dim=256, expansion=4, chunk=64)
"""The shape whose memory is on the chip before its turn."""
LENGTHS = [(3, 13), (0, 0), (1, 1), (2, 0), (0, 5), (5, 7), (4, 12)]
"""Chunks committed and tokens pending."""


@pytest.mark.timeout(300)
@pytest.mark.interpreted("interpreted_decode.py")
def test_in_the_interpreter(request: pytest.FixtureRequest) -> None:
    passes_in_the_interpreter(request.node)


def on_gpu(config: ModelConfig, dtype: torch.dtype) -> Titans:
    return small_model(config, dtype).cuda()


def decoded(model: Titans, opened: list[OpenChunk], *, graphs: bool, steps: int = 1) -> torch.Tensor:
    """Logits of every step, `[steps, B, vocab]`."""
    from mnemosyne.engine.gpu.decode import Decoder
    from mnemosyne.engine.gpu.weights import Weights

    decoder = Decoder(model.config, Weights.of(model), graphs=graphs)
    chunks = [blob_chunk(model, chunk) for chunk in opened]
    return torch.stack(
        [decoder.decode(chunks, torch.arange(len(chunks)) % 7 + step) for step in range(steps)]
    )


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", BOUNDS, ids=str)
@pytest.mark.parametrize(
    "config",
    [
        tiny("mac", head_dim=64, dim=128, expansion=4),
        RESIDENT,
        tiny("mac", depth=1, clip=None),
        tiny("mac", gate="paper", residual=False, clip=0.05),
        tiny("mag", head_dim=128, dim=128),
        tiny("mal", head_dim=16),
        tiny("lmm", depth=1),
    ],
    ids=lambda c: f"{c.variant} {c.head_dim} depth {c.memory.depth} chunk {c.chunk}",
)
def test_equal_to_the_modules(config: ModelConfig, dtype: torch.dtype) -> None:
    model = on_gpu(config, dtype)
    _, opened = model.open_chunk(sessions(model, LENGTHS))
    got = decoded(model, opened, graphs=True, steps=STEPS)
    for step in range(STEPS):
        want = model.decode(opened, torch.arange(len(LENGTHS)) % 7 + step)
        assert error(got[step], want) < BOUNDS[dtype]


@pytest.mark.gpu
@pytest.mark.parametrize("variant", ["mac", "mag"])
def test_a_graph_gives_the_bits_of_eager_launches(variant: str) -> None:
    model = on_gpu(tiny(variant, head_dim=64, dim=128, expansion=4), torch.bfloat16)
    _, opened = model.open_chunk(sessions(model, LENGTHS[:5]))
    eager = decoded(model, opened, graphs=False, steps=STEPS)
    assert torch.equal(decoded(model, opened, graphs=True, steps=STEPS), eager)


@pytest.mark.gpu
@pytest.mark.parametrize(("variant", "chunk"), [("mac", 16), ("mac", 64), ("mag", 16)])
def test_the_same_bits_alone_and_in_any_batch(variant: str, chunk: int) -> None:
    from mnemosyne.engine.gpu.decode import Decoder
    from mnemosyne.engine.gpu.weights import Weights

    config = tiny(variant, head_dim=64, dim=256, expansion=4, chunk=chunk)
    model = on_gpu(config, torch.bfloat16)
    decoder = Decoder(model.config, Weights.of(model))
    kinds = sessions(model, LENGTHS)
    _, opened = model.open_chunk([kinds[b % len(kinds)] for b in range(300)])
    g = torch.Generator().manual_seed(0)
    tokens = torch.randint(0, model.config.vocab_size, (300,), generator=g)

    def run(order: torch.Tensor) -> torch.Tensor:
        return decoder.decode([blob_chunk(model, opened[b]) for b in order.tolist()], tokens[order])

    alone = torch.cat([run(torch.tensor([b])) for b in range(300)])
    for size in (2, 3, 8, 17, 64, 100, 256, 300):
        order = torch.randperm(300, generator=g)[:size]
        assert torch.equal(run(order), alone[order]), size


@pytest.mark.gpu
@pytest.mark.parametrize("graphs", [True, False], ids=["graphs", "eager"])
@pytest.mark.parametrize("config", [RESIDENT, tiny("mag", head_dim=64, dim=128)], ids=lambda c: c.variant)
def test_a_step_begun_ahead_has_the_same_bits(
    config: ModelConfig, graphs: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    from tests.engine.gpu.guessed import check_steps_begun_ahead

    model = on_gpu(config, torch.bfloat16)
    _, opened = model.open_chunk(sessions(model, [(3, 1), (0, 0), (1, 2), (2, 3)]))
    check_steps_begun_ahead(monkeypatch, model, opened, graphs=graphs)
