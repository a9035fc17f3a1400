"""gcompute certify: every parallel form against an independent one-device program."""

import importlib.metadata
import json
import os
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import nullcontext, suppress
from pathlib import Path
from typing import Any

import click
from click.core import ParameterSource

from gcompute.aot.target import INSTALL, check_installed, compile_target
from gcompute.aot.xla_flags import FAST_COMPILES, add_flags
from gcompute.certify.strategies import STRATEGIES
from gcompute.cli import certify_serving
from gcompute.cli.environment import quiet_backends
from gcompute.cli.flags import PATH, SectionedCommand
from gcompute.cli.worker import start_worker
from gcompute.config.fields import nearest
from gcompute.hardware.target import Target

RED = 1
LAST_LINES = 20
# Of a table that goes to a file or a pipe.
WIDTH = 140


class CertifyCommand(SectionedCommand, click.Group):
    """The certificate of parallelism by itself, and the proofs of other things by their names."""

    examples = (
        "gcompute certify",
        "gcompute certify --strategy tensor",
        "gcompute certify --quick --json",
        "gcompute certify --html certificate.html",
        "gcompute certify --strategy fsdp --on v5e:2x4",
        *certify_serving.ServingCommand.examples,
    )

    def format_options(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        SectionedCommand.format_options(self, ctx, formatter)
        self.format_commands(ctx, formatter)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in self.commands:
            raise click.UsageError(f"certify {cmd_name!r} is not known. {nearest(cmd_name, self.commands)}")
        return super().get_command(ctx, cmd_name)


@click.group(cls=CertifyCommand, invoke_without_command=True)
@click.option("--strategy", help=f"Rows of one strategy: {', '.join(STRATEGIES)}.  [all]")
@click.option("--devices", type=click.IntRange(1), default=8, help="Fake CPU devices to run on.  [8]")
@click.option("--quick", is_flag=True, help="One row of each strategy, in seconds.")
@click.option(
    "--on", "target_text", help=f"Compile every row for this target too, as in v5e:2x4.  Needs: {INSTALL['tpu']}"
)
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
@click.option("--html", "html_path", type=PATH, help="Write one self-contained page to this file.")
@click.pass_context
def command(
    ctx: click.Context,
    strategy: str | None,
    devices: int,
    quick: bool,
    target_text: str | None,
    as_json: bool,
    html_path: Path | None,
) -> None:
    """Train and run every strategy on fake devices and compare with one device, number by number.

    Each row says how far outputs, losses, gradients and trained parameters are from a program that shares no code with
    the library: bit by bit or in float64, and in float32 and bfloat16 beside what reordering sums does to one device.
    It lists the collectives of the compiled program, and is red where one is missing or does not belong.

    Exit status 0: all rows are green; 1: one is red; 2: what was asked does not go together.
    """
    if ctx.invoked_subcommand is not None:
        mine = [name for name in ctx.params if ctx.get_parameter_source(name) is not ParameterSource.DEFAULT]
        if mine:
            raise click.UsageError(f"{ctx.invoked_subcommand} takes its own options: give them after its name.")
        return
    if strategy is not None and strategy not in STRATEGIES:
        raise ValueError(f"strategy {strategy!r} is not known. {nearest(strategy, STRATEGIES)}")
    if html_path is not None and not html_path.absolute().parent.is_dir():
        raise ValueError(f"--html {html_path}: there is no directory {html_path.absolute().parent}.")
    target = None if target_text is None else compile_target(target_text)
    if target is not None:
        check_installed(target)
    if "jax" not in sys.modules:
        _fake_devices(devices)
    quiet_backends()
    from gcompute.certify.certificate import certify, counts, select
    from gcompute.cli.consoles import plain_console

    selection = select(strategy, devices=devices, quick=quick)
    most = max(subject.mesh.num_devices for subject in selection.subjects)
    if target is not None and target.num_devices < most:
        raise ValueError(f"these rows need {most} devices and {target} has {target.num_devices}. Use a larger slice.")
    started, errors = time.perf_counter(), plain_console(stderr=True)
    rows = list(_watched(certify(selection.subjects), "certifying", len(selection.subjects), errors))
    if target is not None:
        request = {"target": str(target), "strategy": strategy, "devices": devices, "quick": quick}
        rows = _with_target(rows, request, target, errors)
    result = {
        "devices": devices,
        "target": None if target is None else str(target),
        "versions": {name: importlib.metadata.version(name) for name in ("jax", "jaxlib")},
        "counts": counts(rows),
        "left_out": selection.num_left_out,
        "seconds": round(time.perf_counter() - started, 1),
        "rows": [row.to_dict() for row in rows],
    }
    if html_path is not None:
        from gcompute.cli.certificate_page import render
        from gcompute.measure.whole_file import write_whole

        write_whole(html_path, render(result))
    if as_json:
        print(json.dumps(result))
    else:
        _show(result)
    if result["counts"]["differs"]:
        raise SystemExit(RED)


command.add_command(certify_serving.command)


def _fake_devices(devices: int) -> None:
    """What JAX must find in the environment when it starts."""
    flags = add_flags(os.environ.get("XLA_FLAGS", ""), FAST_COMPILES)
    os.environ.update(JAX_PLATFORMS="cpu", JAX_NUM_CPU_DEVICES=str(devices), XLA_FLAGS=flags)


def _watched(items: Iterator[Any], what: str, total: int, console: Any) -> Iterator[Any]:
    """The items, with a bar on a terminal that counts them."""
    from gcompute.cli.progress import WorkProgress

    with WorkProgress(console) if console.is_terminal else nullcontext() as bar:
        for done, item in enumerate(items, 1):
            if bar is not None:
                bar(what, done, total)
            yield item


def _with_target(rows: list[Any], request: dict[str, Any], target: Target, console: Any) -> list[Any]:
    """The rows with what each compiles to on the target."""
    from gcompute.certify.certificate import Elsewhere
    from gcompute.certify.collectives import Found

    by_name = {(row.form, row.name): row for row in rows}
    total = sum(bool(row.collectives) for row in rows)
    for answer in _watched(_answers(request, target), f"compiling for {target}", total, console):
        key = answer["form"], answer["name"]
        elsewhere = Elsewhere(
            name=answer["name"],
            form=answer["form"],
            place=str(target),
            found=Found(answer["counts"]),
            faults=tuple(answer["faults"]),
        )
        by_name[key] = elsewhere.added_to(by_name[key])
    return list(by_name.values())


def _answers(request: dict[str, Any], target: Target) -> Iterator[dict[str, Any]]:
    """What the worker says of each row, from a process that starts with the target's environment.

    Raises:
      ValueError: what was asked does not go together, or the process ended before it was done.
    """
    with tempfile.TemporaryFile() as noise:
        process = start_worker("gcompute.cli.certify_worker", request, target, noise)
        assert process.stdin is not None
        assert process.stdout is not None
        try:
            for line in process.stdout:
                answer = json.loads(line)
                if "error" in answer:
                    raise ValueError(answer["error"])
                yield answer
            process.wait()
        finally:
            process.kill()
            process.wait()
            with suppress(BrokenPipeError):
                process.stdin.close()
            process.stdout.close()
        if process.returncode:
            noise.seek(0)
            said = noise.read().decode("utf-8", errors="replace").strip().splitlines()
            print("\n".join(said[-LAST_LINES:]), file=sys.stderr)
            raise ValueError(f"compiling for {target} ended with exit status {process.returncode}; see above.")


def _show(result: dict[str, Any]) -> None:
    """Print the certificate as tables, what is red, and a verdict."""
    from rich.table import Table
    from rich.text import Text

    from gcompute.cli.certificate_page import LEGEND, TITLES, collectives_text, exact_text, ratio_text, summary
    from gcompute.cli.consoles import plain_console

    console = plain_console()
    if not console.is_terminal:
        console = plain_console(width=WIDTH)
    colours = {"equal": "green", "differs": "bold red"}
    for form, title in TITLES.items():
        rows = [row for row in result["rows"] if row["form"] == form and row["refusal"] is None]
        if not rows:
            continue
        table = Table(title=title, title_justify="left", caption=f"collectives: {LEGEND}", caption_justify="left")
        table.add_column("row")
        table.add_column("error", justify="right", no_wrap=True)
        precisions = ("float32", "bfloat16") if any(ratio_text(row, "float32") for row in rows) else ()
        for precision in precisions:
            table.add_column(f"{precision}\n/ band", justify="right", no_wrap=True)
        places = list(dict.fromkeys(place for row in rows for place in row["collectives"]))
        for place in places:
            table.add_column(f"collectives, {place}")
        table.add_column("", no_wrap=True)
        for row in rows:
            ratios = [ratio_text(row, precision) for precision in precisions]
            found = [collectives_text(row["collectives"].get(place, {})) for place in places]
            verdict = Text(row["verdict"], style=colours[row["verdict"]])
            table.add_row(row["name"], exact_text(row), *ratios, *found, verdict)
        console.print(table)
    refused = [row for row in result["rows"] if row["refusal"] is not None]
    if refused:
        table = Table(title="refused, as they must be", title_justify="left", show_header=False)
        for row in refused:
            table.add_row(row["name"], row["refusal"])
        console.print(table)
    for row in result["rows"]:
        for reason in row["reasons"]:
            console.print(Text(f"{row['form']} {row['name']}: {reason}", style="red"), soft_wrap=True)
    console.print(summary(result), style="red" if result["counts"]["differs"] else "green", soft_wrap=True)
