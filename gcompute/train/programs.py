"""What a training run compiles, on the mesh that it runs on."""

import dataclasses
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from gcompute.aot.xla_flags import known_options
from gcompute.config.mesh import Axis, MeshShape
from gcompute.config.train import RunConfig
from gcompute.model.transformer import Execution, init, param_dims
from gcompute.parallel.einsum import accumulator
from gcompute.parallel.mesh import build_mesh, use_mesh
from gcompute.parallel.rules import param_shardings, partition_spec, state_shardings, with_axis
from gcompute.plan.legal import check_mesh
from gcompute.train.optimizer import make_optimizer
from gcompute.train.resolve import (
    default_mesh,
    resolve_accumulation,
    resolve_execution,
    resolve_placement,
    resolve_schedule,
)
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
    if run.train.mesh is None and run.train.batch % default_mesh().num_devices:
        num = default_mesh().num_devices
        raise ValueError(
            f"batch={run.train.batch} does not divide over {num} devices. Use a multiple of {num}, or give --mesh."
        )
    shape = run.train.mesh or default_mesh()
    return shape, build_mesh(shape), resolve_microbatches(run, shape, jax.default_backend())


def resolve_microbatches(run: RunConfig, shape: MeshShape, backend: str) -> int:
    """Microbatches a step on `shape`, after checking that the model and the batch divide over it.

    Raises:
      ValueError: they do not.
    """
    config = run.train
    if config.dropout and shape.stage > 1:
        raise ValueError(
            f"dropout={config.dropout:g} does not run on a pipeline: a stage is not told which rows of the batch its"
            f" microbatch holds. Use dropout=0, or a mesh without stage={shape.stage}."
        )
    accumulation = resolve_accumulation(run, shape, backend)
    check_mesh(
        run.model,
        shape,
        batch=config.batch,
        seq=run.seq,
        accumulation=accumulation,
        schedule=config.pipeline_schedule,
        chunks=config.pipeline_chunks,
        context_attention=config.context_attention,
    )
    return accumulation


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainProgram:
    """The train step of a run on a mesh, before it is compiled, and what else a run needs to know of it.

    A step is called as `steps(state, inputs [n, B, T], targets [n, B, T], count)`; nothing here has touched a device.
    """

    lowered: jax.stages.Lowered
    dispatch_steps: int
    accumulation: int
    execution: Execution
    mesh: Mesh
    shape: MeshShape
    batch_sharding: NamedSharding
    abstract_state: TrainState
    initial: Callable[[jax.Array], TrainState]


def lower_train(
    run: RunConfig,
    mesh: Mesh,
    backend: str,
    *,
    execution: Execution | None = None,
    dispatch_steps: int = 1,
) -> TrainProgram:
    """The train step of `run` on `mesh`, whose devices may be a description of some that are not here.

    Args:
      backend: the platform of the mesh's devices, "cpu", "gpu" or "tpu". execution: other dtypes than the run's, say.
      dispatch_steps: the most steps that one call runs.

    Raises:
      ValueError: the model or the batch does not divide over the mesh.
    """
    shape = MeshShape(**dict(mesh.shape))
    accumulation = resolve_microbatches(run, shape, backend)
    execution = dataclasses.replace(
        execution or resolve_execution(run, shape, backend), placement=resolve_placement(run, mesh, shape)
    )
    optimizer = make_optimizer(run.optimizer, run.train.steps)
    wide = accumulator(execution.compute)

    def initial(key: jax.Array) -> TrainState:
        params = jax.tree.map(lambda leaf: leaf.astype(wide), init(run.model, key))
        return TrainState(jnp.zeros((), jnp.int32), params, optimizer.init(params))

    replicated = NamedSharding(mesh, PartitionSpec())
    abstract = jax.eval_shape(initial, jax.random.key(0))
    placed = param_shardings(param_dims(run.model), mesh, shape, abstract=abstract.params)
    # With ZeRO a parameter is wanted whole on every data shard, its optimizer state and its update are not.
    split = with_axis(abstract.params, placed, Axis.DATA, shape) if run.train.zero else placed
    optimizer_placed = state_shardings(abstract.optimizer, abstract.params, split, mesh)
    shardings = TrainState(replicated, placed, optimizer_placed)
    abstract_state = jax.tree.map(
        lambda leaf, sharding: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding), abstract, shardings
    )
    batch_sharding = NamedSharding(mesh, partition_spec("_B_", shape))
    batches = jax.ShapeDtypeStruct((dispatch_steps, run.train.batch, run.seq), jnp.int32, sharding=batch_sharding)
    count = jax.ShapeDtypeStruct((), jnp.int32, sharding=replicated)
    steps = make_train_steps(
        run.model,
        execution,
        optimizer,
        accumulation,
        zero=run.train.zero,
        schedule=resolve_schedule(run, shape, accumulation),
        shardings=shardings if shape.num_devices > 1 else None,
        update_shardings=split if run.train.zero and shape.data > 1 else None,
        dropout=run.train.dropout,
        seed=run.train.seed,
    )
    metrics = StepMetrics(*[replicated] * 4) if run.model.experts else StepMetrics(replicated, replicated)
    # Asked for outside the mesh: the program that each option is tried on is of one device.
    options = known_options(compiler_options(run, backend), _device_here(mesh)) or None
    with use_mesh(mesh):
        lowered = jax.jit(steps, donate_argnums=0, out_shardings=(shardings, metrics), compiler_options=options).lower(
            abstract_state, batches, batches, count
        )
    return TrainProgram(
        lowered=lowered,
        dispatch_steps=dispatch_steps,
        accumulation=accumulation,
        execution=execution,
        mesh=mesh,
        shape=shape,
        batch_sharding=batch_sharding,
        abstract_state=abstract_state,
        initial=initial,
    )


def _device_here(mesh: Mesh) -> Any:
    """A device of `mesh` that this process can compile for by itself: in a job of several, one of its own."""
    return next((one for one in mesh.devices.flat if one.process_index == jax.process_index()), mesh.devices.flat[0])


def compiler_options(run: RunConfig, backend: str) -> dict[str, str]:
    """Compiler options for the train step of `run` on `backend`, those that its compiler knows.

    The TPU compiler multiplies by the pieces of a matrix as they come round a ring, rather than gather it first, where
    the matrix is larger than this threshold.
    """
    if backend != "tpu" or run.train.collective_matmul:
        return {}
    return {"xla_jf_spmd_threshold_for_windowed_einsum_mib": "1000000"}


def build_programs(run: RunConfig) -> Programs:
    """Resolve, shard and compile everything that `run` needs on the devices of this job.

    Raises:
      ValueError: as `resolve_mesh`.
    """
    shape, mesh, _ = resolve_mesh(run)
    most = run.train.dispatch_steps or (MOST_DISPATCH_STEPS if jax.process_count() == 1 else 1)
    started = time.perf_counter()
    program = lower_train(run, mesh, jax.default_backend(), dispatch_steps=min(most, run.train.steps))
    compiled = program.lowered.compile()
    compile_s = time.perf_counter() - started
    replicated = NamedSharding(mesh, PartitionSpec())
    schedule = resolve_schedule(run, shape, program.accumulation)
    evaluation = make_eval(run.model, program.execution, program.accumulation, schedule=schedule)
    evaluate = jax.jit(evaluation, out_shardings=replicated)

    def evaluate_on_mesh(*arguments: Any) -> Any:
        with use_mesh(mesh):
            return evaluate(*arguments)

    return Programs(
        steps=compiled,
        evaluate=evaluate_on_mesh,
        dispatch_steps=program.dispatch_steps,
        accumulation=program.accumulation,
        execution=program.execution,
        mesh=shape,
        batch_sharding=program.batch_sharding,
        abstract_state=program.abstract_state,
        init=jax.jit(program.initial, out_shardings=jax.tree.map(lambda leaf: leaf.sharding, program.abstract_state)),
        compile_s=compile_s,
    )


def place(rows: np.ndarray, sharding: Any) -> jax.Array:
    """A host array on the devices; in a job of several processes each one holds the rows of its own devices."""
    return jax.make_array_from_callback(rows.shape, sharding, lambda index: rows[index])
