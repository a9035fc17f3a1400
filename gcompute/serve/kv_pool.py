"""Keys and values in pages: a pool that every request shares, and the cache that one dispatch works on.

A dispatch gathers the pages of its rows into a `RowCache` once, runs all its steps on that, and puts the new cells
back. The cells that were there before are only read; new ones go to a small part of their own, because XLA on CPU
rewrites a whole array to change one cell of it. Where kernels read and write pages where they lie, nothing is gathered
(see `page_cache`). Layouts are the business of these two modules: others see pages as a count and cells as positions.
Page 0 belongs to nobody: the tables of rows that stand for no request point to it.

int8: each cell and head has its own scale, the largest of its H numbers / 127. A cell is rounded when it is made
(`store`), so attention sees at once what any later dispatch will see, and where a dispatch ends changes no result.
"""

from dataclasses import dataclass, field, replace

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from gcompute.config.model import ModelConfig
from gcompute.serve.int8 import dequantize, quantize, round_to

# A dispatch does not know where its rows start until its first step says so.
NOT_STARTED = -1
# The dims of pages, of their scales and of a cache's cells as letters, for rules that lay arrays out on a mesh.
PAGE_DIMS, PAGE_SCALE_DIMS, CELL_DIMS = "PSKH", "PSK", "BKSH"


@jax.tree_util.register_dataclass
@dataclass(frozen=True, slots=True, kw_only=True)
class KVPool:
    """Keys and values of every layer in P pages of S cells, [P, S, K, H] each, a leaf a layer.

    A stacked pool would be copied whole to write one layer; and with heads before cells, to write one cell.

    bfloat16 is kept as its bits: to write a cell, XLA on CPU would convert the whole pool to float32 and back.
    Scales are empty unless pages are int8.
    """

    k: tuple[Array, ...]
    v: tuple[Array, ...]
    k_scale: tuple[Float[Array, "p s k"], ...]
    v_scale: tuple[Float[Array, "p s k"], ...]

    @property
    def num_pages(self) -> int:
        return self.k[0].shape[0]

    @property
    def page(self) -> int:
        """Cells of a page."""
        return self.k[0].shape[1]

    @property
    def dtype(self) -> jnp.dtype:
        """Of cells, whatever they are kept as."""
        return jnp.dtype(jnp.bfloat16) if self.k[0].dtype == jnp.uint16 else self.k[0].dtype

    @property
    def quantized(self) -> bool:
        return bool(self.k_scale)


@jax.tree_util.register_dataclass
@dataclass(frozen=True, slots=True, kw_only=True)
class RowCache:
    """The cells of B rows side by side, a leaf a layer, in the layout and dtype that attention reads.

    k, v: S cells from before this dispatch, never written. new_k, new_v: the C cells from `start` on, rounded as the
    pool rounds them; float32, so that writing converts nothing. new scales: with which int8 cells were rounded.
    """

    k: tuple[Float[Array, "b k s h"], ...]
    v: tuple[Float[Array, "b k s h"], ...]
    new_k: tuple[Float[Array, "b k c h"], ...]
    new_v: tuple[Float[Array, "b k c h"], ...]
    new_k_scale: tuple[Float[Array, "b k c"], ...]
    new_v_scale: tuple[Float[Array, "b k c"], ...]
    start_B: Int[Array, "b"]
    compute: jnp.dtype = field(metadata={"static": True})
    pool_dtype: jnp.dtype = field(metadata={"static": True})

    @property
    def length(self) -> int:
        """Cells of a row's pages."""
        return self.k[0].shape[2]

    @property
    def num_new(self) -> int:
        """New cells that there is room for."""
        return self.new_k[0].shape[2]


def empty_pool(config: ModelConfig, *, num_pages: int, page: int, dtype: jnp.dtype | str) -> KVPool:
    """A pool of zeros; `dtype` may be "int8".

    Raises:
      ValueError: there is no page beside the garbage page, or a page has no cell.
    """
    if num_pages < 2 or page < 1:
        raise ValueError(f"a pool needs 2 pages of 1 cell at least, got {num_pages} of {page}: page 0 is never used.")
    shape = (num_pages, page, config.num_kv_heads, config.head_size)
    quantized = jnp.dtype(dtype) == jnp.int8

    def zeros() -> tuple[Array, ...]:
        return tuple(to_bits(jnp.zeros(shape, dtype)) for _ in range(config.layers))

    def scales() -> tuple[Array, ...]:
        return tuple(jnp.zeros(shape[:-1], jnp.float32) for _ in range(config.layers)) if quantized else ()

    return KVPool(k=zeros(), v=zeros(), k_scale=scales(), v_scale=scales())


def gather(
    pool: KVPool,
    tables_BN: Int[Array, "b n"],
    compute: jnp.dtype,
    num_cells: int | None = None,
) -> RowCache:
    """The pages of each row side by side: B rows of N pages, in `compute`, with room for `num_cells` new cells.

    `num_cells` is at least what the dispatch will store; without it there is room for whole rows, which is slower.
    """

    def cells(pages: Array) -> Array:
        rows = jnp.take(pages, tables_BN, axis=0, mode="clip")
        return rows.reshape(rows.shape[0], -1, *rows.shape[3:]).swapaxes(1, 2)

    def old(pages: tuple[Array, ...], scales: tuple[Array, ...]) -> tuple[Array, ...]:
        if scales:
            both = zip(pages, scales, strict=True)
            return tuple(dequantize(cells(values), cells(scale), compute) for values, scale in both)
        return tuple(_values(cells(values)).astype(compute) for values in pages)

    b, n = tables_BN.shape
    shape = (b, pool.k[0].shape[2], num_cells or n * pool.page, pool.k[0].shape[3])
    wide = jnp.promote_types(compute, jnp.float32)

    def new(dims: tuple[int, ...], like: tuple[Array, ...]) -> tuple[Array, ...]:
        return tuple(jnp.zeros(dims, wide) for _ in like)

    return RowCache(
        k=old(pool.k, pool.k_scale),
        v=old(pool.v, pool.v_scale),
        compute=compute,
        pool_dtype=pool.dtype,
        new_k=new(shape, pool.k),
        new_v=new(shape, pool.v),
        new_k_scale=new(shape[:-1], pool.k_scale),
        new_v_scale=new(shape[:-1], pool.v_scale),
        start_B=jnp.full(b, NOT_STARTED, jnp.int32),
    )


def started(cache: RowCache, positions_BT: Int[Array, "b t"]) -> RowCache:
    """The cache, knowing where its new cells begin: at the first positions that were ever stored in it."""
    start_B = jnp.where(cache.start_B == NOT_STARTED, positions_BT[:, 0].astype(jnp.int32), cache.start_B)
    return replace(cache, start_B=start_B)


def store(
    cache: RowCache,
    layer: int,
    k_BTKH: Float[Array, "b t k h"],
    v_BTKH: Float[Array, "b t k h"],
    positions_BT: Int[Array, "b t"],
) -> RowCache:
    """The started cache with T new keys and values of one layer; the positions of a row follow each other.

    What lies outside the cache's new cells is dropped, never clipped.
    """
    compute = cache.compute
    first_B = positions_BT[:, 0] - cache.start_B

    def put(leaves: tuple[Array, ...], new: Array) -> tuple[Array, ...]:
        return replaced(leaves, layer, _place(leaves[layer], new, first_B))

    if not cache.new_k_scale:
        k_BTKH, v_BTKH = (new.astype(compute).astype(cache.pool_dtype) for new in (k_BTKH, v_BTKH))
    else:
        (k_int8, k_scale), (v_int8, v_scale) = quantize(k_BTKH), quantize(v_BTKH)
        k_BTKH, v_BTKH = dequantize(k_int8, k_scale, compute), dequantize(v_int8, v_scale, compute)
        scales = {"new_k_scale": put(cache.new_k_scale, k_scale), "new_v_scale": put(cache.new_v_scale, v_scale)}
        cache = replace(cache, **scales)
    return replace(cache, new_k=put(cache.new_k, k_BTKH), new_v=put(cache.new_v, v_BTKH))


def _place(cells: Array, new: Array, first_B: Array) -> Array:
    """[B, K, C, ...] with [B, T, K, ...] in cells first to first + T of each row."""
    t, rest = new.shape[1], (None,) * (cells.ndim - 3)
    new = new.swapaxes(1, 2).astype(cells.dtype)
    from_BC = jnp.arange(cells.shape[2]) - first_B[:, None]
    if t > 1:
        new = jnp.take_along_axis(new, jnp.clip(from_BC, 0, t - 1)[:, None, :, *rest], axis=2)
    return jnp.where(((from_BC >= 0) & (from_BC < t))[:, None, :, *rest], new, cells)


def in_order(cache: RowCache, layer: int) -> tuple[Array, Array]:
    """One layer's keys and values with the new cells where they belong among the old: [B, K, S, H] in all.

    Sums over these do not depend on where a dispatch began, at the price of a copy of all cells a step.
    """
    from_BS = jnp.arange(cache.length) - cache.start_B[:, None]
    is_new_B1S1 = ((from_BS >= 0) & (from_BS < cache.num_new))[:, None, :, None]
    at_B1S1 = jnp.clip(from_BS, 0, cache.num_new - 1)[:, None, :, None]

    def merged(old: Array, new: Array) -> Array:
        return jnp.where(is_new_B1S1, jnp.take_along_axis(new, at_B1S1, axis=2).astype(old.dtype), old)

    return merged(cache.k[layer], cache.new_k[layer]), merged(cache.v[layer], cache.new_v[layer])


def put_back(
    pool: KVPool,
    cache: RowCache,
    tables_BN: Int[Array, "b n"],
    start_B: Int[Array, "b"],
    count_B: Int[Array, "b"],
    *,
    num_cells: int,
    after: Int[Array, "..."] | None = None,
) -> KVPool:
    """The pool with new cells `start` to `start + count` of each row in their pages; `count` is at most `num_cells`.

    `start` is the first position that the dispatch stored. Nothing else of a page changes; cells past the end of a
    row's table are dropped, never clipped.

    after: tokens that were chosen from what was gathered, where `count` does not follow from them already. Without an
    order between reading and writing, XLA copies the whole pool.
    """
    num_cells = min(num_cells, cache.num_new)
    steps_1C = jnp.arange(num_cells, dtype=jnp.int32)[None]
    cells_BC = start_B[:, None] + steps_1C
    legal_BC = (steps_1C < count_B[:, None]) & (cells_BC < cache.length)
    pages_BC = jnp.take_along_axis(tables_BN, jnp.minimum(cells_BC, cache.length - 1) // pool.page, axis=1)
    if after is not None:
        # Tokens are not that negative, which XLA cannot know.
        legal_BC = legal_BC & (jnp.min(after) > jnp.iinfo(jnp.int32).min)
    pages_BC = jnp.where(legal_BC, pages_BC, pool.num_pages)

    def put(pages: Array, new: Array) -> Array:
        return pages.at[pages_BC, cells_BC % pool.page].set(new.swapaxes(1, 2), mode="drop")

    def values(pages: tuple[Array, ...], new: tuple[Array, ...], scales: tuple[Array, ...]) -> tuple[Array, ...]:
        cells = [leaf[:, :, :num_cells] for leaf in new]
        if scales:
            # bfloat16 keeps 8 bits, so a quotient is off by at most 127 / 2^9, and rounds to the int8 that it was.
            both = zip(cells, scales, strict=True)
            rounded = [round_to(leaf, scale[:, :, :num_cells]) for leaf, scale in both]
        else:
            rounded = [to_bits(leaf.astype(pool.dtype)) for leaf in cells]
        return tuple(put(*both) for both in zip(pages, rounded, strict=True))

    def scales(pages: tuple[Array, ...], new: tuple[Array, ...]) -> tuple[Array, ...]:
        return tuple(put(leaf, scale[:, :, :num_cells]) for leaf, scale in zip(pages, new, strict=True))

    return KVPool(
        k=values(pool.k, cache.new_k, cache.new_k_scale),
        v=values(pool.v, cache.new_v, cache.new_v_scale),
        k_scale=scales(pool.k_scale, cache.new_k_scale),
        v_scale=scales(pool.v_scale, cache.new_v_scale),
    )


def replaced(leaves: tuple[Array, ...], layer: int, leaf: Array) -> tuple[Array, ...]:
    """The leaves of all layers with one of them another."""
    return (*leaves[:layer], leaf, *leaves[layer + 1 :])


def to_bits(x: Array) -> Array:
    """Cells as a pool keeps them."""
    return jax.lax.bitcast_convert_type(x, jnp.uint16) if x.dtype == jnp.bfloat16 else x


def _values(x: Array) -> Array:
    return jax.lax.bitcast_convert_type(x, jnp.bfloat16) if x.dtype == jnp.uint16 else x
