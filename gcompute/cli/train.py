"""gcompute train: train a transformer on text."""

import dataclasses
import json
import shlex
import signal
import sys
import time
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import click

from gcompute.cli.environment import quiet_backends, restart_fast, use_compilation_cache
from gcompute.cli.flags import MODEL, PATH, SectionedCommand, config_options, given, read_toml
from gcompute.cli.main import INTERRUPTED
from gcompute.cli.resume import RESUME, Asked, continued, new_run
from gcompute.cli.run_directory import RUN, SECTIONS
from gcompute.cli.signals import stop_signals
from gcompute.config.model import ModelConfig
from gcompute.config.sizes import is_open, over_devices
from gcompute.config.train import DataConfig, OptimizerConfig, RunConfig, TrainConfig
from gcompute.config.unused import unused
from gcompute.measure.cache import writable_cache


class TrainCommand(SectionedCommand):
    examples = (
        "gcompute train --model demo --data stdlib --steps 500 --out runs/first",
        "gcompute train --model nano-small --data input.txt --tokenizer char --batch 12 --steps 2000 --out runs/char",
        "gcompute train --layers 4 --heads 4 --dim 128 --context 64 --data notes/ --tokenizer byte --out runs/notes",
        "gcompute train --model nano-small --data in.txt --tokenizer char --dropout 0.2 --keep-best --out runs/best",
        "gcompute train --data books/ --validation held_out.txt --tensorboard --out runs/books",
        'gcompute train --data books/ --sample-every 100 --sample-prompt "The " --out runs/books',
        "gcompute train --config run.toml --learning-rate 3e-4 --out runs/second",
        "gcompute train --out runs/first --resume --steps 1000",
        "JAX_NUM_CPU_DEVICES=4 gcompute train --mesh data=2,fsdp=2 --steps 20 --out runs/mesh",
        "JAX_NUM_CPU_DEVICES=4 gcompute train --mesh data=-1,tensor=2 --per-device-batch 8 --steps 20 --out runs/fill",
    )


@click.command(cls=TrainCommand)
@click.option("--model", "model_name", type=MODEL, help="Preset, or a model's .json or .toml file.  [demo]")
@click.option("--config", "config_file", type=PATH, help="TOML: [model] [optimizer] [train] [data].")
@click.option("--out", type=PATH, default=Path("runs/train"), show_default=True, help="Run directory.")
@click.option(
    "--resume",
    type=click.Choice(RESUME),
    default="auto",
    is_flag=False,
    flag_value="yes",
    help="Go on from the newest checkpoint in --out, bit for bit. auto: where --out holds the run that this command"
    " describes; yes, or --resume alone: what is not given is taken from the run there, if any; no: never.  [auto]",
)
@click.option("--inexact", is_flag=True, help="Resume also where this device or jaxlib rounds otherwise.")
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
    resume: str,
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
    sections = {name: {**settings.get(name, {}), **given(kind, values)} for name, kind in SECTIONS.items()}
    if is_open(sections["train"]):
        import jax

        sections["train"] = over_devices(sections["train"], len(jax.devices()))
    asked = Asked(sections=sections, model_name=model_name)
    begun = continued(asked, out, resume)
    if begun is None and inexact and resume != "yes":
        raise ValueError("--inexact goes with --resume: a new run has nothing to be equal to. Leave it away.")
    for notice in begun.notices if begun else ():
        print(f"notice: {notice}", file=sys.stderr)
    execute(
        begun.run if begun else new_run(asked),
        out=out,
        resume=begun is not None,
        profile=profile,
        as_json=as_json,
        started=started,
        vocab_given=begun is not None or "vocab" in asked.sections["model"],
        inexact=inexact,
        asked=asked.names,
    )


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
    asked: Collection[str] = (),
) -> None:
    """Prepare the data, train, and print how it went. `asked`: the fields of `run` that the command gave."""
    import jax

    from gcompute.cli.consoles import plain_console
    from gcompute.cli.session import train_session
    from gcompute.train.resolve import default_mesh

    cache = writable_cache()
    use_compilation_cache()
    again = f"Go on with: gcompute train --out {shlex.quote(str(out))} --resume"
    try:
        with stop_on_interrupt() as interrupt:
            first = jax.process_index() == 0
            console = plain_console(stderr=True, quiet=not first, soft_wrap=True)
            if run.train.mesh is None:
                for reason in unused(run, asked, default_mesh()).values():
                    console.print(f"notice: {reason}.")
            session = train_session(
                run,
                out=out,
                cache=cache,
                resume=resume,
                profile=profile,
                vocab_given=vocab_given,
                console=console,
                stopped=lambda: bool(interrupt),
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
