"""The training loop: batches in, a few compiled steps a dispatch, metrics and checkpoints out."""

import dataclasses
import math
import time
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from gcompute.config.mesh import MeshShape
from gcompute.config.train import RunConfig
from gcompute.measure.profile import trace
from gcompute.model.pretrained import CHECKPOINTS
from gcompute.model.transformer import Execution, abstract_params, init, param_dims
from gcompute.parallel.mesh import build_mesh
from gcompute.parallel.rules import check_divisible, param_shardings, partition_spec, state_shardings
from gcompute.plan.train_step import train_flops
from gcompute.train.checkpoint import Checkpoints
from gcompute.train.corpus import TokenizedCorpus
from gcompute.train.data import BatchSource, Prefetcher, ValidationWindows
from gcompute.train.events import Evaluated, Notice, Report, Saved, Started, Stepped
from gcompute.train.metrics_log import MetricsLog
from gcompute.train.optimizer import make_optimizer, make_schedule
from gcompute.train.resolve import default_mesh, resolve_accumulation, resolve_execution
from gcompute.train.step import StepMetrics, TrainState, make_eval, make_train_steps

METRICS = "metrics.jsonl"
PROFILE = "profile"
DISPATCH_S = 0.5
MOST_DISPATCH_STEPS = 32
PROFILED_DISPATCHES = 2


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainResult:
    """How a run ended. Losses in nats a token; rates are medians over dispatches, compilation left out."""

    step: int
    finished: bool
    train_loss: float | None
    val_loss: float | None
    num_params: int
    accumulation: int
    compile_s: float
    first_step_s: float | None
    train_s: float
    step_s: float | None
    tokens_per_s: float | None
    mfu: float | None


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


def build_programs(run: RunConfig) -> Programs:
    """Resolve, shard and compile everything that `run` needs on the devices of this job.

    Raises:
      ValueError: the mesh, the model and the batch do not go together.
    """
    backend = jax.default_backend()
    shape = run.train.mesh or default_mesh()
    if run.train.mesh is None and run.train.batch % shape.num_devices:
        raise ValueError(
            f"batch={run.train.batch} does not divide over {shape.num_devices} devices."
            f" Use a multiple of {shape.num_devices}, or give --mesh."
        )
    if run.seq > run.model.context:
        raise ValueError(f"seq={run.seq} is longer than the model's context={run.model.context}.")
    mesh = build_mesh(shape)
    accumulation = resolve_accumulation(run, shape, backend)
    check_divisible(run.model, shape, batch=run.train.batch, accumulation=accumulation)
    execution = resolve_execution(run, backend)
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


def evaluate(programs: Programs, params: Any, windows: ValidationWindows, most: int | None) -> float:
    """Mean validation loss in nats a token over `most` batches spread over the split, or all of it."""
    total = weight = 0.0
    sharding = NamedSharding(programs.batch_sharding.mesh, PartitionSpec(*programs.batch_sharding.spec[1:]))
    # Spread over the split: its files are in order of their names, so the first batches are all of one kind.
    chosen = range(len(windows)) if most is None else sorted({i * len(windows) // most for i in range(most)})
    for batch in map(windows.batch_at, chosen):
        losses, weights = programs.evaluate(params, *(place(rows, sharding) for rows in batch))
        total, weight = total + float(losses), weight + float(weights)
    return total / weight


def train(
    run: RunConfig,
    corpus: TokenizedCorpus,
    *,
    out: Path,
    resume: bool = False,
    peak_flops_per_s: float | None = None,
    profile: bool = False,
    report: Report = lambda event: None,
    stopped: Callable[[], bool] = lambda: False,
) -> TrainResult:
    """Train `run` on `corpus`, keeping checkpoints and metrics in `out`; the same losses whenever it is resumed.

    `stopped` is asked between dispatches; when it says yes, the state is saved and the run returns unfinished.

    Raises:
      ValueError: configuration, data or checkpoints do not go together.
      FloatingPointError: a loss is not finite; the last checkpoint stands.
    """
    entered = time.perf_counter()
    programs = build_programs(run)
    train_config, steps = run.train, run.train.steps
    source = BatchSource(tokens=corpus.train, seq=run.seq, batch=train_config.batch, seed=train_config.seed)
    windows = ValidationWindows(tokens=corpus.val, seq=run.seq, batch=train_config.batch)
    schedule = make_schedule(run.optimizer, steps)
    num_params = sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(programs.abstract_state.params))
    flops = train_flops(run.model, batch=train_config.batch, seq=run.seq).step_flops
    meta = {**run.to_dict(), "tokenizer": corpus.tokenizer.fingerprint, "mesh": str(programs.mesh)}
    first = jax.process_index() == 0
    val_loss: float | None = None
    train_loss: float | None = None
    first_step_s: float | None = None
    rates: list[float] = []
    with ExitStack() as stack:
        checkpoints = stack.enter_context(Checkpoints(out / CHECKPOINTS, keep=train_config.keep))
        restored = (
            checkpoints.restore(programs.abstract_state, lambda text: report(Notice(text=text))) if resume else None
        )
        state = restored[0] if restored else programs.init(jax.random.key(train_config.seed))
        state = dataclasses.replace(state, step=place(np.asarray(state.step), programs.abstract_state.step.sharding))
        step = int(state.step)
        log = stack.enter_context(MetricsLog(out / METRICS, last_step=step)) if first else None
        batches = stack.enter_context(
            Prefetcher(map(source.batch_at, range(step, steps)), depth=2 * programs.dispatch_steps)
        )
        report(
            Started(
                first_step=step,
                num_steps=steps,
                num_params=num_params,
                accumulation=programs.accumulation,
                compile_s=programs.compile_s,
            )
        )
        saved = step if restored else -1
        trained_s = 0.0
        dispatches = 0
        profiling: ExitStack | None = None
        while step < steps and not stopped():
            if profile and dispatches == 1:
                profiling = stack.enter_context(ExitStack())
                profiling.enter_context(trace(out / PROFILE))
            num = _dispatch_size(programs, train_config, step, rates, adapt=jax.process_count() == 1)
            rows = [next(batches) for _ in range(num)]
            inputs, targets = (
                place(_padded([row[side] for row in rows], programs.dispatch_steps), programs.batch_sharding)
                for side in (0, 1)
            )
            started = time.perf_counter()
            count = place(np.asarray(num, np.int32), programs.abstract_state.step.sharding)
            state, metrics = programs.steps(state, inputs, targets, count)
            metrics = jax.device_get(metrics)
            now = time.perf_counter()
            first_step_s = first_step_s or now - entered
            trained_s += now - started
            # The first dispatch after a start pays for page faults and caches; it is not the rate of the run.
            if dispatches:
                rates.append((now - started) / num)
            dispatches += 1
            if profiling and dispatches == 1 + PROFILED_DISPATCHES:
                profiling.close()
            losses = [float(loss) for loss in metrics.loss[:num]]
            if log:
                log.write(
                    [
                        {
                            "kind": "train",
                            "step": step + i + 1,
                            "loss": losses[i],
                            "gradient_norm": float(metrics.gradient_norm[i]),
                            "learning_rate": float(np.asarray(schedule(step + i))),
                            "step_s": (now - started) / num,
                        }
                        for i in range(num)
                    ]
                )
            step += num
            train_loss = losses[-1]
            if not all(map(math.isfinite, losses)):
                bad = step - num + 1 + next(i for i, loss in enumerate(losses) if not math.isfinite(loss))
                raise FloatingPointError(
                    f"the loss at step {bad} is not finite. Resume from the last checkpoint with a lower"
                    " --learning-rate or a smaller --clip."
                )
            step_s = median(rates[-20:]) if rates else (now - started) / num
            report(_progress(step, steps, train_loss, step_s, run.tokens_per_step, flops, peak_flops_per_s))
            ended = step == steps
            if ended or (train_config.eval_every and step % train_config.eval_every == 0):
                val_loss = evaluate(programs, state.params, windows, None if ended else train_config.eval_batches)
                if log:
                    log.write([{"kind": "eval", "step": step, "loss": val_loss, "whole": ended}])
                report(Evaluated(step=step, loss=val_loss, whole=ended))
            if ended or (train_config.checkpoint_every and step % train_config.checkpoint_every == 0):
                checkpoints.save(state, meta)
                saved = step
                report(Saved(step=step))
        if step > saved:
            checkpoints.save(state, meta)
            report(Saved(step=step))
        checkpoints.wait()
    step_s = median(rates) if rates else None
    return TrainResult(
        step=step,
        finished=step >= steps,
        train_loss=train_loss,
        val_loss=val_loss,
        num_params=num_params,
        accumulation=programs.accumulation,
        compile_s=programs.compile_s,
        first_step_s=first_step_s,
        train_s=trained_s,
        step_s=step_s,
        tokens_per_s=run.tokens_per_step / step_s if step_s else None,
        mfu=flops / step_s / peak_flops_per_s if step_s and peak_flops_per_s else None,
    )


def _progress(
    step: int, steps: int, loss: float, step_s: float, tokens: int, flops: float, peak_flops_per_s: float | None
) -> Stepped:
    return Stepped(
        step=step,
        loss=loss,
        tokens_per_s=tokens / step_s,
        step_s=step_s,
        mfu=flops / step_s / peak_flops_per_s if peak_flops_per_s else None,
        eta_s=(steps - step) * step_s,
    )


def _dispatch_size(programs: Programs, config: Any, step: int, rates: list[float], *, adapt: bool) -> int:
    """Steps in the next dispatch: about half a second of them, never past an evaluation, a checkpoint or the end."""
    if not adapt or config.dispatch_steps:
        wanted = programs.dispatch_steps
    else:
        wanted = int(DISPATCH_S / median(rates[-20:])) if rates else 1
    borders = [every for every in (config.eval_every, config.checkpoint_every) if every]
    room = min([config.steps - step, *(every - step % every for every in borders)])
    return max(1, min(wanted, room, programs.dispatch_steps))


def _padded(rows: list[np.ndarray], length: int) -> np.ndarray:
    """Rows stacked into [length, B, T]; the places past the last row are never read by the program."""
    stacked = np.zeros((length, *rows[0].shape), rows[0].dtype)
    stacked[: len(rows)] = rows
    return stacked
