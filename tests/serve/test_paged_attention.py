"""Attention over pages: gathering them changes no bit, and the TPU's kernels, run without a TPU, agree."""

import functools
from collections.abc import Iterator

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental import pallas
from tiers import mostly_slow

from gcompute.config.mesh import MeshShape
from gcompute.model.attention import attend
from gcompute.parallel.mesh import build_mesh, use_mesh
from gcompute.parallel.placement import Placement
from gcompute.serve.paged_attention import attend_paged, attend_ragged, check_kernel, empty_pool, write_cells

N, K, PAGE, PAGES, NUM_PAGES = 4, 2, 8, 3, 12
# Rows of one batch: a step of decoding, a whole prompt, a chunk of a longer one over a page's edge, a new row.
LENGTHS, QUERIES = (17, 6, 12, 1), (1, 6, 5, 1)
TABLES = np.array([[3, 4, 9], [7, 0, 0], [2, 5, 0], [1, 0, 0]], np.int32)
NO_ROW = np.zeros((1, PAGES), np.int32)
GATHERED = jax.jit(functools.partial(attend_paged, kernel="xla", compute=jnp.float32))


@pytest.fixture
def interpreted(monkeypatch) -> Iterator[None]:
    """Runs kernels step by step without a TPU. Pallas's mode for TPUs lacks what the ragged kernel does to arrays."""
    monkeypatch.setattr(pallas, "pallas_call", functools.partial(pallas.pallas_call, interpret=True))
    try:
        from jax._src.literals import TypedInt
    except ImportError:
        pass
    else:
        # JAX 0.10 asks the plain numbers of an index for their shape here.
        monkeypatch.setattr(TypedInt, "shape", (), raising=False)
    jax.clear_caches()
    yield
    jax.clear_caches()


def filled(kernel: str, head: int, dtype=jnp.float32, *, kv_heads: int = K, pages: int = NUM_PAGES):
    """A pool whose every cell, of the garbage page too, holds numbers, and the same numbers as [P, S, K, H]."""
    rng = np.random.default_rng(1)
    keys, values = (rng.normal(size=(pages, PAGE, kv_heads, head)).astype(np.float32) for _ in range(2))
    pool = empty_pool(kernel, num_pages=pages, page=PAGE, kv_heads=kv_heads, head_size=head, dtype=dtype)
    at = [jnp.asarray(x, jnp.int32) for x in np.divmod(np.arange(pages * PAGE), PAGE)]
    flat = [jnp.asarray(x.reshape(-1, kv_heads, head)) for x in (keys, values)]
    return jax.jit(write_cells, static_argnums=5)(pool, *flat, *at, kernel), keys, values


def new_tokens(num: int, head: int, *, kv_heads: int = K, heads: int = N):
    rng = np.random.default_rng(2)
    return [rng.normal(size=(num, n, head)).astype(np.float32) for n in (heads, kv_heads, kv_heads)]


def textbook(q, k, v, keys, values, tables, lengths, queries):
    """Each query by itself in float64, its row's old cells from the pages and its new ones from the tokens."""
    out, start = [], 0
    for table, length, count in zip(tables, lengths, queries, strict=True):
        rows = []
        for pages, new in ((keys, k), (values, v)):
            cells = pages[table].reshape(-1, *pages.shape[2:])[:length].astype(np.float64)
            cells[length - count :] = new[start : start + count]
            rows.append(cells)
        for index in range(count):
            seen = length - count + index + 1
            for head in range(q.shape[1]):
                group = head // (q.shape[1] // k.shape[1])
                scores = rows[0][:seen, group] @ q[start + index, head] / q.shape[2] ** 0.5
                weights = np.exp(scores - scores.max())
                out.append(weights @ rows[1][:seen, group] / weights.sum())
        start += count
    return np.array(out).reshape(sum(queries), q.shape[1], q.shape[2])


def ragged_rows(spare_rows: int):
    """The batch with rows that stand for no request after it."""
    cu_q_lens = np.cumsum((0, *QUERIES, *(0,) * spare_rows)).astype(np.int32)
    tables = np.concatenate([TABLES, *[NO_ROW] * spare_rows])
    lengths = np.array((*LENGTHS, *(0,) * spare_rows), np.int32)
    return tuple(map(jnp.asarray, (tables, lengths, cu_q_lens, np.int32(len(LENGTHS)))))


@pytest.mark.oldest
@pytest.mark.parametrize("chunk", [1, 5])
def test_gathered_pages_are_a_contiguous_cache_bit_for_bit(chunk: int):
    head, rows = 8, 3
    pool, keys, values = filled("xla", head)
    lengths, tables = np.array([17, 6, 12]), TABLES[:3]
    q, k, v = (x.reshape(rows, chunk, -1, head) for x in new_tokens(rows * chunk, head))
    cache = [pages[tables].reshape(rows, -1, K, head) for pages in (keys, values)]
    positions_BT = lengths[:, None] - chunk + np.arange(chunk)
    for cells, new in zip(cache, (k, v), strict=True):
        for row in range(rows):
            cells[row, positions_BT[row]] = new[row]
    visible = np.arange(PAGES * PAGE) <= positions_BT[..., None]
    expected = jax.jit(attend, static_argnums=4)(*map(jnp.asarray, (q, *cache, visible)), jnp.float32)
    found, pool = GATHERED(*map(jnp.asarray, (q, k, v)), pool, jnp.asarray(tables), jnp.asarray(lengths, jnp.int32))
    np.testing.assert_array_equal(found, expected)
    for pages, cells in zip(pool, cache, strict=True):
        np.testing.assert_array_equal(np.asarray(pages)[tables].swapaxes(2, 3).reshape(cells.shape), cells)


def test_a_row_of_no_request_writes_nothing():
    pool, _, _ = filled("xla", 8)
    q, k, v = (jnp.asarray(x)[:, None] for x in new_tokens(2, 8))
    tables, lengths = jnp.asarray(TABLES[:2]), jnp.asarray([0, 6], jnp.int32)
    _, after = GATHERED(q, k, v, pool, tables, lengths)
    changed = {tuple(at) for x, y in zip(pool, after, strict=True) for at in np.argwhere(np.asarray(x != y))[:, [0, 2]]}
    assert changed == {(7, 5)}


def test_cells_past_a_table_are_dropped():
    pool, _, _ = filled("xla", 8)
    q, k, v = (jnp.asarray(x)[:, None] for x in new_tokens(1, 8))
    tables, lengths = jnp.asarray(TABLES[:1]), jnp.asarray([PAGES * PAGE + 1], jnp.int32)
    _, after = GATHERED(q, k, v, pool, tables, lengths)
    for before, pages in zip(pool, after, strict=True):
        np.testing.assert_array_equal(before, pages)


@pytest.mark.oldest
@pytest.mark.parametrize("spare_rows", [0, 2])
def test_flat_tokens_are_each_rows_own_attention(spare_rows: int):
    check_ragged("xla", 8, spare_rows, jnp.float32, atol=1e-6)


@pytest.mark.usefixtures("interpreted")
@pytest.mark.parametrize(
    ("head", "dtype", "atol"),
    # float32 sums; bfloat16 rounds weights and results to 8 bits. A head of 16 is padded.
    [
        pytest.param(128, jnp.float32, 1e-5, id="float32", marks=pytest.mark.slow),
        pytest.param(16, jnp.float32, 1e-5, id="padded head", marks=pytest.mark.slow),
        pytest.param(128, jnp.bfloat16, 0.03, id="bfloat16", marks=pytest.mark.slow),
    ],
)
def test_the_ragged_kernel_is_each_rows_own_attention(head: int, dtype, atol: float):
    check_ragged("ragged", head, 2, dtype, atol=atol)


def check_ragged(kernel: str, head: int, spare_rows: int, dtype, *, atol: float) -> None:
    total, padding = sum(QUERIES), 3
    pool, keys, values = filled(kernel, head, dtype)
    q, k, v = new_tokens(total + padding, head)
    run = jax.jit(functools.partial(attend_ragged, kernel=kernel, compute=dtype))
    found, after = run(*map(jnp.asarray, (q, k, v)), pool, *ragged_rows(spare_rows))
    rounded = [np.asarray(jnp.asarray(x, dtype), np.float32) for x in (q, k, v, keys, values)]
    expected = textbook(*rounded, TABLES, LENGTHS, QUERIES)
    np.testing.assert_allclose(found[:total], expected, atol=atol)
    np.testing.assert_array_equal(found[total:], 0)
    # The garbage page, and all cells but the new ones, are as they were.
    same = sum(int(np.sum(np.all(np.asarray(x == y), axis=-1))) for x, y in zip(pool, after, strict=True))
    assert same == 2 * K * (NUM_PAGES * PAGE - total)


@pytest.mark.usefixtures("interpreted")
@pytest.mark.parametrize(
    ("kernel", "head"),
    [
        pytest.param("ragged", 128, marks=pytest.mark.slow),
        pytest.param("paged", 128, marks=pytest.mark.slow),
        ("paged", 64),
    ],
)
def test_a_step_of_decoding_by_a_kernel(kernel: str, head: int):
    pool, keys, values = filled(kernel, head, jnp.bfloat16)
    tables, lengths = np.concatenate([TABLES, NO_ROW])[[0, 1, 4, 2, 3]], np.array([17, 6, 0, 12, 1], np.int32)
    q, k, v = new_tokens(5, head)
    run = jax.jit(functools.partial(attend_paged, kernel=kernel, compute=jnp.bfloat16))
    arrays = (jnp.asarray(x)[:, None] for x in (q, k, v))
    found, _ = run(*arrays, pool, jnp.asarray(tables), jnp.asarray(lengths))
    real = lengths > 0
    rounded = [np.asarray(jnp.asarray(x, jnp.bfloat16), np.float32) for x in (q[real], k[real], v[real], keys, values)]
    expected = textbook(*rounded, tables[real], lengths[real], (1,) * 4)
    np.testing.assert_allclose(np.asarray(found)[real, 0], expected, atol=0.03)


@pytest.mark.parametrize(
    ("text", "kv_heads"),
    mostly_slow([("tensor=2", 2), ("data=2,tensor=2", 2), ("tensor=4", 2)], ("data=2,tensor=2", 2)),
)
def test_a_mesh_attends_as_one_device_does(text: str, kv_heads: int):
    """Heads over tensor, each kept twice where there are too few, and rows with their pages over data."""
    shape = MeshShape.parse(text)
    mesh = build_mesh(shape)
    head, data = 8, shape.data
    q, k, v = (jnp.asarray(x)[:, None] for x in new_tokens(4, head))
    pool = filled("xla", head)[0]
    lengths = jnp.asarray(LENGTHS, jnp.int32)
    expected, _ = GATHERED(q, k, v, pool, jnp.asarray(TABLES), lengths)
    heads = max(kv_heads, shape.tensor)
    repeated = tuple(jnp.repeat(pages, heads // kv_heads, axis=1) for pages in pool)
    # Each share of the rows has all pages, in the same places.
    shared = tuple(jnp.tile(pages, (data, 1, 1, 1)) for pages in repeated)
    placement = Placement(mesh=mesh, shape=shape)
    run = functools.partial(attend_paged, kernel="xla", compute=jnp.float32, placement=placement)
    with use_mesh(mesh):
        found, _ = jax.jit(run)(q, k, v, shared, jnp.asarray(TABLES), lengths)
    # Fewer heads a device: products of another shape, whose sums may be in another order.
    np.testing.assert_allclose(found, expected, atol=1e-6)


@pytest.mark.slow
@pytest.mark.usefixtures("interpreted")
@pytest.mark.parametrize("tensor", [2, 4])
def test_the_ragged_kernel_on_a_mesh(tensor: int):
    """Each device runs it on its own heads; with 4, two devices keep the same head."""
    head, total = 128, sum(QUERIES)
    shape = MeshShape(tensor=tensor)
    mesh = build_mesh(shape)
    q, k, v = (jnp.asarray(x) for x in new_tokens(total, head))
    (pages,), keys, values = filled("ragged", head)
    by_head = pages.reshape(NUM_PAGES, PAGE, K, 2, head)
    pool = (jnp.repeat(by_head, max(K, tensor) // K, axis=2).reshape(NUM_PAGES, PAGE, -1, head),)
    placement = Placement(mesh=mesh, shape=shape)
    run = functools.partial(attend_ragged, kernel="ragged", compute=jnp.float32, placement=placement)
    with use_mesh(mesh):
        found, _ = jax.jit(run)(q, k, v, pool, *ragged_rows(1))
    expected = textbook(*map(np.asarray, (q, k, v)), keys, values, TABLES, LENGTHS, QUERIES)
    np.testing.assert_allclose(found, expected, atol=1e-5)


@pytest.mark.parametrize(
    ("kernel", "changes", "said"),
    [
        ("ragged", {"head_size": 256}, "heads of up to 128 numbers, and these have 256"),
        ("ragged", {"kv_heads": 3, "heads": 6}, "does not take kv_heads=3 of bfloat16 on a device. Legal: 1, 2, 4, 8"),
        ("ragged", {"kv_heads": 16, "heads": 16, "dtype": jnp.float32}, "does not take heads=16 over kv_heads=16"),
        ("paged", {"dtype": jnp.float32}, "rounds keys and values to bfloat16"),
        ("ragged", {"tensor": 3, "heads": 24}, "tensor=3 and kv_heads=8"),
    ],
)
def test_refusals(kernel: str, changes: dict, said: str):
    values = {"heads": 32, "kv_heads": 8, "head_size": 128, "dtype": jnp.bfloat16, "tensor": 1, **changes}
    with pytest.raises(ValueError, match=said):
        check_kernel(kernel, **values)


def test_the_paged_kernel_takes_one_query_a_row():
    pool, _, _ = filled("paged", 128, jnp.bfloat16)
    q, k, v = (jnp.asarray(x)[None] for x in new_tokens(2, 128))
    with pytest.raises(ValueError, match="one query a row, got 2"):
        attend_paged(
            *(q, k, v, pool, jnp.asarray(TABLES[:1]), jnp.asarray([2], jnp.int32)),
            kernel="paged",
            compute=jnp.bfloat16,
        )
    rows = ragged_rows(0)
    with pytest.raises(ValueError, match="use ragged or xla attention for mixed batches"):
        attend_ragged(q[0], k[0], v[0], pool, *rows, kernel="paged", compute=jnp.bfloat16)
