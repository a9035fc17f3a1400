"""Where a decode step sits on the roofline of its machine: predicted from the model alone, set beside what is measured.

A step for B requests that each attend to S cached tokens takes F operations and moves M bytes (`decode_operations`).
Its intensity F / M says which ceiling is above it: min(peak, F / M x bandwidth). No JAX.
"""

import math
from dataclasses import dataclass
from typing import Any

from gcompute.config.architecture import architecture
from gcompute.config.model import ModelConfig
from gcompute.config.serve import ServeConfig
from gcompute.hardware.chip import Chip
from gcompute.hardware.target import Target
from gcompute.plan.roof import Roof, memory_roof
from gcompute.plan.serving import ServeRun, critical_batch, decode_operations, decode_time
from gcompute.plan.sizes import sizes

# Context lengths closer than this share one predicted path.
PATH_CELLS = 16


@dataclass(frozen=True, slots=True, kw_only=True)
class Position:
    """One decode step on the roofline, predicted. bound: "memory" left of the ridge, else "compute".

    attainable_flops_per_s: what the roof allows at this intensity. step_s: each operation of the step under its own
    roof, as `gcompute plan` adds them up; never less than flops / attainable_flops_per_s on a measured machine.
    """

    batch: int
    cells: float
    flops: float
    moved_bytes: float
    attainable_flops_per_s: float
    bound: str
    step_s: float

    @property
    def intensity(self) -> float:
        """Operations for each byte moved."""
        return self.flops / self.moved_bytes

    @property
    def flops_per_s(self) -> float:
        return self.flops / self.step_s

    @property
    def tokens_per_s(self) -> float:
        """Each step gives every request of the batch one token."""
        return self.batch / self.step_s


class DecodeRoofline:
    """The roofline that one model is decoded under. run: its weights', cache's and products' dtypes.

    Raises:
      ValueError: the target's figures are not known.
    """

    def __init__(self, run: ServeRun, target: Target):
        if target.known is None:
            raise ValueError(f"{target} has no figures: give a chip of the catalogue, or one that was measured.")
        self.run = run
        self.target = target
        self.chip: Chip = target.known
        self.roof: Roof = memory_roof(self.chip, run.compute)
        self.critical_batch = critical_batch(run, target)
        self._path: tuple[int, int, tuple[Position, ...]] | None = None

    def at(self, batch: int, cells: float) -> Position:
        """A step for `batch` requests, each attending to `cells` cached tokens."""
        operations = decode_operations(self.run, batch, cells)
        flops = sum(one.flops * one.times for one in operations)
        moved_bytes = sum(one.moved_bytes * one.times for one in operations)
        intensity = flops / moved_bytes
        return Position(
            batch=batch,
            cells=cells,
            flops=flops,
            moved_bytes=moved_bytes,
            attainable_flops_per_s=min(self.roof.flops_per_s, intensity * self.roof.bytes_per_s),
            bound="memory" if intensity < self.roof.ridge else "compute",
            step_s=decode_time(self.run, self.target, batch, cells).seconds,
        )

    def path(self, cells: float, slots: int) -> tuple[Position, ...]:
        """Steps of rising batch at one context length, well past both `slots` and the critical batch."""
        rounded = max(1, round(cells / PATH_CELLS)) * PATH_CELLS
        if self._path is None or self._path[:2] != (rounded, slots):
            last = math.ceil(math.log2(4 * max(slots, self.critical_batch)))
            batches = sorted({*(2**power for power in range(last + 1)), slots})
            self._path = rounded, slots, tuple(self.at(batch, rounded) for batch in batches)
        return self._path[2]

    def to_dict(self) -> dict[str, Any]:
        """What does not change: the machine's ceilings, with where they come from, and the model's critical batch."""
        measured = all(figure.source.startswith("measured") for figure in self._figures())
        return {
            "machine": self.chip.about or self.chip.name,
            "source": "measured" if measured else "catalogue",
            "dtype": self.run.compute,
            "flops_per_s": self.roof.flops_per_s,
            "bytes_per_s": self.roof.bytes_per_s,
            "ridge": self.roof.ridge,
            "critical_batch": self.critical_batch,
            "params": sizes(self.run.model).total,
        }

    def _figures(self) -> list[Any]:
        names = [f"peak_flops_per_s.{self.run.compute}", "hbm_bytes_per_s"]
        return [self.chip.figures[name] for name in names if name in self.chip.figures]


def decode_roofline(model: ModelConfig, serve: ServeConfig, chip: Chip) -> DecodeRoofline:
    """The roofline of a served model on one device of `chip`.

    Raises:
      ValueError: the chip has no peak for the served precision.
    """
    run = ServeRun(
        model=architecture(model),
        prompt=1,
        output=1,
        context=serve.max_context or model.context,
        weights=serve.weights or serve.precision,
        cache=serve.kv or serve.precision,
        compute=serve.precision,
    )
    return DecodeRoofline(run, Target(chip=chip.name, shape=(1,), known=chip))


def position_json(position: Position) -> dict[str, Any]:
    return {
        "batch": position.batch,
        "cells": position.cells,
        "intensity": position.intensity,
        "attainable_flops_per_s": position.attainable_flops_per_s,
        "flops_per_s": position.flops_per_s,
        "bound": position.bound,
        "step_s": position.step_s,
        "tokens_per_s": position.tokens_per_s,
    }
