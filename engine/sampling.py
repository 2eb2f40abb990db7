"""From logits to a token. Owns the draw and its order of operations; knows no session, batch or model.

Everything is computed for one row alone, in float64 on the CPU, and a draw is keyed by (seed, choice,
absolute position): so neither the neighbours in a batch nor what was drawn before can change it, and a
resumed session repeats it. The order is vLLM's: bias, penalties, temperature, min_p, top_k, top_p; log
probabilities are those of the raw logits. Presence and frequency penalties count the emitted tokens, the
repetition penalty the request's prompt as well.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from mnemosyne.engine.errors import NotFinite, RequestError
from mnemosyne.engine.messages import Sampling

_MASK64 = (1 << 64) - 1


@dataclass(frozen=True)
class Choice:
    """One drawn token; ``top`` are the N most likely by the raw logits, the smaller id first among equals."""

    token: int
    logprob: float | None
    top: tuple[tuple[int, float], ...]


class Sampler:
    """Draws the tokens of one request; its only state is which tokens it has seen and emitted."""

    def __init__(self, sampling: Sampling, prompt: Iterable[int], vocab_size: int) -> None:
        """Raises RequestError if a value is out of its range."""
        check(sampling, vocab_size)
        self._sampling = sampling
        self._seen = np.zeros(vocab_size, dtype=bool)
        self._seen[list(prompt)] = True
        self._emitted = np.zeros(vocab_size, dtype=np.float64)
        s = sampling
        penalised = s.presence_penalty != 0.0 or s.frequency_penalty != 0.0 or s.repetition_penalty != 1.0
        self._plain = s.temperature == 0.0 and s.logprobs is None and not s.logit_bias and not penalised

    def draw(self, logits: NDArray[np.float32], position: int) -> Choice:
        """The token at absolute index ``position``, from the logits [vocab] of the one before. Raises
        NotFinite."""
        if not bool(np.isfinite(logits).all()):
            raise NotFinite("a logit is not a finite number")
        settings = self._sampling
        if self._plain:
            # What fp32 orders float64 orders alike: nothing is converted.
            return Choice(self._taken(int(np.argmax(logits))), None, ())
        raw = logits.astype(np.float64)
        scores = self._shape(raw)
        if settings.temperature == 0.0:
            token = self._taken(int(np.argmax(scores)))
        else:
            probabilities = _restrict(scores / settings.temperature, settings)
            drawn = uniform(settings.seed, settings.choice, position)
            token = self._taken(_invert(probabilities, drawn))
        if settings.logprobs is None:
            return Choice(token, None, ())
        logprobs = raw - raw.max()
        logprobs -= math.log(float(np.exp(logprobs).sum()))
        top = np.argsort(-raw, kind="stable")[: settings.logprobs]
        return Choice(token, float(logprobs[token]), tuple((int(i), float(logprobs[i])) for i in top))

    def _taken(self, token: int) -> int:
        self._seen[token] = True
        self._emitted[token] += 1
        return token

    def _shape(self, raw: NDArray[np.float64]) -> NDArray[np.float64]:
        settings = self._sampling
        scores = raw.copy()
        for token, bias in settings.logit_bias.items():
            scores[token] += bias
        if settings.repetition_penalty != 1.0:
            seen = scores[self._seen]
            factor = settings.repetition_penalty
            scores[self._seen] = np.where(seen > 0, seen / factor, seen * factor)
        if settings.frequency_penalty:
            scores -= settings.frequency_penalty * self._emitted
        if settings.presence_penalty:
            scores -= settings.presence_penalty * (self._emitted > 0)
        return scores


def uniform(seed: int, choice: int, position: int) -> float:
    """A number in [0, 1) with 53 random bits, a function of its arguments alone (Philox 4x64)."""
    generator = np.random.Philox(
        key=np.array([seed & _MASK64, choice & _MASK64], dtype=np.uint64),
        counter=np.array([0, position & _MASK64, 0, 0], dtype=np.uint64),
    )
    return (int(generator.random_raw()) >> 11) * 2.0**-53


def _restrict(scores: NDArray[np.float64], settings: Sampling) -> NDArray[np.float64]:
    """Unnormalised probabilities, zero where min_p, top_k or top_p leave a token out; the best is never left
    out."""
    weights = np.exp(scores - scores.max())
    if settings.min_p > 0.0:
        weights[weights < settings.min_p] = 0.0
    if settings.top_k > 0:
        weights = _only(weights, _best(weights, settings.top_k)[: settings.top_k])
    if settings.top_p < 1.0:
        weights = _only(weights, _nucleus(weights, settings.top_p))
    return weights


def _only(weights: NDArray[np.float64], kept: NDArray[np.int64]) -> NDArray[np.float64]:
    """Those of the ids ``kept``, and zero for the others."""
    restricted = np.zeros_like(weights)
    restricted[kept] = weights[kept]
    return restricted


def _best(weights: NDArray[np.float64], count: int) -> NDArray[np.int64]:
    """At least ``count`` ids of the largest weights, in their order; the smaller id first among equals."""
    if count >= len(weights):
        return np.argsort(-weights, kind="stable")
    # Sorting all of a vocabulary takes many times as long as finding its best.
    least = np.partition(weights, len(weights) - count)[len(weights) - count]
    found = np.flatnonzero(weights >= least)
    return found[np.argsort(-weights[found], kind="stable")]


def _nucleus(weights: NDArray[np.float64], top_p: float) -> NDArray[np.int64]:
    """As few of the best as it takes for ``top_p`` of all weight."""
    wanted = top_p * weights.sum()
    count = 64
    while True:
        best = _best(weights, count)
        ranked = weights[best]
        before = np.cumsum(ranked) - ranked
        beyond = np.flatnonzero(before[1:] >= wanted)
        if len(beyond):
            return best[: beyond[0] + 1]
        if len(best) == len(weights):
            return best
        count *= 8


def _invert(weights: NDArray[np.float64], u: float) -> int:
    """The token at ``u`` of the cumulative distribution over ids; one of weight zero is never it."""
    possible = np.flatnonzero(weights)
    cumulative = np.cumsum(weights[possible])
    at = int(np.searchsorted(cumulative, u * cumulative[-1], side="right"))
    return int(possible[min(at, len(possible) - 1)])


def check(sampling: Sampling, vocab_size: int) -> None:
    """Raise RequestError, its ``param`` the field's name, unless every value can be used."""

    def need(ok: bool, param: str, what: str) -> None:
        if not ok:
            raise RequestError(f"{param} must be {what}", param=param)

    s = sampling
    need(s.max_tokens >= 0, "max_tokens", "0 or more")
    need(0 <= s.temperature < math.inf, "temperature", "0 or a positive number")
    need(0 < s.top_p <= 1, "top_p", "above 0 and at most 1")
    need(s.top_k >= 0, "top_k", "0 (off) or more")
    need(0 <= s.min_p <= 1, "min_p", "between 0 and 1")
    need(0 < s.repetition_penalty < math.inf, "repetition_penalty", "a positive number")
    need(math.isfinite(s.presence_penalty), "presence_penalty", "a number")
    need(math.isfinite(s.frequency_penalty), "frequency_penalty", "a number")
    need(s.logprobs is None or 0 <= s.logprobs <= vocab_size, "logprobs", f"between 0 and {vocab_size}")
    for token, bias in s.logit_bias.items():
        need(0 <= token < vocab_size, "logit_bias", f"a map of token ids below {vocab_size}")
        need(math.isfinite(bias), "logit_bias", "a map to finite numbers")
