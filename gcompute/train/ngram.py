"""Unigram and bigram models of a token stream: the losses that a trained model has to beat.

Both are fitted by counting, in one pass over the training tokens, and judged on the targets that the transformer is
judged on: every validation token but the first.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float64, Int64, Integer

DISCOUNT_WITHOUT_ESTIMATE = 0.75


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Bigram:
    """Interpolated Kneser-Ney: seen pairs lose a discount, and what they lose is spread as tokens join new contexts.

    p(w | v) = max(c(v, w) - d, 0) / c(v) + d N(v, .) / c(v) * q(w),    q(w) = (N(., w) + 1) / (N(., .) + V),
    where c counts pairs, c(v) = sum_w c(v, w), and N counts distinct pairs: N(v, .) those that v begins. Where v begins
    none, p(w | v) = q(w). Over w, p(. | v) sums to 1, and no p is 0.

    Source: Kneser and Ney 1995; the form of Chen and Goodman 1998, equation 17, with add-one in the lower order.
    """

    vocab: int
    discount: float
    pairs: Int64[np.ndarray, "p"]  # v * vocab + w of the distinct pairs, ascending
    counts: Int64[np.ndarray, "p"]
    context_counts_V: Int64[np.ndarray, "v"]  # c(v)
    context_types_V: Int64[np.ndarray, "v"]  # N(v, .)
    lower_V: Float64[np.ndarray, "v"]  # q

    def probability(
        self, before: Integer[np.ndarray, "n"], after: Integer[np.ndarray, "n"]
    ) -> Float64[np.ndarray, "n"]:
        """p(after | before), element by element.

        Raises:
          ValueError: a token is not in the vocabulary.
        """
        before, after = _checked(before, self.vocab), _checked(after, self.vocab)
        wanted = before * self.vocab + after
        places = np.minimum(np.searchsorted(self.pairs, wanted), len(self.pairs) - 1)
        counts = np.where(self.pairs[places] == wanted, self.counts[places], 0)
        contexts = np.maximum(self.context_counts_V[before], 1)
        lower_weight = np.where(
            self.context_counts_V[before] > 0, self.discount * self.context_types_V[before] / contexts, 1.0
        )
        return np.maximum(counts - self.discount, 0) / contexts + lower_weight * self.lower_V[after]


def fit_unigram(train: Integer[np.ndarray, "n"], vocab: int) -> Float64[np.ndarray, "v"]:
    """p(w) = (c(w) + 1) / (n + V): each token's share of the training tokens, with add-one smoothing.

    Raises:
      ValueError: a token is not in the vocabulary.
    """
    counts = np.bincount(_checked(train, vocab), minlength=vocab)
    return (counts + 1) / (len(train) + vocab)


def fit_bigram(train: Integer[np.ndarray, "n"], vocab: int) -> Bigram:
    """Count the pairs of neighbouring tokens.

    The discount is n1 / (n1 + 2 n2), where n1 and n2 are the numbers of pairs seen once and twice, and 0.75 where one
    of these is 0.

    Raises:
      ValueError: there are fewer than 2 tokens, or one is not in the vocabulary.
    Source: Ney, Essen and Kneser 1994, on the discount.
    """
    if len(train) < 2:
        raise ValueError(f"a bigram model needs at least 2 training tokens, got {len(train)}: give more text.")
    tokens = _checked(train, vocab)
    pairs, counts = np.unique(tokens[:-1] * vocab + tokens[1:], return_counts=True)
    num_once, num_twice = int((counts == 1).sum()), int((counts == 2).sum())
    estimated = num_once > 0 and num_twice > 0
    return Bigram(
        vocab=vocab,
        discount=num_once / (num_once + 2 * num_twice) if estimated else DISCOUNT_WITHOUT_ESTIMATE,
        pairs=pairs,
        counts=counts,
        context_counts_V=np.bincount(tokens[:-1], minlength=vocab),
        context_types_V=np.bincount(pairs // vocab, minlength=vocab),
        lower_V=(np.bincount(pairs % vocab, minlength=vocab) + 1) / (len(pairs) + vocab),
    )


def unigram_loss(
    train: Integer[np.ndarray, "n"], val: Integer[np.ndarray, "m"], vocab: int, stretches: Sequence[slice] | None = None
) -> float:
    """Cross-entropy, in nats per token, of val[1:] under the unigram model of `train`.

    Args:
      stretches: the parts of `val` to judge, each from the second of its tokens on; all of it by default.

    Raises:
      ValueError: val has fewer than 2 tokens, or a token is not in the vocabulary.
    """
    _, targets = _pairs(val, vocab, stretches)
    return float(-np.log(fit_unigram(train, vocab))[targets].mean())


def bigram_loss(
    train: Integer[np.ndarray, "n"], val: Integer[np.ndarray, "m"], vocab: int, stretches: Sequence[slice] | None = None
) -> float:
    """Cross-entropy, in nats per token, of val[1:] given the token before each, under the bigram model of `train`.

    Args:
      stretches: as in `unigram_loss`.

    Raises:
      ValueError: either has fewer than 2 tokens, or a token is not in the vocabulary.
    """
    before, targets = _pairs(val, vocab, stretches)
    return float(-np.log(fit_bigram(train, vocab).probability(before, targets)).mean())


def _pairs(
    val: Integer[np.ndarray, "m"], vocab: int, stretches: Sequence[slice] | None
) -> tuple[Int64[np.ndarray, "k"], Int64[np.ndarray, "k"]]:
    """Each target of the stretches and the token before it."""
    parts = [val[stretch] for stretch in stretches or [slice(None)]]
    if min(map(len, parts)) < 2:
        raise ValueError(f"a loss needs at least 2 validation tokens, got {min(map(len, parts))}: give more text.")
    before, after = (np.concatenate([part[side] for part in parts]) for side in (slice(None, -1), slice(1, None)))
    return _checked(before, vocab), _checked(after, vocab)


def _checked(tokens: Integer[np.ndarray, "n"], vocab: int) -> Int64[np.ndarray, "n"]:
    tokens = np.asarray(tokens, np.int64)
    if len(tokens) and not 0 <= tokens.min() <= tokens.max() < vocab:
        raise ValueError(
            f"token ids run from {tokens.min()} to {tokens.max()}, and vocab={vocab} has 0 to {vocab - 1}: "
            "the tokens come from another tokenizer."
        )
    return tokens
