"""Attention on CPU over the pages of a pool where they lie."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from gcompute.serve.native.build import target
from gcompute.serve.page_cache import PageCache


def attend(
    q_BTNH: Float[Array, "b t n h"],
    cache: PageCache,
    layer: int,
    positions_BT: Int[Array, "b t"],
    suffix: str = "",
    *,
    dtype: jnp.dtype | str = "float32",
) -> Float[Array, "b t n h"]:
    """softmax(q k^T / sqrt(H)) v over the cells up to each query's position; `dtype`: float32 or bfloat16.

    Scaled queries and weights are rounded to the cache's compute dtype, as by the model's own attention. Sums run
    over cells in their order, and a query's do not depend on the other queries or rows.
    """
    pool, no_scales = cache.pool, jnp.zeros(0, jnp.float32)
    scales = (pool.k_scale[layer], pool.v_scale[layer]) if pool.quantized else (no_scales, no_scales)
    call = jax.ffi.ffi_call(target("attention_paged", suffix), jax.ShapeDtypeStruct(q_BTNH.shape, dtype))
    return call(
        q_BTNH.astype(jnp.float32),
        pool.k[layer],
        pool.v[layer],
        *scales,
        cache.tables_BN.astype(jnp.int32),
        positions_BT.astype(jnp.int32),
        rounded=cache.compute == jnp.bfloat16,
    )
