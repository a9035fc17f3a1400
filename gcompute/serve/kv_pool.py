"""Keys and values in pages: a pool that every request shares, and the contiguous cache that a dispatch works on.

A dispatch gathers the pages of its rows into a `RowCache` once, runs all its steps on that, and puts the cells that it
wrote back. Layouts are this module's own business: others see pages as a count and cells as positions. Page 0 belongs
to nobody: the tables of rows that stand for no request point to it.

int8: each cell and head has its own scale, the largest of its H numbers / 127. A cell is rounded when it is made
(`store`), so attention sees at once what any later dispatch will see, and where a dispatch ends changes no result.
"""

from dataclasses import dataclass

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from gcompute.config.model import ModelConfig
from gcompute.serve.int8 import dequantize, round_to, scales

GARBAGE_PAGE = 0


@jax.tree_util.register_dataclass
@dataclass(frozen=True, slots=True, kw_only=True)
class KVPool:
    """Keys and values of every layer in P pages of S cells, a leaf a layer: a stacked pool would be copied whole.

    scales are empty unless pages are int8.
    """

    k: tuple[Array, ...]
    v: tuple[Array, ...]
    k_scale: tuple[Float[Array, "p k s"], ...]
    v_scale: tuple[Float[Array, "p k s"], ...]

    @property
    def num_pages(self) -> int:
        return self.k[0].shape[0]

    @property
    def page(self) -> int:
        """Cells of a page."""
        return self.k[0].shape[2]

    @property
    def quantized(self) -> bool:
        return bool(self.k_scale)


@jax.tree_util.register_dataclass
@dataclass(frozen=True, slots=True, kw_only=True)
class RowCache:
    """The cells of B rows side by side, in the layout that attention reads; values are never int8.

    scales are those that int8 cells were rounded with, so that putting them back rounds nothing again.
    """

    k: tuple[Float[Array, "b k s h"], ...]
    v: tuple[Float[Array, "b k s h"], ...]
    k_scale: tuple[Float[Array, "b k s"], ...]
    v_scale: tuple[Float[Array, "b k s"], ...]

    @property
    def length(self) -> int:
        """Cells of a row."""
        return self.k[0].shape[2]


# The dims of each leaf as letters, for rules that lay arrays out on a mesh. No rule names pages or cells.
PAGE_DIMS, PAGE_SCALE_DIMS = "PKSH", "PKS"
CACHE_DIMS, CACHE_SCALE_DIMS = "BKSH", "BKS"


def empty_pool(config: ModelConfig, *, num_pages: int, page: int, dtype: jnp.dtype | str) -> KVPool:
    """A pool of zeros; `dtype` may be "int8".

    Raises:
      ValueError: there is no page beside the garbage page, or a page has no cell.
    """
    if num_pages < 2 or page < 1:
        raise ValueError(f"a pool needs 2 pages of 1 cell at least, got {num_pages} of {page}: page 0 is never used.")
    shape = (num_pages, config.num_kv_heads, page, config.head_size)
    quantized = jnp.dtype(dtype) == jnp.int8

    def zeros() -> tuple[Array, ...]:
        return tuple(jnp.zeros(shape, dtype) for _ in range(config.layers))

    def no_scales() -> tuple[Array, ...]:
        return tuple(jnp.zeros(shape[:-1], jnp.float32) for _ in range(config.layers)) if quantized else ()

    return KVPool(k=zeros(), v=zeros(), k_scale=no_scales(), v_scale=no_scales())


def gather(pool: KVPool, tables_BN: Int[Array, "b n"], compute: jnp.dtype) -> RowCache:
    """The pages of each row side by side: B rows of N pages of cells, in `compute`."""

    def cells(pages: Array) -> Array:
        rows = jnp.take(pages, tables_BN, axis=0, mode="clip").swapaxes(1, 2)
        return rows.reshape(rows.shape[0], rows.shape[1], -1, *rows.shape[4:])

    def values(pages: Array, scale_BKS: Array | None) -> Array:
        return cells(pages).astype(compute) if scale_BKS is None else dequantize(cells(pages), scale_BKS, compute)

    k_scale, v_scale = (tuple(cells(scale) for scale in scales) for scales in (pool.k_scale, pool.v_scale))
    nothing = (None,) * len(pool.k)
    return RowCache(
        k=tuple(values(*both) for both in zip(pool.k, k_scale or nothing, strict=True)),
        v=tuple(values(*both) for both in zip(pool.v, v_scale or nothing, strict=True)),
        k_scale=k_scale,
        v_scale=v_scale,
    )


def put_back(
    pool: KVPool,
    cache: RowCache,
    tables_BN: Int[Array, "b n"],
    start_B: Int[Array, "b"],
    count_B: Int[Array, "b"],
    *,
    num_cells: int,
) -> KVPool:
    """The pool with cells `start` to `start + count` of each row in their pages; `count` is at most `num_cells`.

    Nothing else of a page changes; cells past the end of a row's table are dropped, never clipped.
    """
    page, length = pool.page, cache.length
    steps_1C = jnp.arange(num_cells, dtype=jnp.int32)[None]
    cells_BC = start_B[:, None] + steps_1C
    legal_BC = (steps_1C < count_B[:, None]) & (cells_BC < length)
    pages_BC = jnp.take_along_axis(tables_BN, jnp.minimum(cells_BC, length - 1) // page, axis=1)
    pages_BC = jnp.where(legal_BC, pages_BC, pool.num_pages)

    def put(pages: Array, rows: Array, scale_BKS: Array | None) -> Array:
        at = jnp.minimum(cells_BC, length - 1)[:, None, :, *(None,) * (rows.ndim - 3)]
        new = jnp.take_along_axis(rows, at, axis=2)
        if scale_BKS is not None:
            new = round_to(new, jnp.take_along_axis(scale_BKS, at[..., 0], axis=2))
        # Indices apart from a slice put their dims first: [B, C, K, ...].
        return pages.at[pages_BC, :, cells_BC % page].set(new.swapaxes(1, 2).astype(pages.dtype), mode="drop")

    nothing = (None,) * len(pool.k)
    return KVPool(
        k=tuple(put(*three) for three in zip(pool.k, cache.k, cache.k_scale or nothing, strict=True)),
        v=tuple(put(*three) for three in zip(pool.v, cache.v, cache.v_scale or nothing, strict=True)),
        k_scale=tuple(put(*both, None) for both in zip(pool.k_scale, cache.k_scale, strict=True)),
        v_scale=tuple(put(*both, None) for both in zip(pool.v_scale, cache.v_scale, strict=True)),
    )


def store(
    cache: RowCache,
    layer: int,
    k_BTKH: Float[Array, "b t k h"],
    v_BTKH: Float[Array, "b t k h"],
    positions_BT: Int[Array, "b t"],
) -> tuple[tuple[Array, Array], tuple[Array, Array] | None]:
    """One layer's keys and values with T new cells a row at `positions`, and its scales where cells are int8.

    Positions past the end of the cache are dropped, never clipped.
    """
    rows_B1 = jnp.arange(positions_BT.shape[0])[:, None]

    def put(cells: Array, new: Array) -> Array:
        return cells.at[rows_B1, :, positions_BT].set(new.astype(cells.dtype), mode="drop")

    if not cache.k_scale:
        return (put(cache.k[layer], k_BTKH), put(cache.v[layer], v_BTKH)), None
    new_scales = scales(k_BTKH), scales(v_BTKH)
    dtype = cache.k[layer].dtype
    k_BTKH, v_BTKH = (
        dequantize(round_to(x, scale), scale, dtype) for x, scale in zip((k_BTKH, v_BTKH), new_scales, strict=True)
    )
    return (
        (put(cache.k[layer], k_BTKH), put(cache.v[layer], v_BTKH)),
        (put(cache.k_scale[layer], new_scales[0]), put(cache.v_scale[layer], new_scales[1])),
    )
