"""Published runs and servers that no efficiency was fitted to: how far off predictions are where nobody looked."""

import dataclasses
import json
import statistics
from functools import cache
from pathlib import Path
from typing import Any

from gcompute.config.mesh import MeshShape
from gcompute.exam.published import planned, published_run, target_of
from gcompute.plan.accuracy import Unseen
from gcompute.plan.serving import ServeRun, load_of
from gcompute.plan.train_time import train_time

POINTS = Path(__file__).with_name("unseen.json")
SERVING = {"tpu": "serving, TPU", "gpu": "serving, GPU"}


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Point:
    """One published figure. kind: its class of prediction; error: predicted / published - 1.

    uncertain: what the source does not say, and what was taken for it; empty where it says all.
    """

    name: str
    kind: str
    predicted: float
    published: float
    source: str
    uncertain: str = ""

    @property
    def error(self) -> float:
        return self.predicted / self.published - 1


@cache
def unseen_points() -> tuple[Point, ...]:
    """Every figure of unseen.json and the prediction of it; a server has one for each figure that it published."""
    document = json.loads(POINTS.read_text(encoding="utf-8"))
    models = document["models"]
    trained = [_train_point(one, models) for one in document["train"]]
    return (*trained, *(point for one in document["serve"] for point in _serve_points(one, models)))


def unseen_errors() -> dict[str, Unseen]:
    """Number, median and worst of the absolute errors by class of prediction."""
    by_kind: dict[str, list[float]] = {}
    for point in unseen_points():
        by_kind.setdefault(point.kind, []).append(abs(point.error))
    return {
        kind: Unseen(num=len(errors), median=round(statistics.median(errors), 4), worst=round(max(errors), 4))
        for kind, errors in by_kind.items()
    }


def _train_point(one: dict[str, Any], models: dict[str, Any]) -> Point:
    found = published_run({"slices": 1, **one}, models)
    return Point(
        name=found.name,
        kind=f"train step, {found.target.backend.upper()}",
        predicted=train_time(found.run, found.target).step_s,
        published=found.step_s,
        source=found.source,
        uncertain=one.get("uncertain", ""),
    )


def _serve_points(one: dict[str, Any], models: dict[str, Any]) -> list[Point]:
    target = target_of(one["chip"], one["chips"])
    run = ServeRun(
        model=planned(one["model"], models[one["model"]], max(8192, one["prompt"] + one["output"])),
        prompt=one["prompt"],
        output=one["output"],
        concurrency=one["concurrency"],
        mesh=MeshShape.parse(one.get("mesh", "data=1")),
        weights=one["weights"],
        cache=one["kv"],
    )
    load = load_of(run, target, run.concurrency)
    told = {
        "tok_s": load.tokens_per_s,
        "tok_s_decode": run.concurrency / load.step_s,
        "ttft_ms": 1e3 * load.ttft_s,
        "tpot_ms": 1e3 * load.time_per_token_s,
        "itl_ms": 1e3 * load.step_s,
        "e2e_ms": 1e3 * (load.ttft_s + (run.output - 1) * load.time_per_token_s),
    }
    where = f"{one['model']} on {one['chips']} {target.chip}, {run.concurrency} of {run.prompt} + {run.output} tokens"
    return [
        Point(
            name=f"{where}: {name}",
            kind=SERVING[target.backend],
            predicted=told[name],
            published=value,
            source=one["source"],
            uncertain=one.get("uncertain", ""),
        )
        for name, value in one["published"].items()
    ]
