"""Run the trainer's own compiled program on given values, and read from its state what the reference says too."""

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from gcompute.certify.precision import FLOAT64, precision_of
from gcompute.certify.recipes import BATCH, SEQ, STEPS
from gcompute.certify.reference import Trajectory, flat, nested
from gcompute.config.mesh import MeshShape
from gcompute.config.model import ModelConfig
from gcompute.config.train import OptimizerConfig, RunConfig
from gcompute.model.transformer import abstract_params
from gcompute.parallel.mesh import build_mesh
from gcompute.train.programs import TrainProgram, lower_train
from gcompute.train.resolve import resolve_execution
from gcompute.train.step import TrainState


@dataclass(frozen=True, slots=True, kw_only=True)
class Values:
    """What a run starts from: parameters by path and N batches of token ids."""

    params: dict[str, np.ndarray]
    inputs_NBT: np.ndarray
    targets_NBT: np.ndarray


def starting_values(model: ModelConfig, seed: int = 0) -> Values:
    """Parameters that float32 holds exactly, large enough that every one of them matters, and random tokens.

    Matrices are N(0, 1/4), so that scores and activations are of order 1; scales lie around 1 and biases around 0,
    off both, so that one that is ignored shows.
    """
    random = np.random.default_rng(seed)

    def value(path: str, shape: tuple[int, ...]) -> np.ndarray:
        noise = random.standard_normal(shape).astype(np.float32)
        name = path.rsplit("/", 1)[-1]
        return 1 + noise / 8 if name == "scale" else noise / 8 if "bias" in name else noise / 4

    params = {path: value(path, leaf.shape) for path, leaf in _shapes(abstract_params(model)).items()}
    rows = random.integers(0, model.vocab, (STEPS, BATCH, SEQ + 1), dtype=np.int32)
    return Values(params=params, inputs_NBT=rows[..., :-1], targets_NBT=rows[..., 1:])


def _shapes(tree: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """The abstract leaves of a nested dict by their path."""
    found: dict[str, Any] = {}
    for name, value in tree.items():
        path = f"{prefix}/{name}" if prefix else str(name)
        found |= _shapes(value, path) if isinstance(value, dict) else {path: value}
    return found


def lower(run: RunConfig, precision: str, devices: Sequence[Any] | None = None) -> TrainProgram:
    """The trainer's own step for `run`, in `precision`, over devices of this job or a description of others.

    Raises:
      ValueError: the trainer refuses the run.
    """
    backend = jax.default_backend() if devices is None else devices[0].platform
    shape = run.train.mesh or MeshShape()
    with precision_of(precision):
        execution = resolve_execution(run, shape, backend)
        if precision == FLOAT64:
            wide = jnp.dtype(FLOAT64)
            execution = dataclasses.replace(execution, compute=wide, residual=wide)
        return lower_train(run, build_mesh(shape, devices), backend, execution=execution, dispatch_steps=STEPS)


def follow(
    program: TrainProgram,
    compiled: jax.stages.Compiled,
    values: Values,
    optimizer: OptimizerConfig,
    precision: str,
) -> Trajectory:
    """One step and then the rest of them by `compiled`, from `values`.

    The gradient is read from the first moment, which after one step is (1 - b1) times the clipped gradient for AdamW,
    and that gradient for SGD.
    """
    with precision_of(precision):
        state = program.abstract_state
        params = jax.tree.map(_place, nested(values.params), state.params)
        # Counts and moments of both optimizers start at 0.
        started = TrainState(_zeros(state.step), params, jax.tree.map(_zeros, state.optimizer))
        count = partial(jax.device_put, device=state.step.sharding)
        put = partial(jax.device_put, device=program.batch_sharding)
        rows = (values.inputs_NBT, values.targets_NBT)
        state, first = compiled(started, *map(put, rows), count(np.int32(1)))
        norm, after_one = float(np.asarray(first.gradient_norm)[0]), flat(state.params)
        gradients = _gradients(state.optimizer, optimizer, norm)
        later = (np.roll(tokens, -1, axis=0) for tokens in rows)
        state, rest = compiled(state, *map(put, later), count(np.int32(STEPS - 1)))

    def joined(name: str) -> np.ndarray:
        if getattr(first, name) is None:
            return np.zeros(STEPS)
        return np.append(np.asarray(getattr(first, name))[:1], np.asarray(getattr(rest, name))[:-1])

    return Trajectory(
        losses=joined("loss"),
        balances=joined("balance"),
        dropped=joined("dropped"),
        norms=joined("gradient_norm"),
        gradients=gradients,
        first=after_one,
        last=flat(state.params),
    )


def _place(value: np.ndarray, like: jax.ShapeDtypeStruct) -> jax.Array:
    return jax.device_put(value.astype(like.dtype), like.sharding)


def _zeros(like: jax.ShapeDtypeStruct) -> jax.Array:
    return jax.device_put(np.zeros(like.shape, like.dtype), like.sharding)


def _gradients(state: Any, config: OptimizerConfig, norm: float) -> dict[str, np.ndarray]:
    """The gradient before clipping, from the optimizer's state after the first step."""
    name = "mu" if config.optimizer == "adamw" else "trace"
    nodes = jax.tree.leaves(state, is_leaf=lambda node: hasattr(node, name))
    moments = flat(next(getattr(node, name) for node in nodes if hasattr(node, name)))
    share = min(1.0, config.clip / norm) if config.clip else 1.0
    if config.optimizer == "adamw":
        share *= 1 - config.b1
    return {path: np.asarray(leaf, np.float64) / share for path, leaf in moments.items()}
