import dataclasses
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gcompute.config.model import ModelConfig
from gcompute.config.presets import PRESETS
from gcompute.model import transformer
from gcompute.model.transformer import Execution, init
from gcompute.serve.decoder import forward
from gcompute.serve.kv_pool import RowCache, empty_pool, gather
from gcompute.serve.native import build
from gcompute.serve.page_cache import PageCache
from gcompute.serve.weights import Layout, choose_layout, serving_weights

FAMILIES = {
    "llama": PRESETS["test"],
    "gpt2": PRESETS["test-gpt2"],
    "qwen3": dataclasses.replace(PRESETS["test"], qk_norm=True, head_dim=12, tied=False),
    "biased-llama": dataclasses.replace(PRESETS["test"], bias=True),
    "experts": dataclasses.replace(PRESETS["test"], experts=4, experts_per_token=2),
}
# Rows of 64 words or more, which few rows are multiplied from.
WIDE = ModelConfig(vocab=96, layers=2, dim=128, heads=4, kv_heads=2, ffn=256, context=64)
PAGE = 4
# A prompt read in two chunks, three tokens at once as a draft is verified, then one.
PIECES = ((0, 3), (3, 3), (6, 3), (9, 1), (10, 1))
LENGTH = 11


def require_kernels(layout: Layout) -> None:
    if layout is Layout.PACKED and not build.available():
        pytest.skip(f"needs the CPU kernels: {build.why_not()}")


def perturbed(config: ModelConfig) -> transformer.Params:
    """Parameters with every value moved, so that a bias or scale that is ignored shows."""

    @jax.jit
    def moved():
        leaves, structure = jax.tree.flatten(init(config, jax.random.key(0)))
        keys = jax.random.split(jax.random.key(1), len(leaves))
        return structure.unflatten(
            [leaf + 0.1 * jax.random.normal(key, leaf.shape) for leaf, key in zip(leaves, keys, strict=True)]
        )

    return moved()


def fresh_cache(
    config: ModelConfig, *, rows: int, compute, pool_dtype=None, layout=Layout.FUSED
) -> RowCache | PageCache:
    pool = empty_pool(config, num_pages=4 * rows + 1, page=PAGE, dtype=pool_dtype or compute)
    tables = jnp.arange(1, 4 * rows + 1).reshape(rows, 4)
    return PageCache(pool=pool, tables_BN=tables, compute=compute) if layout.native else gather(pool, tables, compute)


def by_pieces(config: ModelConfig, params, tokens, *, execution, layout, int8=False, pool_dtype=None) -> list:
    """Logits of each piece, from the decoder."""
    weights = jax.jit(partial(serving_weights, config=config, compute=execution.compute, layout=layout, int8=int8))(
        params
    )
    step = jax.jit(partial(forward, config=config, execution=execution))
    rows = tokens.shape[0]
    cache = fresh_cache(config, rows=rows, compute=execution.compute, pool_dtype=pool_dtype, layout=layout)
    found = []
    for start, num in PIECES:
        positions = jnp.tile(jnp.arange(start, start + num), (rows, 1))
        logits, cache = step(weights, tokens[:, start : start + num], positions_BT=positions, cache=cache)
        found.append(logits)
    return found


def expected(config: ModelConfig, params, tokens, execution) -> list:
    """The same from one pass of the model over whole sequences."""
    logits, _ = jax.jit(partial(transformer.forward, config=config, execution=execution))(params, tokens)
    return [logits[:, start : start + num] for start, num in PIECES]


def random_tokens(config: ModelConfig, rows: int) -> jax.Array:
    return jax.random.randint(jax.random.key(5), (rows, LENGTH), 0, config.vocab)


def rms(x) -> float:
    return float(np.sqrt((np.asarray(x, np.float64) ** 2).mean()))


# Those that leave out nothing are enough for a quick look.
QUICK = {
    ("qwen3", Layout.PACKED),
}
CASES = [
    pytest.param(family, layout, marks=() if (family, layout) in QUICK else pytest.mark.slow)
    for family in FAMILIES
    for layout in (Layout.PLAIN, Layout.FUSED, Layout.PACKED)
]


@pytest.mark.parametrize(("family", "layout"), CASES)
def test_every_family_gives_the_logits_of_the_model(family, layout):
    require_kernels(layout)
    config = FAMILIES[family]
    params, execution = perturbed(config), Execution(compute=jnp.float32)
    tokens = random_tokens(config, 2)
    wanted = expected(config, params, tokens, execution)
    found = by_pieces(config, params, tokens, execution=execution, layout=layout)
    for ours, theirs in zip(found, wanted, strict=True):
        # The same float32 sums in another order: some 1e-6 of the largest logit.
        np.testing.assert_allclose(ours, theirs, rtol=1e-5, atol=1e-5 * float(jnp.abs(theirs).max()))


@pytest.mark.oldest("packed")
@pytest.mark.parametrize("layout", [pytest.param(Layout.PAIRED, marks=pytest.mark.slow), Layout.PACKED])
def test_other_layouts_give_what_the_matrix_gives(layout):
    """They hold the very bfloat16 numbers: what differs is the order of sums, and rounding that it tips over."""
    require_kernels(layout)
    params, execution = perturbed(WIDE), Execution(compute=jnp.bfloat16)
    tokens = random_tokens(WIDE, 1)
    wanted = by_pieces(WIDE, params, tokens, execution=execution, layout=Layout.FUSED)
    found = by_pieces(WIDE, params, tokens, execution=execution, layout=layout)
    exact = expected(WIDE, params, tokens, Execution(compute=jnp.float32))
    for ours, theirs, truth in zip(found, wanted, exact, strict=True):
        rounding = rms(theirs - truth)
        assert rms(ours - theirs) < rounding
        # Both are as far from float32 as bfloat16 makes them.
        assert 0 < rms(ours - truth) < 1.5 * rounding


@pytest.mark.oldest
def test_logits_at_picks_one_position_a_row():
    config, execution = FAMILIES["llama"], Execution(compute=jnp.float32)
    weights = serving_weights(perturbed(config), config, compute=jnp.float32, layout=Layout.FUSED)
    tokens = jax.random.randint(jax.random.key(5), (3, 7), 0, config.vocab)
    common = {
        "config": config,
        "execution": execution,
        "positions_BT": jnp.tile(jnp.arange(7), (3, 1)),
        "cache": fresh_cache(config, rows=3, compute=jnp.float32),
    }
    at = jnp.array([0, 6, 3])
    whole, picked = jax.jit(
        lambda: (forward(weights, tokens, **common)[0], forward(weights, tokens, **common, logits_at_B=at)[0])
    )()
    np.testing.assert_allclose(picked, whole[jnp.arange(3), at], rtol=1e-5, atol=1e-5)


def test_int8_weights_give_the_same_whatever_the_number_of_rows():
    """Products are whole numbers, so words (1 row) and matrices (8 rows) agree but for float32 sums in attention."""
    params, execution = perturbed(WIDE), Execution(compute=jnp.float32)
    tokens = random_tokens(WIDE, 8)
    many = by_pieces(WIDE, params, tokens, execution=execution, layout=Layout.PAIRED, int8=True)
    one = by_pieces(WIDE, params, tokens[7:], execution=execution, layout=Layout.PAIRED, int8=True)
    for ours, theirs in zip(one, many, strict=True):
        # Where a float32 sum tips an activation over, its int8 is off by one part in 127.
        np.testing.assert_allclose(ours[0], theirs[7], atol=0.02 * float(jnp.abs(theirs).max()))


@pytest.mark.parametrize("layout", [Layout.FUSED, Layout.PACKED])
@pytest.mark.parametrize(("int8", "pool_dtype"), [(True, None), (False, jnp.int8)])
def test_int8_is_near_the_model(int8, pool_dtype, layout):
    require_kernels(layout)
    params, execution = perturbed(WIDE), Execution(compute=jnp.float32)
    tokens = random_tokens(WIDE, 2)
    wanted = expected(WIDE, params, tokens, execution)
    found = by_pieces(WIDE, params, tokens, execution=execution, layout=layout, int8=int8, pool_dtype=pool_dtype)
    for ours, theirs in zip(found, wanted, strict=True):
        # Weights and activations are off by 2.8 / 127 / sqrt(12) of their own size, 2.8 being the largest of some 200
        # normal numbers: 0.9 % a product, and 9 products follow each other.
        assert 1e-5 < rms(ours - theirs) / rms(theirs) < 0.08


def test_the_layout_follows_the_backend_and_the_compiler(monkeypatch):
    monkeypatch.setattr(build, "available", lambda: True)
    assert choose_layout(None, "cpu", jnp.bfloat16) is Layout.PACKED
    assert choose_layout(None, "cpu", jnp.float32) is Layout.PACKED
    monkeypatch.setattr(build, "available", lambda: False)
    assert choose_layout(None, "cpu", jnp.bfloat16) is Layout.PAIRED
    assert choose_layout(None, "cpu", jnp.float32) is Layout.FUSED
    assert choose_layout(None, "tpu", jnp.bfloat16) is Layout.FUSED


def test_int8_on_a_mesh_is_refused():
    config = FAMILIES["llama"]
    with pytest.raises(ValueError, match="one device"):
        serving_weights(perturbed(config), config, compute=jnp.bfloat16, layout=Layout.PLAIN, int8=True)
