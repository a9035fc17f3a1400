"""Causal attention over a sequence that is split over devices, by bringing whole sequences to an ordinary attention.

Two ways, both for any attention function that already works on one device, a fused kernel as well:

    ulysses_attention    all-to-all: from a piece of the sequence with all heads, to all of it with a piece of the heads
    gathered_attention   all-gather: own queries with all heads against all keys and values

Values a device sends in a forward pass, for t local tokens, N query and K key/value heads on n devices, times b H:

    Ulysses   (n - 1) / n t (2 N + 2 K)   K becomes lcm(K, n) where n does not divide K
    gathered  (n - 1) t 2 K               and all keys are held: n t 2 K
    ring      (n - 1) t 2 K               `ring_attention`, which holds the keys of two devices

Source: Jacobs et al. 2023, "DeepSpeed Ulysses", arXiv:2309.14509, section 3; Llama 3 herd of models 2024,
arXiv:2407.21783, section 3.3.2 (the all-gather).
"""

import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from gcompute.parallel.load_balance import Layout, local_positions, sequence_order, to_sequence, to_shards
from gcompute.parallel.ring_attention import check_shapes


def ulysses_attention(
    q_btNH: Float[Array, "b t n h"],
    k_bsKH: Float[Array, "b s k h"],
    v_bsKH: Float[Array, "b s k h"],
    *,
    axis: str,
    layout: Layout,
    attend: Callable[[Array, Array, Array], Array],
) -> Float[Array, "b t n h"]:
    """Causal attention of a sequence that is split over mesh axis `axis`, by all-to-all. Per-device code.

    `attend(q_BTnH, k_BTkH, v_BTkH) -> o_BTnH` is causal attention over a whole sequence in order; it gets N / n of the
    query heads and their key/value heads, and its gradient is used as it is. Work is the same on every device in any
    layout, so `layout` only says how the sequence was split. Four all-to-alls (q, k, v, o), and their opposites in the
    backward pass. Key/value heads that n devices cannot share out are repeated up to lcm(K, n), no further.

    >>> from jax.sharding import PartitionSpec as P
    >>> from gcompute.config.mesh import Axis, MeshShape
    >>> from gcompute.parallel.mesh import build_mesh
    >>> attend = lambda q, k, v: jax.nn.dot_product_attention(q, k, v, is_causal=True)
    >>> whole = lambda q, k, v: ulysses_attention(q, k, v, axis=Axis.CONTEXT, layout="zigzag", attend=attend)
    >>> sharded = jax.shard_map(whole, mesh=build_mesh(MeshShape(context=4)), in_specs=P(None, Axis.CONTEXT),
    ...                         out_specs=P(None, Axis.CONTEXT))
    >>> q_BTNH, k_BTKH = jnp.ones((1, 16, 8, 4)), jnp.ones((1, 16, 2, 4))
    >>> jax.jit(sharded)(q_BTNH, k_BTKH, k_BTKH).shape
    (1, 16, 8, 4)

    Raises:
      ValueError: the axis does not divide the query heads, or shapes that do not belong together.
    """
    check_shapes(q_btNH, k_bsKH, v_bsKH)
    num_shards, heads, kv_heads = jax.lax.axis_size(axis), q_btNH.shape[2], k_bsKH.shape[2]
    if heads % num_shards:
        legal = ", ".join(str(n) for n in range(1, heads + 1) if heads % n == 0)
        raise ValueError(
            f"{num_shards} devices cannot share out {heads} query heads, which Ulysses attention needs. Legal sizes of"
            f" axis {str(axis)!r}: {legal}; ring attention takes any."
        )
    repeats = math.lcm(kv_heads, num_shards) // kv_heads

    def by_heads(x_btNH: Array) -> Array:
        x_bTnH = jax.lax.all_to_all(x_btNH, axis, split_axis=2, concat_axis=1, tiled=True)
        return to_sequence(x_bTnH, num_shards, layout)

    k_btKH, v_btKH = (jnp.repeat(x, repeats, axis=2) if repeats > 1 else x for x in (k_bsKH, v_bsKH))
    o_bTnH = attend(by_heads(q_btNH), by_heads(k_btKH), by_heads(v_btKH))
    return jax.lax.all_to_all(to_shards(o_bTnH, num_shards, layout), axis, split_axis=1, concat_axis=2, tiled=True)


def gathered_attention(
    q_btNH: Float[Array, "b t n h"],
    k_bsKH: Float[Array, "b s k h"],
    v_bsKH: Float[Array, "b s k h"],
    *,
    axis: str,
    layout: Layout,
    attend: Callable[[Array, Array, Array, Array], Array],
) -> Float[Array, "b t n h"]:
    """Causal attention of a sequence that is split over mesh axis `axis`, by all-gather. Per-device code.

    `attend(q_btNH, k_bSKH, v_bSKH, visible_bTS) -> o_btNH` is attention over the keys that each query may see. Keys
    stay in the order of the layout: the mask follows them. Two all-gathers, and two reduce-scatters in the backward
    pass. The zigzag layout balances only an `attend` that skips masked blocks.

    Raises:
      ValueError: shapes that do not belong together, or an odd t in the zigzag layout.
    """
    check_shapes(q_btNH, k_bsKH, v_bsKH)
    num_shards, t = jax.lax.axis_size(axis), q_btNH.shape[1]
    k_bSKH, v_bSKH = (jax.lax.all_gather(x, axis, axis=1, tiled=True) for x in (k_bsKH, v_bsKH))
    key_positions_S = jnp.asarray(sequence_order(t * num_shards, num_shards, layout))
    visible_tS = key_positions_S <= local_positions(axis, t, layout)[:, None]
    return attend(q_btNH, k_bSKH, v_bSKH, visible_tS[None])
