"""The plan's part of a benchmark: what it predicts for the loads that are put on, and what tokens cost."""

import dataclasses
import os
from dataclasses import dataclass
from pathlib import Path

from gcompute.cli.bench_server import ServedCheckpoint
from gcompute.cli.planning import THIS, known_chips, planning_target
from gcompute.config.architecture import Architecture, architecture
from gcompute.config.bench import PlanConfig
from gcompute.config.mesh import MeshShape
from gcompute.config.models import planned_model
from gcompute.hardware.target import Target
from gcompute.plan.cost import Price, known_price, usd_per_million_tokens
from gcompute.plan.serve_search import serving_meshes
from gcompute.plan.serving import ServeRun, load_of
from gcompute.serve.load import Arrivals
from gcompute.serve.load_plan import Predicted, predict


@dataclass(frozen=True, slots=True, kw_only=True)
class Planner:
    """What is known of the server beside its URL; each part may be missing. why_not: what a prediction lacks."""

    model: Architecture | None = None
    target: Target | None = None
    mesh: MeshShape | None = None
    weights: str = "bfloat16"
    kv: str = "bfloat16"
    slots: int | None = None
    price: Price | None = None
    why_not: str = ""

    @property
    def num_chips(self) -> int:
        return self.target.num_chips if self.target else 1

    def predict(self, arrivals: Arrivals, *, prompt: int, output: int, num_requests: int | None) -> Predicted | None:
        """The plan's figures, None where the model or the chip is not known.

        Raises:
          ValueError: the plan cannot be of such a server.
        """
        if self.model is None or self.target is None:
            return None
        run = ServeRun(
            model=self.model,
            prompt=prompt,
            output=output,
            weights=self.weights,
            cache=self.kv,
            compute="float32" if self.weights == "float32" else "bfloat16",
        )
        together = arrivals.concurrency or self.slots or 1
        run = dataclasses.replace(run, mesh=self.mesh or best_mesh(run, self.target, together))
        return predict(run, self.target, arrivals, slots=self.slots, num_requests=num_requests)

    def usd_per_million(self, output_tokens_per_s: float) -> float | None:
        if self.price is None or output_tokens_per_s <= 0:
            return None
        return usd_per_million_tokens(self.price.usd_per_chip_hour * self.num_chips, output_tokens_per_s)


def best_mesh(run: ServeRun, target: Target, together: int) -> MeshShape:
    """The mesh of most tokens a second for so many requests, one that fits before one that does not."""

    def rank(mesh: MeshShape) -> tuple[bool, float]:
        load = load_of(dataclasses.replace(run, mesh=mesh), target, together)
        return load.fits, load.tokens_per_s

    return max(serving_meshes(run.model, target), key=rank)


def make_planner(config: PlanConfig, served: ServedCheckpoint | None, chip_file: Path | None) -> Planner:
    """Put together what the command line and, for a checkpoint, its server say.

    Raises:
      ValueError: the model, the chip, the mesh or the price does not exist.
    """
    model, weights = None, "bfloat16"
    if config.model is not None:
        model = planned_model(config.model).architecture
    elif served is not None:
        model = architecture(served.model, served.name)
    if served is not None:
        weights = served.precision
    weights = config.weights or weights
    target = None
    on = config.on or (THIS if served is not None else None)
    if on is not None and served is not None and on.strip().lower() in (THIS, f"{THIS}:1"):
        assert served.chip is not None
        target = Target(chip=THIS, shape=(1,), known=served.chip)
    elif on is not None:
        # The server may be on this very device: JAX must not take all its memory to look at it.
        os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
        target = planning_target(on, known_chips(chip_file))
    price = None
    if target is not None and target.known is not None:
        price = known_price(target.known, given=config.usd_per_hour)
    elif config.usd_per_hour is not None:
        price = Price(usd_per_chip_hour=config.usd_per_hour, what="given")
    mesh = MeshShape.parse(config.mesh, target and target.num_devices) if config.mesh is not None else None
    if mesh is not None and (target is None or mesh.num_devices != target.num_devices):
        raise ValueError(f"--mesh {mesh} is of {mesh.num_devices} devices: give --on a target of as many.")
    lacks = [flag for flag, value in (("--model", model), ("--on", target)) if value is None]
    return Planner(
        model=model,
        target=target,
        mesh=mesh,
        weights=weights,
        kv=config.kv or weights,
        slots=served.slots if served is not None else None,
        price=price,
        why_not=f"no prediction: give {' and '.join(lacks)}." if lacks else "",
    )
