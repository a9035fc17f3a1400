"""Fit the efficiencies of `plan.efficiency` to published runs, and say what each run's error is when it is left out.

`python -m gcompute.exam.fit` prints both, and the workspace of `plan.program_memory` fitted to compiled programs. The
loss is the mean of |log(predicted / published)| over a source's runs, and then over sources, so that one long table
does not outvote the rest; a share of it is the worst run of each source. Runs of one model on one kind of chip are left
out together: they are too alike to examine each other.
"""

import dataclasses
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from gcompute.exam.compiled import CompiledTrain, compiled_train
from gcompute.exam.published import PublishedRun, published_runs
from gcompute.plan.efficiency import BY_KIND, Efficiency, device_of
from gcompute.plan.links import routes
from gcompute.plan.program_memory import WORKSPACE
from gcompute.plan.traffic import communication_of
from gcompute.plan.train_time import bubble, optimizer_operation, train_operations

# What a share can be; reuse is in operations a byte.
BOUNDS: Mapping[str, tuple[float, float]] = {
    "matmul": (0.5, 0.97),
    "reuse_flops_per_byte": (300.0, 20000.0),
    "attention": (0.2, 1.0),
    "sweep": (0.3, 0.95),
    "link": (0.3, 1.0),
    "hidden": (0.0, 1.0),
    "attention_flops_per_byte": (30.0, 5000.0),
    "ragged": (0.2, 1.0),
}
WORST_SHARE = 0.15
ROUNDS = 60
FIRST_STEP = 0.25


@dataclass(frozen=True, slots=True)
class _Work:
    """All operations of all runs as arrays, so that one trial of constants is one pass of numpy."""

    run: np.ndarray
    is_matmul: np.ndarray
    is_attention: np.ndarray
    is_ragged: np.ndarray
    flops_s: np.ndarray
    bytes_s: np.ndarray
    flops_per_bandwidth: np.ndarray
    times: np.ndarray
    fill: np.ndarray
    optimizer_s: np.ndarray
    hideable_s: np.ndarray
    waiting_s: np.ndarray
    bubbles: np.ndarray
    step_s: np.ndarray


def _work(runs: Sequence[PublishedRun]) -> _Work:
    rows: list[tuple[float, ...]] = []
    ends: list[tuple[float, ...]] = []
    for index, one in enumerate(runs):
        assert one.target.known is not None
        device = device_of(one.target.known, one.run.precision)
        for op in train_operations(one.run):
            fill = min(1.0, op.depth / device.matrix_dim) if device.matrix_dim and op.depth else 1.0
            kinds = (op.kind == "matmul", op.kind == "attention", op.ragged)
            seconds = (op.flops / device.flops_per_s, op.moved_bytes / device.hbm_bytes_per_s)
            rows.append((index, *kinds, *seconds, op.flops / device.hbm_bytes_per_s, op.times, fill))
        sent = communication_of(one.run, routes(one.run.mesh, one.target), tpu=one.target.backend == "tpu")
        update = optimizer_operation(one.run)
        ends.append(
            (
                update.moved_bytes / device.hbm_bytes_per_s,
                sum(row.seconds for row in sent if row.hides),
                sum(row.seconds for row in sent if not row.hides),
                bubble(one.run),
                one.step_s,
            )
        )
    columns, totals = np.array(rows, float).T, np.array(ends, float).T
    run, matmul, attention, ragged, *rest = columns
    return _Work(run.astype(int), matmul.astype(bool), attention.astype(bool), ragged.astype(bool), *rest, *totals)


def _errors(work: _Work, e: Efficiency) -> np.ndarray:
    """log(predicted / published) of every run; the same sums as `train_time.train_time`."""
    share = np.where(work.is_attention, e.matmul * e.attention * work.fill, e.matmul)
    share = np.where(work.is_ragged, share * e.ragged, share)
    reuse = np.where(
        work.is_matmul,
        e.reuse_flops_per_byte,
        np.where(work.is_attention, e.attention_flops_per_byte, np.inf),
    )
    seconds = np.maximum(work.flops_s / share, work.bytes_s / e.sweep) + work.flops_per_bandwidth / reuse
    computing = np.bincount(work.run, seconds * work.times, minlength=len(work.step_s))
    hideable, waiting = work.hideable_s / e.link, work.waiting_s / e.link
    exposed = hideable + waiting - np.minimum(computing, e.hidden * hideable)
    step = (computing + exposed) * (1 + work.bubbles) + work.optimizer_s / e.sweep
    return np.log(step / work.step_s)


def _loss(errors: np.ndarray, sources: np.ndarray, left: np.ndarray) -> float:
    parts = []
    for source in np.unique(sources[left]):
        own = np.abs(errors[left & (sources == source)])
        parts.append(own.mean() + WORST_SHARE * own.max())
    return float(np.mean(parts))


def _search(work: _Work, sources: np.ndarray, left: np.ndarray, start: Efficiency, rounds: int) -> Efficiency:
    """Coordinate by coordinate, in steps that halve when none helps: deterministic."""
    best, lowest, step = start, _loss(_errors(work, start), sources, left), FIRST_STEP
    for _ in range(rounds):
        improved = False
        for name, (low, high) in BOUNDS.items():
            value = getattr(best, name)
            if not math.isfinite(value):
                continue
            for factor in (math.exp(step), math.exp(-step)):
                tried = dataclasses.replace(best, **{name: min(high, max(low, value * factor))})
                loss = _loss(_errors(work, tried), sources, left)
                if loss < lowest:
                    best, lowest, improved = tried, loss, True
        if not improved:
            step /= 2
            if step < 1e-3:
                break
    return best


def fit(runs: Iterable[PublishedRun], start: Efficiency, *, rounds: int = ROUNDS) -> Efficiency:
    """The efficiencies that fit `runs` best, from `start`."""
    runs = tuple(runs)
    sources = np.array([_source(one) for one in runs])
    return _search(_work(runs), sources, np.ones(len(runs), bool), start, rounds)


def left_out_errors(runs: Iterable[PublishedRun], start: Efficiency, *, rounds: int = 12) -> list[float]:
    """predicted / published - 1 of each run by efficiencies fitted without all runs of its model on its chip."""
    runs = tuple(runs)
    work, sources = _work(runs), np.array([_source(one) for one in runs])
    groups = np.array([one.group for one in runs])
    errors = np.zeros(len(runs))
    for group in np.unique(groups):
        left = groups != group
        if not left.any():
            raise ValueError(f"nothing is left to fit where {group} is left out.")
        efficiency = _search(work, sources, left, start, rounds)
        errors[~left] = np.expm1(_errors(work, efficiency))[~left]
    return errors.tolist()


def _source(one: PublishedRun) -> str:
    return f"{one.source.partition(':')[0]} {one.target.chip}"


def fit_workspace(compiled: Sequence[CompiledTrain], start: Mapping[str, float]) -> dict[str, float]:
    """How many of each array of `program_memory.WORKSPACE` fit the totals of compiled programs best."""
    best, step = dict(start), FIRST_STEP

    def loss(tried: Mapping[str, float]) -> float:
        errors = [abs(math.log(one.predicted(tried).total_bytes / one.needed_bytes)) for one in compiled]
        return sum(errors) / len(errors) + WORST_SHARE * max(errors)

    lowest = loss(best)
    while step > 0.01:
        improved = False
        for name in best:
            for change in (math.exp(step), math.exp(-step)):
                tried = {**best, name: best[name] * change}
                if (found := loss(tried)) < lowest:
                    best, lowest, improved = tried, found, True
        step = step if improved else step / 2
    return best


def workspace_errors(compiled: Sequence[CompiledTrain], start: Mapping[str, float]) -> list[float]:
    """predicted / compiled - 1 of each program by a workspace fitted without all programs of its model."""
    found: dict[int, float] = {}
    for model in {one.model for one in compiled}:
        workspace = fit_workspace([one for one in compiled if one.model != model], start)
        for index, one in enumerate(compiled):
            if one.model == model:
                found[index] = one.predicted(workspace).total_bytes / one.needed_bytes - 1
    return [found[index] for index in range(len(compiled))]


def main() -> None:
    """Print the fitted efficiencies of each kind of chip, and the fitted workspace."""
    for kind in ("tpu", "gpu"):
        runs = [one for one in published_runs() if one.target.backend == kind]
        found = fit(runs, BY_KIND[kind])
        errors = left_out_errors(runs, found)
        print(kind, {name: float(f"{getattr(found, name):.3g}") for name in BOUNDS})
        size = np.abs(errors)
        print(f"  {len(runs)} runs, left out: median {np.median(size):.1%}, worst {size.max():.1%}")
    compiled = [one for one in compiled_train() if one.target.backend == "tpu"]
    workspace = fit_workspace(compiled, WORKSPACE)
    errors = [one.predicted(workspace).total_bytes / one.needed_bytes - 1 for one in compiled]
    print({name: float(f"{value:.3g}") for name, value in workspace.items()})
    print(f"  {len(compiled)} programs: median {np.median(np.abs(errors)):.1%}, worst {np.abs(errors).max():.1%}")
    without = np.abs(workspace_errors(compiled, workspace))
    print(f"  each model left out: median {np.median(without):.1%}, worst {without.max():.1%}")


if __name__ == "__main__":
    main()
