"""Load a trained model for inference: its configuration, parameters and tokenizer.

A run directory holds tokenizer.json and checkpoints/STEP/{params,optimizer,meta,checksums.json}. The path
checkpoints/best stands for the one of them that had the lowest validation loss, where the run keeps that.
"""

import json
import logging
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import orbax.checkpoint as ocp
from jax.sharding import SingleDeviceSharding

from gcompute.config.model import ModelConfig
from gcompute.config.presets import model_from_dict
from gcompute.model.checksums import verify
from gcompute.model.tokenizer import Tokenizer
from gcompute.model.transformer import Params, abstract_params

PARAMS, OPTIMIZER, META = "params", "optimizer", "meta"
CHECKPOINTS = "checkpoints"
TOKENIZER = "tokenizer.json"
BEST = "best"
# In the meta of a checkpoint: the validation loss of these very parameters, and over how many batches.
VALIDATION = "validation"


@dataclass(frozen=True, slots=True, kw_only=True)
class Pretrained:
    """What it takes to generate text. name: the run's name; step: optimizer steps that it was trained for."""

    name: str
    config: ModelConfig
    params: Params
    tokenizer: Tokenizer
    step: int


def saved_steps(checkpoints: Path) -> list[int]:
    """The steps that have a whole checkpoint in the directory `checkpoints`, oldest first."""
    # One that is still being written, or was when its process died, has a longer name.
    return sorted(int(p.name) for p in checkpoints.iterdir() if p.name.isdecimal()) if checkpoints.is_dir() else []


@dataclass(frozen=True, slots=True, kw_only=True)
class Validated:
    """A checkpoint's step and its validation loss, in nats per token over `batches` of the split."""

    step: int
    loss: float
    batches: int


def best_saved(checkpoints: Path) -> Validated | None:
    """The checkpoint of lowest validation loss, the oldest of equals; None where none has one.

    Losses over another number of batches than the newest has do not compare with it and do not count.
    """
    found = []
    for step in saved_steps(checkpoints):
        with suppress(OSError, ValueError, KeyError, TypeError, RecursionError):
            meta = json.loads((checkpoints / str(step) / META / "metadata").read_text(encoding="utf-8"))
            check_step(meta, step)
            kept = meta[VALIDATION]
            found.append(Validated(step=step, loss=float(kept["loss"]), batches=int(kept["batches"])))
    return min((one for one in found if one.batches == found[-1].batches), key=lambda one: one.loss, default=None)


def unreadable(error: Exception) -> str:
    """What Orbax or TensorStore says of a file, in a few words; they say it in many lines."""
    text = " ".join(str(error).split()).partition(" See full TensorStore")[0]
    for known in ("No space left on device", "Disk quota exceeded", "File too large", "Permission denied"):
        if known in text:
            return known
    return text[:160] + ("..." if len(text) > 160 else "") or type(error).__name__


def check_whole(checkpoint: Path, items: Iterable[str], notice: Callable[[str], None]) -> None:
    """Compare the files of `items` with their checksums. `notice` says where there are none, as before they were kept.

    Raises:
      ValueError: a file is damaged.
      OSError: a file cannot be read.
    """
    if not verify(checkpoint, items):
        notice(f"checkpoint {checkpoint} has no checksums: whether it is as it was saved is not known.")


def check_step(meta: Mapping[str, Any], step: int) -> None:
    """Refuse a checkpoint that has the name of another step than it was saved at.

    Raises:
      ValueError: it has.
    """
    if meta.get("step", step) != step:
        raise ValueError(f"it is of step {meta['step']}, and was renamed")


def locate(path: Path) -> tuple[Path, list[int]]:
    """The run directory that `path` means and the steps to try, newest first.

    `path` is a run directory, its checkpoints directory, one checkpoint in it, or "best" there.

    Raises:
      ValueError: there is no checkpoint there.
    """
    path = path.absolute()
    if path.name == BEST and path.parent.name == CHECKPOINTS and path.parent.is_dir():
        best = best_saved(path.parent)
        if best is None:
            raise ValueError(
                f"no checkpoint in {path.parent} has a validation loss, so none is the best. Give one of the steps"
                " there, or train with --keep-best."
            )
        return path.parent.parent, [best.step]
    if not path.exists():
        raise ValueError(f"{path} does not exist. Give the --out directory of a `gcompute train` run.")
    if path.name.isdecimal() and path.parent.name == CHECKPOINTS:
        return path.parent.parent, [int(path.name)]
    run = path.parent if path.name == CHECKPOINTS else path
    steps = saved_steps(run / CHECKPOINTS)
    if not steps:
        raise ValueError(f"{path} holds no checkpoint. Give the --out directory of a `gcompute train` run.")
    return run, steps[::-1]


def load(path: str | Path, *, notice: Callable[[str], None] = lambda text: None) -> Pretrained:
    """The newest checkpoint at `path` that is as it was saved, on the first device.

    `notice` says which checkpoints are damaged, or have no checksums. What is not loaded, the optimizer's state, is not
    read.

    Raises:
      ValueError: nothing there can be read, or the tokenizer is not the one that the model was trained with.
    """
    logging.getLogger("absl").setLevel(logging.CRITICAL)
    run, steps = locate(Path(path))
    tokenizer_path = run / TOKENIZER
    if not tokenizer_path.is_file():
        raise ValueError(f"{run} has no {TOKENIZER}: copy the one that the model was trained with there.")
    tokenizer = Tokenizer.load(tokenizer_path)
    here = SingleDeviceSharding(jax.local_devices()[0])
    reason = ""
    for step in steps:
        directory = run / CHECKPOINTS / str(step)
        try:
            check_whole(directory, (PARAMS, META), notice)
            meta = json.loads((directory / META / "metadata").read_text(encoding="utf-8"))
            check_step(meta, step)
            config, trained_with = model_from_dict(meta["model"], source=f"checkpoint {directory}"), meta["tokenizer"]
            target = jax.tree.map(
                lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=here), abstract_params(config)
            )
            with ocp.StandardCheckpointer() as checkpointer:
                params = checkpointer.restore(directory / PARAMS, target)
        # Orbax and TensorStore raise many kinds for a damaged file: each means that this checkpoint is unusable.
        except Exception as error:
            reason = unreadable(error)
            if step != steps[-1]:
                notice(f"checkpoint {directory} cannot be read ({reason}); trying the one before it.")
            continue
        if trained_with != tokenizer.fingerprint:
            raise ValueError(
                f"{tokenizer_path} is not the tokenizer that checkpoint {step} was trained with (vocabulary"
                f" {tokenizer.vocab_size}, the model's {config.vocab}). Put the original file back."
            )
        return Pretrained(name=run.name, config=config, params=params, tokenizer=tokenizer, step=step)
    which = f"checkpoint {steps[0]} in {run} cannot" if len(steps) == 1 else f"none of the checkpoints in {run} can"
    raise ValueError(f"{which} be read ({reason}). Restore it from a copy, or give another checkpoint.")
