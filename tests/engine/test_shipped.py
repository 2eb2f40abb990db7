"""The checkpoint that ships: its own promises about logits, on text that it is served with."""

from __future__ import annotations

import pydoc_data.topics

import pytest
import torch
from tokenizers import Tokenizer

from mnemosyne.checkpoints.weights import load_checkpoint, shipped
from mnemosyne.engine.advance import advance
from mnemosyne.engine.model import Titans
from mnemosyne.engine.state import GENERATED, SessionState

CHUNKS = 9


@pytest.fixture(scope="module", params=[torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def model(request: pytest.FixtureRequest) -> Titans:
    found = load_checkpoint(shipped())
    made = Titans(found.config)
    made.load_state_dict(found.tensors(made.state_dict()))
    return made.prepare(request.param)


@pytest.fixture(scope="module")
def tokens() -> list[int]:
    tokenizer = Tokenizer.from_file(str(shipped() / "tokenizer.json"))
    text = "".join(pydoc_data.topics.topics[name] for name in sorted(pydoc_data.topics.topics))
    return tokenizer.encode(text[:9000], add_special_tokens=False).ids


def test_chunk_path_and_decode_agree(model, tokens):
    """Every position of some chunks both ways: input through the chunk path, generated through decode."""
    exact = model.compute == torch.float32
    bound = 1e-3 if exact else 3e-2
    L = model.config.chunk
    assert len(tokens) > CHUNKS * L
    chunks = [tuple(tokens[c * L : (c + 1) * L]) for c in range(CHUNKS)]
    states = [model.initial_state()]
    for ids in chunks[:-1]:
        state = advance(model, SessionState(states[-1].position, states[-1].tensors), [*ids, 0], chunk=L)
        states.append(SessionState(state.position, state.tensors))
    # What a session computes doesn't depend on what is beside it: all chunks decode as one batch.
    firsts = [
        SessionState(state.position, state.tensors, ids[:1], bytes([GENERATED]))
        for state, ids in zip(states, chunks, strict=True)
    ]
    row, opened = model.open_chunk(firsts)
    rest = torch.tensor(chunks)[:, 1:]
    decoded = torch.stack([row, *(model.decode(opened, column) for column in rest.T)], 1)
    same, beyond = 0, 0
    for state, ids, by_decode in zip(states, chunks, decoded, strict=True):
        prefixes = [SessionState(state.position, state.tensors, ids[:n], bytes(n)) for n in range(1, L + 1)]
        chunked, _ = model.open_chunk(prefixes)
        # Position by position, the root mean square of the difference against that of the logits.
        difference = (chunked - by_decode).square().mean(1).sqrt()
        size = chunked.square().mean(1).sqrt()
        beyond += int((difference >= bound * size).sum())
        assert (difference < 2 * bound * size).all()
        # Where the likeliest token is another one, the two were as likely within the bound.
        other = chunked.gather(1, by_decode.argmax(1, keepdim=True)).squeeze(1)
        assert (chunked.amax(1) - other < bound * size).all()
        same += int((chunked.argmax(1) == by_decode.argmax(1)).sum())
    # In bf16 roundings add up to more at few places: the last layer writes at every token.
    assert beyond <= (0 if exact else 0.01 * CHUNKS * L)
    assert same >= (0.99 if exact else 0.98) * CHUNKS * L


def test_it_fits_the_repository():
    assert sum(path.stat().st_size for path in shipped().iterdir()) <= 20_000_000
