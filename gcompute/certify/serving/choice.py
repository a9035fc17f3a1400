"""The rules of sampling a second time, in numpy and float64, one position at a time and by sorting.

Of a token that is not the reference's own choice it says how wrong it is: the gap, twice the least distance that scores
must move for that token to be chosen. Between two candidates that both stay in the draw it is the difference of their
scores. Where a filter stands between them (top-k, top-p, min-p) it is what it takes to carry one of them over its edge,
if that is less.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from jaxtyping import Bool, Float, Int

from gcompute.serve.request import Sampling

SMALLEST_TEMPERATURE = 1e-6
HALVINGS = 50
# More than the distance between any two scores that matter: exp(-60) is nothing in float32.
FAR = 60.0


def adjusted(
    logits_V: Float[np.ndarray, "v"],
    sampling: Sampling,
    *,
    in_prompt_V: Bool[np.ndarray, "v"],
    count_V: Int[np.ndarray, "v"],
    ends: list[int],
) -> Float[np.ndarray, "v"]:
    """The logits after bias, penalties and the end held back; `count_V`: times in the output so far."""
    x_V = logits_V.astype(np.float64)
    for token, bias in sampling.logit_bias:
        x_V[token] += bias
    r, seen_V = sampling.repetition_penalty, in_prompt_V | (count_V > 0)
    if r != 1:
        x_V = np.where(seen_V, np.where(x_V > 0, x_V / r, x_V * r), x_V)
    x_V -= sampling.frequency_penalty * count_V + sampling.presence_penalty * (count_V > 0)
    if count_V.sum() < sampling.min_tokens:
        x_V[ends] = -math.inf
    return x_V


@dataclass(frozen=True, kw_only=True)
class Draw:
    """One position's choice. x_V: the adjusted logits; noise_V: Gumbel noise, unread where the choice is greedy."""

    x_V: Float[np.ndarray, "v"]
    noise_V: Float[np.ndarray, "v"]
    sampling: Sampling

    @cached_property
    def scaled_V(self) -> np.ndarray:
        return (self.x_V - self.x_V.max()) / max(self.sampling.temperature, SMALLEST_TEMPERATURE)

    @cached_property
    def _filtered(self) -> bool:
        own = self.sampling
        return own.temperature > 0 and (own.top_k > 0 or own.top_p < 1 or own.min_p > 0)

    @cached_property
    def _falling_V(self) -> np.ndarray:
        return np.sort(self.scaled_V)[::-1]

    @cached_property
    def _kth(self) -> float:
        k = self.sampling.top_k
        return float(self._falling_V[k - 1]) if 0 < k <= len(self.x_V) else -math.inf

    @cached_property
    def _after_kth(self) -> float:
        k = self.sampling.top_k
        return float(self._falling_V[k]) if 0 < k < len(self.x_V) else -math.inf

    @cached_property
    def _mass(self) -> tuple[np.ndarray, np.ndarray]:
        """What top-k leaves, rising, and the sums of its weights from each place to the top; 0 beyond it."""
        rising = self._falling_V[self._falling_V >= self._kth][::-1]
        return rising, np.append(np.cumsum(np.exp(rising)[::-1])[::-1], 0.0)

    @cached_property
    def _enough(self) -> float:
        return self.sampling.top_p * float(self._mass[1][0])

    def _mass_above(self, bound: np.ndarray, side: str) -> np.ndarray:
        """Weight of what is larger than `bound`, or as large with side "left"."""
        rising, sums = self._mass
        return sums[np.searchsorted(rising, bound, side=side)]  # pyright: ignore[reportCallIssue, reportArgumentType]

    @property
    def _least(self) -> float:
        return math.log(self.sampling.min_p) if self.sampling.min_p > 0 else -math.inf

    @cached_property
    def kept_V(self) -> Bool[np.ndarray, "v"]:
        """What stays in the draw. Tokens tied with the last kept stay, and the most likely always does."""
        s_V = self.scaled_V
        if not self._filtered:
            return np.ones(len(s_V), bool)
        kept_V = (s_V >= self._kth) & (s_V >= self._least)
        if self.sampling.top_p < 1:
            kept_V &= self._mass_above(s_V, "right") < self._enough
        return kept_V | (s_V >= 0)

    @cached_property
    def score_V(self) -> Float[np.ndarray, "v"]:
        """What the choice is the largest of; -inf where a token is out of the draw."""
        if self.sampling.temperature == 0:
            return self.x_V
        return np.where(self.kept_V, self.scaled_V + self.noise_V, -math.inf)

    @cached_property
    def token(self) -> int:
        return int(np.argmax(self.score_V))

    def gap(self, token: int) -> float:
        """How far `token` is from being chosen: 0 for the choice itself, inf for an end that is held back."""
        if token == self.token:
            return 0.0
        if self.x_V[token] == -math.inf:
            return math.inf
        raw_V = self.x_V if self.sampling.temperature == 0 else self.scaled_V + self.noise_V
        ahead_V = raw_V - raw_V[token]
        rivals = np.flatnonzero(self.kept_V & (ahead_V > 0))
        overtake = ahead_V[rivals] / 2
        if not self._filtered:
            return 2 * float(overtake.max(initial=0.0))
        leave = self._to_leave(self.scaled_V[rivals])
        return 2 * max(self._to_enter(float(self.scaled_V[token])), float(np.minimum(overtake, leave).max(initial=0.0)))

    def _to_enter(self, s: float) -> float:
        """The least move of all scores that puts one of scaled logit `s` into the draw."""
        if s >= 0:
            return 0.0
        moves = [(self._kth - s) / 2, (self._least - s) / 2]
        if self.sampling.top_p < 1:
            inside = lambda e: math.exp(-2 * e) * self._mass_above(np.array(s + 2 * e), "right") < self._enough  # noqa: E731
            moves.append(float(_least_move(lambda e_1: np.array([inside(float(e_1[0]))]), 1)[0]))
        # Or by becoming the most likely.
        return min(max(0.0, *moves), -s / 2)

    def _to_leave(self, s_R: Float[np.ndarray, "r"]) -> Float[np.ndarray, "r"]:
        """The least move of all scores that puts each of these out of the draw."""
        move_R = np.minimum(s_R - self._after_kth, s_R - self._least) / 2
        if self.sampling.top_p < 1:

            def outside(e_R: np.ndarray) -> np.ndarray:
                others_R = self._mass_above(s_R - 2 * e_R, "left") - np.exp(s_R)
                return np.exp(2 * e_R) * others_R >= self._enough

            move_R = np.minimum(move_R, _least_move(outside, len(s_R)))
        # The most likely token goes only where another becomes that.
        return np.where(s_R >= 0, np.maximum(move_R, (s_R - self._falling_V[1]) / 2), move_R)


def _least_move(holds: Callable[[np.ndarray], np.ndarray], num: int) -> np.ndarray:
    """The least move of each from which `holds` is true, by halving; FAR where it is not true before."""
    low, high = np.zeros(num), np.full(num, FAR)
    at_once = holds(low)
    for _ in range(HALVINGS):
        middle = (low + high) / 2
        true = holds(middle)
        low, high = np.where(true, low, middle), np.where(true, middle, high)
    return np.where(at_once, 0.0, high)
