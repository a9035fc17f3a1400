"""Sequence parallelism: between tensor-parallel products each device keeps only its piece of the sequence.

The all-reduce of tensor parallelism is a reduce-scatter and an all-gather. Done apart, at the two ends of a block, they
send as many bytes as it does, and the norms, residuals and dropout between them work on, and keep, 1/n of the
activations. All functions are per-device code, called inside `jax.shard_map`: `t` is this device's piece of T.

What is copied between devices travels in `compute`; what is summed travels in `accumulator(compute)`.
Source: Korthikanti et al. 2022, "Reducing Activation Recomputation in Large Transformer Models", section 4.2.2.
"""

from functools import partial, reduce

import jax
import jax.numpy as jnp
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Float, PyTree

from gcompute.config.mesh import Axis
from gcompute.parallel.einsum import accumulator, einsum
from gcompute.parallel.product import alike
from gcompute.parallel.tensor import check_divides

SEQUENCE_DIM = 1


def gather_column_parallel(
    x_BtD: Float[Array, "b t d"], w_Df: PyTree[Float[Array, "d _"]], axis: str, *, compute: jnp.dtype | None = None
) -> PyTree[Float[Array, "b T _"]]:
    """y = all_gather(x) @ w: whole sequences of this device's columns, from a piece of the sequence.

    Backward one reduce-scatter gives dx, and x is gathered again for dw rather than kept: between the passes a device
    holds its own piece only. Several matrices (any tree) share the gathers.

    >>> from gcompute.config.mesh import MeshShape
    >>> from gcompute.parallel.mesh import build_mesh
    >>> pieces, hidden = P(None, Axis.TENSOR), P(None, None, Axis.TENSOR)
    >>> multiply = jax.jit(jax.shard_map(
    ...     lambda x, w: gather_column_parallel(x, w, Axis.TENSOR), mesh=build_mesh(MeshShape(tensor=4)),
    ...     in_specs=(pieces, P(None, Axis.TENSOR)), out_specs=hidden))
    >>> multiply(jnp.arange(4.0).reshape(1, 4, 1), jnp.ones((1, 4)))[0, :, 0].tolist()
    [0.0, 1.0, 2.0, 3.0]

    Source: Korthikanti et al. 2022, section 4.2.2: operator g, and the extra all-gather of the backward pass.
    """
    leaves, structure = jax.tree.flatten(w_Df)
    x_BtD, *leaves = alike(x_BtD, *leaves, axis=axis)
    compute = jnp.dtype(x_BtD.dtype if compute is None else compute)
    return structure.unflatten(_gather_matmul(x_BtD, tuple(leaves), axis, compute))


def row_parallel_scatter(
    x_BTf: Float[Array, "b T f"], w_fD: Float[Array, "f d"], axis: str, *, compute: jnp.dtype | None = None
) -> Float[Array, "b t d"]:
    """y = reduce_scatter(x @ w): this device's piece of the sequence, summed over every device's rows of w.

    Backward one all-gather of dy serves both dx and dw.

    >>> from gcompute.config.mesh import MeshShape
    >>> from gcompute.parallel.mesh import build_mesh
    >>> pieces, hidden = P(None, Axis.TENSOR), P(None, None, Axis.TENSOR)
    >>> multiply = jax.jit(jax.shard_map(
    ...     lambda x, w: row_parallel_scatter(x, w, Axis.TENSOR), mesh=build_mesh(MeshShape(tensor=4)),
    ...     in_specs=(hidden, P(Axis.TENSOR)), out_specs=pieces))
    >>> multiply(jnp.ones((1, 4, 8)), jnp.ones((8, 1))).ravel().tolist()
    [8.0, 8.0, 8.0, 8.0]

    Raises:
      ValueError: the devices along `axis` do not divide T.
    Source: Korthikanti et al. 2022, section 4.2.2, the operator conjugate to g.
    """
    check_sequence(x_BTf.shape[SEQUENCE_DIM], axis)
    x_BTf, w_fD = alike(x_BTf, w_fD, axis=axis)
    return _matmul_scatter(x_BTf, w_fD, axis, jnp.dtype(x_BTf.dtype if compute is None else compute))


def rms_norm(x_BtD: Float[Array, "b t d"], scale_D: Float[Array, "d"], *, eps: float) -> Float[Array, "b t d"]:
    """y = x / sqrt(mean(x^2) + eps) * scale, on a piece of the sequence; sums in `accumulator(x.dtype)`.

    The scale is the same on every device and each sees other positions, so its gradient is a sum over the devices. It
    is made where the unvarying scale meets the varying x, and so only where `check_vma` is on: without it the caller
    must add the parts up.

    Source: Zhang and Sennrich 2019, equation 4; Korthikanti et al. 2022, section 4.2.2.
    """
    wide = x_BtD.astype(accumulator(x_BtD.dtype))
    y = wide * jax.lax.rsqrt(jnp.mean(wide * wide, axis=-1, keepdims=True) + eps)
    return (y * scale_D.astype(wide.dtype)).astype(x_BtD.dtype)


def layer_norm(
    x_BtD: Float[Array, "b t d"], scale_D: Float[Array, "d"], bias_D: Float[Array, "d"] | None = None, *, eps: float
) -> Float[Array, "b t d"]:
    """y = (x - mean) / sqrt(var + eps) * scale + bias, on a piece of the sequence; gradients as those of `rms_norm`.

    Source: Ba et al. 2016, equation 4; Korthikanti et al. 2022, section 4.2.2.
    """
    wide = x_BtD.astype(accumulator(x_BtD.dtype))
    centred = wide - jnp.mean(wide, axis=-1, keepdims=True)
    y = centred * jax.lax.rsqrt(jnp.mean(centred * centred, axis=-1, keepdims=True) + eps)
    y = y * scale_D.astype(wide.dtype)
    return (y if bias_D is None else y + bias_D.astype(wide.dtype)).astype(x_BtD.dtype)


def sequence_specs(mesh: Mesh, *, sequence: int, axis: str = Axis.TENSOR) -> dict[str, P]:
    """Where activations lie: `x_BtD` between the blocks, `hidden_BTf` inside them.

    With these as sharding constraints, and weights placed by the `*_specs` of `gcompute.parallel.tensor`, `jit` inserts
    the same all-gathers and reduce-scatters by itself. On CPU it leaves each of the latter an all-reduce and a slice.

    Raises:
      ValueError: `axis` does not divide `sequence`.
    """
    check_divides(mesh, axis, sequence=sequence)
    return {"x_BtD": P(None, axis, None), "hidden_BTf": P(None, None, axis)}


def check_sequence(length: int, axis: str) -> None:
    """Refuse, in per-device code, a whole sequence of which the devices along `axis` cannot have equal pieces.

    Raises:
      ValueError: they do not divide `length`.
    """
    num_shards = jax.lax.axis_size(axis)
    if length % num_shards:
        raise ValueError(
            f"{axis}={num_shards} does not divide a sequence of {length}: each device keeps an equal piece. Pad it to"
            f" {length + -length % num_shards}."
        )


@partial(jax.custom_vjp, nondiff_argnums=(2, 3))
def _gather_matmul(x_BtD: Array, weights: tuple[Array, ...], axis: str, compute: jnp.dtype) -> tuple[Array, ...]:
    x_BTD = _gather(x_BtD, axis, compute)
    return tuple(einsum("btd,df->btf", x_BTD, w_Df, compute).astype(x_BtD.dtype) for w_Df in weights)


def _gather_matmul_forward(x_BtD: Array, weights: tuple[Array, ...], axis: str, compute: jnp.dtype) -> tuple:
    return _gather_matmul(x_BtD, weights, axis, compute), (x_BtD, weights)


def _gather_matmul_backward(axis: str, compute: jnp.dtype, saved: tuple, dys_BTf: tuple[Array, ...]) -> tuple:
    weights = saved[1]
    # Tied to dy: else the compiler sees the forward pass's gather once more, and keeps its result instead.
    x_BtD, dys_BTf = jax.lax.optimization_barrier((saved[0], dys_BTf))
    parts_BTD = [einsum("btf,df->btd", dy, w, compute) for dy, w in zip(dys_BTf, weights, strict=True)]
    x_BTD = _gather(x_BtD, axis, compute)
    dws = tuple(
        einsum("btd,btf->df", x_BTD, dy, compute).astype(w.dtype) for dy, w in zip(dys_BTf, weights, strict=True)
    )
    return _scatter(reduce(jnp.add, parts_BTD), axis).astype(x_BtD.dtype), dws


_gather_matmul.defvjp(_gather_matmul_forward, _gather_matmul_backward)


@partial(jax.custom_vjp, nondiff_argnums=(2, 3))
def _matmul_scatter(x_BTf: Array, w_fD: Array, axis: str, compute: jnp.dtype) -> Array:
    return _scatter(einsum("btf,fd->btd", x_BTf, w_fD, compute), axis).astype(x_BTf.dtype)


def _matmul_scatter_forward(x_BTf: Array, w_fD: Array, axis: str, compute: jnp.dtype) -> tuple:
    return _matmul_scatter(x_BTf, w_fD, axis, compute), (x_BTf, w_fD)


def _matmul_scatter_backward(axis: str, compute: jnp.dtype, saved: tuple, dy_BtD: Array) -> tuple[Array, Array]:
    x_BTf, w_fD = saved
    dy_BTD = _gather(dy_BtD, axis, compute)
    dx_BTf = einsum("btd,fd->btf", dy_BTD, w_fD, compute)
    dw_fD = einsum("btf,btd->fd", x_BTf, dy_BTD, compute)
    return dx_BTf.astype(x_BTf.dtype), dw_fD.astype(w_fD.dtype)


_matmul_scatter.defvjp(_matmul_scatter_forward, _matmul_scatter_backward)


def _gather(x_BtD: Array, axis: str, compute: jnp.dtype) -> Array:
    return jax.lax.all_gather(x_BtD.astype(compute), axis, axis=SEQUENCE_DIM, tiled=True)


def _scatter(x_BTD: Array, axis: str) -> Array:
    return jax.lax.psum_scatter(x_BTD, axis, scatter_dimension=SEQUENCE_DIM, tiled=True)
