"""gcompute train: train a transformer on text."""

import dataclasses
import json
import shlex
import signal
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import click

from gcompute.cli.environment import quiet_backends, restart_fast, use_compilation_cache
from gcompute.cli.flags import MODEL, PATH, SectionedCommand, config_options, given, read_toml
from gcompute.cli.main import INTERRUPTED
from gcompute.cli.run_directory import RUN, SECTIONS, stored_run
from gcompute.cli.run_directory import run_from_plain as run_from_plain
from gcompute.cli.signals import stop_signals
from gcompute.config.model import ModelConfig
from gcompute.config.presets import model_config
from gcompute.config.train import RESUMABLE, DataConfig, OptimizerConfig, RunConfig, TrainConfig
from gcompute.measure.cache import writable_cache


class TrainCommand(SectionedCommand):
    examples = (
        "gcompute train --model demo --data stdlib --steps 500 --out runs/first",
        "gcompute train --model nano-small --data input.txt --tokenizer char --batch 12 --steps 2000 --out runs/char",
        "gcompute train --layers 4 --heads 4 --dim 128 --context 64 --data notes/ --tokenizer byte --out runs/notes",
        "gcompute train --config run.toml --learning-rate 3e-4 --out runs/second",
        "gcompute train --out runs/first --resume",
        "JAX_NUM_CPU_DEVICES=4 gcompute train --mesh data=2,fsdp=2 --steps 20 --out runs/mesh",
    )


@click.command(cls=TrainCommand)
@click.option("--model", "model_name", type=MODEL, help="Preset, or a model's .json or .toml file.  [demo]")
@click.option("--config", "config_file", type=PATH, help="TOML: [model] [optimizer] [train] [data].")
@click.option("--out", type=PATH, default=Path("runs/train"), show_default=True, help="Run directory.")
@click.option("--resume", is_flag=True, help="Go on from the newest checkpoint in --out, bit for bit.")
@click.option("--inexact", is_flag=True, help="With --resume: also where this device or jaxlib rounds otherwise.")
@click.option("--profile", is_flag=True, help="Trace a few dispatches into OUT/profile, for XProf and Perfetto.")
@click.option("--json", "as_json", is_flag=True, help="End with one JSON object on standard output.")
@click.option("--fast/--no-fast", default=True, help="Restart once with huge pages where that is faster.  [fast]")
@config_options(ModelConfig, "Model", **{f.name: None for f in dataclasses.fields(ModelConfig)})
@config_options(TrainConfig, "Training")
@config_options(OptimizerConfig, "Optimizer")
@config_options(DataConfig, "Data")
def command(
    model_name: str | None,
    config_file: Path | None,
    out: Path,
    resume: bool,
    inexact: bool,
    profile: bool,
    as_json: bool,
    fast: bool,
    **values: Any,
) -> None:
    """Train a transformer on text. Every field of the configuration is a flag; a TOML file says the same."""
    started = time.monotonic()
    restart_fast(fast)
    quiet_backends()
    settings = read_toml(config_file, SECTIONS) if config_file else {}
    from gcompute.model.pretrained import CHECKPOINTS, saved_steps

    if resume:
        stored = stored_run(out)
        if stored is None:
            raise ValueError(f"--resume: {out} holds no run to go on with. Check --out, or leave --resume away.")
        if stored[1]:
            print(f"notice: {stored[1]}", file=sys.stderr)
        run = _resumed_config(stored[0], settings, values, model_name)
        how = {"profile": profile, "as_json": as_json, "started": started, "inexact": inexact}
        execute(run, out=out, resume=True, vocab_given=True, **how)
        return
    if inexact:
        raise ValueError("--inexact goes with --resume: a new run has nothing to be equal to. Leave it away.")
    if saved_steps(out / CHECKPOINTS):
        raise ValueError(f"{out} already holds a run. Go on with --resume, or choose another --out.")
    model = model_config(model_name or "demo")
    chosen = {**settings.get("model", {}), **given(ModelConfig, values)}
    run = RunConfig(
        model=dataclasses.replace(model, **chosen),
        optimizer=OptimizerConfig(**{**settings.get("optimizer", {}), **given(OptimizerConfig, values)}),
        train=TrainConfig(**{**settings.get("train", {}), **given(TrainConfig, values)}),
        data=DataConfig(**{**settings.get("data", {}), **given(DataConfig, values)}),
    )
    execute(
        run, out=out, resume=False, profile=profile, as_json=as_json, started=started, vocab_given="vocab" in chosen
    )


def _resumed_config(
    run: RunConfig, settings: dict[str, dict[str, Any]], values: dict[str, Any], model_name: str | None
) -> RunConfig:
    """The stored configuration with what may change replaced; a flag that contradicts it is an error."""
    if model_name is not None and model_config(model_name) != run.model:
        raise ValueError("--resume takes the model from the run: leave --model away, or start another --out.")
    parts: dict[str, Any] = {}
    for section, kind in SECTIONS.items():
        current, changes = getattr(run, section), {}
        for name, value in {**settings.get(section, {}), **given(kind, values)}.items():
            if value == getattr(current, name):
                continue
            if name not in RESUMABLE:
                raise ValueError(
                    f"--resume: {name} was {getattr(current, name)!r} and cannot become {value!r} in the same run."
                    " Leave it away, or start another --out."
                )
            changes[name] = value
        parts[section] = dataclasses.replace(current, **changes)
    return RunConfig(**parts)


class StopRequest:
    """What Ctrl-C, SIGTERM and SIGHUP ask for. True once one came while the training loop was there to see it.

    The loop asks between dispatches. Before it asks for the first time there is no step to save, so a signal interrupts
    at once, as a second one does at any time. A closed terminal sends SIGHUP once or twice and none insists by it.
    """

    def __init__(self) -> None:
        self.watched = self.asked = self.insisted = False

    def __bool__(self) -> bool:
        self.watched = True
        return self.asked

    def ask(self, number: int, frame: Any) -> None:
        hung_up = number == signal.SIGHUP
        at_once = not self.watched or (self.insisted and not hung_up)
        self.insisted = self.insisted or not hung_up
        # Kept also where the exception is raised: in a callback of C++ or a finalizer nobody would hear of it.
        self.asked = True
        if at_once:
            raise KeyboardInterrupt


@contextmanager
def stop_on_interrupt() -> Iterator[StopRequest]:
    """A request that Ctrl-C, SIGTERM or SIGHUP makes true."""
    request = StopRequest()
    previous = {number: signal.signal(number, request.ask) for number in stop_signals()}
    try:
        yield request
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


def execute(
    run: RunConfig,
    *,
    out: Path,
    resume: bool,
    profile: bool,
    as_json: bool,
    started: float,
    vocab_given: bool,
    inexact: bool = False,
) -> None:
    """Prepare the data, train, and print how it went."""
    import jax

    from gcompute.cli.consoles import plain_console
    from gcompute.cli.session import train_session

    cache = writable_cache()
    use_compilation_cache()
    again = f"Go on with: gcompute train --out {shlex.quote(str(out))} --resume"
    try:
        with stop_on_interrupt() as asked:
            first = jax.process_index() == 0
            console = plain_console(stderr=True, quiet=not first, soft_wrap=True)
            session = train_session(
                run,
                out=out,
                cache=cache,
                resume=resume,
                profile=profile,
                vocab_given=vocab_given,
                console=console,
                stopped=lambda: bool(asked),
                started=started,
                inexact=inexact,
            )
    except KeyboardInterrupt:
        there = (out / RUN).is_file()
        print(f"interrupted. {again if there else 'Nothing was trained yet: start again.'}", file=sys.stderr)
        raise SystemExit(INTERRUPTED) from None
    if as_json and first:
        print(json.dumps(session.to_dict()))
    if not session.result.finished:
        console.print(f"stopped at step {session.result.step}. {again}")
        raise SystemExit(INTERRUPTED)
