import itertools
import math
from collections import Counter, defaultdict

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gcompute.train.ngram import bigram_loss, fit_bigram, fit_unigram, unigram_loss

VOCAB = 7
tokens = st.lists(st.integers(0, VOCAB - 1), min_size=2, max_size=60)


def slow_unigram(train, val):
    count = Counter(train)
    return -sum(math.log((count[w] + 1) / (len(train) + VOCAB)) for w in val[1:]) / (len(val) - 1)


def slow_bigram_probability(train):
    """The definition, pair by pair, from dictionaries."""
    followers = defaultdict(Counter)
    for v, w in itertools.pairwise(train):
        followers[v][w] += 1
    all_counts = [count for counter in followers.values() for count in counter.values()]
    once, twice = all_counts.count(1), all_counts.count(2)
    discount = once / (once + 2 * twice) if once and twice else 0.75

    def probability(v, w):
        num_contexts = sum(w in counter for counter in followers.values())
        lower = (num_contexts + 1) / (len(all_counts) + VOCAB)
        if v not in followers:
            return lower
        total = sum(followers[v].values())
        freed = sum(min(count, discount) for count in followers[v].values())
        return max(followers[v][w] - discount, 0) / total + freed / total * lower

    return probability


def arrays(*lists):
    return [np.array(values, np.uint16) for values in lists]


@given(tokens, tokens)
@settings(deadline=None)
def test_losses_equal_the_slow_definition(train, val):
    probability = slow_bigram_probability(train)
    slow = -sum(math.log(probability(v, w)) for v, w in itertools.pairwise(val)) / (len(val) - 1)
    # float64 sums of at most 60 terms in another order
    assert unigram_loss(*arrays(train, val), VOCAB) == pytest.approx(slow_unigram(train, val), rel=1e-12)
    assert bigram_loss(*arrays(train, val), VOCAB) == pytest.approx(slow, rel=1e-12)


@given(tokens)
@settings(deadline=None)
def test_probabilities_sum_to_one_and_none_is_zero(train):
    assert fit_unigram(*arrays(train), VOCAB).sum() == pytest.approx(1, rel=1e-12)
    model = fit_bigram(*arrays(train), VOCAB)
    before, after = np.divmod(np.arange(VOCAB * VOCAB), VOCAB)
    table = model.probability(before, after).reshape(VOCAB, VOCAB)
    assert table.sum(axis=1) == pytest.approx(np.ones(VOCAB), rel=1e-12)
    assert table.min() > 0


@pytest.mark.oldest
def test_the_bigram_learns_a_markov_chain_to_its_entropy():
    random = np.random.default_rng(0)
    vocab = 50
    transitions = random.dirichlet(np.full(vocab, 0.1), size=vocab)
    chain = [0]
    for uniform in random.random(40_000):
        chain.append(min(int(np.searchsorted(transitions[chain[-1]].cumsum(), uniform)), vocab - 1))
    train, val = arrays(chain[:36_000], chain[36_000:])
    truth = -np.log(transitions[val[:-1], val[1:]]).mean()
    bigram, unigram = bigram_loss(train, val, vocab), unigram_loss(train, val, vocab)
    assert truth < bigram < truth + 0.05
    assert bigram < unigram - 1


def test_it_beats_add_one_smoothing_by_far_where_pairs_are_sparse():
    # A straw man would make the trained model look good: add-one over 2,000 tokens drowns the counts.
    random = np.random.default_rng(1)
    vocab = 2000
    words = np.minimum(random.zipf(1.3, 30_000), vocab) - 1
    train, val = arrays(words[:27_000], words[27_000:])
    pair_counts = Counter(itertools.pairwise(train.tolist()))
    contexts = Counter(train[:-1].tolist())
    add_one = -np.mean(
        [math.log((pair_counts[v, w] + 1) / (contexts[v] + vocab)) for v, w in itertools.pairwise(val.tolist())]
    )
    assert bigram_loss(train, val, vocab) < add_one - 0.3


def test_stretches_are_judged_as_if_they_stood_alone():
    random = np.random.default_rng(2)
    train, val = random.integers(0, 7, 300), random.integers(0, 7, 100)
    stretches = [slice(0, 11), slice(40, 51), slice(90, 120)]
    for loss in (unigram_loss, bigram_loss):
        alone = [loss(train, val[stretch], 7) for stretch in stretches]
        assert loss(train, val, 7, stretches) == pytest.approx(np.average(alone, weights=[10, 10, 9]), rel=1e-12)
        assert loss(train, val, 7, [slice(None)]) == loss(train, val, 7)


def test_pair_codes_of_a_wide_vocabulary_do_not_overflow():
    model = fit_bigram(np.array([199_999, 199_998] * 3, np.uint32), 200_000)
    assert model.probability(np.array([199_999]), np.array([199_998]))[0] > 0.7


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: unigram_loss(np.array([1, 9]), np.array([1, 2]), 7), "run from 1 to 9, and vocab=7"),
        (lambda: bigram_loss(np.array([1, 2]), np.array([1, 9]), 7), "run from 9 to 9, and vocab=7"),
        (lambda: bigram_loss(np.array([1, 2]), np.array([9, 1]), 7), "run from 9 to 9, and vocab=7"),
        (lambda: bigram_loss(np.array([1]), np.array([1, 2]), 7), "at least 2 training tokens, got 1"),
        (lambda: unigram_loss(np.array([1, 2]), np.array([1]), 7), "at least 2 validation tokens, got 1"),
    ],
)
def test_bad_tokens_are_refused(call, message):
    with pytest.raises(ValueError, match=message):
        call()
