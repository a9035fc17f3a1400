"""gcompute train: train a transformer on text."""

import dataclasses
import json
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import click

from gcompute.cli.environment import cache_directory, quiet_backends, restart_fast, use_compilation_cache
from gcompute.cli.flags import SectionedCommand, config_options, from_plain, given, read_toml
from gcompute.config.model import ModelConfig
from gcompute.config.presets import model_config
from gcompute.config.train import DataConfig, OptimizerConfig, RunConfig, TrainConfig

PATH = click.Path(path_type=Path)
SECTIONS: dict[str, type] = {
    "model": ModelConfig,
    "optimizer": OptimizerConfig,
    "train": TrainConfig,
    "data": DataConfig,
}
# What a resumed run may be given anew: nothing of this changes what the steps already done would have been.
RESUMABLE = {"steps", "eval_every", "eval_batches", "checkpoint_every", "keep", "log_every", "dispatch_steps", "mesh"}


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
@click.option("--model", "model_name", default=None, help="Preset, or a model's .json or .toml file.  [demo]")
@click.option(
    "--config", "config_file", type=click.Path(path_type=Path), help="TOML: [model] [optimizer] [train] [data]."
)
@click.option(
    "--out", type=click.Path(path_type=Path), default=Path("runs/train"), show_default=True, help="Run directory."
)
@click.option("--resume", is_flag=True, help="Go on from the newest checkpoint in --out, bit for bit.")
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
    profile: bool,
    as_json: bool,
    fast: bool,
    **values: Any,
) -> None:
    """Train a transformer on text. Every field of the configuration is a flag; a TOML file says the same."""
    started = time.time()
    restart_fast(fast)
    quiet_backends()
    settings = read_toml(config_file, SECTIONS) if config_file else {}
    stored = _stored_config(out) if resume else None
    if resume and stored is None:
        raise ValueError(f"--resume: {out} holds no checkpoint to go on from. Check --out, or leave --resume away.")
    if not resume and any((out / "checkpoints").glob("[0-9]*")):
        raise ValueError(f"{out} already holds a run. Go on with --resume, or choose another --out.")
    if stored is not None:
        run = _resumed_config(stored, settings, values, model_name)
        execute(run, out=out, resume=True, profile=profile, as_json=as_json, started=started, vocab_given=True)
        return
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


def _stored_config(out: Path) -> dict[str, Any] | None:
    path = out / "run.json"
    if not path.is_file() or not any((out / "checkpoints").glob("[0-9]*")):
        return None
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is damaged ({error}). Copy it back, or start again in another --out.") from None


def run_from_plain(values: dict[str, Any], *, source: str) -> RunConfig:
    """A RunConfig from what `RunConfig.to_dict` gave."""
    parts = {
        name: kind(**from_plain(kind, values[name], source=f"{source} [{name}]")) for name, kind in SECTIONS.items()
    }
    return RunConfig(**parts)


def _resumed_config(
    stored: dict[str, Any], settings: dict[str, dict[str, Any]], values: dict[str, Any], model_name: str | None
) -> RunConfig:
    """The stored configuration with what may change replaced; a flag that contradicts it is an error."""
    run = run_from_plain(stored, source="run.json")
    if model_name is not None:
        raise ValueError("--resume takes the model from the checkpoint: leave --model away.")
    changes: dict[str, Any] = {}
    for section, kind in SECTIONS.items():
        current = getattr(run, section)
        for name, value in {**settings.get(section, {}), **given(kind, values)}.items():
            if value == getattr(current, name):
                continue
            if name not in RESUMABLE:
                raise ValueError(
                    f"--resume: {name} was {getattr(current, name)!r} and cannot become {value!r} in the same run."
                    " Leave it away, or start another --out."
                )
            changes[name] = value
    return dataclasses.replace(run, train=dataclasses.replace(run.train, **changes))


@contextmanager
def stop_on_interrupt() -> Iterator[list[bool]]:
    """A flag that the first Ctrl-C (or SIGTERM) raises; the second interrupts at once."""
    asked: list[bool] = []

    def ask(number: int, frame: Any) -> None:
        if asked:
            raise KeyboardInterrupt
        asked.append(True)

    previous = {number: signal.signal(number, ask) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield asked
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


def execute(
    run: RunConfig, *, out: Path, resume: bool, profile: bool, as_json: bool, started: float, vocab_given: bool
) -> None:
    """Prepare the data, train, and print how it went."""
    from rich.console import Console

    from gcompute.cli.session import train_session

    console = Console(stderr=True)
    use_compilation_cache()
    with stop_on_interrupt() as asked:
        session = train_session(
            run,
            out=out,
            cache=cache_directory(),
            resume=resume,
            profile=profile,
            vocab_given=vocab_given,
            console=console,
            stopped=lambda: bool(asked),
            started=started,
        )
    if as_json:
        print(json.dumps(session.to_dict()))
    if not session.result.finished:
        console.print(f"stopped at step {session.result.step}. Go on with: gcompute train --out {out} --resume")
        raise SystemExit(130)
