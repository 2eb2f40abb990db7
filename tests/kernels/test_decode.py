"""The decode form of every rule: token by token through a cache, and what the rule and the chunk form say."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from mnemosyne.kernels import decode
from mnemosyne.kernels.rules.registry import RULES
from tests.kernels.cases import FORMS, Case, clipped, error, make_case, rule_of, usual_case, worst_token

DECODED = [form for form in FORMS if form[1] in (1, 2, 3) and form[2] == form[3]]


@pytest.mark.parametrize("gates", ["plain", "ends"])
@pytest.mark.parametrize(("name", "depth", "residual", "norm"), DECODED)
def test_equals_the_rule_and_the_chunk_form_at_every_token(name, depth, residual, norm, gates):
    case = clipped(make_case(rule_of(name, depth, residual=residual, norm=norm), depth, gates=gates))
    rows = case.decoded()
    assert worst_token(rows, case.reference()[0]) < 1e-10
    assert worst_token(rows, case.chunked()[0]) < 1e-10


def opened(case: Case, length: int) -> dict[str, torch.Tensor]:
    """The cache of a case of one chunk after its first ``length`` tokens, made of the chunk form's parts. The
    rest of the chunk is there while it is made, and mustn't matter."""
    _, scanned, decay = case.chunked()
    cache = {f"inputs.{i}": x[:, :, 0].clone() for i, x in enumerate(scanned.inputs)}
    cache |= {f"deltas.{i}": x[:, :, 0].clone() for i, x in enumerate(scanned.deltas)}
    return cache | decode.rows_at(decay, torch.tensor([length - 1]))


@pytest.mark.parametrize("gates", ["plain", "ends"])
@pytest.mark.parametrize("name", RULES)
def test_opens_in_the_middle_of_a_chunk(name, gates):
    case = clipped(usual_case(name, gates=gates, chunks=1))
    y = case.reference()[0]
    shapes = {name: tensor.shape for name, tensor in case.fresh_cache().items()}
    padding = usual_case(name, seed=1, chunks=1)
    for length in range(1, case.length):
        tokens = {
            part: torch.cat([getattr(case, part)[:length], getattr(padding, part)[length:]])
            for part in ("q", "k", "v")
        }
        cache = opened(replace(case, **tokens), length)
        assert {name: tensor.shape for name, tensor in cache.items()} == shapes
        rows = torch.stack([case.step(t, cache) for t in range(length, case.length)])
        assert worst_token(rows, y[length:]) < 1e-10, length


@pytest.mark.parametrize("name", RULES)
def test_sessions_step_together_from_different_places(name):
    cases = [clipped(usual_case(name, seed=seed, chunks=1)) for seed in range(2)]
    cases[1] = replace(cases[1], rule=cases[0].rule)
    at = [1, 4]
    caches = [opened(case, t) for case, t in zip(cases, at, strict=True)]
    both = {part: torch.cat([cache[part] for cache in caches]) for part in caches[0]}

    def rows(part: str) -> torch.Tensor:
        return torch.stack([getattr(c, part)[t] for c, t in zip(cases, at, strict=True)]).unsqueeze(1)

    pairs = zip(cases, at, strict=True)
    tokens = [case.gates.map(lambda gate, t=t: gate[..., t]) for case, t in pairs]
    gates = type(tokens[0])(
        *[None if gate[0] is None else torch.stack(gate).unsqueeze(1) for gate in zip(*tokens, strict=True)]
    )
    memory = [torch.stack(m).unsqueeze(1) for m in zip(*[c.memory for c in cases], strict=True)]
    momentum = [torch.stack(s).unsqueeze(1) for s in zip(*[c.momentum for c in cases], strict=True)]
    got = decode.step(
        rows("q"), rows("k"), rows("v"), gates, memory, momentum, both, torch.tensor(at), cases[0].rule
    )
    for i, (case, t) in enumerate(zip(cases, at, strict=True)):
        assert error(got[i, 0], case.reference()[0][t]) < 1e-10


@pytest.mark.parametrize("name", RULES)
def test_the_memory_itself_stays_as_it_was(name):
    case = usual_case(name, chunks=1)
    before = [m.clone() for m in case.memory + case.momentum]
    cache = case.fresh_cache()
    for t in range(case.length):
        case.step(t, cache)
    assert all(torch.equal(a, b) for a, b in zip(case.memory + case.momentum, before, strict=True))
