import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gcompute.config.model import ModelConfig
from gcompute.serve.int8 import dequantize, quantize, round_to
from gcompute.serve.kv_pool import KVPool, empty_pool, gather, put_back, started, store

CONFIG = ModelConfig(vocab=16, layers=2, dim=16, heads=4, kv_heads=2, head_dim=4, ffn=16, context=64)
PAGE, TABLES = 4, [[3, 1, 5], [2, 6, 4], [0, 0, 0]]
DTYPES = (jnp.float32, jnp.bfloat16, jnp.int8)


def filled(dtype) -> KVPool:
    """A pool whose every cell is another number."""
    pool = empty_pool(CONFIG, num_pages=8, page=PAGE, dtype=dtype)
    rng = np.random.default_rng(0)
    if dtype != jnp.int8:

        def random(leaf):
            values = jnp.asarray(rng.standard_normal(leaf.shape), dtype)
            return jax.lax.bitcast_convert_type(values, leaf.dtype) if leaf.dtype == jnp.uint16 else values

        return jax.tree.map(random, pool)
    return jax.tree.map(
        lambda leaf: jnp.asarray(
            rng.integers(-127, 128, leaf.shape) if leaf.dtype == jnp.int8 else rng.uniform(0.01, 0.1, leaf.shape),
            leaf.dtype,
        ),
        pool,
    )


def compute_of(dtype):
    return jnp.bfloat16 if dtype == jnp.int8 else dtype


def numbers(leaf) -> np.ndarray:
    """A leaf of the pool as numbers: bfloat16 is kept as its bits."""
    return np.asarray(
        jax.lax.bitcast_convert_type(leaf, jnp.bfloat16) if leaf.dtype == jnp.uint16 else leaf, np.float32
    )


def cell_of(pool: KVPool, kind: str, layer: int, page: int, offset: int) -> np.ndarray:
    """One cell's [K, H] numbers as attention is to see them."""
    values = numbers(getattr(pool, kind)[layer])[page, offset]
    if not pool.quantized:
        return values
    scaled = values * np.asarray(getattr(pool, f"{kind}_scale")[layer])[page, offset, :, None]
    return np.asarray(jnp.asarray(scaled).astype(jnp.bfloat16), np.float32)


@pytest.mark.oldest
@pytest.mark.parametrize("dtype", DTYPES)
def test_gather_lays_the_pages_of_a_row_side_by_side(dtype):
    pool = filled(dtype)
    cache = jax.jit(gather, static_argnums=2)(pool, jnp.array(TABLES), compute_of(dtype))
    assert cache.length == 12
    for layer in range(CONFIG.layers):
        for row, table in enumerate(TABLES):
            for cell in range(12):
                for kind in ("k", "v"):
                    got = np.asarray(getattr(cache, kind)[layer], np.float32)[row, :, cell]
                    np.testing.assert_array_equal(got, cell_of(pool, kind, layer, table[cell // PAGE], cell % PAGE))


@pytest.mark.oldest
@pytest.mark.parametrize("dtype", DTYPES)
def test_put_back_writes_the_counted_cells_and_nothing_else(dtype):
    """Cells of each row: across a page's border, up to and past the end of the table, and none."""
    pool, tables = filled(dtype), jnp.array(TABLES)
    start, count = np.array([2, 9, 0]), np.array([5, 6, 0])
    cache = gather(pool, tables, compute_of(dtype), num_cells=6)
    # The first two cells, then the other four, as two steps of a dispatch would store them.
    for first, num in ((0, 2), (2, 4)):
        positions = jnp.asarray(start)[:, None] + first + jnp.arange(num)
        cache = started(cache, positions)
        for layer in range(CONFIG.layers):
            new = jax.random.normal(jax.random.key(first), (3, num, 2, 4))
            cache = store(cache, layer, new + layer, 2 * new - layer, positions)
    put = jax.jit(put_back, static_argnames="num_cells")
    after = put(pool, cache, tables, jnp.asarray(start), jnp.asarray(count), num_cells=6)
    written = {
        (TABLES[row][cell // PAGE], cell % PAGE): (row, cell)
        for row in range(3)
        for cell in range(start[row], min(start[row] + count[row], 12))
    }
    assert len(written) == 5 + 3
    for layer in range(CONFIG.layers):
        for kind in ("k", "v"):
            for page in range(8):
                for offset in range(PAGE):
                    got = cell_of(after, kind, layer, page, offset)
                    if (page, offset) in written:
                        row, cell = written[page, offset]
                        want = np.asarray(getattr(cache, f"new_{kind}")[layer])[row, :, cell - start[row]]
                        assert np.abs(want).max() > 0
                    else:
                        want = cell_of(pool, kind, layer, page, offset)
                    np.testing.assert_array_equal(got, want)


def test_new_cells_are_rounded_as_the_pool_will_keep_them():
    pool = filled(jnp.bfloat16)
    cache = started(gather(pool, jnp.array([[1, 2]]), jnp.float32, num_cells=2), jnp.array([[3]]))
    new = jax.random.normal(jax.random.key(0), (1, 2, 2, 4))
    cache = store(cache, 0, new, new, jnp.array([[3, 4]]))
    np.testing.assert_array_equal(cache.new_k[0], new.astype(jnp.bfloat16).astype(jnp.float32).swapaxes(1, 2))
    after = put_back(pool, cache, jnp.array([[1, 2]]), jnp.array([3]), jnp.array([2]), num_cells=2)
    np.testing.assert_array_equal(numbers(after.v[0])[2, 0], np.asarray(cache.new_v[0])[0, :, 1])


def test_what_was_rounded_to_int8_is_rounded_no_further():
    x = jax.random.normal(jax.random.key(0), (4096, 16)) * jnp.exp(jax.random.normal(jax.random.key(1), (4096, 1)))
    once, scale = quantize(x)
    assert int(jnp.max(jnp.abs(once.astype(jnp.int32)))) == 127
    for compute in (jnp.bfloat16, jnp.float32):
        np.testing.assert_array_equal(round_to(dequantize(once, scale, compute), scale), once)
    # Half a step, and what float32 division rounds.
    error = jnp.abs(dequantize(once, scale, jnp.float32) - x) / scale[:, None]
    assert float(jnp.max(error)) < 0.5 + 1e-4


def test_a_cell_of_zeros_stays_zeros():
    zeros = jnp.zeros((2, 4))
    np.testing.assert_array_equal(dequantize(*quantize(zeros), jnp.float32), zeros)


def test_cells_that_there_is_no_room_for_are_dropped():
    cache = gather(filled(jnp.float32), jnp.array([[1, 2]]), jnp.float32, num_cells=3)
    cache = started(cache, jnp.array([[5]]))
    nines = jnp.full((1, 3, 2, 4), 9.0)
    stored = store(cache, 0, nines, nines, jnp.array([[7, 8, 9]])).new_k[0]
    np.testing.assert_array_equal(stored[:, :, :2], 0.0)
    np.testing.assert_array_equal(stored[:, :, 2], 9.0)


def test_a_pool_needs_a_page_beside_the_garbage_page():
    with pytest.raises(ValueError, match="2 pages"):
        empty_pool(CONFIG, num_pages=1, page=16, dtype=jnp.float32)
