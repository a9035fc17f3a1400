"""Data parallelism in three notations with one contract: `shard_map`, `jit` with shardings, and the older `pmap`.

Every device holds all parameters P and a part of the batch; the gradient of the mean loss is the mean of the devices'
gradients, so one all-reduce a step makes their updates the same:

  g = 1/n sum_i grad loss(P, rows of device i)

Each builder takes `loss_fn(params, batch)`, the mean loss over the rows of `batch` (every leaf [B, ...]), and an optax
optimizer, and gives `step(params, opt_state, batch) -> (params, opt_state, loss)` over global arrays, ready for
`jax.jit(step, donate_argnums=(0, 1))`. Gradients of `accumulation` microbatches are added up on each device first, and
reduced once: a device sends 2 (n - 1) / n of the gradient's bytes a step, however many microbatches there are.

Source: Li et al. 2020, "PyTorch Distributed: Experiences on Accelerating Data Parallel Training", section 3 (the
gradients reduced once, `no_sync`).
"""

import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.sharding import AbstractMesh, Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array, Float, PyTree

from gcompute.config.mesh import Axis
from gcompute.parallel.collectives import Axes, all_reduce, varying
from gcompute.parallel.einsum import accumulator
from gcompute.parallel.mesh import check_automatic

LossFn = Callable[[Any, Any], Float[Array, ""]]
Step = Callable[[Any, Any, Any], tuple[Any, Any, Float[Array, ""]]]


def shard_map_step(
    loss_fn: LossFn,
    optimizer: optax.GradientTransformation,
    mesh: Mesh,
    *,
    axis: Axes = Axis.DATA,
    accumulation: int = 1,
) -> Step:
    """A data-parallel train step in per-device code: the all-reduce is written where it happens.

    >>> import jax, jax.numpy as jnp, optax
    >>> from gcompute.config.mesh import MeshShape
    >>> from gcompute.parallel.mesh import build_mesh
    >>> def loss_fn(w, batch):
    ...     return jnp.mean((batch["x"] * w - batch["y"]) ** 2)
    >>> optimizer, w = optax.sgd(0.25), jnp.float32(0)
    >>> step = jax.jit(shard_map_step(loss_fn, optimizer, build_mesh(MeshShape(data=8))))
    >>> w, _, loss = step(w, optimizer.init(w), {"x": jnp.ones(16), "y": jnp.full(16, 2.0)})
    >>> print(w, loss)
    1.0 4.0

    Raises:
      ValueError: `mesh` has no such axis, or (when the step is traced) the batch does not divide.
    """
    size = num_shards(mesh, axis)
    per_device = _device_step(loss_fn, optimizer, axis, accumulation)
    whole, rows = PartitionSpec(), PartitionSpec(axis)

    def step(params: Any, opt_state: Any, batch: Any) -> tuple[Any, Any, Array]:
        check_rows(batch, size, accumulation)
        mapped = jax.shard_map(per_device, mesh=mesh, in_specs=(whole, whole, rows), out_specs=whole)
        return mapped(params, opt_state, batch)

    return step


def jit_step(
    loss_fn: LossFn,
    optimizer: optax.GradientTransformation,
    mesh: Mesh,
    *,
    axis: Axes = Axis.DATA,
    accumulation: int = 1,
) -> Step:
    """A data-parallel train step as the one-device program with shardings: the compiler adds the all-reduce.

    Left to itself the compiler would reduce every microbatch, because a replicated sum must be whole after each. So
    the sums of the devices get a dim of their own, [n, ...] split over `axis`, and are added up after the last.

    Raises:
      ValueError: as `shard_map_step`, or `mesh` has explicit axes.
    """
    size = num_shards(mesh, axis)
    check_automatic(mesh)
    whole, rows = NamedSharding(mesh, PartitionSpec()), NamedSharding(mesh, PartitionSpec(axis))
    pin = jax.lax.with_sharding_constraint

    def step(params: Any, opt_state: Any, batch: Any) -> tuple[Any, Any, Array]:
        check_rows(batch, size, accumulation)
        params, opt_state, batch = pin(params, whole), pin(opt_state, whole), pin(batch, rows)
        if accumulation == 1:
            loss, gradients = jax.value_and_grad(loss_fn)(params, batch)
        else:
            loss, gradients = grouped_gradients(loss_fn, params, batch, size, rows, accumulation)
        params, opt_state = update(optimizer, params, opt_state, pin(gradients, whole))
        return pin(params, whole), pin(opt_state, whole), pin(loss, whole)

    return step


def pmap_step(
    loss_fn: LossFn,
    optimizer: optax.GradientTransformation,
    *,
    devices: Sequence[Any] | None = None,
    axis: str = Axis.DATA,
    accumulation: int = 1,
) -> Step:
    """A data-parallel train step as it was written with `jax.pmap`, for reading old code; it compiles itself.

    `pmap` maps over a leading dim of one row a device, and knows neither a mesh nor global arrays. What replaces it:

      jax.pmap(f, axis_name=a)              jax.jit(jax.shard_map(f, mesh=mesh, in_specs=P(a), out_specs=P(a)))
      x.reshape(n, B // n, ...)             nothing: f sees [B / n, ...] of one global [B, ...]
      flax.jax_utils.replicate(params)      jax.device_put(params, NamedSharding(mesh, P()))
      unreplicate(params), params[0]        nothing: one global array
      jax.lax.pmean(gradients, a)           the same

    Raises:
      ValueError: (when called) the batch does not divide.

    Source: JAX documentation, "Migrating to the new jax.pmap".
    """
    size = len(jax.local_devices() if devices is None else devices)
    per_device = _device_step(loss_fn, optimizer, axis, accumulation)
    mapped = jax.pmap(per_device, axis_name=axis, in_axes=(None, None, 0), out_axes=None, devices=devices)

    def step(params: Any, opt_state: Any, batch: Any) -> tuple[Any, Any, Array]:
        check_rows(batch, size, accumulation)
        return mapped(params, opt_state, _grouped(batch, size))

    return step


def _device_step(loss_fn: LossFn, optimizer: optax.GradientTransformation, axis: Axes, accumulation: int) -> Step:
    """What one device does; all three notations mean this."""

    def per_device(params: Any, opt_state: Any, rows: Any) -> tuple[Any, Any, Array]:
        # The gradient of parameters that are typed as the same everywhere would be summed over devices, microbatch by
        # microbatch; that of varying ones stays here.
        mine = local_gradients(loss_fn, varying(params, axis), rows, accumulation, axes=axis)
        loss, gradients = all_reduce(mine, axis, "mean")
        return *update(optimizer, params, opt_state, gradients), loss

    return per_device


def local_gradients(
    loss_fn: LossFn,
    params: PyTree,
    batch: PyTree,
    accumulation: int = 1,
    *,
    axes: Axes = (),
    each: Callable[[Any], Any] = lambda gradients: gradients,
) -> tuple[Float[Array, ""], PyTree]:
    """Mean loss of the rows at hand and its gradient, `accumulation` microbatches one after another; no collective.

    Sums are kept in float32 or wider, and come back in the dtype of the gradient. In per-device code `params` are to
    vary along `axes`; `each` is applied to the gradient of every microbatch before it is added.
    """

    def one(rows: Any) -> tuple[Array, Any]:
        loss, gradients = jax.value_and_grad(loss_fn)(params, rows)
        return loss, each(gradients)

    if accumulation == 1:
        return one(batch)
    rows = jax.tree.map(lambda leaf: microbatches(leaf, accumulation), batch)
    shapes = jax.eval_shape(one, jax.tree.map(lambda leaf: leaf[0], rows))
    zeros = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, accumulator(leaf.dtype)), shapes)

    def add(total: Any, rows: Any) -> tuple[Any, None]:
        return jax.tree.map(jnp.add, total, one(rows)), None

    total, _ = jax.lax.scan(add, varying(zeros, axes), rows)
    return jax.tree.map(lambda leaf, shape: (leaf / accumulation).astype(shape.dtype), total, shapes)


def grouped_gradients(
    loss_fn: LossFn, params: PyTree, batch: PyTree, size: int, rows: NamedSharding, accumulation: int
) -> tuple[Float[Array, ""], PyTree]:
    """`local_gradients` of each of `size` devices side by side, and their mean, in the notation of `jit`."""

    def of_group(group: Any) -> tuple[Array, Any]:
        return local_gradients(loss_fn, params, group, accumulation)

    pin = jax.lax.with_sharding_constraint
    per_device = jax.vmap(of_group, spmd_axis_name=rows.spec[0])(pin(_grouped(batch, size), rows))
    return jax.tree.map(lambda leaf: leaf.mean(axis=0), pin(per_device, rows))


def microbatches(rows: Array, accumulation: int) -> Array:
    """[B, ...] as [A, B/A, ...], each microbatch taking every A-th row so that a sharded B stays sharded.

    >>> print(microbatches(jnp.arange(6), 2))
    [[0 2 4]
     [1 3 5]]
    """
    return rows.reshape(rows.shape[0] // accumulation, accumulation, *rows.shape[1:]).swapaxes(0, 1)


def update(
    optimizer: optax.GradientTransformation, params: PyTree, opt_state: PyTree, gradients: PyTree
) -> tuple[PyTree, PyTree]:
    """Parameters and optimizer state after one step of `optimizer`."""
    updates, opt_state = optimizer.update(gradients, opt_state, params)
    return optax.apply_updates(params, updates), opt_state


def num_shards(mesh: Mesh | AbstractMesh, axis: Axes) -> int:
    """Over how many devices `axis` (or the axes of a tuple together) splits an array.

    Raises:
      ValueError: the mesh has no such axis.
    """
    names = (axis,) if isinstance(axis, str) else axis
    for name in names:
        if name not in mesh.axis_names:
            raise ValueError(f"the mesh has no axis {str(name)!r}: it has {', '.join(map(str, mesh.axis_names))}.")
    return math.prod(mesh.shape[name] for name in names)


def check_rows(batch: PyTree, size: int, accumulation: int) -> None:
    """Refuse a batch that does not divide into equal parts: means of unequal parts would not average to the mean.

    Raises:
      ValueError: `accumulation` is not above 0, there is nothing to split, leaves have different numbers of rows, or
        the rows do not divide into devices x microbatches.
    """
    if accumulation < 1:
        raise ValueError(f"accumulation={accumulation} must be a whole number above 0.")
    shapes = {jax.tree_util.keystr(path): jnp.shape(leaf) for path, leaf in jax.tree_util.tree_leaves_with_path(batch)}
    for path, shape in shapes.items():
        if not shape:
            raise ValueError(f"batch{path} is a scalar: every leaf of the batch needs a leading dim of rows.")
    counts = {shape[0]: path for path, shape in shapes.items()}
    if len(counts) != 1:
        found = ", ".join(f"batch{path} has {rows}" for rows, path in counts.items()) or "it has no leaves"
        raise ValueError(f"all leaves of the batch need the same number of rows: {found}.")
    (rows,) = counts
    if rows % (size * accumulation) or not rows:
        raise ValueError(
            f"a batch of {rows} rows does not divide over {size} devices x {accumulation} microbatches: use a multiple"
            f" of {size * accumulation}."
        )


def _grouped(batch: PyTree, size: int) -> PyTree:
    """[B, ...] as [n, B/n, ...]: the rows of each device."""
    return jax.tree.map(lambda leaf: jnp.reshape(leaf, (size, leaf.shape[0] // size, *leaf.shape[1:])), batch)
