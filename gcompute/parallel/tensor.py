"""Tensor parallelism: the matrices of a block split over devices, one all-reduce a block.

A column-parallel product followed by a row-parallel one needs no communication between them. All functions are
per-device code, called inside `jax.shard_map`: a lower-case letter is a dim of which this device has its share.
The `*_specs` say where the arrays lie, both as `in_specs` of shard_map and as shardings with which `jit` inserts the
same collectives by itself.

What is summed between devices is summed in `accumulator(compute)`, then cast to the dtype of x.
Source: Shoeybi et al. 2019 (Megatron-LM), section 3.
"""

from collections.abc import Callable
from typing import Protocol

import jax
import jax.numpy as jnp
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Float, PyTree

from gcompute.config.mesh import Axis
from gcompute.parallel.collectives import varying
from gcompute.parallel.product import product


class Column(Protocol):
    """A product with matrices split by columns: `column_parallel`, or one that first gathers the sequence."""

    def __call__(self, x: Array, w: PyTree, axis: str, /, *, compute: jnp.dtype | None) -> PyTree: ...


class Row(Protocol):
    """A product with a matrix split by rows: `row_parallel`, or one that leaves each device a piece of the sequence."""

    def __call__(self, x: Array, w: Array, axis: str, /, *, compute: jnp.dtype | None) -> Array: ...


def column_parallel(
    x_BTD: Float[Array, "b t d"], w_Df: PyTree[Float[Array, "d _"]], axis: str, *, compute: jnp.dtype | None = None
) -> PyTree[Float[Array, "b t _"]]:
    """y = x @ w with w split by columns over `axis`: every device has all of x and computes its columns of y.

    Forward nothing is sent. Backward each device knows the part of dx that comes through its columns, so one
    all-reduce ends it: the gradient of `varying`, which is Megatron's operator f. Several matrices (any tree) that
    multiply one x share that all-reduce.

    >>> from gcompute.config.mesh import MeshShape
    >>> from gcompute.parallel.mesh import build_mesh
    >>> multiply = jax.jit(jax.shard_map(
    ...     lambda x, w: column_parallel(x, w, Axis.TENSOR), mesh=build_mesh(MeshShape(tensor=4)),
    ...     in_specs=(P(), P(None, Axis.TENSOR)), out_specs=P(None, None, Axis.TENSOR)))
    >>> multiply(jnp.ones((1, 1, 3)), jnp.ones((3, 4))).ravel().tolist()
    [3.0, 3.0, 3.0, 3.0]

    Source: Shoeybi et al. 2019, section 3, equation 3 and figure 3.
    """
    x_BTD = varying(x_BTD, axis)
    return jax.tree.map(lambda w: product("btd,df->btf", x_BTD, w, compute).astype(x_BTD.dtype), w_Df)


def row_parallel(
    x_BTf: Float[Array, "b t f"], w_fD: Float[Array, "f d"], axis: str, *, compute: jnp.dtype | None = None
) -> Float[Array, "b t d"]:
    """y = x @ w with w split by rows over `axis`: each device has a part of every sum, so one all-reduce ends it.

    Its gradient needs nothing sent. A bias of y is added after it, once: added before, it would count n times.

    >>> from gcompute.config.mesh import MeshShape
    >>> from gcompute.parallel.mesh import build_mesh
    >>> multiply = jax.jit(jax.shard_map(
    ...     lambda x, w: row_parallel(x, w, Axis.TENSOR), mesh=build_mesh(MeshShape(tensor=4)),
    ...     in_specs=(P(None, None, Axis.TENSOR), P(Axis.TENSOR)), out_specs=P()))
    >>> multiply(jnp.ones((1, 2, 8)), jnp.ones((8, 1))).ravel().tolist()
    [8.0, 8.0]

    Source: Shoeybi et al. 2019, section 3, operator g of figure 3.
    """
    partial_BTD = product("btf,fd->btd", x_BTf, w_fD, compute)
    return jax.lax.psum(partial_BTD, axis).astype(x_BTf.dtype)


def feed_forward(
    x: Float[Array, "b t d"],
    up_Df: Float[Array, "d f"],
    down_fD: Float[Array, "f d"],
    axis: str,
    *,
    gate_Df: Float[Array, "d f"] | None = None,
    up_bias_f: Float[Array, "f"] | None = None,
    gate_bias_f: Float[Array, "f"] | None = None,
    down_bias_D: Float[Array, "d"] | None = None,
    act: Callable[[Array], Array] = jax.nn.silu,
    compute: jnp.dtype | None = None,
    column: Column = column_parallel,
    row: Row = row_parallel,
) -> Float[Array, "b t d"]:
    """down(act(up(x))), or down(act(gate(x)) * up(x)) with a gate; hidden units are split over `axis`.

    `column` and `row` choose how x and y lie: whole on every device here, as pieces of the sequence with those of
    `gcompute.parallel.sequence` and `gcompute.parallel.collective_matmul`.

    >>> from gcompute.config.mesh import MeshShape
    >>> from gcompute.parallel.mesh import build_mesh
    >>> mesh = build_mesh(MeshShape(tensor=4))
    >>> specs = feed_forward_specs(mesh, ffn=8)
    >>> sharded = jax.jit(jax.shard_map(
    ...     lambda x, up, down: feed_forward(x, up, down, Axis.TENSOR, act=jax.nn.relu), mesh=mesh,
    ...     in_specs=(P(), specs["up_Df"], specs["down_fD"]), out_specs=P()))
    >>> sharded(jnp.ones((1, 2, 3)), jnp.ones((3, 8)), jnp.ones((8, 1))).ravel().tolist()
    [24.0, 24.0]

    Source: Shoeybi et al. 2019, section 3, figure 3a; Shazeer 2020, equation 6 (gated).
    """
    if up_Df.shape[-1] != down_fD.shape[0]:
        raise ValueError(
            f"up has {up_Df.shape[-1]} hidden units on this device and down {down_fD.shape[0]}: split up (and gate) by"
            " columns and down by rows, over the same axis."
        )
    inward = {"up": up_Df} if gate_Df is None else {"up": up_Df, "gate": gate_Df}
    hidden = column(x, inward, axis, compute=compute)
    up_BTf = _add(hidden["up"], up_bias_f)
    hidden_BTf = act(up_BTf) if gate_Df is None else act(_add(hidden["gate"], gate_bias_f)) * up_BTf
    return _add(row(hidden_BTf, down_fD, axis, compute=compute), down_bias_D)


def project_heads(
    x: Float[Array, "b t d"],
    w_DnH: PyTree[Float[Array, "d _ _"]],
    axis: str,
    *,
    compute: jnp.dtype | None = None,
    column: Column = column_parallel,
) -> PyTree[Float[Array, "b t _ _"]]:
    """Queries, keys or values of this device's heads: x @ w for each matrix [D, n, H] of a tree.

    Source: Shoeybi et al. 2019, section 3, figure 3b.
    """
    flat = column(x, jax.tree.map(lambda w: w.reshape(w.shape[0], -1), w_DnH), axis, compute=compute)
    return jax.tree.map(lambda y, w: y.reshape(*y.shape[:2], *w.shape[1:]), flat, w_DnH)


def merge_heads(
    o_BTnH: Float[Array, "b t n h"],
    w_nHD: Float[Array, "n h d"],
    axis: str,
    *,
    compute: jnp.dtype | None = None,
    row: Row = row_parallel,
) -> Float[Array, "b t d"]:
    """The output projection of attention: the sum over all heads of o @ w.

    Source: Shoeybi et al. 2019, section 3, figure 3b.
    """
    b, t, n, h = o_BTnH.shape
    return row(o_BTnH.reshape(b, t, n * h), w_nHD.reshape(n * h, -1), axis, compute=compute)


def attention(
    x: Float[Array, "b t d"],
    q_DnH: Float[Array, "d n h"],
    k_DkH: Float[Array, "d k h"],
    v_DkH: Float[Array, "d k h"],
    o_nHD: Float[Array, "n h d"],
    axis: str,
    *,
    attend: Callable[[Array, Array, Array], Array],
    compute: jnp.dtype | None = None,
    column: Column = column_parallel,
    row: Row = row_parallel,
) -> Float[Array, "b t d"]:
    """Attention with whole heads on each device: `attend(q, k, v)` runs on this device's heads and sends nothing.

    `attend` maps q [b, t, n, h] and k, v [b, t, k, h] to [b, t, n, h]; the n / k queries of a group are neighbours.

    Raises:
      ValueError: this device's query heads are no multiple of its key/value heads.
    Source: Shoeybi et al. 2019, section 3, figure 3b.
    """
    if q_DnH.shape[1] % k_DkH.shape[1]:
        raise ValueError(
            f"this device has {q_DnH.shape[1]} query heads and {k_DkH.shape[1]} key/value heads: each device needs"
            " whole groups. Split all of q, k and v over the same axis."
        )
    heads = project_heads(x, {"q": q_DnH, "k": k_DkH, "v": v_DkH}, axis, compute=compute, column=column)
    return merge_heads(attend(heads["q"], heads["k"], heads["v"]), o_nHD, axis, compute=compute, row=row)


def feed_forward_specs(mesh: Mesh, *, ffn: int, axis: str = Axis.TENSOR) -> dict[str, P]:
    """Where the weights of `feed_forward` lie, by argument name, and its hidden units `hidden_BTf`.

    Raises:
      ValueError: `axis` does not divide `ffn`.
    """
    check_divides(mesh, axis, ffn=ffn)
    inward = {"up_Df": P(None, axis), "gate_Df": P(None, axis), "up_bias_f": P(axis), "gate_bias_f": P(axis)}
    return {**inward, "hidden_BTf": P(None, None, axis), "down_fD": P(axis, None), "down_bias_D": P(None)}


def attention_specs(mesh: Mesh, *, heads: int, kv_heads: int, axis: str = Axis.TENSOR) -> dict[str, P]:
    """Where the weights of `attention` lie, by argument name, and its queries, keys and values `heads_BTnH`.

    Raises:
      ValueError: `axis` does not divide both counts of heads.
    """
    check_divides(mesh, axis, heads=heads, kv_heads=kv_heads)
    inward = {"q_DnH": P(None, axis, None), "k_DkH": P(None, axis, None), "v_DkH": P(None, axis, None)}
    return {**inward, "heads_BTnH": P(None, None, axis, None), "o_nHD": P(axis, None, None)}


def check_divides(mesh: Mesh, axis: str, **sizes: int) -> None:
    """Refuse sizes of which each device along `axis` cannot have an equal share.

    Raises:
      ValueError: the mesh has no such axis, or it does not divide a size; with the sizes of axis that would.
    """
    if axis not in mesh.shape:
        raise ValueError(f"the mesh has no axis {str(axis)!r}: it has {', '.join(map(str, mesh.shape))}.")
    num_shards = mesh.shape[axis]
    legal = [n for n in range(1, min(sizes.values()) + 1) if all(size % n == 0 for size in sizes.values())]
    for name, size in sizes.items():
        if size % num_shards:
            raise ValueError(
                f"mesh {axis}={num_shards} does not divide {name}={size}: each device needs a whole share."
                f" Legal: {axis}={', '.join(map(str, legal))}."
            )


def _add(x: Array, bias: Array | None) -> Array:
    return x if bias is None else x + bias.astype(x.dtype)
