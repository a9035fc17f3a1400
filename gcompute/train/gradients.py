"""The loss of a batch and its gradient: microbatches one after another, then one reduction over the data axis."""

import dataclasses
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec
from jaxtyping import Array

from gcompute.config.mesh import Axis, MeshShape
from gcompute.config.model import ModelConfig
from gcompute.model.dropout import Dropout
from gcompute.model.transformer import Execution, Params, param_dims, stack, unstack
from gcompute.parallel.pipeline.schedule import Schedule
from gcompute.parallel.rules import dim_to_add, partition_spec
from gcompute.train.objective import Losses, microbatches, objective
from gcompute.train.pipelined import in_model_order, in_stage_order, pipeline_gradients, stage_specs


def local_gradients(
    params: Params,
    inputs_BT: Array,
    targets_BT: Array,
    dropout: Dropout | None = None,
    *,
    config: ModelConfig,
    execution: Execution,
    accumulation: int,
) -> tuple[Losses, Params]:
    """Mean losses and gradient over the batch, `accumulation` microbatches one after another.

    With no scan over layers the gradient is taken of one tree a layer and stacked once, after the last microbatch; and
    with `output_major` of matrices that narrow, [O, I], turned once too.
    """
    unrolled = execution.unroll >= config.layers
    params = unstack(params, config) if unrolled else params
    turned = unrolled and execution.output_major
    params = _turn_narrowing(params) if turned else params

    def loss(params: Params, inputs: Array, targets: Array, dropout: Dropout | None) -> tuple[Array, Losses]:
        params = _turn_narrowing(params) if turned else params
        return objective(params, inputs, targets, config=config, execution=execution, dropout=dropout)

    def value_and_grad(inputs: Array, targets: Array, rows_B: Array | None) -> tuple[Losses, Params]:
        part = dataclasses.replace(dropout, rows_B=rows_B) if dropout is not None else None
        (_, losses), gradients = jax.value_and_grad(loss, has_aux=True)(params, inputs, targets, part)
        return losses, gradients

    rows_B = dropout.rows_B if dropout is not None else None
    if accumulation == 1:
        losses, gradients = value_and_grad(inputs_BT, targets_BT, rows_B)
    else:

        def add(total: Any, rows: tuple[Array, Array, Array | None]) -> tuple[Any, None]:
            return jax.tree.map(jnp.add, total, value_and_grad(*rows)), None

        rows = jax.tree.map(lambda rows: microbatches(rows, accumulation), (inputs_BT, targets_BT, rows_B))
        shapes = jax.eval_shape(value_and_grad, *jax.tree.map(lambda rows: rows[0], rows))
        zeros = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), shapes)
        (losses, gradients), _ = jax.lax.scan(add, zeros, rows)
        gradients = jax.tree.map(lambda value: value / accumulation, gradients)
        losses = _mean_losses(losses, accumulation)
    gradients = _turn_narrowing(gradients) if turned else gradients
    return losses, stack(gradients, config) if unrolled else gradients


def _turn_narrowing(params: Params) -> Params:
    """The same tree with the feed-forward layers' second matrices, [F, D], transposed; its own inverse."""

    def turn(path: Any, leaf: Array) -> Array:
        return leaf.T if "down_FD" in jax.tree_util.keystr(path[-1:]) else leaf

    return jax.tree_util.tree_map_with_path(turn, params)


def _mean_losses(total: Losses, count: int) -> Losses:
    """Sums over `count` parts of a batch as means; dropped choices stay a count."""
    mean = jax.tree.map(lambda value: value / count, total)
    return Losses(mean.loss, mean.balance, total.dropped)


def loss_and_gradients(
    params: Params,
    inputs_BT: Array,
    targets_BT: Array,
    *,
    config: ModelConfig,
    execution: Execution,
    accumulation: int,
    zero: int = 0,
    schedule: Schedule | None = None,
    dropout: Dropout | None = None,
) -> tuple[Losses, Params]:
    """Mean losses of a batch and the gradient of its objective, on whatever mesh `execution` is placed.

    Over the data and stage axes this is per-device code, whose other axes the compiler splits: so the microbatches'
    gradients are summed on each device and reduced once. With `zero` 2 that reduction leaves each device its share.

    Args:
      schedule: the pipeline's, where the mesh has stages; it has no dropout.
    """
    local = partial(local_gradients, config=config, execution=execution, accumulation=accumulation)
    placement = execution.placement
    if placement is None or placement.shape.data == placement.shape.stage == 1:
        return local(params, inputs_BT, targets_BT, dropout)
    mesh = placement.shape
    if schedule is not None:
        local = partial(pipeline_gradients, config=config, execution=execution, schedule=schedule)

    params_specs = stage_specs(config, mesh)
    gradient_specs = params_specs
    if zero == 2:
        gradient_specs = jax.tree.map(partial(_scattered, mesh=mesh), params_specs, param_dims(config), params)

    def per_device(params: Params, inputs_BT: Array, targets_BT: Array, *dropout: Dropout) -> tuple[Losses, Params]:
        # With types unchecked autodiff adds no reduction of its own, which would come once a microbatch.
        losses, gradients = local(params, inputs_BT, targets_BT, *dropout)
        if mesh.data == 1:
            return losses, gradients
        losses = _mean_losses(jax.lax.psum(losses, Axis.DATA), mesh.data)
        return losses, jax.tree.map(partial(_reduced, num_shards=mesh.data), gradients, gradient_specs)

    rows = partition_spec("B", mesh, {"B": (Axis.DATA,)})
    over = {axis for axis in (Axis.DATA, Axis.STAGE) if mesh.size(axis) > 1}
    # Every row keeps the number that it has in the whole batch.
    dropouts = () if dropout is None else (dropout,)
    dropout_specs = tuple(dataclasses.replace(one, key=PartitionSpec(), rows_B=rows) for one in dropouts)
    whole = placement.manual(
        per_device,
        over,
        in_specs=(params_specs, rows, rows, *dropout_specs),
        out_specs=(PartitionSpec(), gradient_specs),
    )
    losses, gradients = whole(in_stage_order(params, schedule), inputs_BT, targets_BT, *dropouts)
    return losses, in_model_order(gradients, schedule)


def _scattered(spec: PartitionSpec, dims: str, leaf: Any, *, mesh: MeshShape) -> PartitionSpec:
    """`spec` with the data axis where it splits the optimizer's state of this parameter."""
    chosen = dim_to_add(partition_spec(dims, mesh), leaf.shape, Axis.DATA, mesh)
    entries = [*spec, *[None] * (len(dims) - len(spec))]
    return PartitionSpec(*(Axis.DATA.value if index == chosen else entry for index, entry in enumerate(entries)))


def _reduced(gradient: Array, spec: PartitionSpec, *, num_shards: int) -> Array:
    """The mean over the data axis; where `spec` names it, each device keeps its share of that dim."""
    if Axis.DATA.value in spec:
        dim = list(spec).index(Axis.DATA.value)
        total = jax.lax.psum_scatter(gradient, Axis.DATA, scatter_dimension=dim, tiled=True)
    else:
        total = jax.lax.psum(gradient, Axis.DATA)
    return total / num_shards
