import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gcompute.serve.request import seed_words
from gcompute.serve.sampler import SamplingRows, keep, sample, scale

V = 50


def rows(*settings: dict) -> SamplingRows:
    def column(name, default, dtype):
        return jnp.array([row.get(name, default) for row in settings], dtype)

    return SamplingRows(
        temperature=column("temperature", 1.0, jnp.float32),
        top_k=column("top_k", 0, jnp.int32),
        top_p=column("top_p", 1.0, jnp.float32),
        min_p=column("min_p", 0.0, jnp.float32),
        seed=jnp.array([seed_words(row.get("seed", 0)) for row in settings], jnp.uint32),
    )


def random_logits(num_rows: int, seed: int = 0) -> np.ndarray:
    return (3 * np.random.default_rng(seed).standard_normal((num_rows, V))).astype(np.float32)


def reference(logits: np.ndarray, *, temperature=1.0, top_k=0, top_p=1.0, min_p=0.0, seed=0) -> np.ndarray:
    """The distribution to draw from, by sorting, in float64."""
    p = np.exp((logits.astype(np.float64) - logits.max()) / temperature)
    order = np.argsort(-p, kind="stable")
    if top_k:
        p[order[top_k:]] = 0
    p /= p.sum()
    before = np.cumsum(p[order]) - p[order]
    p[order[before >= top_p]] = 0
    p[p < min_p * p.max()] = 0
    return p / p.sum()


SETTINGS = [
    {},
    {"temperature": 0.5},
    {"top_k": 1},
    {"top_k": 7},
    {"top_k": V + 5},
    {"top_p": 0.6},
    {"top_p": 0.95, "temperature": 1.7},
    {"min_p": 0.1},
    {"top_k": 12, "top_p": 0.7, "min_p": 0.05, "temperature": 1.3},
]


@pytest.mark.oldest
def test_the_tokens_kept_are_those_of_a_sorting_reference():
    for seed in range(5):
        logits = random_logits(len(SETTINGS), seed)
        settings = rows(*SETTINGS)
        kept = keep(scale(jnp.asarray(logits), settings.temperature), settings)
        for row, setting in enumerate(SETTINGS):
            np.testing.assert_array_equal(kept[row], reference(logits[row], **setting) > 0, err_msg=str(setting))


def test_extreme_settings_still_keep_the_most_likely_token_and_make_no_nan():
    logits = random_logits(5)
    extreme = rows({"top_p": 0.0}, {"min_p": 1.0}, {"temperature": 1e-30}, {"temperature": 1e6}, {"top_p": 1e-9})
    kept = np.asarray(keep(scale(jnp.asarray(logits), extreme.temperature), extreme))
    for row in (0, 1, 4):
        assert kept[row].nonzero()[0].tolist() == [logits[row].argmax()]
    tokens = sample(jnp.asarray(logits), extreme, jnp.arange(5))
    assert int(tokens[2]) == logits[2].argmax()
    assert np.all((np.asarray(tokens) >= 0) & (np.asarray(tokens) < V))


def test_tokens_tied_with_the_last_kept_stay():
    logits = jnp.array([[1.0, 0.0, 0.0, -1.0]])
    settings = rows({"top_k": 2})
    assert keep(scale(logits, settings.temperature), settings).tolist() == [[True, True, True, False]]


@pytest.mark.oldest
def test_temperature_0_is_argmax_with_the_first_of_equals():
    logits = random_logits(4).round()
    tokens = sample(jnp.asarray(logits), rows(*[{"temperature": 0.0, "top_k": 3}] * 4), jnp.arange(4))
    np.testing.assert_array_equal(tokens, logits.argmax(axis=1))


@pytest.mark.parametrize("setting", SETTINGS)
def test_frequencies_follow_the_reference_distribution(setting):
    num_draws = 4000
    logits = random_logits(1)[0]
    settings = jax.tree.map(lambda leaf: jnp.broadcast_to(leaf, (num_draws, *leaf.shape[1:])), rows(setting))
    drawn = jax.jit(sample)(jnp.broadcast_to(logits, (num_draws, V)), settings, jnp.arange(num_draws))
    counts = np.bincount(drawn, minlength=V)
    p = reference(logits, **setting)
    assert not counts[p == 0].any()
    # Five standard deviations of a binomial count: the draws are fixed by their seed, so this cannot flicker.
    np.testing.assert_array_less(np.abs(counts - num_draws * p), 5 * np.sqrt(num_draws * p * (1 - p)) + 1)


def test_a_draw_is_the_gumbel_maximum_under_the_folded_key():
    logits = random_logits(1)
    for seed, position in ((0, 0), (3, 17), (2**31, 5)):
        noise = jax.random.gumbel(jax.random.fold_in(jax.random.key(seed), position), (V,))
        expected = int(np.argmax(logits[0] - logits[0].max() + np.asarray(noise)))
        assert int(sample(jnp.asarray(logits), rows({"seed": seed}), jnp.array([position]))[0]) == expected


def test_seeds_and_positions_change_the_draw():
    logits = np.broadcast_to(random_logits(1) / 3, (64, V))
    by_seed = sample(jnp.asarray(logits), rows(*[{"seed": s * 2**32} for s in range(64)]), jnp.zeros(64, jnp.int32))
    by_position = sample(jnp.asarray(logits), rows(*[{}] * 64), jnp.arange(64))
    assert len(set(by_seed.tolist())) > 10
    assert len(set(by_position.tolist())) > 10


def test_a_row_draws_the_same_token_in_any_slot_of_any_batch_among_any_neighbours():
    logits = random_logits(len(SETTINGS))
    own = [{**setting, "seed": 11 * row} for row, setting in enumerate(SETTINGS)] + [{"temperature": 0.0}]
    logits = np.concatenate([logits, random_logits(1, 9)])
    draw = jax.jit(sample)
    alone = [
        int(draw(jnp.asarray(logits[row : row + 1]), rows(own[row]), jnp.array([100 + row]))[0])
        for row in range(len(own))
    ]
    for seed in range(4):
        order = np.random.default_rng(seed).permutation(len(own))[: len(own) - seed]
        together = draw(jnp.asarray(logits[order]), rows(*[own[row] for row in order]), jnp.asarray(100 + order))
        assert together.tolist() == [alone[row] for row in order]


def test_nothing_is_sorted():
    compiled = jax.jit(sample).lower(jnp.zeros((2, V)), rows({}, {}), jnp.zeros(2, jnp.int32)).compile()
    assert " sort(" not in compiled.as_text()
