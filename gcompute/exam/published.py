"""Published training runs, as the planner is asked about them: shapes, chips, mesh, batch, what is kept; their times.

Nothing of a run but these facts goes into its prediction. Chip counts of v7x are of chips, two devices each.
"""

import json
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from gcompute.config.architecture import Architecture, Attention, FeedForward, Layers
from gcompute.config.huggingface import from_huggingface
from gcompute.config.mesh import MeshShape
from gcompute.hardware.catalogue import find_chip
from gcompute.hardware.target import Target, slice_of
from gcompute.plan.train_run import TrainRun

RUNS = Path(__file__).with_name("published.json")


@dataclass(frozen=True, slots=True, kw_only=True)
class PublishedRun:
    """One run. step_s: as published, or worked back from tokens, TFLOP/s or MFU. headline: of the ten in the README."""

    name: str
    group: str
    run: TrainRun
    target: Target
    step_s: float
    source: str
    headline: bool


@cache
def published_runs() -> tuple[PublishedRun, ...]:
    """Every run of published.json."""
    document = json.loads(RUNS.read_text(encoding="utf-8"))
    return tuple(published_run(one, document["models"]) for one in document["runs"])


def planned(name: str, shape: dict[str, Any], context: int) -> Architecture:
    """The model of that name: its shape, or a Hugging Face configuration where it is more than one kind of layer."""
    if "config" in shape:
        return from_huggingface(shape["config"], source=name).architecture
    attention = Attention(heads=shape["heads"], kv_heads=shape["kv_heads"], head_dim=shape["head_dim"])
    experts = {key: shape[key] for key in ("experts", "experts_per_token", "capacity_factor") if key in shape}
    fed = FeedForward(width=shape["ffn"], gated=shape["gated"], **experts)
    layers = (Layers(num=shape["layers"], attention=attention, feed_forward=fed),)
    return Architecture(name=name, vocab=shape["vocab"], dim=shape["dim"], layers=layers, context=context, tied=False)


def target_of(name: str, chips: int, slices: int = 1) -> Target:
    """`chips` chips of that name, in equal slices."""
    chip = find_chip(name)
    shape = slice_of(chip, chips // slices) if chip.torus_dims else (chips,)
    assert shape is not None
    return Target(chip=chip.name, shape=shape, slices=slices, known=chip)


def published_run(one: dict[str, Any], models: dict[str, Any]) -> PublishedRun:
    target = target_of(one["chip"], one["chips"], one["slices"])
    remat = one["remat"]
    run = TrainRun(
        model=planned(one["model"], models[one["model"]], one["seq"]),
        batch=one["batch"],
        seq=one["seq"],
        mesh=MeshShape.parse(one["mesh"]),
        accumulation=one.get("accumulation", 1),
        remat=remat if isinstance(remat, str) else tuple(remat),
        sequence_parallel=one.get("sequence_parallel", True),
        schedule="interleaved" if one.get("chunks", 1) > 1 else "1f1b",
        chunks=one.get("chunks", 1),
        zero=one.get("zero", 0),
    )
    return PublishedRun(
        name=f"{one['model']} on {one['chips']:,} {target.chip}, {run.mesh}, batch {run.batch:,} x {run.seq:,}",
        group=f"{one['model']} on {target.chip}",
        run=run,
        target=target,
        step_s=one["step_s"],
        source=one["source"],
        headline=one.get("headline", False),
    )
