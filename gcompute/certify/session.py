"""What the rows of one certificate share: the reference's runs, the bands, a count of compilations and a lock."""

import threading
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import jax
import numpy as np

from gcompute.certify.bands import measured_bands
from gcompute.certify.precision import FLOAT64, precision_of
from gcompute.certify.recipes import Recipe
from gcompute.certify.reference import Trajectory, nested, reference_training
from gcompute.certify.trained import Values, starting_values
from gcompute.config.model import ModelConfig
from gcompute.config.train import OptimizerConfig

EVENT = "/jax/core/compile/backend_compile_duration"


class CompilationCounter:
    """Counts the compilations of each thread from its making on.

    JAX takes listeners and gives none back, so make one and ask it often.
    """

    def __init__(self) -> None:
        self.own = threading.local()
        jax.monitoring.register_event_duration_secs_listener(self._listen)

    def _listen(self, event: str, duration_secs: float, **_: Any) -> None:
        if event == EVENT:
            self.own.count = self.count + 1

    @property
    def count(self) -> int:
        """Compilations that this thread has asked for."""
        return getattr(self.own, "count", 0)


@dataclass(frozen=True)
class Truths:
    """The reference's runs and the bands of one device, made when they are first asked for."""

    runs: dict[Any, tuple[Values, Trajectory]] = field(default_factory=dict)
    bands: dict[Any, Mapping[str, Mapping[str, float]]] = field(default_factory=dict)
    making: threading.RLock = field(default_factory=threading.RLock)

    def run(self, model: ModelConfig, optimizer: OptimizerConfig) -> tuple[Values, Trajectory]:
        """Starting values for `model`, and where the reference goes from them in float64."""
        with self.making:
            if (model, optimizer) not in self.runs:
                values = starting_values(model)
                with precision_of(FLOAT64):
                    wide = nested({path: leaf.astype(np.float64) for path, leaf in values.params.items()})
                    truth = reference_training(wide, values.inputs_NBT, values.targets_NBT, model, optimizer)
                self.runs[model, optimizer] = values, truth
            return self.runs[model, optimizer]

    def band(self, recipe: Recipe, precision: str, quantity: str) -> float:
        """How far reordering moves one device from the truth in this quantity."""
        key = recipe.model, recipe.optimizer
        with self.making:
            if key not in self.bands:
                self.bands[key] = measured_bands(recipe, *self.run(*key))
            return self.bands[key][precision][quantity]


@dataclass(frozen=True)
class Session:
    """`running` is held while a program runs: two that wait for their collectives at once could wait for each other."""

    truths: Truths = field(default_factory=Truths)
    counter: CompilationCounter = field(default_factory=CompilationCounter)
    running: threading.Lock = field(default_factory=threading.Lock)
