"""Causal attention over a sequence that is split over devices: keys and values travel around a ring.

In n steps every device sees the keys and values of all n, and never holds more than two devices' share. Softmax is
taken online: the maximum m of a query's scores so far, the sum z of exp(s - m) and the output o before division by z
are rescaled whenever m grows. Of the other devices' keys a causal query needs only the earlier ones, and no step
computes a block that is masked throughout (layouts and their pieces: `load_balance`):

    zigzag       step 0: two triangles and one full block; later steps: two full blocks, on every device
    contiguous   step 0: one triangle; step s: one full block on devices i >= s, nothing on the others

Messages a device: forward n - 1 of (k, v); backward n - 1 of (k, v), and n - 1 of (dk, dv), which are summed on the
way and end at home. k and v travel in the compute dtype, dk and dv in the dtype of the sums. The steps are unrolled:
n is small, and the compiler can hide each message behind the products of a step.

Source: Liu et al. 2023, "Ring Attention with Blockwise Transformers", arXiv:2310.01889, algorithm 1; Dao et al. 2022,
"FlashAttention", arXiv:2205.14135, algorithms 1 and 4 (the online softmax and its gradient).
"""

from collections.abc import Callable
from functools import partial
from typing import TypeVar

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Bool, Float

from gcompute.parallel.collectives import axis_index, varying, varying_axes
from gcompute.parallel.einsum import accumulator, einsum
from gcompute.parallel.load_balance import Layout, check_sequence, pieces_per_shard

# What a rematerialisation policy calls the results: with them kept, the backward pass repeats no step of the forward.
RING_ATTENTION = "ring_attention"
# Finite, so that subtracting the first maximum of a query from it is no NaN.
MASKED = -1e30

Tree = TypeVar("Tree")
Piece = int | Array


def ring_attention(
    q_btNH: Float[Array, "b t n h"],
    k_bsKH: Float[Array, "b s k h"],
    v_bsKH: Float[Array, "b s k h"],
    *,
    axis: str,
    layout: Layout = "zigzag",
    compute: jnp.dtype | None = None,
    key_block: int | None = None,
) -> Float[Array, "b t n h"]:
    """o = softmax(q k^T / sqrt(H)) v, causal, of a sequence that is split over mesh axis `axis`. Per-device code.

    Each device passes the shard that `load_balance.sequence_order` gives it; N / K queries share a key/value head.
    Products have operands in `compute` (by default the dtype of q) and sums in `accumulator(compute)`, which is the
    dtype of the result too. The backward pass is a ring as well; it starts from q, k, v, o and one logsumexp a query.

    `key_block` keys are scored at once (by default a whole piece: t keys if contiguous, t / 2 if zigzag), so the
    working memory is b N (t or t / 2) key_block scores.

    >>> from jax.sharding import PartitionSpec as P
    >>> from gcompute.config.mesh import Axis, MeshShape
    >>> from gcompute.parallel.mesh import build_mesh
    >>> attend = partial(ring_attention, axis=Axis.CONTEXT)
    >>> sharded = jax.shard_map(attend, mesh=build_mesh(MeshShape(context=4)), in_specs=P(None, Axis.CONTEXT),
    ...                         out_specs=P(None, Axis.CONTEXT))
    >>> q_BTNH, k_BTKH = jnp.ones((1, 16, 4, 8)), jnp.ones((1, 16, 2, 8))
    >>> jax.jit(sharded)(q_BTNH, k_BTKH, k_BTKH).shape
    (1, 16, 4, 8)

    Raises:
      ValueError: shapes that do not belong together, an odd t in the zigzag layout, a block that does not divide.
    """
    check_shapes(q_btNH, k_bsKH, v_bsKH)
    t, num_shards = q_btNH.shape[1], jax.lax.axis_size(axis)
    check_sequence(t * num_shards, num_shards, layout)
    piece = t // pieces_per_shard(layout)
    if key_block is not None and (key_block < 1 or piece % key_block):
        raise ValueError(
            f"key_block={key_block} does not divide the {piece} keys of a piece: use a divisor of {piece}."
        )
    # A cotangent must vary as its primal does: where k and v are alike on more devices than q, the sum is taken here.
    axes = (axis, *sorted((varying_axes(q_btNH) | varying_axes(k_bsKH) | varying_axes(v_bsKH)) - {axis}))
    q_btNH, k_bsKH, v_bsKH = varying((q_btNH, k_bsKH, v_bsKH), axes)
    return _ring(q_btNH, k_bsKH, v_bsKH, axis, layout, jnp.dtype(compute or q_btNH.dtype), key_block or piece)


def check_shapes(q_btNH: Array, k_bsKH: Array, v_bsKH: Array) -> None:
    """Refuse q, k and v that are not one causal self-attention with grouped heads.

    Raises:
      ValueError: batch, length or head size differ, or the key/value heads do not divide the query heads.
    """
    q, k, v = q_btNH.shape, k_bsKH.shape, v_bsKH.shape
    if len(q) != 4 or k != v or q[:2] != k[:2] or q[3:] != k[3:]:
        raise ValueError(
            f"q {q}, k {k} and v {v} are not one attention: use q [b, t, N, H] and k, v [b, t, K, H] of one b, t, H."
        )
    if q[2] % k[2]:
        raise ValueError(f"{k[2]} key/value heads do not divide {q[2]} query heads: each must serve a whole group.")


@partial(jax.custom_vjp, nondiff_argnums=(3, 4, 5, 6))
def _ring(
    q_btNH: Array, k_bsKH: Array, v_bsKH: Array, axis: str, layout: Layout, compute: jnp.dtype, key_block: int
) -> Array:
    return _ring_forward(q_btNH, k_bsKH, v_bsKH, axis, layout, compute, key_block)[0]


def _ring_forward(
    q_btNH: Array, k_bsKH: Array, v_bsKH: Array, axis: str, layout: Layout, compute: jnp.dtype, key_block: int
) -> tuple[Array, tuple[Array, ...]]:
    wide, num_shards, place = accumulator(compute), jax.lax.axis_size(axis), axis_index(axis)
    q, kv = _queries(q_btNH, k_bsKH.shape[2], layout, compute), _keys_values(k_bsKH, v_bsKH, layout, compute)

    def visit(kv: Array, state: tuple[Array, ...], query: Piece, key: Piece, *, causal: bool) -> tuple[Array, ...]:
        queries = _piece((q, *state), query)
        return _with_piece(state, query, _absorb(queries, _piece(kv, key), causal, compute, key_block))

    o, m, z = jnp.zeros(q.shape, wide), jnp.full(q.shape[:-1], MASKED, wide), jnp.zeros(q.shape[:-1], wide)
    o, m, z = varying((o, m, z), tuple(varying_axes(q)))
    for step in range(num_shards):
        # Asked for before the products that it can travel behind.
        arriving = _to_next(kv, axis) if step + 1 < num_shards else kv
        o, m, z = _visit_blocks(partial(visit, kv), (o, m, z), step, place, layout)
        # One step at a time, or messages run ahead of the sums and pile up: compiled for 8 TPU v5e, t = 2048, forward
        # and backward took three times the working memory without these barriers.
        kv, o, m, z = jax.lax.optimization_barrier((arriving, o, m, z))
    o_btNH = _tokens_first(o / z[..., None], q_btNH.shape)
    o_btNH, lse = checkpoint_name((o_btNH, m + jnp.log(z)), RING_ATTENTION)
    return o_btNH, (q_btNH, k_bsKH, v_bsKH, o_btNH, lse)


def _ring_backward(
    axis: str, layout: Layout, compute: jnp.dtype, key_block: int, saved: tuple[Array, ...], do_btNH: Array
) -> tuple[Array, Array, Array]:
    # Without the barrier XLA finds the same messages in the forward pass, and keeps what all n of them brought.
    (q_btNH, k_bsKH, v_bsKH, o_btNH, lse), do_btNH = jax.lax.optimization_barrier((saved, do_btNH))
    wide, num_shards, place = accumulator(compute), jax.lax.axis_size(axis), axis_index(axis)
    kv_heads = k_bsKH.shape[2]
    q, kv = _queries(q_btNH, kv_heads, layout, compute), _keys_values(k_bsKH, v_bsKH, layout, compute)
    do = _heads_first(do_btNH.astype(compute), kv_heads, layout)
    # A query's sum of p dp over all keys, known at once because o = sum of p v.
    delta = (do.astype(wide) * _heads_first(o_btNH, kv_heads, layout)).sum(-1)

    def visit(kv: Array, grads: tuple[Array, Array], query: Piece, key: Piece, *, causal: bool) -> tuple[Array, Array]:
        dq, dkv = grads
        queries = _piece((q, do, lse, delta, dq), query)
        new_dq, more_dkv = _absorb_gradient(queries, _piece(kv, key), causal, compute, key_block)
        return _with_piece(dq, query, new_dq), _with_piece(dkv, key, _piece(dkv, key) + more_dkv)

    dq, none = varying((jnp.zeros(q.shape, wide), jnp.zeros(kv.shape, wide)), tuple(varying_axes(q)))
    at_home = travelling = none
    for step in range(num_shards):
        arriving = _to_next(kv, axis) if step + 1 < num_shards else kv
        dq, dkv = _visit_blocks(partial(visit, kv), (dq, none), step, place, layout)
        # What step 0 gives is at home. The rest sets out after step 1, one device on: n - 1 messages close the ring.
        if step == 0:
            at_home = dkv
        else:
            travelling = dkv if step == 1 else _to_next(travelling, axis) + dkv
        kv, travelling = jax.lax.optimization_barrier((arriving, travelling))
    dkv = at_home if num_shards == 1 else at_home + _to_next(travelling, axis)
    dq_btNH = _tokens_first(dq, q_btNH.shape) * q_btNH.shape[-1] ** -0.5
    dk_bsKH, dv_bsKH = _tokens_first(dkv[:, 0], k_bsKH.shape), _tokens_first(dkv[:, 1], v_bsKH.shape)
    return dq_btNH.astype(q_btNH.dtype), dk_bsKH.astype(k_bsKH.dtype), dv_bsKH.astype(v_bsKH.dtype)


_ring.defvjp(_ring_forward, _ring_backward)


def _visit_blocks(visit: Callable[..., Tree], carry: Tree, step: int, place: Array, layout: Layout) -> Tree:
    """Hand to `visit` each pair (piece of queries, piece of keys) of this step that is not masked throughout.

    At step s the device at place i holds the keys of i - s, counted round: of an earlier device exactly if s <= i.
    """
    earlier = place >= step
    if layout == "zigzag":
        # Any device's second piece comes after any device's first.
        carry = visit(carry, 1, 0, causal=False)
    if step == 0:
        for piece in range(pieces_per_shard(layout)):
            carry = visit(carry, piece, piece, causal=True)
        return carry
    if layout == "zigzag":
        # First pieces are in the order of devices, second pieces in the opposite order.
        piece = jnp.where(earlier, 0, 1)
        return visit(carry, piece, piece, causal=False)
    # No collective inside, as devices take different branches.
    return jax.lax.cond(earlier, lambda carry: visit(carry, 0, 0, causal=False), lambda carry: carry, carry)


def _absorb(
    queries: tuple[Array, ...], kv: Array, causal: bool, compute: jnp.dtype, key_block: int
) -> tuple[Array, ...]:
    """The online softmax of (q, o, m, z): o, m and z after these keys as well."""
    q, *state = queries

    def absorb(state: tuple[Array, ...], block: tuple[Array, Array]) -> tuple[tuple[Array, ...], None]:
        (o, m, z), ((k, v), first) = state, block
        s = _scores(q, k, first, kv.shape[-2], causal, compute)
        new_m = jnp.maximum(m, s.max(-1))
        rescale, p = jnp.exp(m - new_m), jnp.exp(s - new_m[..., None])
        o = o * rescale[..., None] + einsum("bkqs,bksh->bkqh", p, v, compute)
        return (o, new_m, z * rescale + p.sum(-1)), None

    return jax.lax.scan(absorb, tuple(state), _split(kv, key_block))[0]


def _absorb_gradient(
    queries: tuple[Array, ...], kv: Array, causal: bool, compute: jnp.dtype, key_block: int
) -> tuple[Array, Array]:
    """From (q, do, lse, delta, dq): dq after these keys as well, and the gradient of the keys and values."""
    q, do, lse, delta, dq = queries

    def absorb(dq: Array, block: tuple[Array, Array]) -> tuple[Array, Array]:
        (k, v), first = block
        p = jnp.exp(_scores(q, k, first, kv.shape[-2], causal, compute) - lse[..., None])
        dv = einsum("bkqs,bkqh->bksh", p, do, compute)
        dp = einsum("bkqh,bksh->bkqs", do, v, compute)
        ds = p * (dp - delta[..., None])
        dk = einsum("bkqs,bkqh->bksh", ds, q, compute)
        return dq + einsum("bkqs,bksh->bkqh", ds, k, compute), jnp.stack([dk, dv])

    dq, dkv = jax.lax.scan(absorb, dq, _split(kv, key_block))
    return dq, jnp.moveaxis(dkv, 0, -3).reshape(kv.shape)


def _split(kv: Array, key_block: int) -> tuple[Array, Array]:
    """A piece's [2, b, K, S, H] as blocks [S / block, 2, b, K, block, H], and the place where each begins."""
    size = kv.shape[-2]
    blocks = kv.reshape(*kv.shape[:-2], size // key_block, key_block, kv.shape[-1])
    return jnp.moveaxis(blocks, -3, 0), jnp.arange(0, size, key_block)


def _scores(q: Array, k: Array, first: Array, size: int, causal: bool, compute: jnp.dtype) -> Array:
    s = einsum("bkqh,bksh->bkqs", q, k, compute)
    return jnp.where(_visible(s.shape[-2], s.shape[-1], first, size), s, MASKED) if causal else s


def _visible(num_rows: int, num_keys: int, first: Array, size: int) -> Bool[Array, "q s"]:
    """Which of the keys from `first` on the queries of their own piece see; each head of a group has `size` rows."""
    return first + jnp.arange(num_keys) <= (jnp.arange(num_rows) % size)[:, None]


def _to_next(x: Array, axis: str) -> Array:
    """One place around the ring: device i receives what device i - 1 has."""
    n = jax.lax.axis_size(axis)
    return jax.lax.ppermute(x, axis, [(i, (i + 1) % n) for i in range(n)])


def _heads_first(x_btNH: Array, kv_heads: int, layout: Layout) -> Array:
    """[pieces, b, K, G T, H]: the G query heads of a group one after another, so that products are batched matmuls."""
    b, t, n, h = x_btNH.shape
    pieces, groups = pieces_per_shard(layout), n // kv_heads
    x = x_btNH.reshape(b, pieces, t // pieces, kv_heads, groups, h).transpose(1, 0, 3, 4, 2, 5)
    return x.reshape(pieces, b, kv_heads, groups * (t // pieces), h)


def _tokens_first(x: Array, shape: tuple[int, ...]) -> Array:
    """The opposite of `_heads_first`: back to `shape` [b, t, N, H]."""
    (b, t, n, h), (pieces, _, kv_heads, *_) = shape, x.shape
    x = x.reshape(pieces, b, kv_heads, n // kv_heads, t // pieces, h)
    return x.transpose(1, 0, 4, 2, 3, 5).reshape(shape)


def _queries(q_btNH: Array, kv_heads: int, layout: Layout, compute: jnp.dtype) -> Array:
    scaled = q_btNH.astype(accumulator(compute)) * q_btNH.shape[-1] ** -0.5
    return _heads_first(scaled.astype(compute), kv_heads, layout)


def _keys_values(k_bsKH: Array, v_bsKH: Array, layout: Layout, compute: jnp.dtype) -> Array:
    """[pieces, 2, b, K, S, H]: one array, so that one message a step carries both."""
    kv_heads = k_bsKH.shape[2]
    return jnp.stack([_heads_first(x.astype(compute), kv_heads, layout) for x in (k_bsKH, v_bsKH)], axis=1)


def _piece(tree: Tree, piece: Piece) -> Tree:
    return jax.tree.map(lambda x: jax.lax.dynamic_index_in_dim(x, piece, keepdims=False), tree)


def _with_piece(tree: Tree, piece: Piece, new: Tree) -> Tree:
    return jax.tree.map(lambda x, part: jax.lax.dynamic_update_index_in_dim(x, part, piece, 0), tree, new)
