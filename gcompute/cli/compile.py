"""gcompute compile: compile a real program for chips that are not here, and say whether it fits."""

import dataclasses
import json
import sys
import tempfile
from contextlib import nullcontext, suppress
from pathlib import Path
from typing import Any

import click

from gcompute.aot.target import INSTALL, check_installed, compile_target
from gcompute.cli.flags import MODEL, PATH, ExampleGroup, MeshType, SectionedCommand, config_options, given, read_toml
from gcompute.cli.run_directory import SECTIONS
from gcompute.cli.worker import start_worker
from gcompute.config.mesh import MeshShape, OpenMesh, mesh_over
from gcompute.config.model import ModelConfig
from gcompute.config.presets import model_config
from gcompute.config.serve import ServeConfig
from gcompute.config.sizes import over_devices
from gcompute.config.train import PRECISIONS, DataConfig, OptimizerConfig, RunConfig, TrainConfig
from gcompute.config.unused import check_used
from gcompute.hardware.target import Target

DOES_NOT_FIT = 1
NEEDS = f"TPUs: {INSTALL['tpu']}; GPUs: {INSTALL['gpu']}"
# These change how long a run goes on and what it keeps, not its step.
NOT_OF_A_STEP = {
    *("steps", "seed", "eval_every", "eval_batches", "final_eval_batches", "checkpoint_every", "keep", "keep_best"),
    *("log_every", "dispatch_steps", "tensorboard", "sample_every", "sample_prompt"),
}
OTHER_OPTIMIZER_FIELDS = {field.name for field in dataclasses.fields(OptimizerConfig)} - {"optimizer"}
LAST_LINES = 20
MEMORY_ROWS = {
    "arguments_bytes": "arguments: parameters, optimizer, batch",
    "outputs_bytes": "outputs",
    "aliased_bytes": "outputs that take the place of arguments",
    "temporaries_bytes": "temporaries: gradients, activations, gathered parameters",
    "code_bytes": "program",
}
SERVE_PROGRAMS = ("prefill", "decode")
# With keys and values in pages, by what computes attention over them.
PAGED_PROGRAMS = {"xla": ("mixed", "decode"), "ragged": ("mixed", "decode"), "paged": ("decode",)}
MIXED_TOKENS = 512
ONE_PASS = {"prefill": "one prefill", "mixed": "one mixed step", "decode": "one decode step"}
OF_A_SERVING_PROGRAM = {"slots", "decode_steps", "page", "precision"}
NOT_OF_A_SERVING_PROGRAM = {field.name for field in dataclasses.fields(ServeConfig)} - OF_A_SERVING_PROGRAM
SERVE_MEMORY_ROWS = {
    **MEMORY_ROWS,
    "arguments_bytes": "arguments: parameters, key/value cache",
    "temporaries_bytes": "temporaries: activations, copies of weights and cache",
}


class CompileTrainCommand(SectionedCommand):
    examples = (
        "gcompute compile train llama3-8b --on v5e:4x4 --mesh fsdp=16 --batch 16 --seq 2048 --remat full",
        "gcompute compile train llama3-70b --on v5p:8x8x16 --mesh fsdp=256,tensor=4 --batch 1024 --remat full --json",
        "gcompute compile train llama3-8b --on '2*v6e:4x4' --mesh data=2,fsdp=16 --batch 32 --remat full",
        "gcompute compile train demo --on cpu:8 --mesh data=2,fsdp=4 --hlo step.txt",
    )


class CompileServeCommand(SectionedCommand):
    examples = (
        "gcompute compile serve llama3-8b --on v5e:2x4 --mesh tensor=8 --slots 16 --context 4096 --prompt 2048",
        "gcompute compile serve llama3-8b --on v5e:2x2 --attention ragged --slots 32 --context 4096 --tokens 512",
        "gcompute compile serve mixtral-8x7b --on v5p:2x2x2 --mesh expert=8 --program decode --json",
    )


@click.group(cls=ExampleGroup, invoke_without_command=True)
@click.pass_context
def command(ctx: click.Context) -> None:
    """Compile a real program for chips that are not here: memory by kind, collectives, fits or not."""
    if ctx.invoked_subcommand is None:
        click.echo(ctx.get_help())


@command.command(name="train", cls=CompileTrainCommand)
@click.argument("model", type=MODEL)
@click.option("--on", "target_text", required=True, help=f"v5e:4x4, 2*v5e:4x4, h100:8, cpu:8.  Needs: {NEEDS}")
@click.option("--config", "config_file", type=PATH, help="TOML: [model] [optimizer] [train].")
@click.option("--hlo", type=PATH, help="Write the compiled program's text to this file.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
@config_options(TrainConfig, "Training", NOT_OF_A_STEP)
@config_options(OptimizerConfig, "Training", OTHER_OPTIMIZER_FIELDS)
@config_options(ModelConfig, "Model, instead of MODEL's", **{f.name: None for f in dataclasses.fields(ModelConfig)})
def train(
    model: str, target_text: str, config_file: Path | None, hlo: Path | None, as_json: bool, **values: Any
) -> None:
    """Compile the trainer's own step of MODEL (a preset, or a .json or .toml file) for a target.

    Exit status 0: it fits; 1: it does not; 2: what was asked does not go together.
    """
    target = compile_target(target_text)
    settings = read_toml(config_file, SECTIONS) if config_file else {}
    run = _run_config(model, target, settings, values)
    check_installed(target)
    _check_file(hlo)
    request = {
        "kind": "train",
        "target": str(target),
        "run": run.to_dict(),
        "hlo": str(hlo.absolute()) if hlo else None,
    }
    report = compile_elsewhere(request, target)
    if as_json:
        print(json.dumps({"model": model, "run": run.to_dict(), **report}))
    else:
        _show(model, run, report)
    if not report["fits"]:
        raise SystemExit(DOES_NOT_FIT)


@command.command(name="serve", cls=CompileServeCommand)
@click.argument("model", type=MODEL)
@click.option("--on", "target_text", required=True, help=f"v5e:2x4, h100:8, cpu:8.  Needs: {NEEDS}")
@click.option("--mesh", type=MeshType(), help="data=2,tensor=4; data and fsdp split the slots.  [tensor=all devices]")
@click.option("--attention", type=click.Choice(tuple(PAGED_PROGRAMS)), help="Keys and values in pages, attended to so.")
@click.option("--program", type=click.Choice((*SERVE_PROGRAMS, "mixed")), help="One alone; mixed needs --attention.")
@click.option("--context", type=click.IntRange(min=1), help="Cells of the cache of a slot.  [the model's context]")
@click.option("--prompt", type=click.IntRange(min=1), help="Tokens that the prefill has room for.  [half the context]")
@click.option("--tokens", type=click.IntRange(min=1), help=f"Tokens of a mixed step, all rows'.  [{MIXED_TOKENS}]")
@click.option("--hlo", type=PATH, help="Write the text of the one --program to this file.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
@config_options(ServeConfig, "Serving", NOT_OF_A_SERVING_PROGRAM)
@config_options(
    ModelConfig, "Model, instead of MODEL's", {"context"}, **{f.name: None for f in dataclasses.fields(ModelConfig)}
)
def serve(
    *,
    model: str,
    target_text: str,
    mesh: MeshShape | OpenMesh | None,
    attention: str | None,
    program: str | None,
    context: int | None,
    prompt: int | None,
    tokens: int | None,
    hlo: Path | None,
    as_json: bool,
    **values: Any,
) -> None:
    """Compile the engine's own prefill and decode of MODEL (a preset, or a .json or .toml file) for a target.

    With --attention, keys and values lie in pages, and a mixed step of prompts and decoding replaces the prefill.

    Exit status 0: both fit; 1: one does not; 2: what was asked does not go together.
    """
    target = compile_target(target_text)
    config = dataclasses.replace(model_config(model), **given(ModelConfig, values))
    mesh = _checked_mesh(mesh or MeshShape(tensor=target.num_devices), target, "tensor")
    context = context or config.context
    served = ServeConfig(**given(ServeConfig, values))
    check_installed(target)
    _check_file(hlo)
    programs = SERVE_PROGRAMS if attention is None else PAGED_PROGRAMS[attention]
    if program is not None and program not in programs:
        raise ValueError(
            f"--program {program} is none of {', '.join(programs)}, which there are with --attention"
            f" {attention or 'left out'}."
        )
    if hlo is not None and program is None and len(programs) > 1:
        raise ValueError(f"--hlo is for one program: give --program {' or --program '.join(programs)} too.")
    if tokens is not None and attention is None:
        raise ValueError("--tokens is of a mixed step: give --attention ragged or --attention xla too.")
    asked = {
        "mesh": str(mesh),
        "slots": served.slots,
        "context": context,
        "attention": attention,
        "tokens": tokens or max(MIXED_TOKENS, served.slots),
        "prompt": prompt or -(-context // 2),
        "precision": served.precision if served.precision in PRECISIONS else "bfloat16",
        "decode_steps": served.decode_steps,
        "page": served.page,
    }
    request = {**asked, "kind": "serve", "target": str(target), "model": dataclasses.asdict(config)}
    request |= {"programs": [program] if program else programs, "hlo": str(hlo.absolute()) if hlo else None}
    answer = compile_elsewhere(request, target)
    if as_json:
        print(json.dumps({"model": model, "target": str(target), **asked, **answer}))
    else:
        _show_serving(model, asked, answer["programs"])
    if not answer["fits"]:
        raise SystemExit(DOES_NOT_FIT)


def _check_file(hlo: Path | None) -> None:
    if hlo is not None and not hlo.absolute().parent.is_dir():
        raise ValueError(f"--hlo {hlo}: there is no directory {hlo.absolute().parent}.")


def _checked_mesh(mesh: MeshShape | OpenMesh, target: Target, example: str) -> MeshShape:
    mesh = mesh_over(mesh, target.num_devices)
    if mesh.num_devices != target.num_devices:
        raise ValueError(
            f"mesh {mesh} is of {mesh.num_devices} devices and {target} has {target.num_devices}. Give axes whose"
            f" product is {target.num_devices}, as in --mesh {example}={target.num_devices}."
        )
    return mesh


def _run_config(model: str, target: Target, settings: dict[str, dict[str, Any]], values: dict[str, Any]) -> RunConfig:
    asked = {"mesh": MeshShape(data=target.num_devices), **settings.get("train", {}), **given(TrainConfig, values)}
    train_values = over_devices(asked, target.num_devices)
    train_values["mesh"] = _checked_mesh(train_values["mesh"], target, "fsdp")
    model_values = {**settings.get("model", {}), **given(ModelConfig, values)}
    run = RunConfig(
        model=dataclasses.replace(model_config(model), **model_values),
        optimizer=OptimizerConfig(**{**settings.get("optimizer", {}), **given(OptimizerConfig, values)}),
        train=TrainConfig(**train_values),
        data=DataConfig(),
    )
    check_used(run, {*model_values, *train_values})
    return run


def compile_elsewhere(request: dict[str, Any], target: Target) -> dict[str, Any]:
    """The worker's report on `request`, from a process that starts with the target's environment.

    Raises:
      ValueError: what was asked does not go together, or the compiler failed.
    """
    with tempfile.TemporaryFile() as noise:
        process = start_worker("gcompute.cli.compile_worker", request, target, noise)
        assert process.stdin is not None
        assert process.stdout is not None
        answer: dict[str, Any] = {}
        try:
            with _spinner() as status:
                for line in process.stdout:
                    answer = json.loads(line)
                    if "doing" in answer and status is not None:
                        status.update(answer["doing"])
            process.wait()
        finally:
            process.kill()
            process.wait()
            with suppress(BrokenPipeError):
                process.stdin.close()
            process.stdout.close()
        if "report" in answer:
            return answer["report"]
        if "error" in answer:
            raise ValueError(answer["error"])
        noise.seek(0)
        said = noise.read().decode("utf-8", errors="replace").strip().splitlines()
        print("\n".join(said[-LAST_LINES:]), file=sys.stderr)
        if "failed" in answer:
            raise ValueError(answer["failed"])
        if process.returncode == -9:
            raise ValueError(
                f"compiling for {target} was killed, as happens when the memory of this machine is not enough."
                " Try a smaller model or fewer layers (--layers)."
            )
        raise ValueError(f"compiling for {target} failed with exit status {process.returncode}; see above.")


def _spinner() -> Any:
    """A line that turns on standard error, on a terminal only."""
    from gcompute.cli.consoles import plain_console

    console = plain_console(stderr=True)
    if not console.is_terminal:
        return nullcontext()
    return console.status("starting the compiler")


def _show(model: str, run: RunConfig, report: dict[str, Any]) -> None:
    """Print the report as tables."""
    from gcompute.cli.consoles import plain_console
    from gcompute.cli.progress import duration

    console = plain_console()
    config = run.train
    console.print(
        f"{model}: one train step on {report['target']} ({report['num_devices']:,} devices), mesh {config.mesh}, batch"
        f" {config.batch} x {run.seq} in {report['accumulation']} microbatches, {report['precision']},"
        f" {run.optimizer.optimizer}, remat {config.remat}; compiled in {duration(report['compile_s'])}",
        soft_wrap=True,
    )
    show_report(report, console, MEMORY_ROWS, "one step")
    console.print(verdict(run, report), style="green" if report["fits"] else "red", soft_wrap=True)


def _show_serving(model: str, asked: dict[str, Any], reports: dict[str, dict[str, Any]]) -> None:
    from gcompute.cli.consoles import plain_console
    from gcompute.cli.progress import duration

    console = plain_console()
    for program, report in reports.items():
        console.print(
            f"{model}: {program} on {report['target']} ({report['num_devices']:,} devices), mesh {asked['mesh']},"
            f" {asked['slots']} slots of {asked['context']}, {asked['precision']}{_details(program, asked)};"
            f" compiled in {duration(report['compile_s'])}",
            soft_wrap=True,
        )
        show_report(report, console, SERVE_MEMORY_ROWS, ONE_PASS[program])
        for kernel, number in (report.get("kernels") or {}).items():
            console.print(f"kernel {kernel}: {number} calls")
        said = fits_or_not(report, "fewer --slots; a shorter --context; --mesh with more tensor; more chips")
        console.print(f"{program} {said}", style="green" if report["fits"] else "red", soft_wrap=True)


def _details(program: str, asked: dict[str, Any]) -> str:
    size = {"prefill": f", prompt {asked['prompt']}", "mixed": f", {asked['tokens']} tokens"}.get(program, "")
    return size + (f", {asked['attention']} attention over pages" if asked["attention"] else "")


def show_report(report: dict[str, Any], console: Any, rows: dict[str, str], of: str) -> None:
    """Print one program's memory, whose kinds are called as `rows` say, and collectives."""
    from rich.table import Table

    memory, limit = report["memory"], report["limit_bytes"]
    table = Table(title="memory of one device, by the compiler", title_justify="left", show_header=False)
    table.add_column()
    table.add_column(justify="right")
    for name, label in rows.items():
        if memory[name]:
            table.add_row(label, gib(memory[name]))
    table.add_row("total", gib(report["needed_bytes"]), style="bold")
    if limit:
        table.add_row("available", gib(limit))
    console.print(table)
    if report["largest"] and not report["fits"]:
        console.print("largest buffers:")
        for one in report["largest"]:
            console.print(f"  {gib(one['size_bytes']):>12}  {one['arrays']}", soft_wrap=True)
    if report["unreadable"]:
        console.print(f"collectives: {report['unreadable']}", soft_wrap=True)
    else:
        _show_collectives(report["collectives"], console, of)


def gib(num_bytes: float) -> str:
    return f"{num_bytes / 2**30:,.2f} GiB" if num_bytes >= 2**25 else f"{num_bytes / 2**20:,.2f} MiB"


def _show_collectives(collectives: list[dict[str, Any]], console: Any, of: str) -> None:
    from rich.table import Table

    if not collectives:
        console.print("no collectives")
        return
    table = Table(title=f"collectives of {of}", title_justify="left")
    for name in ("kind", "along", "dtype"):
        table.add_column(name, no_wrap=True)
    for name in ("number", "runs", "sent by a device"):
        table.add_column(name, justify="right", no_wrap=True)
    for one in collectives:
        axes = ",".join(one["axes"]) if one["axes"] else "parts of axes"
        table.add_row(
            one["kind"],
            f"{axes} (between slices)" if one["between_slices"] else axes,
            one["dtype"],
            str(one["num_instructions"]),
            f"{one['runs']:,}",
            gib(one["sent_bytes"]),
        )
    console.print(table)


def verdict(run: RunConfig, report: dict[str, Any]) -> str:
    """Of a train step, as `fits_or_not`."""
    return fits_or_not(report, "" if report["fits"] else advice(run, report))


def fits_or_not(report: dict[str, Any], help_text: str) -> str:
    """Fits or not, with both numbers, and what would help."""
    needed, limit = report["needed_bytes"], report["limit_bytes"]
    if limit is None:
        return f"compiles: {gib(needed)} a device. The devices of a CPU share the memory of the machine."
    if report["fits"]:
        return f"fits: {gib(needed)} of {gib(limit)} a device, {needed / limit:.0%}."
    return f"does not fit: it needs {gib(needed)} of {gib(limit)} a device. What would help: {help_text}."


def advice(run: RunConfig, report: dict[str, Any]) -> str:
    """Changes that need less memory, the cheapest first."""
    config, mesh = run.train, run.train.mesh
    assert mesh is not None
    rows = config.batch // (mesh.batch_shards * report["accumulation"])
    found = []
    if config.remat != "full":
        found.append("--remat full")
    if config.collective_matmul and mesh.num_devices > mesh.data:
        found.append("--no-collective-matmul")
    if rows > 1:
        found.append(
            f"--accumulation {2 * report['accumulation']} or a smaller --batch ({rows} sequences a device now)"
        )
    elif mesh.context == 1 and mesh.tensor == 1:
        found.append("a shorter --seq, or splitting it: --mesh with tensor or context above 1")
    if mesh.data > 1:
        found.append(f"splitting the parameters over the data axis too: --mesh with fsdp={mesh.data * mesh.fsdp}")
    found.append("more chips")
    return "; ".join(found)
