"""The run that the training tests share: a few thousand parameters, a dozen steps."""

import dataclasses

import numpy as np

from gcompute.config.mesh import MeshShape
from gcompute.config.presets import PRESETS
from gcompute.config.train import DataConfig, OptimizerConfig, RunConfig, TrainConfig


def make_run(optimizer: str = "adamw", *, model: dict | None = None, rate: float = 1e-2, **training) -> RunConfig:
    """A few thousand parameters on one device; `training` are fields of TrainConfig."""
    shape = dataclasses.replace(PRESETS["test"], **{"layers": 1, "context": 16, **(model or {})})
    settings = {"batch": 4, "steps": 12, "precision": "float32", "mesh": MeshShape(), "eval_every": 5, "keep": 20}
    return RunConfig(
        model=shape,
        optimizer=OptimizerConfig(optimizer=optimizer, learning_rate=rate, warmup_steps=3),
        train=TrainConfig(**{**settings, "checkpoint_every": 4, **training}),
        data=DataConfig(tokenizer="char"),
    )


def bits(values: list[float]) -> list[int]:
    """The bits of float32 losses, so that equal means equal."""
    return [int(bits) for bits in np.asarray(values, np.float32).view(np.uint32)]
