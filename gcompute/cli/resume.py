"""What a train command means for the run directory that it names: a new run, or the one there continued.

One command line serves the first start and every restart after a preemption: it describes a run, and where the
directory holds that very run, the command continues it.
"""

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from gcompute.cli.run_directory import SECTIONS, stored_run
from gcompute.config.presets import model_config
from gcompute.config.train import AUTO, RESUMABLE, DataConfig, OptimizerConfig, RunConfig, TrainConfig
from gcompute.config.unused import check_used

RESUME = ("auto", "yes", "no")
DEFAULT_MODEL = "demo"
STDLIB = "stdlib"
# What a start settles for its device or its tokenizer, and so differs from a command that leaves it open.
SETTLED = {"precision", "residual", "vocab"}


@dataclass(frozen=True, slots=True, kw_only=True)
class Asked:
    """What a command gave: the fields of each section of a RunConfig, from flags and TOML, and the model's name."""

    sections: Mapping[str, Mapping[str, Any]]
    model_name: str | None = None

    @property
    def names(self) -> set[str]:
        return {name for fields in self.sections.values() for name in fields}

    @property
    def nothing(self) -> bool:
        return self.model_name is None and not self.names


@dataclass(frozen=True, slots=True, kw_only=True)
class Continued:
    """The run that goes on, and what is to be said of it."""

    run: RunConfig
    notices: tuple[str, ...]


def new_run(asked: Asked) -> RunConfig:
    """The run that a command describes, with the defaults for what it leaves out.

    Raises:
      ValueError: a value is wrong, or one that was given has no effect on this run.
    """
    run = RunConfig(
        model=replace(model_config(asked.model_name or DEFAULT_MODEL), **asked.sections["model"]),
        optimizer=OptimizerConfig(**asked.sections["optimizer"]),
        train=TrainConfig(**asked.sections["train"]),
        data=_found_from_anywhere(DataConfig(**asked.sections["data"])),
    )
    check_used(run, asked.names)
    return run


def continued(asked: Asked, out: Path, resume: str) -> Continued | None:
    """The run in `out` as this command continues it; None where the command begins one.

    Args:
      resume: "auto": where `out` has a checkpoint, and the whole command describes its run. "yes": where `out` has a
        run, from which everything is taken that the command leaves out. "no": never.

    Raises:
      ValueError: the run in `out` is another one, or "no" and there is one, or "yes" with nothing to begin.
    """
    from gcompute.model.pretrained import CHECKPOINTS, saved_steps

    steps = saved_steps(out / CHECKPOINTS)
    if resume != "yes" and not steps:
        return None
    if resume == "no":
        raise ValueError(f"{out} already holds a run. Go on with --resume, or choose another --out.")
    found = stored_run(out)
    if found is None:
        if not asked.nothing:
            return None
        raise ValueError(f"--resume: {out} holds no run to go on with. Check --out, or say what to train.")
    stored, notice = replace(found[0], data=_found_from_anywhere(found[0].data)), found[1]
    if resume == "auto":
        _check_described(asked, stored, out)
    notices = [notice] if notice else []
    if resume == "auto":
        notices.append(f"{out} holds this run: it continues from checkpoint {steps[-1]}.")
    run = _given_anew(asked, stored)
    return Continued(run=run, notices=(*notices, *_of_schedule(stored, run)))


def _check_described(asked: Asked, stored: RunConfig, out: Path) -> None:
    """Refuse to continue a run that differs from what the command would begin."""
    model = replace(model_config(asked.model_name or DEFAULT_MODEL), **asked.sections["model"])
    wanted = {
        "model": model,
        "optimizer": OptimizerConfig(**asked.sections["optimizer"]),
        "train": TrainConfig(**asked.sections["train"]),
        "data": _found_from_anywhere(DataConfig(**asked.sections["data"])),
    }
    differ = [
        f"{name} is {there!r} there and {here!r} here"
        for section, part in wanted.items()
        for name, there, here in _differences(getattr(stored, section), part)
        if name not in RESUMABLE and (name not in SETTLED or (name in asked.names and here != AUTO))
    ]
    if differ:
        raise ValueError(
            f"{out} already holds a run, and another one: {', '.join(differ)}. Go on with it by --resume, or choose"
            " another --out."
        )


def _differences(there: Any, here: Any) -> list[tuple[str, Any, Any]]:
    """(name, there, here) of the fields in which two configurations differ."""
    names = [field.name for field in dataclasses.fields(there)]
    pairs = [(name, getattr(there, name), getattr(here, name)) for name in names]
    return [(name, one, other) for name, one, other in pairs if one != other]


def _given_anew(asked: Asked, run: RunConfig) -> RunConfig:
    """The stored configuration with what may change replaced; what contradicts it is an error."""
    _check_model(asked, run)
    parts: dict[str, Any] = {}
    changed = set()
    for section in SECTIONS:
        current, changes = getattr(run, section), {}
        given = asked.sections[section]
        if section == "data":
            whole = _found_from_anywhere(replace(current, **given))
            given = {name: getattr(whole, name) for name in given}
        for name, value in given.items():
            # `auto` was settled when the run began.
            if value == getattr(current, name) or (value == AUTO and name in SETTLED):
                continue
            if name not in RESUMABLE:
                raise ValueError(
                    f"--resume: {name} was {getattr(current, name)!r} and cannot become {value!r} in the same run."
                    " Leave it away, or start another --out."
                )
            changes[name] = value
        changed |= changes.keys()
        parts[section] = replace(current, **changes)
    if "decay_steps" not in changed and "steps" in changed:
        parts["optimizer"] = run.lasting(parts["train"].steps).optimizer
    for name in ("data", "validation"):
        if name not in asked.sections["data"]:
            _check_there(name, getattr(run.data, name))
    after = RunConfig(**parts)
    check_used(after, changed)
    return after


def _check_model(asked: Asked, run: RunConfig) -> None:
    """Refuse a --model that is not the run's."""
    if asked.model_name is None:
        return
    named = replace(model_config(asked.model_name), **{"vocab": run.model.vocab, **asked.sections["model"]})
    differ = [f"{name} is {there!r} there and {here!r} here" for name, there, here in _differences(run.model, named)]
    if differ:
        raise ValueError(
            f"--resume takes the model from the run, and --model {asked.model_name} is another: {', '.join(differ)}."
            " Leave --model away, or start another --out."
        )


def _of_schedule(before: RunConfig, after: RunConfig) -> list[str]:
    """What is to be said where the run now ends elsewhere than the schedule that it keeps."""
    optimizer, steps = after.optimizer, after.train.steps
    ends = optimizer.schedule_steps(steps)
    if steps == before.train.steps or steps == ends or optimizer.schedule == "constant":
        return []
    kept = f"the learning rate's schedule still ends at step {ends}, as the run began, and the run at step {steps}"
    return [f"{kept}: --decay-steps {steps} moves it."]


def _found_from_anywhere(data: DataConfig) -> DataConfig:
    """The text and a tokenizer's file by absolute paths, so that the run continues from any working directory."""
    tokenizer = Path(data.tokenizer)
    for name in ("data", "validation"):
        text = getattr(data, name)
        if text not in (None, STDLIB) and Path(text).exists():
            data = replace(data, **{name: str(Path(text).absolute())})
    return replace(data, tokenizer=str(tokenizer.absolute())) if tokenizer.is_file() and tokenizer.suffix else data


def _check_there(name: str, text: str | None) -> None:
    """Refuse to resume where a text of the run is gone.

    Raises:
      ValueError: nothing is at its path.
    """
    if text not in (None, STDLIB) and not Path(text).exists():
        where = "" if Path(text).is_absolute() else f" (as seen from {Path.cwd()})"
        raise ValueError(
            f"the run's {name} {text} is not there{where}. Say where the text is now with --{name} PATH; its tokens"
            " are compared with those that the run began with."
        )
