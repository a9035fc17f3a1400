"""What a training run compiles, on the mesh that it runs on."""

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from gcompute.config.mesh import MeshShape
from gcompute.config.train import RunConfig
from gcompute.model.transformer import Execution, abstract_params, init, param_dims
from gcompute.parallel.mesh import build_mesh
from gcompute.parallel.rules import check_divisible, param_shardings, partition_spec, state_shardings
from gcompute.train.optimizer import make_optimizer
from gcompute.train.resolve import default_mesh, resolve_accumulation, resolve_execution
from gcompute.train.step import StepMetrics, TrainState, make_eval, make_train_steps

MOST_DISPATCH_STEPS = 32


@dataclass(frozen=True, slots=True, kw_only=True)
class Programs:
    """What the loop runs: compiled once, so that a test can read them."""

    steps: jax.stages.Compiled
    evaluate: Callable[..., Any]
    dispatch_steps: int
    accumulation: int
    execution: Execution
    mesh: MeshShape
    batch_sharding: NamedSharding
    abstract_state: TrainState
    init: Callable[[jax.Array], TrainState]
    compile_s: float

    def compiled_bytes(self) -> int | None:
        """Memory of one device that the compiler reserves for the train step: arguments, results and temporaries."""
        memory = self.steps.memory_analysis()
        if memory is None:
            return None
        shared = memory.alias_size_in_bytes
        return memory.argument_size_in_bytes + memory.output_size_in_bytes - shared + memory.temp_size_in_bytes


def resolve_mesh(run: RunConfig) -> tuple[MeshShape, Mesh, int]:
    """The mesh that `run` trains on, over the devices of this job, and its microbatches a step.

    Raises:
      ValueError: the mesh, the model, the batch and the devices do not go together.
    """
    shape = run.train.mesh or default_mesh()
    if run.train.mesh is None and run.train.batch % shape.num_devices:
        raise ValueError(
            f"batch={run.train.batch} does not divide over {shape.num_devices} devices."
            f" Use a multiple of {shape.num_devices}, or give --mesh."
        )
    mesh = build_mesh(shape)
    accumulation = resolve_accumulation(run, shape, jax.default_backend())
    check_divisible(run.model, shape, batch=run.train.batch, accumulation=accumulation)
    return shape, mesh, accumulation


def build_programs(run: RunConfig) -> Programs:
    """Resolve, shard and compile everything that `run` needs on the devices of this job.

    Raises:
      ValueError: as `resolve_mesh`.
    """
    shape, mesh, accumulation = resolve_mesh(run)
    execution = resolve_execution(run, jax.default_backend())
    optimizer = make_optimizer(run.optimizer, run.train.steps)

    def initial(key: jax.Array) -> TrainState:
        params = init(run.model, key)
        return TrainState(jnp.zeros((), jnp.int32), params, optimizer.init(params))

    replicated = NamedSharding(mesh, PartitionSpec())
    abstract = abstract_params(run.model)
    placed = param_shardings(param_dims(run.model), mesh, shape)
    abstract_state = jax.eval_shape(initial, jax.random.key(0))
    shardings = TrainState(replicated, placed, state_shardings(abstract_state.optimizer, abstract, placed, mesh))
    abstract_state = jax.tree.map(
        lambda leaf, sharding: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding),
        abstract_state,
        shardings,
    )
    single_process = jax.process_count() == 1
    most = run.train.dispatch_steps or (MOST_DISPATCH_STEPS if single_process else 1)
    most = min(most, run.train.steps)
    batch_sharding = NamedSharding(mesh, partition_spec("_BT", shape))
    batches = jax.ShapeDtypeStruct((most, run.train.batch, run.seq), jnp.int32, sharding=batch_sharding)
    count = jax.ShapeDtypeStruct((), jnp.int32, sharding=replicated)
    started = time.perf_counter()
    steps = jax.jit(
        make_train_steps(run.model, execution, optimizer, accumulation),
        donate_argnums=0,
        out_shardings=(shardings, StepMetrics(replicated, replicated)),
    )
    compiled = steps.lower(abstract_state, batches, batches, count).compile()
    compile_s = time.perf_counter() - started
    return Programs(
        steps=compiled,
        evaluate=jax.jit(make_eval(run.model, execution, accumulation), out_shardings=replicated),
        dispatch_steps=most,
        accumulation=accumulation,
        execution=execution,
        mesh=shape,
        batch_sharding=batch_sharding,
        abstract_state=abstract_state,
        init=jax.jit(initial, out_shardings=shardings),
        compile_s=compile_s,
    )


def place(rows: np.ndarray, sharding: Any) -> jax.Array:
    """A host array on the devices; in a job of several processes each one holds the rows of its own devices."""
    return jax.make_array_from_callback(rows.shape, sharding, lambda index: rows[index])
