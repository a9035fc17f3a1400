"""One training session from the edge: data, predictions, the loop under a progress bar, and what it left behind."""

import dataclasses
import hashlib
import json
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from gcompute.cli.pictures import try_to_draw
from gcompute.cli.progress import TrainProgress, WorkProgress, duration, share_of_ceiling
from gcompute.cli.run_directory import (
    CHOSEN,
    RUN,
    Choices,
    check_outside,
    make_directory,
    only_writer,
    run_json,
    stored_choices,
)
from gcompute.config.train import RunConfig
from gcompute.measure.cache import CORPORA
from gcompute.measure.machine import Machine, look
from gcompute.measure.profile import check_trace, device_memory
from gcompute.measure.roofline import MeasuredRoofline, load_or_measure
from gcompute.measure.whole_file import write_whole
from gcompute.model.pretrained import CHECKPOINTS, TOKENIZER, saved_steps
from gcompute.plan.memory import TrainMemory, train_memory
from gcompute.plan.train_step import StepPrediction, predict_train_step
from gcompute.train.automatic import settle, with_open_microbatches
from gcompute.train.checkpoint import check_path
from gcompute.train.corpus import TokenizedCorpus, prepare
from gcompute.train.curve import plot_loss
from gcompute.train.events import Event, Started
from gcompute.train.loop import METRICS, TrainResult, open_data, train
from gcompute.train.metrics_log import read_metrics
from gcompute.train.programs import resolve_mesh
from gcompute.train.resolve import default_mesh, resolve_accumulation, resolve_query_blocks
from gcompute.train.sampling import sample_prompt
from gcompute.train.source import is_pipe
from gcompute.train.tensorboard import summary_writer

CURVE = "loss.png"


@dataclass(frozen=True, slots=True, kw_only=True)
class Prediction:
    """What the planner says before the first step; every number is predicted, from the measured roofline."""

    num_params: int
    memory: TrainMemory
    step: StepPrediction


@dataclass(frozen=True, slots=True, kw_only=True)
class Session:
    """A finished or interrupted training session."""

    run: RunConfig
    out: Path
    corpus: TokenizedCorpus
    machine: Machine
    roofline: MeasuredRoofline
    prediction: Prediction
    result: TrainResult
    peak_memory: dict[str, Any]
    time_to_first_step_s: float | None

    def to_dict(self) -> dict[str, Any]:
        return {
            "out": str(self.out),
            "run": self.run.to_dict(),
            "predicted": {
                "num_params": self.prediction.num_params,
                "memory_bytes": self.prediction.memory.to_dict(),
                **self.prediction.step.to_dict(),
            },
            "measured": {
                **dataclasses.asdict(self.result),
                "memory": self.peak_memory,
                "time_to_first_step_s": self.time_to_first_step_s,
                "roofline": self.roofline.to_dict(),
            },
        }


def corpus_directory(cache: Path, run: RunConfig) -> Path:
    """Where the tokens of this data and tokenizer are kept, so that runs share them."""
    data = run.data
    where = data.data if data.data == "stdlib" else str(Path(data.data).absolute())
    parts: list[Any] = [where, data.tokenizer, data.val_fraction, data.text_mb]
    if data.validation is not None:
        parts.append(str(Path(data.validation).absolute()))
    key = hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:16]
    return cache / CORPORA / key


def measured_roofline(cache: Path, console: Console, *, again: bool = False) -> MeasuredRoofline:
    """This machine's roofline, measured once and kept."""
    with WorkProgress(console) as progress:
        return load_or_measure(cache / "roofline.json", again=again, progress=progress)


def predict(run: RunConfig, roofline: MeasuredRoofline) -> Prediction:
    """Parameters, memory and step time on this machine of a `run` whose dtypes are settled."""
    import jax

    from gcompute.plan.params import count_params

    train_config = run.train
    mesh = train_config.mesh or default_mesh()
    accumulation = resolve_accumulation(run, mesh, jax.default_backend())
    shared: dict[str, Any] = {
        "batch": train_config.batch,
        "seq": run.seq,
        "accumulation": accumulation,
        "query_blocks": resolve_query_blocks(run, mesh, jax.default_backend()),
        "precision": train_config.precision,
        "optimizer": run.optimizer.optimizer,
        "remat": train_config.remat,
    }
    # Fake CPU devices share the cores that the roofline was measured on.
    num_devices = mesh.num_devices if jax.default_backend() != "cpu" else 1
    return Prediction(
        num_params=count_params(run.model).total,
        memory=train_memory(run.model, mesh=mesh, residual=train_config.residual, **shared),
        step=predict_train_step(
            run.model,
            roofline_flops_per_s=roofline.matmul_flops_per_s[train_config.precision],
            memory_bytes_per_s=roofline.memory_bytes_per_s,
            num_devices=num_devices,
            **shared,
        ),
    )


def check_state_fits(memory: TrainMemory, machine: Machine, *, num_devices: int) -> None:
    """Refuse a run whose state alone exceeds the memory: the runtime would not fail there, it would hang.

    Only what is certain counts: parameters, gradients and optimizer. Devices of a CPU share its memory.

    Raises:
      ValueError: it cannot fit; the message has both sizes.
    """
    state = memory.parameters_bytes + memory.gradients_bytes + memory.optimizer_bytes
    shared = machine.device_memory_bytes is None
    needed = state * (min(num_devices, machine.num_local_devices) if shared else 1)
    there = machine.device_memory_bytes or machine.memory_bytes
    if needed > there:
        raise ValueError(
            f"parameters, gradients and optimizer need {needed / 2**30:,.1f} GiB of {there / 2**30:,.1f} GiB. Use a"
            " smaller model, an optimizer with less state such as lion or sgd, or --mesh fsdp=N over more devices."
        )


def show_prediction(prediction: Prediction, run: RunConfig, console: Console) -> None:
    """Print what the planner expects."""
    table = Table(title="predicted, before the first step", title_justify="left", show_header=False)
    memory = prediction.memory
    table.add_row("parameters", f"{prediction.num_params:,}")
    for name, value in memory.to_dict().items():
        table.add_row(f"memory: {name.removesuffix('_bytes').replace('_', ' ')}", f"{value / 2**20:,.1f} MiB")
    table.add_row("step", f"{duration(prediction.step.step_s)} ({prediction.step.bound} bound)")
    table.add_row("tokens/s", f"{prediction.step.tokens_per_s:,.0f}")
    table.add_row("training", f"{duration(prediction.step.step_s * run.train.steps)} for {run.train.steps} steps")
    console.print(table)


def show_choices(run: RunConfig, choices: Choices, roofline: MeasuredRoofline, console: Console) -> None:
    """Say what was chosen for this device and why, and where the roofline behind it may be too low."""
    for name, reason in choices.reasons.items():
        console.print(f"{name.replace('_', ' ')} {getattr(run.train, name)} ({reason})", highlight=False)
    if roofline.disturbed:
        console.print(f"notice: the roofline may be measured too low: {roofline.disturbed}.", highlight=False)


def show_warmup(run: RunConfig, console: Console) -> None:
    """Say so where the warm-up is longer than the schedule, and so is cut."""
    steps = run.optimizer.schedule_steps(run.train.steps)
    warmup = run.optimizer.warmup(steps)
    if warmup > steps:
        text = f"notice: the warm-up of {warmup} steps is cut to the {steps} of the schedule. --warmup-steps N sets it;"
        console.print(f"{text} --decay-steps N with a longer schedule keeps it.", highlight=False)


def with_vocabulary(run: RunConfig, corpus: TokenizedCorpus, *, given: bool) -> RunConfig:
    """The run with the tokenizer's vocabulary size, or the one given where it is large enough."""
    size = corpus.tokenizer.vocab_size
    if not given:
        return dataclasses.replace(run, model=dataclasses.replace(run.model, vocab=size))
    if run.model.vocab < size:
        raise ValueError(
            f"--vocab {run.model.vocab} is below the tokenizer's {size}: give at least {size}, or nothing."
        )
    return run


def train_session(
    run: RunConfig,
    *,
    out: Path,
    cache: Path,
    resume: bool,
    profile: bool,
    vocab_given: bool,
    console: Console,
    stopped: Callable[[], bool],
    started: float,
    inexact: bool = False,
    roofline: MeasuredRoofline | None = None,
) -> Session:
    """Prepare, predict, train. `started`: when the command began, by time.monotonic().

    inexact: as in `train`. roofline: this machine's, where it is at hand.
    """
    import jax

    first = jax.process_index() == 0
    if profile:
        check_trace()
    if run.train.tensorboard:
        summary_writer()
    check_path(out)
    make_directory(out)
    for flag, text in (("--data", run.data.data), ("--validation", run.data.validation)):
        if text is None:
            continue
        for directory, what in ((out, "--out"), (cache, "the cache")):
            check_outside(directory, what, text, flag)
        if is_pipe(text):
            console.print(f"notice: {text} is a pipe: waiting for it, and reading it to its end", markup=False)
    drawn = False
    with only_writer(out) if first else nullcontext():
        with one_process_first(), WorkProgress(console) as progress:
            corpus = prepare(run.data, corpus_directory(cache, run), progress=progress)
        if corpus.left_out:
            console.print(f"notice: {corpus.left_out}")
        tokenizer_path = out / TOKENIZER
        if resume and tokenizer_path.is_file():
            _check_same_tokenizer(tokenizer_path, corpus)
        run = with_vocabulary(run, corpus, given=vocab_given)
        # What does not go together is refused before anything of the run is written.
        shape = run.train.mesh or default_mesh()
        kept = stored_choices(out) if resume else None
        if kept and kept.mesh != str(shape) and "accumulation" in kept.reasons:
            run = with_open_microbatches(run)
        resolve_mesh(run)
        open_data(run, corpus)
        sample_prompt(run, corpus)
        with one_process_first():
            roofline = roofline or measured_roofline(cache, console)
        run, reasons = settle(run, shape, jax.default_backend(), roofline.matmul_flops_per_s)
        choices = Choices(mesh=str(shape), reasons={**(kept.reasons if kept else {}), **reasons})
        if first and not (resume and tokenizer_path.is_file()):
            corpus.tokenizer.save(tokenizer_path)
        if first and not resume:
            write_whole(out / RUN, run_json(run, choices))
        if resume and not saved_steps(out / CHECKPOINTS):
            console.print(f"notice: {out} has no whole checkpoint yet: the run begins at step 0")
        console.print(
            f"{len(corpus.train):,} training and {len(corpus.val):,} validation tokens,"
            f" vocabulary {corpus.tokenizer.vocab_size:,}"
        )
        show_choices(run, choices, roofline, console)
        if not resume:
            show_warmup(run, console)
        machine = look()
        prediction = predict(run, roofline)
        show_prediction(prediction, run, console)
        check_state_fits(prediction.memory, machine, num_devices=(run.train.mesh or default_mesh()).num_devices)
        before = time.monotonic() - started
        with TrainProgress(console, log_every=run.train.log_every) as show:

            def report(event: Event) -> None:
                # Only now is it certain that the run goes on with what it was given anew, such as more steps.
                if isinstance(event, Started) and first and resume:
                    write_whole(out / RUN, run_json(run, choices))
                show(event)

            result = train(
                run,
                corpus,
                out=out,
                resume=resume,
                peak_flops_per_s=roofline.matmul_flops_per_s[run.train.precision] * _roofline_devices(run),
                profile=profile,
                inexact=inexact,
                about={CHOSEN: dataclasses.asdict(choices)},
                report=report,
                stopped=stopped,
            )
        if first:
            title = f"{out.name}: {prediction.num_params:,} parameters"
            drawn = try_to_draw(
                lambda: plot_loss(read_metrics(out / METRICS), out / CURVE, title=title),
                out / CURVE,
                lambda text: console.print(f"notice: {text}", soft_wrap=True),
            )
    session = Session(
        run=run,
        out=out,
        corpus=corpus,
        machine=machine,
        roofline=roofline,
        prediction=prediction,
        result=result,
        peak_memory=device_memory(),
        time_to_first_step_s=before + result.first_step_s if result.first_step_s is not None else None,
    )
    show_result(session, console)
    kept = "checkpoint, metrics.jsonl and " + CURVE if drawn else "checkpoint and metrics.jsonl"
    console.print(f"{kept} in {out}")
    return session


@contextmanager
def one_process_first() -> Iterator[None]:
    """In a job of several processes, the first does this before the others, which then find what it kept."""
    import jax
    from jax.experimental import multihost_utils

    if jax.process_index():
        multihost_utils.sync_global_devices("the first process is done")
    yield
    if not jax.process_index():
        multihost_utils.sync_global_devices("the first process is done")


def _check_same_tokenizer(path: Path, corpus: TokenizedCorpus) -> None:
    from gcompute.model.tokenizer import Tokenizer

    if Tokenizer.load(path).fingerprint != corpus.tokenizer.fingerprint:
        raise ValueError(
            f"the data gives another tokenizer than {path}: the text has changed since the run began."
            " Give the same --data, or start another --out."
        )


def _roofline_devices(run: RunConfig) -> int:
    import jax

    return 1 if jax.default_backend() == "cpu" else (run.train.mesh or default_mesh()).num_devices


def show_result(session: Session, console: Console) -> None:
    """Print predicted beside measured."""
    result, predicted = session.result, session.prediction
    table = Table(title="how it went", title_justify="left")
    for name in ("", "predicted", "measured"):
        table.add_column(name, justify="left" if not name else "right")
    if result.step_s and result.tokens_per_s:
        table.add_row("step", duration(predicted.step.step_s), duration(result.step_s))
        table.add_row("tokens/s", f"{predicted.step.tokens_per_s:,.0f}", f"{result.tokens_per_s:,.0f}")
    if result.compiled_bytes:
        memory = f"{predicted.memory.total_bytes / 2**20:,.0f} MiB"
        table.add_row("memory of a step (compiled)", memory, f"{result.compiled_bytes / 2**20:,.0f} MiB")
    if result.mfu:
        table.add_row("MFU of the measured roofline", "", share_of_ceiling(result.mfu))
    if session.time_to_first_step_s:
        table.add_row("time to first step", "", duration(session.time_to_first_step_s))
    if result.val_loss is not None:
        table.add_row("validation loss, nats per token", "", f"{result.val_loss:.4f}")
    console.print(table)
