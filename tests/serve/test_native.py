"""The CPU kernels against numpy: for this processor, as they are compiled for lesser ones and by clang, and for ARM."""

import platform
import shutil
import sys
from dataclasses import replace
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from kernels_alone import Emulated, compile_alone
from tiers import mostly_slow

from gcompute.cli.environment import HUGE_PAGES
from gcompute.config.model import ModelConfig
from gcompute.model.layers import rotary_table, rotate
from gcompute.serve.kv_pool import empty_pool, gather, put_back, started, store, to_bits
from gcompute.serve.native import attention, build, choices, norms, products, stores
from gcompute.serve.native.huge_pages import collapse
from gcompute.serve.native.products import pack, packable, unpack_rows
from gcompute.serve.page_cache import PageCache
from gcompute.serve.page_cache import store as store_in_pages

pytestmark = pytest.mark.skipif(not build.available(), reason=f"needs the CPU kernels: {build.why_not()}")
# What each leaves out of the processor's instructions.
LESSER = {
    "no-dot-products": ("-mno-avx512bf16", "-mno-avx512vnni"),
    "no-avx512": ("-mno-avx512f",),
    "no-avx": ("-mno-avx", "-mno-avx2"),
}
OTHERS = (*LESSER, "clang", "clang-no-avx512", "aarch64")
# What compiles for another processor, and what runs it here; Debian has them as g++-aarch64-linux-gnu and qemu-user.
CROSS_COMPILER, EMULATOR = "aarch64-linux-gnu-g++", "qemu-aarch64"
PAGE = 4


@pytest.fixture(scope="module", params=["native", *(pytest.param(name, marks=pytest.mark.slow) for name in OTHERS)])
def suffix(request, tmp_path_factory):
    """Of the names of kernels that are compiled in another way."""
    if request.param == "native":
        yield ""
        return
    folder, suffix = tmp_path_factory.mktemp("native"), f"_{request.param}"
    if request.param == "aarch64":
        if not (shutil.which(CROSS_COMPILER) and shutil.which(EMULATOR)):
            pytest.skip(f"needs {CROSS_COMPILER} and {EMULATOR}")
        program = compile_alone(CROSS_COMPILER, folder / "kernels")
        with pytest.MonkeyPatch.context() as patch:
            emulated = Emulated((EMULATOR, str(program)), folder, suffix, jax.ffi.ffi_call)
            patch.setattr(jax.ffi, "ffi_call", emulated)
            yield suffix
        return
    by_clang = request.param.startswith("clang")
    if by_clang and not shutil.which("clang++"):
        pytest.skip("needs clang++")
    flags = LESSER.get(request.param.removeprefix("clang-"), ())
    if flags and platform.machine() not in ("x86_64", "AMD64"):
        pytest.skip("needs an x86 processor, whose instructions these flags name")
    try:
        library = build.build("clang++" if by_clang else build.compiler(), folder, flags)
    except build.BuildError as error:
        if by_clang:
            raise
        pytest.skip(f"needs a compiler that knows {flags}: {error}")
    build.register(library, suffix)
    yield suffix


def whole_numbers(seed: int, shape: tuple[int, ...], dtype: str) -> np.ndarray:
    """Whole numbers whose products sum exactly in float32."""
    most = 127 if dtype == "int8" else 7
    return np.random.default_rng(seed).integers(-most - 1, most + 1, shape)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "int8"])
@pytest.mark.parametrize(
    ("m", "i", "o"),
    [(1, 64, 32), (5, 72, 70), (12, 64, 96), (13, 128, 33), (40, 256, 500), (1, 4, 40), (33, 16, 32), (200, 600, 70)],
)
def test_products_are_exact(suffix, dtype, m, i, o):
    x, w = whole_numbers(1, (m, i), dtype), whole_numbers(2, (o, i), dtype)
    found = products.product(jnp.asarray(x, dtype), pack(jnp.asarray(w, dtype)), o, suffix)
    assert found.dtype == (jnp.int32 if dtype == "int8" else jnp.float32)
    np.testing.assert_array_equal(found, x @ w.T)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_row_is_the_same_among_any_others(suffix, dtype):
    rng = np.random.default_rng(3)
    x, w = jnp.asarray(rng.normal(size=(129, 600)), dtype), pack(jnp.asarray(rng.normal(size=(80, 600)), dtype))
    whole = products.product(x, w, 80, suffix)
    for rows in (slice(0, 1), slice(7, 8), slice(3, 16), slice(28, 31), slice(100, 105), slice(128, 129)):
        np.testing.assert_array_equal(products.product(x[rows], w, 80, suffix), whole[rows])


@pytest.mark.oldest
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "int8"])
def test_rows_come_out_as_they_were_packed(dtype):
    w = jnp.asarray(whole_numbers(4, (70, 24), dtype), dtype)
    rows = jnp.array([[0, 69], [31, 32]])
    np.testing.assert_array_equal(unpack_rows(pack(w), rows, jnp.dtype(dtype)), w[rows])


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize(("m", "i", "f"), [(1, 64, 32), (13, 72, 96), (40, 256, 512), (1, 4, 32), (33, 16, 32)])
def test_a_gated_product_is_that_of_float64(suffix, dtype, m, i, f):
    x, w = (whole_numbers(seed, (rows, i), dtype) for seed, rows in ((9, m), (10, 2 * f)))
    packed = pack(jnp.asarray(w, dtype))
    found = products.gated_product(jnp.asarray(x, dtype), packed, 2 * f, suffix)
    gate, up = np.split((x @ w.T).astype(np.float64), 2, axis=1)
    exact = gate / (1 + np.exp(np.minimum(-gate, 700.0))) * up
    assert found.dtype == dtype
    # Far below zero, a gate is not quite shut.
    rtol = 2**-8 if dtype == "bfloat16" else 1e-6
    np.testing.assert_allclose(np.asarray(found, np.float64), exact, rtol=rtol, atol=1e-30)
    alone = products.gated_product(jnp.asarray(x[-1:], dtype), packed, 2 * f, suffix)
    np.testing.assert_array_equal(alone, found[-1:])


@pytest.mark.oldest("native-40-256")
@pytest.mark.parametrize(("m", "i"), [(5, 256), (40, 256), (40, 8)])
def test_what_is_fetched_for_later_changes_nothing(suffix, m, i):
    x, w = (whole_numbers(seed, (rows, i), "bfloat16") for seed, rows in ((11, m), (12, 192)))
    x, packed = jnp.asarray(x, "bfloat16"), pack(jnp.asarray(w, "bfloat16"))
    pool = jnp.ones((7, PAGE, 2, 32), jnp.uint16)
    # Entries that are no page, rows that have none and rows that claim more than they have.
    tables, starts = jnp.array([[1, 6, 900, -4], [0, 0, 0, 0], [2, 3, 4, 5]]), jnp.array([13, 0, 900])
    later = (pool, tables.astype(jnp.int32), starts.astype(jnp.int32))
    for product in (products.product, products.gated_product):
        np.testing.assert_array_equal(product(x, packed, 192, suffix, later=later), product(x, packed, 192, suffix))


def test_halves_that_are_not_whole_panels_are_refused():
    x, w = jnp.zeros((3, 64)), jnp.zeros((2 * 48, 64))
    with pytest.raises(Exception, match="do not go together"):
        jax.block_until_ready(products.gated_product(x, pack(w), 2 * 48))


def test_what_has_no_whole_words_is_not_packed():
    assert packable(3, jnp.dtype("float32"))
    assert not packable(3, jnp.dtype("bfloat16"))
    assert not packable(6, jnp.dtype("int8"))
    assert not packable(4, jnp.dtype("float64"))


def test_shapes_that_do_not_go_together_are_refused():
    with pytest.raises(Exception, match="do not go together"):
        jax.block_until_ready(products.product(jnp.ones((2, 8)), pack(jnp.ones((32, 4))), 32))


def cells_and_queries(rows, queries, starts, *, heads, kv_heads, size, table, dtype="float32", compute=None):
    """Pages with random cells before `starts` and `queries` new ones; all of them side by side; the queries."""
    compute = compute or jnp.dtype("float32" if dtype == "int8" else dtype)
    rng, num_cells = np.random.default_rng(5), table * PAGE
    config = ModelConfig(
        vocab=8, layers=1, dim=heads * size, heads=heads, kv_heads=kv_heads, head_dim=size, ffn=8, context=num_cells
    )
    pool = empty_pool(config, num_pages=1 + rows * table, page=PAGE, dtype=dtype)
    tables = jnp.asarray(1 + rng.permutation(rows * table).reshape(rows, table), jnp.int32)
    k, v = (jnp.asarray(rng.normal(size=(rows, num_cells, kv_heads, size)), jnp.float32) for _ in range(2))
    q = jnp.asarray(rng.normal(size=(rows, num_cells, heads, size)), jnp.float32)
    every, starts = jnp.tile(jnp.arange(num_cells), (rows, 1)), jnp.asarray(starts, jnp.int32)
    full = store(started(gather(pool, tables, compute), every), 0, k, v, every)
    pool = put_back(pool, full, tables, jnp.zeros(rows, jnp.int32), starts, num_cells=num_cells)
    positions = starts[:, None] + jnp.arange(queries)
    k, v, q = (jnp.take_along_axis(x, positions[:, :, None, None], axis=1) for x in (k, v, q))
    cache = PageCache(pool=pool, tables_BN=tables, compute=compute)
    cache = store_in_pages(cache, 0, k, v, positions, jnp.full(rows, queries))
    return cache, (full.new_k[0], full.new_v[0]), q, positions


def assert_attends(found, q, cells, positions, compute) -> None:
    """Against float64, a query at a time, with operands rounded as the model rounds them."""
    k, v = (np.asarray(part, np.float64) for part in cells)
    groups, scale = q.shape[2] // k.shape[1], np.float32(q.shape[3] ** -0.5)
    q = np.asarray((q * scale).astype(compute), np.float64)
    for row, query, head in np.ndindex(q.shape[:3]):
        seen = int(positions[row, query]) + 1
        scores = k[row, head // groups, :seen] @ q[row, query, head]
        weights = np.exp(scores - scores.max())
        weights = np.asarray(jnp.asarray(weights / weights.sum(), jnp.float32).astype(compute), np.float64)
        values = v[row, head // groups, :seen]
        # Sums of some hundred float32 numbers of size 1, and exp to 2^-22; a weight may be rounded the other way.
        tipped = 2.0**-8 * np.abs(weights[:, None] * values).max() if compute == jnp.bfloat16 else 0
        np.testing.assert_allclose(found[row, query, head], weights @ values, atol=3e-6 + tipped)


SHAPES = {
    "one query": {"rows": 3, "queries": 1, "starts": [0, 17, 63], "heads": 6, "kv_heads": 2, "size": 64, "table": 16},
    "chunk": {"rows": 2, "queries": 37, "starts": [3, 24], "heads": 4, "kv_heads": 4, "size": 8, "table": 16},
    "blocks": {"rows": 1, "queries": 5, "starts": [700], "heads": 5, "kv_heads": 1, "size": 80, "table": 180},
    "odd size": {"rows": 2, "queries": 1, "starts": [9, 50], "heads": 2, "kv_heads": 1, "size": 20, "table": 16},
    "four heads": {"rows": 2, "queries": 1, "starts": [40, 9], "heads": 4, "kv_heads": 1, "size": 96, "table": 16},
    "own heads": {"rows": 1, "queries": 1, "starts": [150], "heads": 3, "kv_heads": 3, "size": 160, "table": 40},
}


# Each shape by default in one kind of numbers, and each kind in two shapes.
KINDS = [(shape, dtype) for shape in SHAPES for dtype in ("float32", "bfloat16", "int8")]


@pytest.mark.oldest("native-one query-int8")
@pytest.mark.parametrize(("shape", "dtype"), mostly_slow(KINDS, *KINDS[::4]))
def test_attention_is_that_of_float64(suffix, shape, dtype):
    cache, cells, q, positions = cells_and_queries(**SHAPES[shape], dtype=dtype)
    assert_attends(attention.attend(q, cache, 0, positions, suffix), q, cells, positions, cache.compute)


def test_int8_cells_are_rounded_as_new_ones_are(suffix):
    shape = SHAPES["one query"]
    cache, cells, q, positions = cells_and_queries(**shape, dtype="int8", compute=jnp.dtype("bfloat16"))
    assert_attends(attention.attend(q, cache, 0, positions, suffix), q, cells, positions, cache.compute)


def test_no_bit_depends_on_where_a_dispatch_begins_or_on_other_queries(suffix):
    common = {"rows": 1, "heads": 4, "kv_heads": 2, "size": 32, "table": 80, "dtype": "bfloat16"}
    attend = partial(attention.attend, layer=0, suffix=suffix)
    cache, _, q, positions = cells_and_queries(**common, queries=40, starts=[270])
    whole = attend(q, cache, positions_BT=positions)
    for first, num in ((0, 1), (7, 1), (39, 1), (5, 3)):
        cache, _, q, positions = cells_and_queries(**common, queries=num, starts=[270 + first])
        np.testing.assert_array_equal(attend(q, cache, positions_BT=positions), whole[:, first : first + num])


def test_a_pool_of_rows_far_apart_reads_no_cell_of_others(suffix):
    """Cells past a row's position hold NaN, and so do the pages of nobody."""
    cache, cells, q, positions = cells_and_queries(**SHAPES["one query"])
    kept = {int(page) for row, at in enumerate(positions[:, 0]) for page in cache.tables_BN[row, : int(at) // PAGE + 1]}
    unused = jnp.array([page for page in range(cache.pool.num_pages) if page not in kept])
    cache = replace(cache, pool=jax.tree.map(lambda leaf: leaf.at[unused].set(jnp.nan), cache.pool))
    assert_attends(attention.attend(q, cache, 0, positions, suffix), q, cells, positions, cache.compute)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("shape", [(1, 64), (9, 20), (40, 768)])
def test_norms_are_those_of_float64(suffix, shape, dtype):
    rng = np.random.default_rng(6)
    x, added, scale = (rng.normal(size=size).astype(np.float32) for size in (shape, shape, shape[1:]))
    total, normed = norms.add_rms_norm(x, added, scale, 1e-5, jnp.dtype(dtype), suffix)
    np.testing.assert_array_equal(total, x + added)
    exact = np.asarray(total, np.float64)
    exact = exact / np.sqrt(np.mean(exact**2, axis=1, keepdims=True) + 1e-5) * scale
    assert normed.dtype == dtype
    # bfloat16 keeps 8 bits.
    np.testing.assert_allclose(np.asarray(normed, np.float64), exact, rtol=2**-8 if dtype == "bfloat16" else 1e-6)
    alone = norms.add_rms_norm(x[-1:], added[-1:], scale, 1e-5, jnp.dtype(dtype), suffix)
    np.testing.assert_array_equal(alone[1], normed[-1:])


@pytest.mark.parametrize("num", [5, 32, 1000, 32003])
def test_the_first_of_the_largest_is_chosen(suffix, num):
    rng = np.random.default_rng(7)
    x = rng.integers(-5, 5, (6, num)).astype(np.float32)
    x[1] = -np.inf
    x[2, num // 2] = np.inf
    x[3, -1] = 100
    x[4, num // 3] = np.nan
    x[5, 0], x[5, num - 2] = np.nan, np.inf
    expected = x.argmax(axis=1)
    expected[4:] = num - 1
    np.testing.assert_array_equal(choices.largest(jnp.asarray(x), suffix), expected)


# Rows that begin at a page's border, cross one, go past the table's end, keep only some, and none; entries that are no
# page or nobody's; positions before the first.
TABLES = np.array([[3, 1], [2, 6], [4, 5], [7, 8], [9, 10], [0, 40], [11, -3], [12, 13]])
POSITIONS = np.array([[4], [2], [6], [0], [1], [3], [3], [-2]]) + np.arange(3)
COUNTS = np.array([3, 3, 3, 1, 0, 3, 3, 3])
NUM_PAGES = 14


def with_new_cells(pages: np.ndarray, new: np.ndarray) -> np.ndarray:
    """Pages with cells where a reader of tables would look for them."""
    pages = pages.copy()
    for row, one in np.ndindex(*POSITIONS.shape):
        position = POSITIONS[row, one]
        if one < COUNTS[row] and 0 <= position < TABLES.shape[1] * PAGE:
            entry = TABLES[row, position // PAGE]
            if 0 < entry < NUM_PAGES:
                pages[entry, position % PAGE] = new[row, one]
    return pages


@pytest.mark.parametrize("dtype", ["float32", "uint16", "int8"])
@pytest.mark.parametrize("rest", [(2, 12), (3,)])
def test_new_cells_are_stored_where_they_belong_and_nowhere_else(suffix, dtype, rest):
    rng = np.random.default_rng(8)
    pages, new = (rng.integers(0, 100, (*size, *rest)).astype(dtype) for size in ((NUM_PAGES, PAGE), POSITIONS.shape))
    expected = with_new_cells(pages, new)
    assert np.any(expected != pages, axis=tuple(range(2, pages.ndim))).sum() == 3 + 3 + 2 + 1 + 0 + 0 + 1 + 1
    to = (jnp.asarray(TABLES), jnp.asarray(POSITIONS), jnp.asarray(COUNTS))
    np.testing.assert_array_equal(stores.store(jnp.asarray(pages), jnp.asarray(new), *to, suffix), expected)


def test_new_cells_of_another_size_are_refused():
    to = (jnp.asarray(TABLES), jnp.asarray(POSITIONS), jnp.asarray(COUNTS))
    with pytest.raises(Exception, match="not of the size"):
        jax.block_until_ready(
            stores.store(jnp.zeros((NUM_PAGES, PAGE, 2, 4)), jnp.zeros((*POSITIONS.shape, 2, 3)), *to)
        )


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("compute", ["float32", "bfloat16"])
@pytest.mark.parametrize("size", [12, 64])
@pytest.mark.parametrize("turned", [True, False])
def test_heads_are_turned_and_placed_as_by_the_model(suffix, dtype, compute, size, turned):
    (b, t), heads, kv_heads = POSITIONS.shape, 4, 2
    rng, compute = np.random.default_rng(11), jnp.dtype(compute)
    joined = jnp.asarray(rng.normal(size=(b, t, (heads + 2 * kv_heads) * size)), jnp.float32)
    shape = (NUM_PAGES, PAGE, kv_heads, size)
    pages = [to_bits(jnp.asarray(rng.normal(size=shape), dtype)) for _ in range(2)]
    to = (jnp.asarray(TABLES), jnp.asarray(POSITIONS), jnp.asarray(COUNTS))
    table = rotary_table(jnp.arange(b * t).reshape(b, t), size, 10000.0, jnp.dtype("float32")) if turned else None
    q, k, v = stores.place(joined, table, *pages, *to, heads=heads, compute=compute, suffix=suffix)

    parts = jnp.split(joined.reshape(b, t, -1, size), (heads, heads + kv_heads), axis=2)
    queries, keys = (rotate(part, table) if turned else part for part in parts[:2])
    np.testing.assert_allclose(q, queries, rtol=1e-6, atol=1e-6)
    wanted_k, wanted_v = (
        stores.store(before, to_bits(new.astype(compute).astype(dtype)), *to, suffix)
        for before, new in zip(pages, (keys, parts[2]), strict=True)
    )
    # A number may round to the other side.
    near = {"rtol": 1e-6 if dtype == compute == "float32" else 2**-7, "atol": 1e-6}
    np.testing.assert_allclose(numbers(k), numbers(wanted_k), **near)
    np.testing.assert_array_equal(v, wanted_v)


def numbers(pages) -> np.ndarray:
    """Of pages that may hold bfloat16's bits."""
    values = jax.lax.bitcast_convert_type(pages, jnp.bfloat16) if pages.dtype == jnp.uint16 else pages
    return np.asarray(values, np.float32)


def test_heads_that_are_not_as_many_as_the_pages_have_are_refused():
    pages, to = jnp.zeros((NUM_PAGES, PAGE, 2, 8)), (jnp.asarray(TABLES), jnp.asarray(POSITIONS), jnp.asarray(COUNTS))
    joined = jnp.zeros((*POSITIONS.shape, 7 * 8))
    with pytest.raises(Exception, match="not as many"):
        jax.block_until_ready(stores.place(joined, None, pages, pages, *to, heads=4, compute=jnp.dtype("float32")))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("shape", [SHAPES["one query"], SHAPES["odd size"]])
def test_attention_rounds_its_result_if_asked(suffix, shape, dtype):
    cache, _, q, positions = cells_and_queries(**shape, dtype=dtype)
    wide, narrow = (attention.attend(q, cache, 0, positions, suffix, dtype=to) for to in ("float32", "bfloat16"))
    np.testing.assert_array_equal(narrow, wide.astype(jnp.bfloat16))


def test_weights_are_the_same_on_huge_pages():
    rng = np.random.default_rng(12)
    arrays = [jnp.asarray(rng.integers(0, 1 << 32, 3 << 20, np.uint32)) for _ in range(2)]
    before = [np.array(array) for array in arrays]
    moved = collapse(arrays)
    for array, expected in zip(arrays, before, strict=True):
        np.testing.assert_array_equal(array, expected)
    is_linux = sys.platform.startswith("linux") and HUGE_PAGES.exists()
    if not is_linux or tuple(map(int, platform.release().split(".")[:2])) < (6, 1):
        pytest.skip("needs Linux 6.1 with huge pages, which can put pages together")
    # 12 MB lie on 5 huge pages at least that they fill.
    assert moved >= 2 * 5


def test_without_a_compiler_the_reason_is_told(monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CXX", raising=False)
    with pytest.raises(build.BuildError, match="install g"):
        build.compiler()


def test_a_compiler_that_fails_is_told_by_its_first_error(tmp_path):
    with pytest.raises(build.BuildError, match=r"failed: .*no-such-flag"):
        build.build(build.compiler(), tmp_path, ("-fno-such-flag",))
    assert not [path for path in tmp_path.rglob("*") if path.suffix == ".so"]


@pytest.mark.oldest
@pytest.mark.slow
def test_a_library_is_compiled_once(tmp_path):
    first = build.build(build.compiler(), tmp_path, ("-O0",))
    made = first.stat().st_mtime_ns
    assert build.build(build.compiler(), tmp_path, ("-O0",)) == first
    assert first.stat().st_mtime_ns == made


def test_more_flags_reach_the_compiler(monkeypatch, tmp_path):
    monkeypatch.setenv("GCOMPUTE_CACHE", str(tmp_path))
    monkeypatch.setenv(build.MORE_FLAGS, "-fno-such-flag")
    assert "no-such-flag" in str(build.why_not.__wrapped__())


def test_the_switch_turns_kernels_off(monkeypatch):
    monkeypatch.setenv(build.SWITCH, "0")
    assert build.why_not.__wrapped__() == f"{build.SWITCH}=0"
