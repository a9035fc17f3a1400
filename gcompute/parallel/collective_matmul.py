"""Collective matmuls: the gather or scatter of a tensor-parallel product, cut into steps that hide behind the product.

An all-gather before a product, or a reduce-scatter after it, leaves the matrix units idle. Both are rings of n - 1
sends. Here each send is a `ppermute` of its own and the product is cut alike: while one piece is multiplied, the next
is on its way, and a compiler with asynchronous sends (TPU, GPU) runs the two at once. Values, signatures and gradients
are those of `gcompute.parallel.sequence`, and so is the memory: the backward passes are rings as well, and send x
round again rather than keep it.

`bidirectional` cuts each piece in two halves that go round in opposite directions, so that both directions of a ring
of links carry half: as many steps, each half as long.

Source: Wang et al. 2023, "Overlap Communication with Dependent Computation via Decomposition in Large Deep Learning
Models", section 5.
"""

from collections.abc import Callable, Iterator
from functools import partial, reduce
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PyTree

from gcompute.parallel import tensor
from gcompute.parallel.collectives import axis_index
from gcompute.parallel.einsum import accumulator, einsum
from gcompute.parallel.product import alike
from gcompute.parallel.sequence import SEQUENCE_DIM, check_sequence


def all_gather_matmul(
    x_BtD: Float[Array, "b t d"],
    w_Df: PyTree[Float[Array, "d _"]],
    axis: str,
    *,
    bidirectional: bool = False,
    compute: jnp.dtype | None = None,
) -> PyTree[Float[Array, "b T _"]]:
    """y = all_gather(x) @ w: n products of one piece of the sequence each, with n - 1 sends between them.

    Several matrices (any tree) multiply each piece as it passes.

    >>> from jax.sharding import PartitionSpec as P
    >>> from gcompute.config.mesh import Axis, MeshShape
    >>> from gcompute.parallel.mesh import build_mesh
    >>> pieces, hidden = P(None, Axis.TENSOR), P(None, None, Axis.TENSOR)
    >>> multiply = jax.jit(jax.shard_map(
    ...     lambda x, w: all_gather_matmul(x, w, Axis.TENSOR), mesh=build_mesh(MeshShape(tensor=4)),
    ...     in_specs=(pieces, P(None, Axis.TENSOR)), out_specs=hidden))
    >>> multiply(jnp.arange(4.0).reshape(1, 4, 1), jnp.ones((1, 4)))[0, :, 0].tolist()
    [0.0, 1.0, 2.0, 3.0]

    Source: Wang et al. 2023, section 5, "AllGather-Einsum" and "Bidirectional data transfer".
    """
    leaves, structure = jax.tree.flatten(w_Df)
    x_BtD, *leaves = alike(x_BtD, *leaves, axis=axis)
    compute = jnp.dtype(x_BtD.dtype if compute is None else compute)
    return structure.unflatten(_gather_matmul(x_BtD, tuple(leaves), axis, bidirectional, compute))


def matmul_reduce_scatter(
    x_BTf: Float[Array, "b T f"],
    w_fD: Float[Array, "f d"],
    axis: str,
    *,
    bidirectional: bool = False,
    compute: jnp.dtype | None = None,
) -> Float[Array, "b t d"]:
    """y = reduce_scatter(x @ w): sums go round, and each device adds its product for the piece that passes.

    >>> from jax.sharding import PartitionSpec as P
    >>> from gcompute.config.mesh import Axis, MeshShape
    >>> from gcompute.parallel.mesh import build_mesh
    >>> pieces, hidden = P(None, Axis.TENSOR), P(None, None, Axis.TENSOR)
    >>> multiply = jax.jit(jax.shard_map(
    ...     lambda x, w: matmul_reduce_scatter(x, w, Axis.TENSOR), mesh=build_mesh(MeshShape(tensor=4)),
    ...     in_specs=(hidden, P(Axis.TENSOR)), out_specs=pieces))
    >>> multiply(jnp.ones((1, 4, 8)), jnp.ones((8, 1))).ravel().tolist()
    [8.0, 8.0, 8.0, 8.0]

    Raises:
      ValueError: the devices along `axis` do not divide T.
    Source: Wang et al. 2023, section 5, "Einsum-ReduceScatter" and "Bidirectional data transfer".
    """
    check_sequence(x_BTf.shape[SEQUENCE_DIM], axis)
    x_BTf, w_fD = alike(x_BTf, w_fD, axis=axis)
    compute = jnp.dtype(x_BTf.dtype if compute is None else compute)
    return _matmul_scatter(x_BTf, w_fD, axis, bidirectional, compute)


def feed_forward(
    x_BtD: Float[Array, "b t d"], up_Df: Array, down_fD: Array, axis: str, *, bidirectional: bool = False, **rest: Any
) -> Float[Array, "b t d"]:
    """`tensor.feed_forward`, `rest` its other arguments, from and to a piece of the sequence by collective matmuls."""
    column = partial(all_gather_matmul, bidirectional=bidirectional)
    row = partial(matmul_reduce_scatter, bidirectional=bidirectional)
    return tensor.feed_forward(x_BtD, up_Df, down_fD, axis, column=column, row=row, **rest)


@partial(jax.custom_vjp, nondiff_argnums=(2, 3, 4))
def _gather_matmul(
    x_BtD: Array, weights: tuple[Array, ...], axis: str, bidirectional: bool, compute: jnp.dtype
) -> tuple[Array, ...]:
    b, t, _ = x_BtD.shape
    length = t * jax.lax.axis_size(axis)
    ys = [jnp.zeros((b, length, w_Df.shape[1]), x_BtD.dtype) for w_Df in weights]
    for piece, start in _pieces(x_BtD.astype(compute), axis, bidirectional):
        ys = [_put(y, einsum("btd,df->btf", piece, w_Df, compute), start) for y, w_Df in zip(ys, weights, strict=True)]
    return tuple(ys)


def _gather_matmul_forward(x_BtD: Array, weights: tuple, axis: str, bidirectional: bool, compute: jnp.dtype) -> tuple:
    return _gather_matmul(x_BtD, weights, axis, bidirectional, compute), (x_BtD, weights)


def _gather_matmul_backward(axis: str, bidirectional: bool, compute: jnp.dtype, saved: tuple, dys: tuple) -> tuple:
    weights = saved[1]
    # Tied to dy: else the compiler sees the forward pass's sends once more, and keeps every piece instead.
    x_BtD, dys = jax.lax.optimization_barrier((saved[0], dys))

    def part(start: Array, size: int) -> Array:
        rows = [_take(dy_BTf, start, size) for dy_BTf in dys]
        parts = [einsum("btf,df->btd", dy, w_Df, compute) for dy, w_Df in zip(rows, weights, strict=True)]
        return reduce(jnp.add, parts)

    dx_BtD = _sums(part, x_BtD.shape[SEQUENCE_DIM], axis, bidirectional)
    dws = [jnp.zeros(w_Df.shape, accumulator(compute)) for w_Df in weights]
    for piece, start in _pieces(x_BtD.astype(compute), axis, bidirectional):
        # One after another: a compiler free to form all n products of the size of w first would keep n of them.
        piece, dws = jax.lax.optimization_barrier((piece, dws))
        dws = [
            dw + einsum("btd,btf->df", piece, _take(dy_BTf, start, piece.shape[SEQUENCE_DIM]), compute)
            for dw, dy_BTf in zip(dws, dys, strict=True)
        ]
    return dx_BtD.astype(x_BtD.dtype), tuple(dw.astype(w.dtype) for dw, w in zip(dws, weights, strict=True))


_gather_matmul.defvjp(_gather_matmul_forward, _gather_matmul_backward)


@partial(jax.custom_vjp, nondiff_argnums=(2, 3, 4))
def _matmul_scatter(x_BTf: Array, w_fD: Array, axis: str, bidirectional: bool, compute: jnp.dtype) -> Array:
    def part(start: Array, size: int) -> Array:
        return einsum("btf,fd->btd", _take(x_BTf, start, size), w_fD, compute)

    t = x_BTf.shape[SEQUENCE_DIM] // jax.lax.axis_size(axis)
    return _sums(part, t, axis, bidirectional).astype(x_BTf.dtype)


def _matmul_scatter_forward(x_BTf: Array, w_fD: Array, axis: str, bidirectional: bool, compute: jnp.dtype) -> tuple:
    return _matmul_scatter(x_BTf, w_fD, axis, bidirectional, compute), (x_BTf, w_fD)


def _matmul_scatter_backward(axis: str, bidirectional: bool, compute: jnp.dtype, saved: tuple, dy_BtD: Array) -> tuple:
    x_BTf, w_fD = saved
    dx_BTf, dw_fD = jnp.zeros(x_BTf.shape, x_BTf.dtype), jnp.zeros(w_fD.shape, accumulator(compute))
    for piece, start in _pieces(dy_BtD.astype(compute), axis, bidirectional):
        piece, dw_fD = jax.lax.optimization_barrier((piece, dw_fD))  # as above
        dx_BTf = _put(dx_BTf, einsum("btd,fd->btf", piece, w_fD, compute), start)
        rows = _take(x_BTf, start, piece.shape[SEQUENCE_DIM])
        dw_fD = dw_fD + einsum("btf,btd->fd", rows, piece, compute)
    return dx_BTf, dw_fD.astype(w_fD.dtype)


_matmul_scatter.defvjp(_matmul_scatter_forward, _matmul_scatter_backward)


def _pieces(x_BtD: Array, axis: str, bidirectional: bool) -> Iterator[tuple[Array, Array]]:
    """Every device's piece as it comes round, this device's first, each with the row of T where it starts."""
    n, device, t = jax.lax.axis_size(axis), axis_index(axis), x_BtD.shape[SEQUENCE_DIM]
    lanes = [(_take(x_BtD, first, size), first, step) for first, size, step in _lanes(t, bidirectional)]
    for hop in range(n):
        for piece, first, step in lanes:
            yield piece, (device - step * hop) % n * t + first
        if hop < n - 1:
            lanes = [(jax.lax.ppermute(piece, axis, _ring(n, step)), first, step) for piece, first, step in lanes]


def _sums(part: Callable[[Array, int], Array], t: int, axis: str, bidirectional: bool) -> Array:
    """The sum over devices of `part(start, size)`, their product for some rows of T: each keeps its piece of t rows.

    A sum starts at the neighbour of the device that will keep it and collects a part at each device that it passes.
    """
    n, device = jax.lax.axis_size(axis), axis_index(axis)
    lanes = _lanes(t, bidirectional)
    totals = [part((device - step) % n * t + first, size) for first, size, step in lanes]
    for hop in range(2, n + 1):
        arrived = [
            jax.lax.ppermute(total, axis, _ring(n, step)) for total, (*_, step) in zip(totals, lanes, strict=True)
        ]
        mine = [part((device - step * hop) % n * t + first, size) for first, size, step in lanes]
        totals = [total + rows for total, rows in zip(arrived, mine, strict=True)]
    return jnp.concatenate(totals, axis=SEQUENCE_DIM)


def _lanes(t: int, bidirectional: bool) -> list[tuple[int, int, int]]:
    """(first row, rows, step round the ring) of the parts of a piece that travel apart."""
    half = t // 2 if bidirectional else 0
    return [(first, size, step) for first, size, step in ((0, half, -1), (half, t - half, 1)) if size]


def _ring(n: int, step: int) -> list[tuple[int, int]]:
    """Every device sends to the one `step` further round."""
    return [(device, (device + step) % n) for device in range(n)]


def _take(x: Array, start: Array | int, size: int) -> Array:
    return jax.lax.dynamic_slice_in_dim(x, start, size, axis=SEQUENCE_DIM)


def _put(x: Array, rows: Array, start: Array) -> Array:
    return jax.lax.dynamic_update_slice_in_dim(x, rows.astype(x.dtype), start, axis=SEQUENCE_DIM)
