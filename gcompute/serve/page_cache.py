"""The cache of one dispatch where CPU kernels read and write the pool's pages where they lie: nothing is gathered.

New cells go straight to their pages, rounded as the pool keeps them. A cell whose position is past its row's table or
whose page is that of nobody is dropped.
"""

from dataclasses import dataclass, field, replace

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from gcompute.serve.int8 import quantize
from gcompute.serve.kv_pool import KVPool, replaced, to_bits
from gcompute.serve.native import stores as native_stores


@jax.tree_util.register_dataclass
@dataclass(frozen=True, slots=True, kw_only=True)
class PageCache:
    """The whole pool, and which pages hold the cells of B rows, each of N pages."""

    pool: KVPool
    tables_BN: Int[Array, "b n"]
    compute: jnp.dtype = field(metadata={"static": True})

    @property
    def length(self) -> int:
        """Cells of a row's pages."""
        return self.tables_BN.shape[1] * self.pool.page


def store(
    cache: PageCache,
    layer: int,
    k_BTKH: Float[Array, "b t k h"],
    v_BTKH: Float[Array, "b t k h"],
    positions_BT: Int[Array, "b t"],
    count_B: Int[Array, "b"],
) -> PageCache:
    """The cache with the first `count` of T new keys and values of each row in one layer."""
    pool, to = cache.pool, (cache.tables_BN, positions_BT, count_B)

    def put(leaves: tuple[Array, ...], new: Array) -> tuple[Array, ...]:
        return replaced(leaves, layer, native_stores.store(leaves[layer], new, *to))

    if pool.quantized:
        (k_BTKH, k_scale_BTK), (v_BTKH, v_scale_BTK) = quantize(k_BTKH), quantize(v_BTKH)
        scales = {"k_scale": put(pool.k_scale, k_scale_BTK), "v_scale": put(pool.v_scale, v_scale_BTK)}
        pool = replace(pool, **scales)
    else:
        k_BTKH, v_BTKH = (to_bits(new.astype(cache.compute).astype(pool.dtype)) for new in (k_BTKH, v_BTKH))
    return replace(cache, pool=replace(pool, k=put(pool.k, k_BTKH), v=put(pool.v, v_BTKH)))


def place(
    cache: PageCache,
    layer: int,
    joined_BTO: Float[Array, "b t o"],
    rotary: Float[Array, "2 b t half"] | None,
    positions_BT: Int[Array, "b t"],
    count_B: Int[Array, "b"],
    *,
    heads: int,
) -> tuple[Float[Array, "b t n h"], PageCache]:
    """Queries, and the cache as `store` makes it, of the product that has all heads side by side; not of int8 cells."""
    pool, to = cache.pool, (cache.tables_BN, positions_BT, count_B)
    pages = (pool.k[layer], pool.v[layer])
    q_BTNH, k, v = native_stores.place(joined_BTO, rotary, *pages, *to, heads=heads, compute=cache.compute)
    pool = replace(pool, k=replaced(pool.k, layer, k), v=replaced(pool.v, layer, v))
    return q_BTNH, replace(cache, pool=pool)
