"""Load a trained model for inference: its configuration, parameters and tokenizer.

A run directory holds tokenizer.json and checkpoints/STEP/{params,optimizer,meta}.
"""

import json
import logging
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import jax
import orbax.checkpoint as ocp
from jax.sharding import SingleDeviceSharding

from gcompute.config.model import ModelConfig
from gcompute.config.presets import model_from_dict
from gcompute.model.tokenizer import Tokenizer
from gcompute.model.transformer import Params, abstract_params

PARAMS, OPTIMIZER, META = "params", "optimizer", "meta"
CHECKPOINTS = "checkpoints"
TOKENIZER = "tokenizer.json"


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


def unreadable(error: Exception) -> str:
    """What Orbax or TensorStore says of a file, in a few words; they say it in many lines."""
    text = " ".join(str(error).split()).partition(" See full TensorStore")[0]
    for known in ("No space left on device", "Disk quota exceeded", "File too large", "Permission denied"):
        if known in text:
            return known
    return text[:160] + ("..." if len(text) > 160 else "") or type(error).__name__


def locate(path: Path) -> tuple[Path, list[int]]:
    """The run directory that `path` means and the steps to try, newest first.

    `path` is a run directory, its checkpoints directory, or one checkpoint in it.

    Raises:
      ValueError: there is no checkpoint there.
    """
    path = path.absolute()
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
    """The newest checkpoint at `path` that can be read, on the first device.

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
    for step in steps:
        directory = run / CHECKPOINTS / str(step)
        try:
            meta = json.loads((directory / META / "metadata").read_text(encoding="utf-8"))
            config, trained_with = model_from_dict(meta["model"], source=f"checkpoint {directory}"), meta["tokenizer"]
            target = jax.tree.map(
                lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=here), abstract_params(config)
            )
            with ocp.StandardCheckpointer() as checkpointer:
                params = checkpointer.restore(directory / PARAMS, target)
        # Orbax and TensorStore raise many kinds for a damaged file: each means that this checkpoint is unusable.
        except Exception as error:
            notice(f"checkpoint {directory} cannot be read ({unreadable(error)}); trying the one before it.")
            continue
        if trained_with != tokenizer.fingerprint:
            raise ValueError(
                f"{tokenizer_path} is not the tokenizer that checkpoint {step} was trained with (vocabulary"
                f" {tokenizer.vocab_size}, the model's {config.vocab}). Put the original file back."
            )
        return Pretrained(name=run.name, config=config, params=params, tokenizer=tokenizer, step=step)
    raise ValueError(f"no checkpoint in {run} can be read.")
