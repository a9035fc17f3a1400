"""What training minimises: mean cross-entropy, and for a mixture of experts the routers' balance loss."""

from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from gcompute.config.mesh import Axis
from gcompute.config.model import ModelConfig
from gcompute.model.dropout import Dropout
from gcompute.model.transformer import Execution, Params, forward_losses
from gcompute.parallel.load_balance import sequence_order
from gcompute.parallel.placement import Placement


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Losses:
    """loss: mean cross-entropy in nats a token. balance: routers' balance loss, a sum over layers; dropped: choices of
    experts that found no place. The last two are None without experts.
    """

    loss: Any
    balance: Any = None
    dropped: Any = None


def microbatches(rows: Array, accumulation: int) -> Array:
    """[B, ...] as [A, B/A, ...], each microbatch taking every A-th row so that a sharded B stays sharded."""
    return rows.reshape(rows.shape[0] // accumulation, accumulation, *rows.shape[1:]).swapaxes(0, 1)


@dataclass(frozen=True, slots=True, kw_only=True)
class Arranged:
    """Rows in the order in which their tokens lie over the context axis; `positions` None means 0, 1, 2, ..."""

    rows: tuple[Array, ...]
    positions_1T: Array | None


def arrange(placement: Placement | None, *rows_BT: Array) -> Arranged:
    """Put the tokens of each row in the order that the context axis has them in, and say their positions."""
    if placement is None:
        return Arranged(rows=rows_BT, positions_1T=None)
    positions = None
    if placement.shape.context > 1:
        order = sequence_order(rows_BT[0].shape[1], placement.shape.size(Axis.CONTEXT), placement.layout)
        rows_BT, positions = tuple(rows[:, order] for rows in rows_BT), jnp.asarray(order)[None]
    return Arranged(rows=tuple(placement.constrain(rows, "BT") for rows in rows_BT), positions_1T=positions)


def objective(
    params: Params,
    inputs_BT: Array,
    targets_BT: Array,
    *,
    config: ModelConfig,
    execution: Execution,
    dropout: Dropout | None = None,
) -> tuple[Float[Array, ""], Losses]:
    """What the gradient is taken of, loss + balance_weight balance, and its parts."""
    placement = execution.placement
    arranged = arrange(placement, inputs_BT, targets_BT)
    inputs_BT, targets_BT = arranged.rows
    losses_BT, stats = forward_losses(
        params,
        inputs_BT,
        targets_BT,
        config=config,
        execution=execution,
        positions_BT=arranged.positions_1T,
        dropout=dropout,
    )
    loss = losses_BT.mean()
    if stats is None:
        return loss, Losses(loss)
    return loss + config.balance_weight * stats.balance, Losses(loss, stats.balance, stats.dropped)


def mean_loss(
    params: Params, inputs_BT: Array, targets_BT: Array, *, config: ModelConfig, execution: Execution
) -> Float[Array, ""]:
    """Mean cross-entropy in nats a token."""
    return objective(params, inputs_BT, targets_BT, config=config, execution=execution)[1].loss
