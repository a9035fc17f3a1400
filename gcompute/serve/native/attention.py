"""Attention on CPU over the pages of a pool where they lie."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from gcompute.serve.kv_pool import RowCache
from gcompute.serve.native.build import target


def attend(
    q_BTNH: Float[Array, "b t n h"],
    cache: RowCache,
    layer: int,
    positions_BT: Int[Array, "b t"],
    suffix: str = "",
    *,
    dtype: jnp.dtype | str = "float32",
) -> Float[Array, "b t n h"]:
    """softmax(q k^T / sqrt(H)) v over the cells up to each query's position; `dtype`: float32 or bfloat16.

    Scaled queries and weights are rounded to the cache's compute dtype, as by the model's own attention. `cache` has
    its pages in place. Sums run over cells in their order, whichever of them are new, and a query's do not depend on
    the other queries or rows.
    """
    assert cache.tables_BN is not None
    no_scales = jnp.zeros(0, jnp.float32)
    scales = (cache.k_scale[layer], cache.v_scale[layer]) if cache.k_scale else (no_scales, no_scales)
    call = jax.ffi.ffi_call(target("attention_paged", suffix), jax.ShapeDtypeStruct(q_BTNH.shape, dtype))
    return call(
        q_BTNH.astype(jnp.float32),
        cache.k[layer],
        cache.v[layer],
        *scales,
        cache.tables_BN.astype(jnp.int32),
        cache.new_k[layer],
        cache.new_v[layer],
        cache.start_B,
        positions_BT.astype(jnp.int32),
        rounded=cache.compute == jnp.bfloat16,
    )
