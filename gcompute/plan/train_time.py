"""Predict the time of one train step of any decoder on any mesh: operations, communication by axis, bubbles.

step = (work + what communication it cannot hide) (1 + bubble) + optimizer. A prediction from formulae and the stated
efficiencies of `plan.efficiency`. For this machine's own trainer, measured, see `plan.train_step`.
"""

import dataclasses
import math
from collections.abc import Collection, Iterable
from dataclasses import dataclass
from functools import lru_cache

from gcompute.config.architecture import Architecture
from gcompute.hardware.target import Target
from gcompute.plan.efficiency import Device, Efficiency, device_of, efficiency_of, operation_s
from gcompute.plan.links import routes
from gcompute.plan.mfu import kept_keys, mfu
from gcompute.plan.operations import Operation, Rows, backward, block_forward, output_forward
from gcompute.plan.traffic import Communication, communication_of, hidden_behind
from gcompute.plan.train_run import TrainRun, params_on_device

WIDE_BYTES = 4
TOKEN_BYTES = 4
# A block's last product is never recomputed: its result is not needed to differentiate the block.
NEVER_AGAIN = "down"
# Bytes of device memory that an update moves for each parameter: two reads of its gradient, its own read and write.
UPDATE_BYTES = 16
# What a schedule leaves idle, against (stages - 1) / microbatches.
BUBBLES = {"gpipe": 1.0, "1f1b": 1.0, "interleaved": 1.0, "zero-bubble": 1 / 3}


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainTime:
    """Predicted seconds of one step, on the slowest device.

    step_s = (matmul_s + attention_s + sweep_s + exposed_s) + bubble_s + optimizer_s.
    """

    operations: tuple[Operation, ...]
    communication: tuple[Communication, ...]
    matmul_s: float
    attention_s: float
    sweep_s: float
    exposed_s: float
    bubble_s: float
    optimizer_s: float
    step_s: float
    tokens_per_s: float
    mfu: float
    bound: str


def train_time(run: TrainRun, target: Target, efficiency: Efficiency | None = None) -> TrainTime:
    """Predict one train step of `run` on `target`.

    Raises:
      ValueError: the mesh and the target do not go together, or the catalogue lacks a figure that is needed.
    """
    if target.known is None:
        raise ValueError(f"{target} has no figures in the catalogue: plan for a chip of it, or --on this, measured.")
    device = device_of(target.known, run.precision)
    efficiency = efficiency or efficiency_of(target.known.kind)
    work = _work(_shape(run), device, efficiency)
    optimizer = optimizer_operation(run)
    optimizer_s = operation_s(optimizer, device, efficiency)
    links = routes(run.mesh, target)
    found = hidden_behind(communication_of(run, links, tpu=target.backend == "tpu"), links, work.seconds, efficiency)
    exposed_s = sum(one.exposed_s for one in found)
    bubble_s = (work.seconds + exposed_s) * bubble(run)
    step_s = work.seconds + exposed_s + bubble_s + optimizer_s
    peak = device.flops_per_s * target.num_devices
    return TrainTime(
        operations=(*work.operations, optimizer),
        communication=found,
        matmul_s=work.matmul_s,
        attention_s=work.attention_s,
        sweep_s=work.sweep_s,
        exposed_s=exposed_s,
        bubble_s=bubble_s,
        optimizer_s=optimizer_s,
        step_s=step_s,
        tokens_per_s=run.tokens / step_s,
        mfu=mfu(run.model, run.batch, run.seq, step_s, peak),
        bound=_bound(work, found, bubble_s, _host_s(run, target)),
    )


@dataclass(frozen=True, slots=True)
class _Work:
    """The operations of a step and their seconds: by kind, and by what they wait for."""

    operations: tuple[Operation, ...]
    matmul_s: float
    attention_s: float
    sweep_s: float
    computing_s: float

    @property
    def seconds(self) -> float:
        return self.matmul_s + self.attention_s + self.sweep_s


@dataclass(frozen=True, slots=True)
class _Shape:
    """What the operations of a step depend on; a search meets the same again on many meshes."""

    model: Architecture
    rows: Rows
    seq: int
    accumulation: int
    stage: int
    remat: str | tuple[str, ...]


@lru_cache(maxsize=4096)
def _work(shape: _Shape, device: Device, efficiency: Efficiency) -> _Work:
    operations = _operations(shape)
    by_kind: dict[str, float] = {"matmul": 0.0, "attention": 0.0, "sweep": 0.0}
    computing_s = 0.0
    for one in operations:
        seconds = operation_s(one, device, efficiency)
        by_kind[one.kind] += seconds
        computing_s += seconds if one.intensity >= device.ridge else 0.0
    return _Work(operations, by_kind["matmul"], by_kind["attention"], by_kind["sweep"], computing_s)


def train_operations(run: TrainRun) -> tuple[Operation, ...]:
    """Every operation of one step on the device that has most of them, all microbatches together."""
    return _operations(_shape(run))


def _shape(run: TrainRun) -> _Shape:
    mesh = run.mesh
    rows = Rows(
        tokens=run.local_tokens,
        # Blocks of scores that the mask hides are skipped.
        keys=(run.seq + 1) / 2,
        tensor=mesh.tensor,
        expert=mesh.expert,
        scattered=run.sequence_parallel and mesh.tensor > 1,
        activation_bytes=run.activation_bytes,
        weight_bytes=run.weight_bytes,
    )
    remat = run.remat if isinstance(run.remat, str) else tuple(run.remat)
    return _Shape(run.model, rows, run.seq, run.accumulation, mesh.stage, remat)


def _operations(shape: _Shape) -> tuple[Operation, ...]:
    found: list[Operation] = []
    for group in shape.model.layers:
        windowed = _averaged(shape.rows, shape.seq, group.attention.window)
        times = shape.accumulation * group.num / shape.stage
        forward = block_forward(shape.model, group, windowed)
        again = tuple(one.repeated(1, " again") for one in forward if recomputed(one, shape.remat))
        found += [one.repeated(times) for one in (*forward, *again, *backward(forward))]
    ends = output_forward(shape.model, shape.rows)
    found += [one.repeated(shape.accumulation) for one in (*ends, *backward(ends))]
    return tuple(found)


def _averaged(rows: Rows, seq: int, window: int | None) -> Rows:
    """With the keys that a query sees on average through `window`: all before it at first, then the window."""
    if window is None or window >= seq:
        return rows
    return dataclasses.replace(rows, keys=kept_keys(seq, window))


def recomputed(operation: Operation, remat: str | Collection[str]) -> bool:
    """Whether the backward pass runs this operation of a block a second time."""
    if remat == "none" or operation.part == NEVER_AGAIN:
        return False
    if remat == "dots":
        return operation.kind != "matmul"
    kept = () if remat == "full" else remat
    return operation.kind == "sweep" or operation.part not in kept


def bubbles(run: TrainRun) -> dict[str, float]:
    """The bubble of each schedule that this run could take, interleaved with two chunks; empty without stages."""
    if run.mesh.stage == 1:
        return {}
    found = {}
    for schedule in BUBBLES:
        chunks = max(2, run.chunks) if schedule == "interleaved" else 1
        found[schedule] = bubble(dataclasses.replace(run, schedule=schedule, chunks=chunks))
    return found


def bubble(run: TrainRun) -> float:
    """Idle time of a pipeline as a share of its work: (stages - 1) / microbatches, over the chunks of a stage.

    Source: Narayanan et al. 2021, arXiv:2104.04473, section 2.2; Qi et al. 2023, arXiv:2401.10241, table 2.
    """
    if run.schedule not in BUBBLES:
        raise ValueError(f"schedule {run.schedule!r} is not known. Legal: {', '.join(BUBBLES)}.")
    return BUBBLES[run.schedule] * (run.mesh.stage - 1) / (run.accumulation * run.chunks)


def optimizer_operation(run: TrainRun) -> Operation:
    """The update of what a device stores, a sweep: 16 bytes a parameter and 8 a value of state."""
    stored, _ = params_on_device(run)
    split = run.mesh.data if run.zero else 1
    moved = stored / split * (UPDATE_BYTES + 2 * WIDE_BYTES * run.state_values)
    return Operation(name="optimizer", kind="sweep", part="optimizer", flops=0.0, moved_bytes=moved)


def _host_s(run: TrainRun, target: Target) -> float:
    """Seconds to bring a step's tokens and targets from the host to one device; 0 where its bus is not known."""
    if target.known is None or target.known.pcie_bytes_per_s is None:
        return 0.0
    return 2 * TOKEN_BYTES * run.accumulation * run.local_tokens / target.known.pcie_bytes_per_s


def _bound(work: _Work, communication: Iterable[Communication], bubble_s: float, host_s: float) -> str:
    """What takes most of the step: "compute", "HBM", the links of an axis, "pipeline bubble" or "host"."""
    parts = {"compute": work.computing_s, "HBM": work.seconds - work.computing_s, "pipeline bubble": bubble_s}
    parts["host"] = host_s
    for one in communication:
        name = f"{one.link}, axis {one.axis.value}"
        parts[name] = parts.get(name, 0.0) + one.exposed_s
    return max(parts, key=lambda name: parts[name] if math.isfinite(parts[name]) else 0.0)
