"""The Titans rule against titans-pytorch's NeuralMemory, in the options where both compute the same
(docs/outside-truth.md).

Its loss is the mean over the d outputs, so theta here is theirs over d. Weights there are [in, out].
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mnemosyne.kernels.gates import Gates
from mnemosyne.kernels.rules.rule import Architecture, MemoryRule
from tests.kernels.cases import Case, error, rule_of
from tests.outside.peers import titans_pytorch

DIM, HIDDEN, LENGTH, CHUNKS = 8, 16, 6, 4
BOUND = 1e-12


class Memory(nn.Module):
    """M(x) = [x +] [LN](W_L gelu(... W_1 x)), weights [in, out]: theirs takes any module as the memory.

    Their own differ in GELU (exact, not the tanh form), and in a learned scale of the norm, which moves.
    """

    def __init__(self, depth: int, architecture: Architecture) -> None:
        super().__init__()
        widths = [DIM] + [HIDDEN] * (depth - 1) + [DIM]
        self.architecture = architecture
        self.weights = nn.ParameterList(
            [nn.Parameter(torch.empty(widths[i], widths[i + 1])) for i in range(depth)]
        )
        for weight in self.weights:
            nn.init.xavier_uniform_(weight)

    def forward(self, x: Tensor) -> Tensor:
        z = x
        for i, weight in enumerate(self.weights):
            z = (F.gelu(z, approximate="tanh") if i else z) @ weight
        if self.architecture.norm:
            z = F.layer_norm(z, z.shape[-1:], eps=1e-6)
        return x + z if self.architecture.residual else z


@pytest.fixture
def seeded() -> Iterator[None]:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        yield


def neural_memory(model: nn.Module, **options: Any) -> Any:
    """Theirs in float64, with gates that vary."""
    peer = titans_pytorch().NeuralMemory(
        dim=DIM,
        heads=1,
        model=model,
        mem_model_norm_add_residual=False,
        pre_rmsnorm=False,
        default_step_transform_max_lr=1.0,
        **options,
    )
    with torch.no_grad():
        peer.to_decay_factor[0].bias -= 3  # a memory that lasts: half of it would go with every token
    return peer.double()


def as_case(peer: Any, tokens: Tensor, rule: MemoryRule, *, block: int = 1) -> Case:
    """What theirs makes of ``tokens`` `[T, DIM]`, as ours takes it: of a block of tokens with one decay, the
    first has it and the others none."""
    T = len(tokens)
    weights = [peer.memory_model_parameters[i][0] for i in range(peer.num_memory_parameter_tensors)]
    means = tokens.view(-1, block, DIM).mean(1)
    theta = peer.to_adaptive_step(tokens[None]).sigmoid().view(1, T) / DIM
    if peer.to_layer_modulation is not None:
        theta = theta * peer.to_layer_modulation(means[None])[:, 0].repeat_interleave(block, 1)
    decay = peer.to_decay_factor(means[None]).sigmoid().flatten()
    alpha = torch.zeros(T, dtype=torch.float64)
    alpha[::block] = decay
    D = len(weights)
    # A rule that has momentum, without: nothing carries on.
    eta = peer.to_momentum(means[None]).sigmoid().flatten() if peer.to_momentum else torch.zeros_like(alpha)
    case = Case(
        rule=rule,
        length=LENGTH,
        q=peer.to_queries(tokens),
        k=peer.to_keys(tokens),
        v=peer.to_values(tokens),
        gates=Gates(theta.expand(D, T), eta.expand(D, T), alpha.expand(D, T)),
        memory=[w.T for w in weights],
        momentum=[torch.zeros_like(w.T) for w in weights],
    )
    return case.map(lambda x: x.detach().contiguous())


def same_state(scanned: Any, state: Any, case: Case, *, momentum: bool) -> None:
    weights, moments = ([x[name] for name in sorted(x.keys())] for x in state.states)
    for i, start in enumerate(case.memory):
        theirs = weights[i][0].T
        assert error(scanned.memory[i][0, 0], theirs) < BOUND
        assert error(theirs, start) > 0.1, "a memory that stays as it was proves nothing"
        if momentum:
            assert error(scanned.momentum[i][0, 0], moments[i][0, 0].T) < BOUND


FORMS = [(1, False, False), (2, False, False), (2, True, False), (2, True, True), (3, True, True)]


@pytest.mark.parametrize("momentum", [True, False])
@pytest.mark.parametrize(("depth", "residual", "norm"), FORMS)
def test_the_whole_rule_with_gates_per_token(depth, residual, norm, momentum, seeded):
    """Its chunk one token, its batch our chunk: every gate is a token's, gradients are of each of our chunks'
    starts. Reads at every token, weights and momentum at the end; also when its state is handed on."""
    rule = rule_of("titans", depth, residual=residual, norm=norm)
    peer = neural_memory(
        Memory(depth, rule.architecture),
        chunk_size=1,
        batch_size=LENGTH,
        momentum=momentum,
        per_parameter_lr_modulation=True,
    )
    tokens = torch.randn(LENGTH * CHUNKS, DIM, dtype=torch.float64)
    case = as_case(peer, tokens, rule)
    if not momentum:
        case = case.gated(eta=torch.zeros_like(case.gates.theta))
    with torch.no_grad():
        reads, state = peer(tokens[None])
        first, middle = peer(tokens[None, : 2 * LENGTH])
        second, handed_on = peer(tokens[None, 2 * LENGTH :], state=middle)
    got, scanned, _ = case.chunked()
    assert error(got, reads[0]) < BOUND
    assert error(case.decoded(), reads[0]) < BOUND
    assert error(got, torch.cat([first, second], 1)[0]) < BOUND
    same_state(scanned, state, case, momentum=momentum)
    same_state(scanned, handed_on, case, momentum=momentum)


def test_one_decay_for_a_block_of_tokens(seeded):
    """Its chunk 3 tokens, its batch our chunk, no momentum: a decay a block, which our token at its head has.
    Reads agree where a block ends; within one theirs are those of the memory before it."""
    rule, block = rule_of("titans", 2), 3
    peer = neural_memory(Memory(2, rule.architecture), chunk_size=block, batch_size=LENGTH, momentum=False)
    tokens = torch.randn(LENGTH * CHUNKS, DIM, dtype=torch.float64)
    case = as_case(peer, tokens, rule, block=block)
    with torch.no_grad():
        reads, state = peer(tokens[None])
    got, scanned, _ = case.chunked()
    ends = slice(block - 1, None, block)
    assert error(got[ends], reads[0, ends]) < BOUND
    same_state(scanned, state, case, momentum=False)


def test_its_own_linear_memory(seeded):
    """Its MemoryMLP of depth 1, nothing of ours put in."""
    titans_pytorch()
    from titans_pytorch.memory_models import MemoryMLP

    peer = neural_memory(MemoryMLP(DIM, depth=1), chunk_size=1, batch_size=LENGTH)
    tokens = torch.randn(LENGTH * CHUNKS, DIM, dtype=torch.float64)
    case = as_case(peer, tokens, rule_of("titans"))
    with torch.no_grad():
        reads, state = peer(tokens[None])
    got, scanned, _ = case.chunked()
    assert error(got, reads[0]) < BOUND
    same_state(scanned, state, case, momentum=True)


def test_its_own_two_layers_differ_by_the_form_of_gelu_alone(seeded):
    """Depth 2 as published, exact GELU, beside ours in the tanh form: near, and not equal."""
    titans_pytorch()
    from titans_pytorch.memory_models import MemoryMLP

    peer = neural_memory(
        MemoryMLP(DIM, depth=2, expansion_factor=HIDDEN / DIM), chunk_size=1, batch_size=LENGTH
    )
    tokens = torch.randn(LENGTH * CHUNKS, DIM, dtype=torch.float64)
    case = as_case(peer, tokens, rule_of("titans", 2))
    with torch.no_grad():
        reads, _ = peer(tokens[None])
    assert 1e-8 < error(case.chunked()[0], reads[0]) < 3e-3


def test_without_a_batch_size_its_gradients_stay_at_the_first_weights(seeded):
    """Its default: the same as ours where all tokens are one chunk, and only there."""
    rule = rule_of("titans")
    peer = neural_memory(Memory(1, rule.architecture), chunk_size=1, batch_size=None)
    tokens = torch.randn(LENGTH * CHUNKS, DIM, dtype=torch.float64)
    case = as_case(peer, tokens, rule)
    with torch.no_grad():
        reads, _ = peer(tokens[None])
    whole = replace(case, length=len(tokens))
    assert error(whole.chunked()[0], reads[0]) < BOUND
    assert error(case.chunked()[0], reads[0]) > 1e-3
