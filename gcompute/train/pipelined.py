"""The decoder as a pipeline: embedding, chunks of blocks, output layer; gradients and evaluation over the stage axis.

Everything here but `pipeline_evaluation` is per-device code over that axis; the compiler, or islands, split the rest.
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec
from jaxtyping import Array

from gcompute.config.mesh import Axis, MeshShape
from gcompute.config.model import ModelConfig
from gcompute.model.transformer import Execution, Params, ends, param_dims, run_blocks, without_blocks
from gcompute.parallel.pipeline.executor import run_pipeline
from gcompute.parallel.pipeline.forward import pipeline_forward
from gcompute.parallel.pipeline.layout import join_chunks, layer_order, split_chunks
from gcompute.parallel.pipeline.schedule import Schedule
from gcompute.parallel.placement import Placement
from gcompute.parallel.rules import partition_spec
from gcompute.train.objective import Losses, arrange, microbatches


def in_stage_order(params: Params, schedule: Schedule | None) -> Params:
    """Whole parameters with their layers in the order in which stages hold them; only interleaving changes it.

    The state keeps the model's order, so that checkpoints fit any mesh: an interleaved schedule moves its layers
    between stages once a step.
    """
    return _reordered(params, schedule, inverse=False)


def in_model_order(params: Params, schedule: Schedule | None) -> Params:
    """The inverse of `in_stage_order`, for gradients."""
    return _reordered(params, schedule, inverse=True)


def _reordered(params: Params, schedule: Schedule | None, *, inverse: bool) -> Params:
    if schedule is None or schedule.num_chunks == 1:
        return params
    num_layers = jax.tree.leaves(params["blocks"])[0].shape[0]
    order = layer_order(num_layers, schedule.num_stages, schedule.num_chunks)
    order = np.argsort(order) if inverse else order
    return {**params, "blocks": jax.tree.map(lambda leaf: leaf[order], params["blocks"])}


def stage_specs(config: ModelConfig, mesh: MeshShape) -> Params:
    """How parameters lie over the stage axis: blocks by layers, the rest whole on every stage."""
    return jax.tree.map(
        lambda dims: partition_spec("".join(dim if dim == "L" else "_" for dim in dims), mesh), param_dims(config)
    )


def _uniform_ends(placement: Placement) -> bool:
    """Whether the output layer holds collectives, and so has to be computed by all stages alike."""
    mesh = placement.shape
    return mesh.fsdp * mesh.tensor * mesh.context * mesh.expert > 1


class _Parts:
    """The functions that a pipeline is made of, for rows of one microbatch."""

    def __init__(self, config: ModelConfig, execution: Execution, positions_1T: Array):
        self.config, self.execution, self.positions_1T = config, execution, positions_1T

    def first(self, extra: Params, tokens_BT: Array) -> Array:
        return ends(extra, self.config, self.execution.placement).embed(tokens_BT, self.positions_1T, self.execution)

    def stage(self, chunk: Params, x_BTD: Array) -> tuple[Array, Any]:
        x_BTD, _, stats = run_blocks(chunk, x_BTD, self.positions_1T, config=self.config, execution=self.execution)
        if stats is None:
            return x_BTD, jnp.zeros((), x_BTD.dtype)
        aux = (self.config.balance_weight * stats.balance, (stats.balance, stats.dropped))
        return x_BTD, aux

    def losses(self, extra: Params, x_BTD: Array, targets_BT: Array) -> Array:
        return ends(extra, self.config, self.execution.placement).losses(x_BTD, targets_BT, self.execution)


def _positions(arranged: Any, seq: int) -> Array:
    return jnp.arange(seq)[None] if arranged.positions_1T is None else arranged.positions_1T


def pipeline_gradients(
    params: Params,
    inputs_BT: Array,
    targets_BT: Array,
    *,
    config: ModelConfig,
    execution: Execution,
    schedule: Schedule,
) -> tuple[Losses, Params]:
    """Mean losses and gradient over the batch, in the microbatches and the order of `schedule`.

    `params` and their gradients hold this stage's layers, in stage order, and the two ends whole.
    """
    placement = execution.placement
    assert placement is not None, "a pipeline is placed on a mesh"
    arranged = arrange(placement, inputs_BT, targets_BT)
    parts = _Parts(config, execution, _positions(arranged, inputs_BT.shape[1]))
    inputs, targets = (microbatches(rows, schedule.num_microbatches) for rows in arranged.rows)
    result = run_pipeline(
        parts.stage,
        split_chunks(params["blocks"], schedule.num_chunks),
        without_blocks(params),
        inputs,
        targets,
        schedule,
        first=parts.first,
        last=lambda extra, x, targets: parts.losses(extra, x, targets).mean(),
        has_aux=True,
        uniform_ends=_uniform_ends(placement),
    )
    losses = Losses(result.loss)
    if config.experts:
        balance, dropped = result.counts
        losses = Losses(result.loss - result.aux, balance / schedule.num_microbatches, dropped)
    return losses, {**result.extra_grads, "blocks": join_chunks(result.stage_grads)}


def pipeline_evaluation(
    params: Params,
    inputs_BT: Array,
    targets_BT: Array,
    weights_BT: Array,
    *,
    config: ModelConfig,
    execution: Execution,
    schedule: Schedule,
) -> tuple[Array, Array]:
    """The sum of weighted losses and of weights over whole rows, the forward half of the training pipeline."""
    placement = execution.placement
    assert placement is not None, "a pipeline is placed on a mesh"

    def per_stage(params: Params, inputs_BT: Array, targets_BT: Array, weights_BT: Array) -> Array:
        arranged = arrange(placement, inputs_BT, targets_BT, weights_BT)
        parts = _Parts(config, execution, _positions(arranged, inputs_BT.shape[1]))
        inputs, *rest = (microbatches(rows, schedule.num_microbatches) for rows in arranged.rows)
        return pipeline_forward(
            parts.stage,
            split_chunks(params["blocks"], schedule.num_chunks),
            without_blocks(params),
            inputs,
            tuple(rest),
            schedule,
            first=parts.first,
            last=lambda extra, x, rows: (parts.losses(extra, x, rows[0]) * rows[1]).sum(),
            has_aux=True,
            uniform_ends=_uniform_ends(placement),
        ).sum()

    whole = PartitionSpec()
    total = placement.manual(
        per_stage,
        {Axis.STAGE},
        in_specs=(stage_specs(config, placement.shape), whole, whole, whole),
        out_specs=whole,
    )(in_stage_order(params, schedule), inputs_BT, targets_BT, weights_BT)
    return total, weights_BT.sum()
