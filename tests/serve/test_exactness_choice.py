"""The second sampler: it chooses what the engine's does, and its gap is what it says."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gcompute.certify.serving.choice import Draw, adjusted
from gcompute.certify.serving.models import FORMS, small_params
from gcompute.certify.serving.reference import Reference, noise
from gcompute.certify.serving.rounding import Rounding, measure_rounding, reordered
from gcompute.serve.request import Sampling, seed_words
from gcompute.serve.sampler import SamplingRows, keep, sample, scale

V = 40
SETTINGS = [
    {},
    {"temperature": 0.0},
    {"temperature": 0.4},
    {"top_k": 1},
    {"top_k": 6},
    {"top_k": V + 3},
    {"top_p": 0.0},
    {"top_p": 0.7},
    {"top_p": 0.95, "temperature": 2.0},
    {"min_p": 0.1},
    {"min_p": 1.0},
    {"top_k": 9, "top_p": 0.8, "min_p": 0.05, "temperature": 1.4},
]


def draws(setting, seed):
    rng = np.random.default_rng(seed)
    x_V = (2 * rng.standard_normal(V)).astype(np.float32)
    sampling = Sampling(**{"temperature": 1.0, **setting}, seed=seed)
    return Draw(x_V=x_V.astype(np.float64), noise_V=noise(seed, 5, 1, V)[0], sampling=sampling)


@pytest.mark.oldest
def test_it_chooses_and_keeps_what_the_engine_does():
    several = [draws(setting, seed) for seed in range(6) for setting in SETTINGS]
    own = [draw.sampling for draw in several]
    rows = SamplingRows(
        temperature=jnp.array([one.temperature for one in own], jnp.float32),
        top_k=jnp.array([one.top_k for one in own]),
        top_p=jnp.array([one.top_p for one in own], jnp.float32),
        min_p=jnp.array([one.min_p for one in own], jnp.float32),
        seed=jnp.array([seed_words(one.seed or 0) for one in own], jnp.uint32),
    )
    logits_BV = jnp.asarray(np.stack([draw.x_V for draw in several]), jnp.float32)
    chosen = jax.jit(sample)(logits_BV, rows, jnp.full(len(several), 5))
    assert chosen.tolist() == [draw.token for draw in several]
    kept = np.asarray(jax.jit(keep)(scale(logits_BV, rows.temperature), rows))
    for row, draw in enumerate(several):
        if draw.sampling.temperature > 0:
            np.testing.assert_array_equal(draw.kept_V, kept[row], err_msg=str(draw.sampling))


@pytest.mark.parametrize("setting", SETTINGS)
def test_no_move_of_scores_by_less_than_half_the_gap_chooses_the_token(setting):
    rng = np.random.default_rng(0)
    tried = 0
    for seed in range(4):
        draw = draws(setting, seed)
        stretch = draw.sampling.temperature or 1.0
        for token in rng.choice(V, 6, replace=False):
            gap = draw.gap(int(token))
            assert (gap == 0) == (token == draw.token)
            if gap == 0 or gap > 20:
                continue
            for _ in range(60):
                # Corners of the cube of moves are the worst of them.
                move_V = 0.49 * gap * stretch * rng.choice([-1.0, 1.0], V)
                move_V[token] = abs(move_V[token])
                moved = Draw(x_V=draw.x_V + move_V, noise_V=draw.noise_V, sampling=draw.sampling)
                assert moved.token != token
                tried += 1
    assert tried > 100


@pytest.mark.parametrize("setting", [{}, {"temperature": 0.0}, {"temperature": 0.4}])
def test_a_move_of_a_little_more_than_half_the_gap_chooses_it(setting):
    """Without filters, of all others down and of itself up."""
    for seed in range(8):
        draw = draws(setting, seed)
        stretch = draw.sampling.temperature or 1.0
        second = int(np.argsort(draw.score_V)[-2])
        gap = draw.gap(second)
        if not 0 < gap < 20:
            continue
        move_V = np.full(V, -0.501 * gap * stretch)
        move_V[second] *= -1
        assert Draw(x_V=draw.x_V + move_V, noise_V=draw.noise_V, sampling=draw.sampling).token == second


def test_between_two_that_stay_the_gap_is_the_difference_of_scores_and_a_filter_makes_it_less():
    plain = Draw(x_V=np.array([0.0, -1.0, -1.5]), noise_V=np.array([0.5, 0.2, 3.0]), sampling=Sampling(temperature=1.0))
    assert plain.token == 2
    assert plain.gap(0) == pytest.approx(1.0)
    # The winner is the last of two that top-k keeps: it leaves when the third overtakes its logit.
    edge = Draw(x_V=np.array([0.0, -1.5, -1.6]), noise_V=np.array([0.5, 9.0, 0.1]), sampling=Sampling(top_k=2))
    assert edge.token == 1
    assert edge.gap(0) == pytest.approx(0.1)
    # The third comes in by the same way; it must then put out the most likely, which lies 1.6 above it.
    assert edge.gap(2) == pytest.approx(1.6)


def test_an_end_that_is_held_back_can_never_be_chosen():
    x_V = adjusted(
        np.array([5.0, 1.0, 0.0], np.float32),
        Sampling(min_tokens=2, max_tokens=4),
        in_prompt_V=np.zeros(3, bool),
        count_V=np.array([0, 1, 0]),
        ends=[0],
    )
    assert x_V.tolist() == [-math.inf, 1.0, 0.0]
    assert Draw(x_V=x_V, noise_V=np.zeros(3), sampling=Sampling(temperature=0.0)).gap(0) == math.inf


def test_adjustments_are_those_of_their_definition():
    sampling = Sampling(
        repetition_penalty=2.0, frequency_penalty=0.5, presence_penalty=0.25, logit_bias=((3, 1.0),), max_tokens=9
    )
    x_V = adjusted(
        np.array([4.0, -4.0, 2.0, 1.0], np.float32),
        sampling,
        in_prompt_V=np.array([True, False, False, False]),
        count_V=np.array([0, 2, 0, 1]),
        ends=[],
    )
    assert x_V.tolist() == [2.0, -8.0 - 1.0 - 0.25, 2.0, 1.0 - 0.5 - 0.25]


@pytest.fixture(scope="module")
def tiny():
    config = FORMS["GPT-2 form"]
    return config, small_params(config)


def test_another_order_of_dims_is_the_same_function_up_to_rounding(tiny):
    config, params = tiny
    rng = np.random.default_rng(0)
    texts = [rng.integers(0, config.vocab, 30).tolist() for _ in range(4)]
    ref = Reference(params, config, "float32")
    measured = measure_rounding(ref, texts)
    # Five sums of 48 terms: sqrt(5 * 48) eps is 9e-7.
    assert 1e-7 < measured.band <= measured.largest < 2e-5
    orders = {"D": rng.permutation(config.dim), "F": rng.permutation(config.ffn_size)}
    again = reordered(params, orders, config)
    assert not np.array_equal(again["embedding_VD"], params["embedding_VD"])


def test_the_bound_grows_with_what_enlarges_a_move():
    rounding, logits_V = Rounding(band=1e-6), np.array([3.0, -4.0], np.float32)
    plain = rounding.gap_bound(logits_V, logits_V, Sampling(temperature=0.0))
    # Twice 8 bands of the largest logit, and a little for the arithmetic of the sampler.
    assert 2 * 8e-6 * 4 < plain < 2.3 * 8e-6 * 4
    assert rounding.gap_bound(logits_V, logits_V, Sampling(temperature=0.1)) > 9 * plain
    assert rounding.gap_bound(logits_V, logits_V, Sampling(temperature=0.0, repetition_penalty=0.25)) > 3.5 * plain
    local = Rounding(band=1e-6, local=1e-3)
    assert local.unstable
    assert not rounding.unstable
    assert local.logit_bound(logits_V) == pytest.approx(2e-3 * 4)
