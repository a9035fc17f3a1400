"""Hold a prediction against the target's own compiler: memory part by part, collectives axis by axis."""

import dataclasses
import math
from typing import Any

from rich.console import Console
from rich.table import Table

from gcompute.aot.target import check_installed, compile_target
from gcompute.cli.compile import compile_elsewhere
from gcompute.cli.planning import THIS, gib, seconds, wide_console
from gcompute.config.fields import to_plain
from gcompute.config.mesh import Axis
from gcompute.config.models import PlannedModel
from gcompute.config.serve import ServeConfig
from gcompute.config.train import RunConfig
from gcompute.hardware.target import Target
from gcompute.plan.serving import ServeRun, serve_memory
from gcompute.plan.traffic import Communication
from gcompute.plan.train_plan import TrainAnswer

PROGRAMS = ("prefill", "decode")
COMPILERS = {"tpu": "the TPU compiler", "gpu": "XLA's GPU compiler", "cpu": "XLA's CPU compiler"}


def check_provable(planned: PlannedModel, target: Target) -> Target:
    """What to compile for; the machine at hand is a CPU of as many fake devices.

    Raises:
      ValueError: the trainer has no such model, or there is no compiler for the target here.
    """
    if planned.trainable is None:
        raise ValueError(
            f"--prove compiles the trainer's own step, and {planned.name} is not a model of the trainer:"
            f" {planned.why_not}. Plan without --prove."
        )
    if target.chip != THIS:
        compiled = compile_target(str(target))
    elif target.backend == "cpu":
        compiled = compile_target(f"cpu:{target.num_devices}")
    else:
        raise ValueError(
            "--prove compiles for CPU devices, or for chips of the catalogue: name this one's, --on CHIP:N."
        )
    check_installed(compiled)
    return compiled


def prove_train(told: TrainAnswer, run: RunConfig) -> dict[str, Any]:
    """Compile the step that was planned; predicted and compiled side by side. Bytes are of one device."""
    question = told.question
    planned = PlannedModel(name=question.run.model.name, architecture=question.run.model, trainable=run.model)
    target = check_provable(planned, question.target)
    report = compile_elsewhere({"target": str(target), "run": run.to_dict(), "hlo": None}, target)
    components = told.memory.components
    arguments = components.get("parameters", 0.0) + components.get("optimizer", 0.0)
    expected = [
        (one.axis.value, one.what, _sent_bytes(one, question.run.mesh.size(one.axis)))
        for one in told.time.communication
    ]
    return _proof(report, target, arguments, told.memory.total_bytes, expected)


def _proof(
    report: dict[str, Any],
    target: Target,
    arguments: float,
    total: float,
    expected: list[tuple[str, str, float]],
) -> dict[str, Any]:
    memory = report["memory"]
    rows = {
        "arguments": (arguments, memory["arguments_bytes"]),
        "temporaries and program": (total - arguments, report["needed_bytes"] - memory["arguments_bytes"]),
        "total": (total, report["needed_bytes"]),
    }
    return {
        "target": str(target),
        "compiler": COMPILERS[target.backend],
        "compile_s": report["compile_s"],
        "fits": report["fits"],
        "limit_bytes": report["limit_bytes"],
        "memory": [
            {"part": part, "predicted_bytes": said, "compiled_bytes": is_, "residual": said / is_ - 1 if is_ else None}
            for part, (said, is_) in rows.items()
        ],
        "collectives": _collectives(report, expected),
        "unreadable": report["unreadable"],
    }


def _sent_bytes(one: Communication, size: int) -> float:
    """What one device sends: all but its own part of what it gathers or scatters, twice for an all-reduce."""
    share = (size - 1) / size
    match one.what:
        case "all-reduce":
            return 2 * one.payload_bytes * share
        case "permute":
            return one.payload_bytes
        case "all-to-all":
            return one.payload_bytes / size * share
        case _:
            return one.payload_bytes * share


def _collectives(report: dict[str, Any], expected: list[tuple[str, str, float]]) -> list[dict[str, Any]]:
    """For each axis what was expected and what the compiled program has: runs of each kind, and bytes sent."""
    found: dict[str, dict[str, Any]] = {}

    def row(axis: str) -> dict[str, Any]:
        return found.setdefault(axis, {"expected": [], "expected_bytes": 0.0, "found": {}, "found_bytes": 0.0})

    for axis, what, sent in expected:
        row(axis)["expected"].append(what)
        row(axis)["expected_bytes"] += sent
    for one in report["collectives"]:
        here = row("+".join(one["axes"] or ["parts of axes"]))
        here["found"][one["kind"]] = here["found"].get(one["kind"], 0) + one["runs"]
        here["found_bytes"] += one["sent_bytes"]
    order = {axis.value: index for index, axis in enumerate(Axis)}
    return [{"axis": axis, **here} for axis, here in sorted(found.items(), key=lambda item: order.get(item[0], 99))]


def show_proof(proof: dict[str, Any]) -> None:
    """Print predicted, compiled and residual; then the collectives."""
    console = wide_console()
    programs = proof.get("programs") or [proof]
    for one in programs:
        name = f"{one['name']}: " if "name" in one else ""
        table = Table(
            title=f"{name}memory of one device, by {one['compiler']} for {one['target']}", title_justify="left"
        )
        table.add_column("part", no_wrap=True)
        for heading in ("predicted", "compiled", "residual"):
            table.add_column(heading, justify="right", no_wrap=True)
        for row in one["memory"]:
            residual = "-" if row["residual"] is None else f"{row['residual']:+.1%}"
            style = "bold" if row["part"] == "total" else None
            table.add_row(row["part"], gib(row["predicted_bytes"]), gib(row["compiled_bytes"]), residual, style=style)
        console.print(table)
        if one["unreadable"]:
            console.print(f"collectives: {one['unreadable']}", soft_wrap=True)
        elif one["collectives"]:
            _show_collectives(one["collectives"], console)
        limit = f" of {gib(one['limit_bytes'])}" if one["limit_bytes"] else ""
        total = one["memory"][-1]["compiled_bytes"]
        word = "fits" if one["fits"] else "does not fit"
        console.print(
            f"compiled in {seconds(one['compile_s'])}: {word}, {gib(total)}{limit}.",
            style="green" if one["fits"] else "red",
        )


def _show_collectives(rows: list[dict[str, Any]], console: Console) -> None:
    table = Table(title="collectives, sent by a device", title_justify="left")
    for name in ("axis", "expected", "found (runs)"):
        table.add_column(name)
    for name in ("expected bytes", "found bytes"):
        table.add_column(name, justify="right", no_wrap=True)
    for row in rows:
        table.add_row(
            row["axis"],
            ", ".join(row["expected"]) or "-",
            ", ".join(f"{kind} {runs:,}" for kind, runs in row["found"].items()) or "-",
            gib(row["expected_bytes"]),
            gib(row["found_bytes"]),
        )
    console.print(table)


def check_provable_serve(planned: PlannedModel, run: ServeRun, target: Target) -> Target:
    """As `check_provable`, for the engine's programs, which hold weights and cache in bfloat16."""
    if run.weights != "bfloat16" or run.cache != "bfloat16":
        raise ValueError(
            "--prove compiles the engine's programs, which are bfloat16: use --weights bfloat16 --kv bfloat16."
        )
    return check_provable(planned, target)


def prove_serve(planned: PlannedModel, run: ServeRun, target: Target) -> dict[str, Any]:
    """Compile the engine's prefill and decode for these requests; predicted and compiled side by side."""
    compiled = check_provable_serve(planned, run, target)
    config = planned.trainable
    assert config is not None
    if run.room > config.context:
        config = dataclasses.replace(config, context=run.room)
    slots = math.ceil(run.concurrency / run.replicas) * run.replicas
    request = {
        "kind": "serve",
        "target": str(compiled),
        "model": to_plain(config),
        "mesh": str(run.mesh),
        "programs": PROGRAMS,
        "slots": slots,
        "context": run.room,
        "attention": None,
        "prompt": run.prompt,
        "precision": run.compute,
        "decode_steps": ServeConfig().decode_steps,
        "page": ServeConfig().page,
        "hlo": None,
    }
    report = compile_elsewhere(request, compiled)
    memory = serve_memory(dataclasses.replace(run, concurrency=slots), compiled)
    programs = [
        {
            "name": name,
            **_proof(report["programs"][name], compiled, memory.arguments_bytes, memory.program_bytes(name), []),
        }
        for name in PROGRAMS
    ]
    return {"fits": report["fits"], "programs": programs}
