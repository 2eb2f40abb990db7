"""Drawing tokens: what each setting does, and that a draw depends on nothing but its own row and key."""

from __future__ import annotations

import math

import numpy as np
import pytest

from mnemosyne.engine.errors import NotFinite, RequestError
from mnemosyne.engine.messages import Sampling
from mnemosyne.engine.sampling import Sampler, uniform

V = 8


def logits(*values: float) -> np.ndarray:
    return np.array([*values, *[-50.0] * (V - len(values))], dtype=np.float32)


def draws(sampling: Sampling, row: np.ndarray, n: int = 400) -> list[int]:
    """Tokens that would be drawn at n positions by a sampler that has emitted nothing."""
    return [Sampler(sampling, (), V).draw(row, position).token for position in range(n)]


def test_greedy_takes_the_largest_and_the_smallest_id_among_equals() -> None:
    row = logits(1.0, 3.0, 3.0, 2.0)
    assert set(draws(Sampling(temperature=0.0), row, 20)) == {1}


def test_draws_follow_the_probabilities() -> None:
    p = np.array([0.5, 0.3, 0.2])
    got = np.bincount(draws(Sampling(), logits(*np.log(p)), 4000), minlength=3)[:3] / 4000
    assert np.abs(got - p).max() < 0.03


def test_temperature_sharpens() -> None:
    row = logits(0.0, 1.0)
    hot = draws(Sampling(temperature=10.0), row).count(0)
    cold = draws(Sampling(temperature=0.2), row).count(0)
    assert cold < 15 < 120 < hot
    assert set(draws(Sampling(temperature=1e-9), row)) == {1}


def test_the_key_is_seed_choice_and_position() -> None:
    numbers = {uniform(s, c, p) for s in range(-2, 3) for c in range(3) for p in range(50)}
    assert len(numbers) == 5 * 3 * 50
    assert all(0 <= n < 1 for n in numbers)
    assert uniform(7, 1, 12345) == uniform(7, 1, 12345)
    assert 0.45 < np.mean([uniform(1, 0, p) for p in range(2000)]) < 0.55


KNOWN = [0.011546754286, 0.303568034307, 0.813354060979, 0.211859544033]


def test_known_draws_stay_what_they_are() -> None:
    """A resumed session repeats its draws after an upgrade too: these values may never change."""
    assert [round(uniform(s, c, p), 12) for s, c, p in [(0, 0, 0), (1, 0, 0), (0, 1, 0), (0, 0, 1)]] == KNOWN


def test_history_and_order_of_the_draws_do_not_matter() -> None:
    row = np.random.default_rng(3).standard_normal(V).astype(np.float32)
    one = Sampler(Sampling(seed=5), (), V)
    forwards = [one.draw(row, p).token for p in range(30)]
    other = Sampler(Sampling(seed=5), (), V)
    backwards = [other.draw(row, p).token for p in reversed(range(30))]
    assert forwards == backwards[::-1]
    assert len(set(forwards)) > 2


def test_top_k_top_p_and_min_p() -> None:
    row = logits(*np.log([0.5, 0.3, 0.15, 0.05]))
    assert set(draws(Sampling(top_k=2), row)) == {0, 1}
    assert set(draws(Sampling(top_k=1), row)) == {0}
    assert set(draws(Sampling(top_p=0.6), row)) == {0, 1}
    assert set(draws(Sampling(top_p=0.4), row)) == {0}
    assert set(draws(Sampling(top_p=1e-9), row)) == {0}
    assert set(draws(Sampling(min_p=0.25), row)) == {0, 1, 2}
    assert set(draws(Sampling(min_p=1.0), row)) == {0}
    equal = np.zeros(V, dtype=np.float32)
    assert set(draws(Sampling(top_k=3), equal)) == {0, 1, 2}


def test_top_k_is_applied_before_top_p() -> None:
    row = logits(*np.log([0.4, 0.3, 0.2, 0.1]))
    assert set(draws(Sampling(top_k=2, top_p=0.5), row)) == {0}  # 0.4 of 0.7 is more than a half
    assert set(draws(Sampling(top_p=0.5), row)) == {0, 1}


def test_penalties_count_what_they_say() -> None:
    greedy = Sampling(temperature=0.0)

    def run(row: np.ndarray, prompt: tuple[int, ...], n: int, **change: float) -> list[int]:
        sampler = Sampler(Sampling(temperature=0.0, **change), prompt, V)  # type: ignore[arg-type]
        return [sampler.draw(row, p).token for p in range(n)]

    assert greedy.presence_penalty == 0.0
    row = logits(5.0, 4.0, 3.0)
    assert run(row, (), 3) == [0, 0, 0]
    assert run(row, (), 4, presence_penalty=1.5) == [0, 1, 0, 0]
    assert run(row, (), 4, frequency_penalty=1.5) == [0, 1, 0, 2]
    assert run(row, (0, 0), 1, presence_penalty=1.5, frequency_penalty=1.5) == [0]
    assert run(row, (0,), 2, repetition_penalty=2.0) == [1, 2]
    assert run(logits(-1.0, -1.5), (0,), 1, repetition_penalty=2.0) == [1]
    assert run(row, (), 1, logit_bias={2: 10.0}) == [2]
    assert run(row, (), 1, logit_bias={0: -100.0}) == [1]


def test_logprobs_are_those_of_the_raw_logits() -> None:
    row = np.random.default_rng(0).standard_normal(V).astype(np.float32)
    sampler = Sampler(Sampling(temperature=0.0, logit_bias={4: 100.0}, logprobs=3), (), V)
    choice = sampler.draw(row, 0)
    expected = row.astype(float) - math.log(sum(math.exp(float(x)) for x in row))
    assert choice.token == 4
    assert choice.logprob == pytest.approx(expected[4], abs=1e-12)
    assert [i for i, _ in choice.top] == sorted(range(V), key=lambda i: -row[i])[:3]
    assert [p for _, p in choice.top] == pytest.approx(sorted(expected, reverse=True)[:3], abs=1e-12)
    only = Sampler(Sampling(logprobs=0), (), V).draw(row, 0)
    assert only.logprob is not None and only.top == ()
    assert Sampler(Sampling(), (), V).draw(row, 0).logprob is None


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_a_logit_that_is_not_finite_is_refused(bad: float) -> None:
    row = logits(1.0, bad)
    with pytest.raises(NotFinite):
        Sampler(Sampling(temperature=0.0), (), V).draw(row, 0)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("max_tokens", -1),
        ("temperature", -0.1),
        ("temperature", math.nan),
        ("top_p", 0.0),
        ("top_p", 1.1),
        ("top_k", -1),
        ("min_p", 2.0),
        ("repetition_penalty", 0.0),
        ("presence_penalty", math.inf),
        ("frequency_penalty", math.nan),
        ("logprobs", V + 1),
        ("logit_bias", {V: 1.0}),
        ("logit_bias", {0: math.nan}),
    ],
)
def test_values_out_of_range_are_refused_by_name(field: str, value: object) -> None:
    with pytest.raises(RequestError) as refused:
        Sampler(Sampling(**{field: value}), (), V)  # type: ignore[arg-type]
    assert refused.value.param == field
