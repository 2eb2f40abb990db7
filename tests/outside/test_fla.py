"""The linear rules against fla-core's naive recurrences (docs/outside-truth.md). They compute in fp32.

There a gradient is taken at every token, so a chunk here is one token; the loss has a 1/2, so theta is
beta / 2.
"""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from mnemosyne.kernels.gates import Gates
from tests.kernels.cases import Case, error, make_case, rule_of
from tests.outside.peers import fla_naive

TOKENS, HEAD = 64, 16
BOUND = 1e-6


def one_token_chunks(name: str) -> tuple[Case, Tensor]:
    """A case, and beta `[T]` in (0, 1)."""
    case = make_case(rule_of(name), 1, length=1, chunks=TOKENS, head=HEAD)
    beta = torch.rand(TOKENS, generator=torch.Generator().manual_seed(7), dtype=torch.float64)
    return case.gated(theta=beta[None] / 2), beta


def same(case: Case, reads: Tensor, state: Tensor) -> None:
    """``state`` is theirs, `[in, out]`."""
    got, scanned, _ = case.chunked()
    assert error(got, reads) < BOUND
    assert error(case.decoded(), reads) < BOUND
    assert error(scanned.memory[0][0, 0], state.T) < BOUND
    assert error(state.T, case.memory[0]) > 0.3, "a memory that stays as it was proves nothing"


def test_delta_rule():
    case, beta = one_token_chunks("delta")
    q, k, v = (x[None, None].float() for x in (case.q * HEAD**0.5, case.k, case.v))
    reads, state = fla_naive("delta_rule").delta_rule_recurrence(
        q, k, v, beta[None, None].float(), initial_state=case.memory[0].T[None, None].float()
    )
    same(case, reads[0, 0], state[0, 0])


@pytest.mark.parametrize("tokens_for_one", [1, 2])
def test_gated_delta_rule(tokens_for_one):
    """There the memory decays first and the gradient is taken of what is left; here it is taken before.

    With r = 1 - alpha, theta = r beta / 2 and v / r for v one token does the same; or two tokens do, of which
    the first only forgets and the second only writes.
    """
    case, beta = one_token_chunks("gated_delta")
    assert case.gates.alpha is not None
    keep = 1 - 3 * case.gates.alpha[0]
    q, k, v, b, g = (x[None, :, None].float() for x in (case.q, case.k, case.v, beta, keep.log()))
    reads, state = fla_naive("gated_delta_rule").naive_recurrent_gated_delta_rule(
        q, k, v, b, g, scale=1.0, initial_state=case.memory[0].T[None, None].float(), output_final_state=True
    )
    if tokens_for_one == 1:
        ours = replace(case, v=case.v / keep[:, None])
        same(ours.gated(theta=(keep * beta)[None] / 2, alpha=1 - keep[None]), reads[0, :, 0], state[0, 0])
        return
    none = torch.zeros_like(keep)
    ours = replace(
        case,
        **{name: getattr(case, name).repeat_interleave(2, 0) for name in ("q", "k", "v")},
        gates=Gates(
            theta=torch.stack([none, beta / 2], 1).view(1, -1),
            alpha=torch.stack([1 - keep, none], 1).view(1, -1),
        ),
    )
    got, scanned, _ = ours.chunked()
    assert error(got[1::2], reads[0, :, 0]) < BOUND
    assert error(scanned.memory[0][0, 0], state[0, 0].T) < BOUND
