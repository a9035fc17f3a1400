"""The training and evaluation programs, as pure functions that the loop compiles."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array

from gcompute.config.model import ModelConfig
from gcompute.model.dropout import dropout_of_step
from gcompute.model.transformer import Execution, Params, forward_losses
from gcompute.parallel.einsum import accumulator
from gcompute.parallel.pipeline.schedule import Schedule
from gcompute.train.gradients import loss_and_gradients
from gcompute.train.objective import arrange, microbatches
from gcompute.train.pipelined import pipeline_evaluation


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class TrainState:
    """All that a step changes, or a shape or sharding for each of it. step: int32, optimizer steps done."""

    step: Any
    params: Any
    optimizer: Any


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class StepMetrics:
    """[n], one value a step: loss in nats a token, global norm of the gradient before clipping.

    Of a mixture of experts also the balance loss and the dropped choices, see `Losses`; else None.
    """

    loss: Any
    gradient_norm: Any
    balance: Any = None
    dropped: Any = None


def make_train_steps(
    config: ModelConfig,
    execution: Execution,
    optimizer: optax.GradientTransformation,
    accumulation: int,
    *,
    zero: int = 0,
    schedule: Schedule | None = None,
    shardings: TrainState | None = None,
    update_shardings: Any = None,
    dropout: float = 0.0,
    seed: int = 0,
) -> Callable[[TrainState, Array, Array, Array], tuple[TrainState, StepMetrics]]:
    """A function that runs `num_steps` optimizer steps over the first batches of [N, B, T] inputs and targets.

    The count is a traced value: one program serves any number of steps up to N, so how steps are grouped into
    dispatches changes no bit of the result.

    Args:
      zero, schedule: as in `loss_and_gradients`. shardings: where each step leaves the state. update_shardings: how
        parameters and gradients are split to compute the update, where that is more than where they lie (ZeRO-1, -2).
      dropout: probability of zero, see `gcompute.model.dropout`; 0 leaves it out of the program. seed: of its masks.
    """
    gradient_of = partial(
        loss_and_gradients,
        config=config,
        execution=execution,
        accumulation=accumulation,
        zero=zero,
        schedule=schedule,
    )

    def one(state: TrainState, inputs_BT: Array, targets_BT: Array) -> tuple[TrainState, StepMetrics]:
        drawn = dropout_of_step(dropout, seed, state.step, inputs_BT.shape[0])
        losses, gradients = gradient_of(state.params, inputs_BT, targets_BT, dropout=drawn)
        params = state.params
        if update_shardings is not None:
            # Else XLA gathers the optimizer's state, and every device computes the whole update.
            params, gradients = jax.lax.with_sharding_constraint((params, gradients), (update_shardings,) * 2)
        updates, optimizer_state = optimizer.update(gradients, state.optimizer, params)
        params = optax.apply_updates(params, updates)
        if update_shardings is not None:
            params = jax.lax.with_sharding_constraint(params, update_shardings)
        after = TrainState(state.step + 1, params, optimizer_state)
        if shardings is not None:
            after = jax.lax.with_sharding_constraint(after, shardings)
        return after, StepMetrics(losses.loss, optax.tree.norm(gradients), losses.balance, losses.dropped)

    def train_steps(
        state: TrainState, inputs_NBT: Array, targets_NBT: Array, num_steps: Array
    ) -> tuple[TrainState, StepMetrics]:
        def body(i: Array, carry: tuple[TrainState, StepMetrics]) -> tuple[TrainState, StepMetrics]:
            state, metrics = carry
            if shardings is not None:
                # Left free, what a loop carries may be laid out otherwise between steps.
                state = jax.lax.with_sharding_constraint(state, shardings)
            state, new = one(state, inputs_NBT[i], targets_NBT[i])
            return state, jax.tree.map(lambda values, value: values.at[i].set(value), metrics, new)

        empty = jnp.zeros(inputs_NBT.shape[0], accumulator(execution.compute))
        routed = empty if config.experts else None
        return jax.lax.fori_loop(0, num_steps, body, (state, StepMetrics(empty, empty, routed, routed)))

    return train_steps


def make_eval(
    config: ModelConfig, execution: Execution, accumulation: int, *, schedule: Schedule | None = None
) -> Callable[[Params, Array, Array, Array], tuple[Array, Array]]:
    """A function of (params, inputs, targets, weights [B, T]) giving the sum of weighted losses and of weights."""
    placement = execution.placement
    if schedule is not None:
        return partial(pipeline_evaluation, config=config, execution=execution, schedule=schedule)

    def evaluate(params: Params, inputs_BT: Array, targets_BT: Array, weights_BT: Array) -> tuple[Array, Array]:
        def add(totals: tuple[Array, Array], rows: Any) -> tuple[tuple[Array, Array], None]:
            arranged = arrange(placement, *rows)
            inputs, targets, weights = arranged.rows
            losses, _ = forward_losses(
                params, inputs, targets, config=config, execution=execution, positions_BT=arranged.positions_1T
            )
            losses = losses * weights
            return (totals[0] + losses.sum(), totals[1] + weights.sum()), None

        rows = jax.tree.map(lambda x: microbatches(x, accumulation), (inputs_BT, targets_BT, weights_BT))
        zeros = (jnp.zeros((), accumulator(execution.compute)), jnp.zeros((), jnp.float32))
        return jax.lax.scan(add, zeros, rows)[0]

    return evaluate
