"""How far rounding can move a logit between two programs of one function, and so how near two candidates must be to
change places.

Programs of other shapes add the same products in other orders. The errors of a sum of D terms add like a random walk,
sqrt(D) eps of its size, a residual stream is made of 2 L such sums and the output layer is one more: of S, the largest
|logit| of a position, about sqrt((2 L + 1) D) eps in float32, and in bfloat16, whose sums are float32 and whose
operands are rounded apart where a sum lies near the middle of two bfloat16 numbers, at most about sqrt(2 L + 1) eps.
How much of that a model's softmaxes and norms enlarge is the model's own matter, so it is measured, on the reference
alone: it reads some texts once more with its model dims and hidden units in another order, which changes no function
and the order of every sum; and for bfloat16 without rounding operands too, because XLA leaves roundings out where it
may (excess precision), in some programs and not in others. The band is the median over positions of the largest move,
as a share of S, and a logit may lie WITHIN bands of the reference's.

A choice of experts is a step and not a sum: at a tie of the router, rounding sends a token elsewhere and everything
after it moves. So where an answer is beyond the bound, the reference is asked again at that very place: if reordering
moves its own logits there by as much, the place is a tie of the reference's, counted and shown as such.

Source: Higham and Mary 2019, A new approach to probabilistic rounding error analysis, theorem 2.4.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from gcompute.certify.serving.reference import Reference
from gcompute.config.model import ModelConfig
from gcompute.model.transformer import Params, param_dims
from gcompute.serve.request import Sampling

# The largest of a few thousand moves is about 8 times their median.
WITHIN = 8.0
# Of the largest move of some reorderings at one place.
WITHIN_LOCAL = 2.0
ORDERS, LOCAL_ORDERS = 2, 8
# A few operations in float32 between the logits and the score: a bias, two penalties, a difference, a quotient, a sum.
SCORING = 8 * 2.0**-24
# -log(-log u) lies between -4.5 and 16.7 for every float32 number u.
LARGEST_NOISE = 17.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Rounding:
    """band: the median move of a position, as a share of its largest |logit|; largest: of all that were measured.

    local: the largest move of one position, where that was measured.
    """

    band: float
    largest: float = 0.0
    local: float = 0.0

    @property
    def unstable(self) -> bool:
        """Whether the position's own moves make the bound."""
        return WITHIN_LOCAL * self.local > WITHIN * self.band

    def logit_bound(self, logits_V: Float[np.ndarray, "v"]) -> float:
        """How far any of these logits may lie from that of another program."""
        return max(WITHIN * self.band, WITHIN_LOCAL * self.local) * float(np.abs(logits_V).max())

    def gap_bound(
        self, logits_V: Float[np.ndarray, "v"], adjusted_V: Float[np.ndarray, "v"], sampling: Sampling
    ) -> float:
        """The largest gap, in units of the final score, across which rounding may choose the other candidate.

        Both scores may move towards each other, hence twice the bound of one. A repetition penalty r stretches a move
        by r or 1/r, and a temperature T by 1/T. What the sampler itself rounds is relative to what it computes with;
        its sum of V probabilities, for top-p, moves by sqrt(V) eps of itself.
        """
        stretch = max(sampling.repetition_penalty, 1 / sampling.repetition_penalty)
        finite = np.abs(adjusted_V[np.isfinite(adjusted_V)])
        one = stretch * self.logit_bound(logits_V) + SCORING * float(finite.max(initial=0.0))
        if sampling.temperature == 0:
            return 2 * one
        summed = SCORING * math.sqrt(len(logits_V)) if sampling.top_p < 1 else 0.0
        return 2 * (one / max(sampling.temperature, 1e-6) + SCORING * LARGEST_NOISE + summed)

    def logprob_bound(self, logits_V: Float[np.ndarray, "v"]) -> float:
        """How far a log-probability may lie from that of another program: its logit moves, and the sum under it."""
        scoring = SCORING * (math.sqrt(len(logits_V)) + float(np.abs(logits_V).max()))
        return 2 * self.logit_bound(logits_V) + scoring


def measure_rounding(reference: Reference, texts: Sequence[Sequence[int]]) -> Rounding:
    """The band of one model and precision, from these texts; the engine has no part in it."""
    moves = np.concatenate(list(measure_moves(reference, texts, ORDERS)))
    return Rounding(band=max(float(np.median(moves)), 2.0**-24), largest=float(moves.max()))


def measure_moves(
    reference: Reference, texts: Sequence[Sequence[int]], num_orders: int
) -> list[Float[np.ndarray, "t"]]:
    """The largest move of each position of each text over some orders, as a share of the position's largest |logit|."""
    plain = dict(reference.logits(texts))
    moves = [np.zeros(len(text)) for text in texts]
    for other in _variations(reference, num_orders):
        for index, logits_TV in other.logits(texts):
            move_T = np.abs(logits_TV - plain[index]).max(axis=1) / np.abs(plain[index]).max(axis=1)
            moves[index] = np.maximum(moves[index], move_T)
    return moves


def _variations(reference: Reference, num_orders: int) -> Iterator[Reference]:
    rng, config = np.random.default_rng(0), reference.config
    for number in range(num_orders):
        orders = {"D": rng.permutation(config.dim), "F": rng.permutation(config.ffn_size)}
        wide = reference.precision == "bfloat16" and number % 2 == 1
        yield reference.of(reordered(reference.params, orders, config), wide=wide)


@partial(jax.jit, static_argnums=2)
def reordered(params: Params, orders: Mapping[str, Array], config: ModelConfig) -> Params:
    """The same function with the model dims D and the hidden units F in another order."""

    def permute(leaf: Any, dims: str) -> Any:
        for axis, letter in enumerate(dims):
            if letter in orders:
                leaf = jnp.take(leaf, orders[letter], axis=axis)
        return leaf

    return jax.tree.map(permute, params, param_dims(config))
