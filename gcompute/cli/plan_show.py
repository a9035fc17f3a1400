"""How the answers on training are shown: tables for a reader, plain values for a program."""

import dataclasses
from collections.abc import Sequence
from typing import Any

from rich.console import Console
from rich.table import Table

from gcompute.cli.planning import count, dollars, gib, seconds, two_columns, wide_console
from gcompute.config.models import PlannedModel
from gcompute.hardware.target import Target
from gcompute.plan.accuracy import Accuracy
from gcompute.plan.cost import known_price, usd_per_million_tokens
from gcompute.plan.efficiency import device_of, efficiency_of, operation_s
from gcompute.plan.memory import OPERAND_BYTES
from gcompute.plan.operations import Operation
from gcompute.plan.program_memory import largest_batch, largest_context, program_memory
from gcompute.plan.sizes import sizes
from gcompute.plan.train_plan import CLOSE, FITS, MemoryAnswer, TrainAnswer
from gcompute.plan.train_time import TrainTime, bubbles
from gcompute.plan.why import why_train

MOST_OPERATIONS = 12
# What a model of its size is best trained on, where no budget is given. Source: Hoffmann et al. 2022, arXiv:2203.15556.
TOKENS_PER_PARAM = 20
MANY = ("", "es")
TIME_FIELDS = tuple(
    one.name for one in dataclasses.fields(TrainTime) if one.name not in ("operations", "communication")
)
STYLES = {FITS: "green", CLOSE: "yellow"}
MEMORY_LABELS = {
    "parameters": "parameters, float32",
    "optimizer": "optimizer state",
    "accumulator": "gradients summed over microbatches",
    "activations": "activations kept for the backward pass",
    "gradients": "gradients",
    "workspace": "temporaries of one layer's gradient",
    "logits": "temporaries of the losses (not at the same time)",
    "compute_copies": "parameters cast and gathered for products",
}


def train_json(
    planned: PlannedModel, told: TrainAnswer, *, tokens: float | None, usd_per_hour: float | None, spot: bool
) -> dict[str, Any]:
    """The whole answer as plain values; every number is predicted."""
    run, target, time = told.question.run, told.question.target, told.time
    return {
        "model": planned.name,
        "target": str(target),
        "num_devices": target.num_devices,
        "mesh": str(run.mesh),
        "batch": run.batch,
        "seq": run.seq,
        "accumulation": run.accumulation,
        "remat": run.remat,
        "precision": run.precision,
        "residual": told.question.residual,
        "optimizer": told.question.optimizer,
        "params": dataclasses.asdict(sizes(planned.architecture)),
        "unknown_fields": list(planned.unused),
        "memory": {
            "components_bytes": told.memory.components,
            "total_bytes": told.memory.total_bytes,
            "available_bytes": told.memory.available_bytes,
            "left_bytes": told.memory.left_bytes,
            "verdict": told.memory.verdict,
            "accuracy": accuracy_json(told.memory.accuracy),
        },
        "largest": _largest(told),
        "time": {
            **{name: getattr(time, name) for name in TIME_FIELDS},
            "accuracy": accuracy_json(told.time_accuracy),
        },
        "bubbles": bubbles(run),
        "communication": [
            {**dataclasses.asdict(one), "axis": one.axis.value, "exposed_s": one.exposed_s}
            for one in time.communication
        ],
        "operations": [_operation_json(one, told) for one in grouped(time.operations)],
        "cost": cost_of(planned, told, tokens=tokens, usd_per_hour=usd_per_hour, spot=spot),
        "why": why_train(told),
    }  # fmt: skip


def accuracy_json(accuracy: Accuracy | None) -> dict[str, Any] | None:
    return None if accuracy is None else dataclasses.asdict(accuracy)


def grouped(operations: Sequence[Operation]) -> list[Operation]:
    """Operations of the same name added up, over groups of layers."""
    found: dict[str, Operation] = {}
    for one in operations:
        before = found.get(one.name)
        flops, moved = one.flops * one.times, one.moved_bytes * one.times
        if before is not None:
            flops, moved = flops + before.flops, moved + before.moved_bytes
        found[one.name] = dataclasses.replace(one, flops=flops, moved_bytes=moved, times=1.0)
    return list(found.values())


def _operation_s(one: Operation, told: TrainAnswer) -> float:
    chip = told.question.target.known
    assert chip is not None
    return operation_s(one, device_of(chip, told.question.run.precision), efficiency_of(chip.kind))


def _operation_json(one: Operation, told: TrainAnswer) -> dict[str, Any]:
    return {
        "name": one.name,
        "kind": one.kind,
        "flops": one.flops,
        "moved_bytes": one.moved_bytes,
        "seconds": _operation_s(one, told),
    }


def _largest(told: TrainAnswer) -> dict[str, int | None]:
    """The largest batch and sequence that fit a TPU, by the same memory, margin included."""
    question, available = told.question, told.memory.available_bytes
    if available is None or question.target.backend != "tpu":
        return {"batch": None, "seq": None}
    residual, run = OPERAND_BYTES[question.residual], question.run
    # What the layout adds hangs neither on the batch nor on the sequence.
    tiles = told.memory.total_bytes - program_memory(run, residual_bytes=residual).total_bytes
    sure = available / (1 + told.memory.low) - tiles
    batch = largest_batch(run, sure, residual_bytes=residual)
    seq = largest_context(run, sure, residual_bytes=residual)
    # A sequence that fits may be no whole number of the steps that longer ones are tried in.
    return {"batch": batch, "seq": max(seq, run.seq) if told.memory.verdict == FITS else seq}


def cost_of(
    planned: PlannedModel, told: TrainAnswer, *, tokens: float | None, usd_per_hour: float | None, spot: bool
) -> dict[str, Any]:
    """Days and dollars for a token budget; dollars are None where the chip has no price."""
    target = told.question.target
    assert target.known is not None
    budget = tokens or TOKENS_PER_PARAM * sizes(planned.architecture).total
    price = known_price(target.known, given=usd_per_hour, spot=spot)
    run_s = budget / told.time.tokens_per_s
    hourly = price.usd_per_chip_hour * target.num_chips if price else None
    return {
        "tokens": budget,
        "days": run_s / 86400,
        "usd_per_chip_hour": price.usd_per_chip_hour if price else None,
        "price_source": str(price) if price else None,
        "usd_per_hour": hourly,
        "usd": hourly * run_s / 3600 if hourly else None,
        "usd_per_million_tokens": usd_per_million_tokens(hourly, told.time.tokens_per_s) if hourly else None,
    }


def show_train(
    planned: PlannedModel,
    told: TrainAnswer,
    *,
    chosen: bool,
    tokens: float | None,
    usd_per_hour: float | None,
    spot: bool,
) -> None:
    """Print the answer."""
    console = wide_console()
    run, target = told.question.run, told.question.target
    counted = sizes(planned.architecture)
    active = f", {count(counted.active)} a token" if counted.active != counted.total else ""
    console.print(
        f"{planned.name} ({count(counted.total)} parameters{active}): one train step on {target}"
        f" ({target.num_devices:,} devices), mesh {run.mesh}{' (found by search)' if chosen else ''}, batch"
        f" {run.batch:,} x {run.seq:,} in {run.accumulation} microbatch{MANY[run.accumulation > 1]}, remat {run.remat},"
        f" {run.precision}, residual {told.question.residual}, {told.question.optimizer}. Predicted.",
        soft_wrap=True,
    )
    for name in planned.unused:
        console.print(f"note: {planned.name}: field {name!r} is not known to the planner, and changes nothing here.")
    show_memory(told.memory, console)
    largest = _largest(told)
    if largest["batch"] is not None:
        most = {"batch {:,} at this length": largest["batch"], "length {:,} at this batch": largest["seq"]}
        fitting = " or ".join(words.format(size) for words, size in most.items() if size)
        console.print(f"the most that surely fits: {fitting or 'nothing, on this mesh'}")
    _show_time(told, console)
    _show_communication(told, console)
    _show_operations(told, console)
    _show_cost(cost_of(planned, told, tokens=tokens, usd_per_hour=usd_per_hour, spot=spot), target, console)
    console.print(f"why: {why_train(told)}", soft_wrap=True)


def show_memory(memory: MemoryAnswer, console: Console) -> None:
    """The components, the total, what is left, and how sure that is."""
    rows = {MEMORY_LABELS.get(name, name): gib(value) for name, value in memory.components.items() if value}
    rows["total"] = gib(memory.total_bytes)
    if memory.available_bytes is not None and memory.left_bytes is not None:
        rows["available"] = gib(memory.available_bytes)
        rows["left" if memory.left_bytes >= 0 else "lacking"] = gib(abs(memory.left_bytes))
    two_columns("memory of one device (predicted)", rows, console, bold="total")
    said = f"{memory.verdict}. Error of such predictions: {memory.accuracy or 'not examined on such chips'}."
    if memory.verdict == CLOSE:
        said += " --prove asks the compiler."
    console.print(said, style=STYLES.get(memory.verdict, "red"), soft_wrap=True)


def _show_time(told: TrainAnswer, console: Console) -> None:
    time = told.time
    parts = {
        "matrix products": time.matmul_s,
        "attention": time.attention_s,
        "memory traffic between products": time.sweep_s,
        "communication, not hidden": time.exposed_s,
        "pipeline bubbles": time.bubble_s,
        "optimizer": time.optimizer_s,
    }
    rows = {name: f"{seconds(value)}  {value / time.step_s:4.0%}" for name, value in parts.items() if value}
    rows |= {
        "step": seconds(time.step_s),
        "tokens/s": f"{time.tokens_per_s:,.0f}",
        "tokens/s a chip": f"{time.tokens_per_s / told.question.target.num_chips:,.0f}",
        "MFU": f"{time.mfu:.1%}",
        "bound by": time.bound,
    }
    two_columns("time of one step (predicted)", rows, console, bold="step")
    shares = ", ".join(f"{name} {share:.0%}" for name, share in bubbles(told.question.run).items())
    if shares:
        console.print(f"bubbles by schedule, on top of the work: {shares}")
    console.print(f"error of such predictions: {told.time_accuracy or 'not examined on such chips'}.", soft_wrap=True)


def _show_communication(told: TrainAnswer, console: Console) -> None:
    if not told.time.communication:
        return
    table = Table(title="communication of one step, a device (predicted)", title_justify="left")
    for name in ("axis", "what", "over"):
        table.add_column(name, no_wrap=True)
    for name in ("arrays", "takes", "hidden"):
        table.add_column(name, justify="right", no_wrap=True)
    for one in told.time.communication:
        hidden = f"{one.hidden_s / one.seconds:.0%}" if one.seconds else "-"
        table.add_row(one.axis.value, one.what, one.link, gib(one.payload_bytes), seconds(one.seconds), hidden)
    console.print(table)


def _show_operations(told: TrainAnswer, console: Console) -> None:
    rows = sorted(grouped(told.time.operations), key=lambda one: -_operation_s(one, told))
    table = Table(
        title=f"operations of one step, a device: the {MOST_OPERATIONS} longest (predicted)", title_justify="left"
    )
    table.add_column("operation", no_wrap=True)
    for name in ("operations", "bytes", "per byte", "takes"):
        table.add_column(name, justify="right", no_wrap=True)
    for one in rows[:MOST_OPERATIONS]:
        per_byte = f"{one.intensity:,.0f}" if one.flops else "-"
        table.add_row(one.name, count(one.flops), gib(one.moved_bytes), per_byte, seconds(_operation_s(one, told)))
    console.print(table)
    chip = told.question.target.known
    assert chip is not None
    ridge = device_of(chip, told.question.run.precision).ridge
    console.print(f"an operation with fewer than {ridge:,.0f} a byte waits for memory (peak / bandwidth).")


def _show_cost(cost: dict[str, Any], target: Target, console: Console) -> None:
    words = f"{count(cost['tokens'])} tokens: {seconds(cost['days'] * 86400)}"
    if cost["usd"] is None:
        words += f". {target.chip} has no price in the catalogue: give --usd-per-hour."
    else:
        words += (
            f", {dollars(cost['usd'])}, {dollars(cost['usd_per_million_tokens'])} a million tokens, at"
            f" {dollars(cost['usd_per_chip_hour'])} a chip-hour ({cost['price_source']})."
        )
    console.print(words, soft_wrap=True)
