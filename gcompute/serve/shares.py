"""Pages of a pool that is split into shares, each with rows of its own: no share reads or writes another's.

A share's pages lie together, its garbage page first; tables have the numbers of the whole pool. Rows come a share after
another, equally many each. With one share these are `kv_pool.gather` and `put_back`.
"""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Int

from gcompute.model.transformer import Execution
from gcompute.parallel.placement import constrain
from gcompute.serve import kv_pool
from gcompute.serve.kv_pool import CELL_DIMS, KVPool, RowCache
from gcompute.serve.page_cache import PageCache
from gcompute.serve.weights import Layout


def gather(
    pool: KVPool,
    tables_BN: Int[Array, "b n"],
    num_cells: int,
    *,
    execution: Execution,
    layout: Layout,
    shares: int,
) -> RowCache | PageCache:
    """The pages of each row side by side, as `kv_pool.gather`, or the pool itself where kernels read and write it."""
    compute, placement = execution.compute, execution.placement
    if layout.native:
        return PageCache(pool=pool, tables_BN=tables_BN, compute=compute)
    if shares == 1:
        cache = kv_pool.gather(pool, tables_BN, compute, num_cells)
    else:
        read = jax.vmap(partial(kv_pool.gather, compute=compute, num_cells=num_cells))
        cache = _joined(read(_split(pool, shares), _own_tables(pool, tables_BN, shares)))
    if placement is None:
        return cache
    # Scales lack the head's dim, and where a row starts has none but the row's.
    return jax.tree.map(lambda leaf: constrain(placement, leaf, CELL_DIMS[: leaf.ndim]), cache)


def put_back(
    pool: KVPool,
    cache: RowCache | PageCache,
    *,
    tables_BN: Int[Array, "b n"],
    start_B: Int[Array, "b"],
    count_B: Int[Array, "b"],
    num_cells: int,
    shares: int,
    after: Array | None = None,
) -> KVPool:
    """The pool with cells `start` to `start + count` of each row, as `kv_pool.put_back`; a `PageCache` has them."""
    if isinstance(cache, PageCache):
        return cache.pool
    if shares == 1:
        return kv_pool.put_back(pool, cache, tables_BN, start_B, count_B, num_cells=num_cells, after=after)
    write = jax.vmap(partial(kv_pool.put_back, num_cells=num_cells))
    rows = (_own_tables(pool, tables_BN, shares), *_split((start_B, count_B), shares))
    return _joined(write(_split(pool, shares), _split(cache, shares), *rows))


def _own_tables(pool: KVPool, tables_BN: Array, shares: int) -> Array:
    """Tables [shares, b / shares, n] of each share's own numbers."""
    first_R11 = (jnp.arange(shares, dtype=jnp.int32) * (pool.num_pages // shares))[:, None, None]
    return _split(tables_BN, shares) - first_R11


def _split(tree: Any, shares: int) -> Any:
    return jax.tree.map(lambda leaf: leaf.reshape(shares, -1, *leaf.shape[1:]), tree)


def _joined(tree: Any) -> Any:
    return jax.tree.map(lambda leaf: leaf.reshape(-1, *leaf.shape[2:]), tree)
