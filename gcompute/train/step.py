"""The training and evaluation programs, as pure functions that the loop compiles."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, Int

from gcompute.config.model import ModelConfig
from gcompute.model.matmul import accumulator
from gcompute.model.transformer import Execution, Params, forward, stack, unstack


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
    """[n], one value a step: loss in nats a token, global norm of the gradient before clipping."""

    loss: Any
    gradient_norm: Any


def token_losses(logits_BTV: Float[Array, "b t v"], targets_BT: Int[Array, "b t"]) -> Float[Array, "b t"]:
    """Cross-entropy of each target in nats: logsumexp(logits) - logits[target]."""
    chosen_BT = jnp.take_along_axis(logits_BTV, targets_BT[..., None], axis=-1)[..., 0]
    return jax.nn.logsumexp(logits_BTV, axis=-1) - chosen_BT


def mean_loss(
    params: Params, inputs_BT: Array, targets_BT: Array, *, config: ModelConfig, execution: Execution
) -> Float[Array, ""]:
    """Mean cross-entropy in nats a token."""
    logits_BTV, _ = forward(params, inputs_BT, config=config, execution=execution)
    return token_losses(logits_BTV, targets_BT).mean()


def microbatches(rows: Array, accumulation: int) -> Array:
    """[B, ...] as [A, B/A, ...], each microbatch taking every A-th row so that a sharded B stays sharded."""
    return rows.reshape(rows.shape[0] // accumulation, accumulation, *rows.shape[1:]).swapaxes(0, 1)


def loss_and_gradients(
    params: Params,
    inputs_BT: Array,
    targets_BT: Array,
    *,
    config: ModelConfig,
    execution: Execution,
    accumulation: int,
) -> tuple[Float[Array, ""], Params]:
    """Mean loss and its gradient over the batch, `accumulation` microbatches one after another.

    With no scan over layers the gradient is taken of one tree a layer and stacked once, after the last microbatch.
    """
    unrolled = execution.unroll >= config.layers
    params = unstack(params, config) if unrolled else params
    value_and_grad = jax.value_and_grad(partial(mean_loss, config=config, execution=execution))
    if accumulation == 1:
        loss, gradients = value_and_grad(params, inputs_BT, targets_BT)
    else:

        def add(total: Any, rows: tuple[Array, Array]) -> tuple[Any, None]:
            return jax.tree.map(jnp.add, total, value_and_grad(params, *rows)), None

        start = (jnp.zeros((), accumulator(execution.compute)), jax.tree.map(jnp.zeros_like, params))
        rows = (microbatches(inputs_BT, accumulation), microbatches(targets_BT, accumulation))
        total, _ = jax.lax.scan(add, start, rows)
        loss, gradients = jax.tree.map(lambda value: value / accumulation, total)
    return loss, stack(gradients, config) if unrolled else gradients


def make_train_steps(
    config: ModelConfig, execution: Execution, optimizer: optax.GradientTransformation, accumulation: int
) -> Callable[[TrainState, Array, Array, Array], tuple[TrainState, StepMetrics]]:
    """A function that runs `num_steps` optimizer steps over the first batches of [N, B, T] inputs and targets.

    The count is a traced value: one program serves any number of steps up to N, so how steps are grouped into
    dispatches changes no bit of the result.
    """

    def one(state: TrainState, inputs_BT: Array, targets_BT: Array) -> tuple[TrainState, Array, Array]:
        loss, gradients = loss_and_gradients(
            state.params, inputs_BT, targets_BT, config=config, execution=execution, accumulation=accumulation
        )
        updates, optimizer_state = optimizer.update(gradients, state.optimizer, state.params)
        params = optax.apply_updates(state.params, updates)
        return TrainState(state.step + 1, params, optimizer_state), loss, optax.tree.norm(gradients)

    def train_steps(
        state: TrainState, inputs_NBT: Array, targets_NBT: Array, num_steps: Array
    ) -> tuple[TrainState, StepMetrics]:
        def body(i: Array, carry: tuple[TrainState, StepMetrics]) -> tuple[TrainState, StepMetrics]:
            state, metrics = carry
            state, loss, norm = one(state, inputs_NBT[i], targets_NBT[i])
            return state, StepMetrics(metrics.loss.at[i].set(loss), metrics.gradient_norm.at[i].set(norm))

        empty = jnp.zeros(inputs_NBT.shape[0], accumulator(execution.compute))
        return jax.lax.fori_loop(0, num_steps, body, (state, StepMetrics(empty, empty)))

    return train_steps


def make_eval(
    config: ModelConfig, execution: Execution, accumulation: int
) -> Callable[[Params, Array, Array, Array], tuple[Array, Array]]:
    """A function of (params, inputs, targets, weights [B, T]) giving the sum of weighted losses and of weights."""

    def evaluate(params: Params, inputs_BT: Array, targets_BT: Array, weights_BT: Array) -> tuple[Array, Array]:
        def add(totals: tuple[Array, Array], rows: Any) -> tuple[tuple[Array, Array], None]:
            inputs, targets, weights = rows
            logits, _ = forward(params, inputs, config=config, execution=execution)
            losses = token_losses(logits, targets) * weights
            return (totals[0] + losses.sum(), totals[1] + weights.sum()), None

        rows = jax.tree.map(lambda x: microbatches(x, accumulation), (inputs_BT, targets_BT, weights_BT))
        zero = jnp.zeros((), jnp.float32)
        return jax.lax.scan(add, (zero, zero), rows)[0]

    return evaluate
