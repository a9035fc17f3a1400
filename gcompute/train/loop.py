"""The training loop: batches in, a few compiled steps a dispatch, metrics and checkpoints out."""

import dataclasses
import math
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import NamedSharding, PartitionSpec

from gcompute.config.architecture import architecture
from gcompute.config.plain import from_plain
from gcompute.config.train import OptimizerConfig, RunConfig
from gcompute.measure.machine import rounding
from gcompute.measure.profile import trace
from gcompute.model.pretrained import CHECKPOINTS, Validated
from gcompute.plan.mfu import model_flops
from gcompute.train.checkpoint import Checkpoints
from gcompute.train.corpus import TokenizedCorpus
from gcompute.train.data import BatchSource, Prefetcher, ValidationWindows
from gcompute.train.events import Evaluated, Notice, Report, Sampled, Saved, Started, Stepped
from gcompute.train.identity import tokens_fingerprint
from gcompute.train.metrics_log import MetricsLog
from gcompute.train.optimizer import make_schedule
from gcompute.train.programs import Programs, build_programs, place
from gcompute.train.sampling import SAMPLES, make_sampler, sample_prompt
from gcompute.train.tensorboard import TENSORBOARD, TensorboardLog, summary_writer

METRICS = "metrics.jsonl"
PROFILE = "profile"
DISPATCH_S = 0.5
PROFILED_DISPATCHES = 2


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainResult:
    """How a run ended. Losses in nats per token; rates are medians over dispatches, compilation left out.

    val_batches: of the validation split that val_loss is over.
    """

    step: int
    finished: bool
    train_loss: float | None
    val_loss: float | None
    val_batches: int | None
    num_params: int
    accumulation: int
    compile_s: float
    compiled_bytes: int | None
    first_step_s: float | None
    train_s: float
    step_s: float | None
    tokens_per_s: float | None
    mfu: float | None


def open_data(run: RunConfig, corpus: TokenizedCorpus) -> tuple[BatchSource, ValidationWindows]:
    """The batches of `run` and its validation windows.

    Raises:
      ValueError: a split is too short.
    """
    config = run.train
    return (
        BatchSource(tokens=corpus.train, seq=run.seq, batch=config.batch, seed=config.seed),
        ValidationWindows(tokens=corpus.val, seq=run.seq, batch=config.batch),
    )


def evaluate(programs: Programs, params: Any, windows: ValidationWindows, most: int) -> float:
    """Mean validation loss in nats per token over `most` batches spread over the split."""
    total = weight = 0.0
    sharding = NamedSharding(programs.batch_sharding.mesh, PartitionSpec(*programs.batch_sharding.spec[1:]))
    for batch in map(windows.batch_at, windows.sample(most)):
        losses, weights = programs.evaluate(params, *(place(rows, sharding) for rows in batch))
        total, weight = total + float(losses), weight + float(weights)
    return total / weight


@contextmanager
def advice_on_memory() -> Iterator[None]:
    """Turn an allocation that fails, on the host or a device, into a MemoryError that says what helps."""
    try:
        yield
    except (MemoryError, jax.errors.JaxRuntimeError) as error:
        if isinstance(error, jax.errors.JaxRuntimeError) and "RESOURCE_EXHAUSTED" not in str(error):
            raise
        raise MemoryError(
            "the memory is not enough for this run. Use a smaller --batch or --seq, more --accumulation, --remat full,"
            " or a --mesh over more devices."
        ) from None


def agreed(stopped: Callable[[], bool]) -> bool:
    """Whether any process of the job is to stop: they run the same steps, so they stop together or wait for ever."""
    if jax.process_count() == 1:
        return stopped()
    return bool(multihost_utils.process_allgather(np.asarray(stopped())).any())


@advice_on_memory()
def train(
    run: RunConfig,
    corpus: TokenizedCorpus,
    *,
    out: Path,
    resume: bool = False,
    peak_flops_per_s: float | None = None,
    profile: bool = False,
    inexact: bool = False,
    about: Mapping[str, Any] | None = None,
    report: Report = lambda event: None,
    stopped: Callable[[], bool] = lambda: False,
) -> TrainResult:
    """Train `run` on `corpus`, keeping checkpoints and metrics in `out`; the same losses whenever it is resumed.

    `stopped` is asked between dispatches; when it says yes, the state is saved and the run returns unfinished. The last
    evaluation is over `ValidationWindows.final` batches.

    Args:
      inexact: resume also where another processor or jaxlib rounds otherwise than the one that saved the checkpoint.
      about: plain values that each checkpoint keeps beside the configuration.

    Raises:
      ValueError: configuration, data or checkpoints do not go together.
      FloatingPointError: a loss is not finite; the last checkpoint stands.
      OSError: a checkpoint or the metrics cannot be written; the checkpoints before it stand.
      MemoryError: the run does not fit.
    """
    entered = time.perf_counter()
    if run.train.tensorboard:
        summary_writer()
    source, windows = open_data(run, corpus)
    prompt = sample_prompt(run, corpus)
    programs = build_programs(run)
    train_config, steps = run.train, run.train.steps
    final_eval = windows.final(train_config.final_eval_batches, steps=steps, eval_batches=train_config.eval_batches)
    usual_eval = min(train_config.eval_batches or len(windows), len(windows))
    learning_rates = jax.device_get(jax.jit(jax.vmap(make_schedule(run.optimizer, steps)))(np.arange(steps)))
    num_params = sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(programs.abstract_state.params))
    flops = model_flops(architecture(run.model), train_config.batch, run.seq)
    tokens_sha256 = tokens_fingerprint(corpus)
    meta = {
        **(about or {}),
        **run.to_dict(),
        "tokenizer": corpus.tokenizer.fingerprint,
        "tokens_sha256": tokens_sha256,
        "mesh": str(programs.mesh),
        "made_on": rounding(),
    }
    first = jax.process_index() == 0
    val_loss: float | None = None
    val_batches: int | None = None
    train_loss: float | None = None
    first_step_s: float | None = None
    rates: list[float] = []
    with ExitStack() as stack:
        checkpoints = stack.enter_context(
            Checkpoints(out / CHECKPOINTS, keep=train_config.keep, keep_best=train_config.keep_best)
        )
        restored = (
            checkpoints.restore(programs.abstract_state, lambda text: report(Notice(text=text)), run=meta)
            if resume
            else None
        )
        if restored and restored[1].get("tokens_sha256") != tokens_sha256:
            raise ValueError(
                f"the data is not what the run in {out} began with: its tokens differ. Give the same text, or start"
                " another --out."
            )
        if restored:
            _check_rounding(restored[1].get("made_on"), meta["made_on"], out, report if inexact else None)
            _tell_of_schedule(restored[1], run, learning_rates, report)
        state = restored[0] if restored else programs.init(jax.random.key(train_config.seed))
        state = dataclasses.replace(state, step=place(np.asarray(state.step), programs.abstract_state.step.sharding))
        step = int(state.step)
        if step > steps:
            raise ValueError(f"{out} is at step {step}, past --steps {steps}. Give at least {step}.")
        log = stack.enter_context(MetricsLog(out / METRICS, last_step=step)) if first else None
        logs: list[MetricsLog | TensorboardLog] = [log] if log else []
        if first and train_config.tensorboard:
            board = TensorboardLog(
                out / TENSORBOARD,
                last_step=step,
                tokens_per_step=run.tokens_per_step,
                flops_per_step=flops,
                peak_flops_per_s=peak_flops_per_s,
            )
            logs.append(stack.enter_context(board))
        samples = stack.enter_context(MetricsLog(out / SAMPLES, last_step=step)) if prompt else None
        sampler = make_sampler(run, corpus.tokenizer, prompt, programs.execution) if prompt else None
        if log and step == steps:
            train_loss, val_loss = (log.last[kind]["loss"] if kind in log.last else None for kind in ("train", "eval"))
            val_batches = log.last.get("eval", {}).get("batches")
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
        profiled_until = 0
        while step < steps and not agreed(stopped):
            num = _dispatch_size(programs, train_config, step, rates, adapt=jax.process_count() == 1)
            # The first dispatch pays for page faults and caches; it is traced only where it is the last as well.
            if profile and profiling is None and (dispatches or step + num == steps):
                profiling = stack.enter_context(ExitStack())
                profiling.enter_context(trace(out / PROFILE))
                profiled_until = dispatches + PROFILED_DISPATCHES
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
            if profiling and dispatches == profiled_until:
                profiling.close()
            losses = [float(loss) for loss in metrics.loss[:num]]
            norms = [float(norm) for norm in metrics.gradient_norm[:num]]
            finite = [math.isfinite(loss) and math.isfinite(norm) for loss, norm in zip(losses, norms, strict=True)]
            num_good = num if all(finite) else finite.index(False)
            rows = [
                {
                    "kind": "train",
                    "step": step + i + 1,
                    "loss": losses[i],
                    "gradient_norm": norms[i],
                    "learning_rate": float(learning_rates[step + i]),
                    "step_s": (now - started) / num,
                    **{
                        name: float(values[i])
                        for name, values in (("balance", metrics.balance), ("dropped", metrics.dropped))
                        if values is not None
                    },
                }
                for i in range(num_good)
            ]
            for one in logs:
                one.write(rows)
            if num_good < num:
                raise _diverged(f"the loss or its gradient at step {step + num_good + 1}", saved)
            step += num
            train_loss = losses[-1]
            step_s = median(rates[-20:]) if rates else (now - started) / num
            report(_progress(step, steps, train_loss, step_s, run.tokens_per_step, flops, peak_flops_per_s))
            ended = step == steps
            validated: Validated | None = None
            if ended or (train_config.eval_every and step % train_config.eval_every == 0):
                most = final_eval if ended else usual_eval
                val_loss, val_batches = evaluate(programs, state.params, windows, most), most
                if not math.isfinite(val_loss):
                    raise _diverged(f"the validation loss at step {step}", saved)
                evaluated = {"kind": "eval", "step": step, "loss": val_loss}
                for one in logs:
                    one.write([{**evaluated, "batches": most, "of_batches": len(windows)}])
                report(Evaluated(step=step, loss=val_loss, num_batches=most, of_batches=len(windows)))
                if train_config.keep_best:
                    # The last evaluation may be over other batches, and only equals compare.
                    loss = val_loss if most == usual_eval else evaluate(programs, state.params, windows, usual_eval)
                    validated = Validated(step=step, loss=loss, batches=usual_eval)
            if prompt and sampler and samples and (ended or step % train_config.sample_every == 0):
                text = sampler(state.params, step)
                samples.write([{"kind": "sample", "step": step, "prompt": prompt.text, "text": text}])
                report(Sampled(step=step, prompt=prompt.text, text=text))
            due = ended or (train_config.checkpoint_every and step % train_config.checkpoint_every == 0)
            if due or (validated and checkpoints.improves(validated)):
                checkpoints.save(state, meta, validated)
                saved = step
                report(Saved(step=step))
        if profile and profiling is None:
            why = "no step was left to run" if step >= steps else "the run was stopped before the second dispatch"
            report(Notice(text=f"--profile left no trace: {why}."))
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
        val_batches=val_batches,
        num_params=num_params,
        accumulation=programs.accumulation,
        compile_s=programs.compile_s,
        compiled_bytes=programs.compiled_bytes(),
        first_step_s=first_step_s,
        train_s=trained_s,
        step_s=step_s,
        tokens_per_s=run.tokens_per_step / step_s if step_s else None,
        mfu=flops / step_s / peak_flops_per_s if step_s and peak_flops_per_s else None,
    )


def _check_rounding(there: dict[str, Any] | None, here: dict[str, Any], out: Path, notify: Report | None) -> None:
    """Refuse to resume where the same steps round otherwise, or only say so with `notify`."""
    differ = [name for name in here if there and name in there and there[name] != here[name]]
    if not differ:
        return
    what = ", ".join(f"{name.replace('_', ' ')} {there[name]} there and {here[name]} here" for name in differ if there)
    if notify is None:
        raise ValueError(
            f"the run in {out} cannot go on bit for bit here: {what}. Resume it there, or give --inexact to go on with"
            " other rounding."
        )
    notify(Notice(text=f"the steps from here on round otherwise than those before: {what}."))


def _tell_of_schedule(saved: Mapping[str, Any], run: RunConfig, rates: np.ndarray, report: Report) -> None:
    """Say where the schedule of `run` gives the next step another learning rate than that of the checkpoint did."""
    step = int(saved["step"])
    if step >= len(rates):
        return
    values = from_plain(OptimizerConfig, saved["optimizer"], source="the checkpoint [optimizer]")
    before = OptimizerConfig(**values)
    steps = int(saved["train"]["steps"])
    was = float(np.asarray(make_schedule(before, steps)(step)))
    if not math.isclose(was, rates[step], rel_tol=1e-3):
        ends = before.schedule_steps(steps), run.optimizer.schedule_steps(run.train.steps)
        text = (
            f"the learning rate of step {step + 1} is {rates[step]:.3g} and was to be {was:.3g}: the schedule ends at"
        )
        report(Notice(text=f"{text} step {ends[1]} now and ended at step {ends[0]} before."))


def _diverged(what: str, saved: int) -> FloatingPointError:
    stands = f"Checkpoint {saved} stands" if saved >= 0 else "There is no checkpoint yet"
    return FloatingPointError(
        f"{what} is not finite. {stands}: start again in another --out with a lower --learning-rate or more"
        " --warmup-steps."
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
    """Steps in the next dispatch: about half a second of them, never past where something else is due."""
    if not adapt or config.dispatch_steps:
        wanted = programs.dispatch_steps
    else:
        wanted = int(DISPATCH_S / median(rates[-20:])) if rates else 1
    borders = [every for every in (config.eval_every, config.checkpoint_every, config.sample_every) if every]
    room = min([config.steps - step, *(every - step % every for every in borders)])
    return max(1, min(wanted, room, programs.dispatch_steps))


def _padded(rows: list[np.ndarray], length: int) -> np.ndarray:
    """Rows stacked into [length, B, T]; the places past the last row are never read by the program."""
    stacked = np.zeros((length, *rows[0].shape), rows[0].dtype)
    stacked[: len(rows)] = rows
    return stacked
