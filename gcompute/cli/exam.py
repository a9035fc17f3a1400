"""gcompute exam: what the planner says against what is known, class by class."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import click

from gcompute.cli.flags import SectionedCommand
from gcompute.cli.planning import checked_json, gib, seconds, wide_console
from gcompute.plan.accuracy import RECORD

FAILED = 1
WORST_SHOWN = 5


class ExamCommand(SectionedCommand):
    examples = (
        "gcompute exam",
        "gcompute exam --cases",
        "gcompute exam --json",
        "gcompute exam --compile 3",
    )


@click.command(cls=ExamCommand)
@click.option("--cases", is_flag=True, help="List every case, not only the worst of each class.")
@click.option("--compile", "num_compiled", type=click.IntRange(1), help="Compile so many of the recorded steps again.")
@click.option("--write", is_flag=True, help="Write the errors that plans carry (gcompute/plan/accuracy.json).")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
def command(cases: bool, num_compiled: int | None, write: bool, as_json: bool) -> None:
    """Ask the planner what is known, and say how far off it is.

    Worked problems of the scaling-book by the library's public functions; published step times, each predicted by
    efficiencies that were fitted without that model on that chip; memory against recorded results of the TPU compiler.
    Beside them, with no limit demanded: published runs and servers that no fit saw.
    Exit status 0: every class is within its limits; 1: one is not.
    """
    from gcompute.exam.report import headline_errors, sit
    from gcompute.exam.unseen import unseen_points

    parts = sit()
    again = _compile_again(num_compiled) if num_compiled else []
    if write:
        write_accuracy(parts, RECORD)
    if as_json:
        headline = [{"name": one.name, "step_s": one.step_s, "error": error} for one, error in headline_errors()]
        document = {
            "parts": [part.to_dict() for part in parts],
            "unseen": [{**dataclasses.asdict(one), "error": one.error} for one in unseen_points()],
            "headline": headline,
            "compiled_again": again,
        }
        print(checked_json(document))
    else:
        _show(parts, headline_errors(), cases=cases)
        for row in again:
            print(f"compiled again: {row['name']}: {gib(row['compiled_bytes'])}, recorded {gib(row['recorded_bytes'])}")
    if not all(part.passed for part in parts):
        raise SystemExit(FAILED)


def write_accuracy(parts: Any, path: Path) -> None:
    """The errors of each class, as `plan.accuracy` reads them."""
    from gcompute.exam.unseen import unseen_errors

    classes = {
        part.kind: {
            "num": len(part.cases),
            "median": round(part.median, 4),
            "worst": round(part.worst, 4),
            "low": round(part.low, 4),
            "examined": part.examined(),
        }
        for part in parts
    }
    lines = [f"  {json.dumps(kind)}: {json.dumps(values)}" for kind, values in classes.items()]
    unseen = [f"  {json.dumps(kind)}: {json.dumps(dataclasses.asdict(one))}" for kind, one in unseen_errors().items()]
    text = '{\n "classes": {\n' + ",\n".join(lines) + '\n },\n "unseen": {\n' + ",\n".join(unseen) + "\n }\n}\n"
    path.write_text(text, encoding="utf-8")


def _compile_again(num: int) -> list[dict[str, Any]]:
    """The first `num` records, the quickest to compile first, by the compiler that is here."""
    from gcompute.aot.target import check_installed
    from gcompute.cli.compile import compile_elsewhere
    from gcompute.exam.compiled import compiled_train

    rows = []
    order = sorted(compiled_train(), key=lambda one: one.run.model.layers * one.run.model.dim)
    for one in order[:num]:
        check_installed(one.target)
        report = compile_elsewhere({"target": str(one.target), "run": one.run.to_dict(), "hlo": None}, one.target)
        rows.append({"name": one.name, "compiled_bytes": report["needed_bytes"], "recorded_bytes": one.needed_bytes})
    return rows


def _show(parts: Any, headline: Any, *, cases: bool) -> None:
    from rich.table import Table

    from gcompute.exam.unseen import unseen_errors, unseen_points

    console = wide_console()
    table = Table(title="the planner's exam", title_justify="left")
    table.add_column("class", no_wrap=True)
    for name in ("cases", "median", "worst", "demanded"):
        table.add_column(name, justify="right", no_wrap=True)
    table.add_column("", no_wrap=True)
    for part in parts:
        limits = "each its own" if part.limits is None else f"{part.limits[0]:.0%}, {part.limits[1]:.0%}"
        table.add_row(
            part.kind,
            str(len(part.cases)),
            f"{part.median:.1%}",
            f"{part.worst:.1%}",
            limits,
            "passed" if part.passed else "FAILED",
            style=None if part.passed else "red",
        )
    console.print(table)
    for part in parts:
        shown = sorted(part.cases, key=lambda case: -abs(case.error))
        failed = [case for case in shown if not case.within]
        if part.wrong_fits:
            console.print(f"{part.kind}: {part.wrong_fits} said to fit where the compiler ran out", style="red")
        for case in part.cases if cases else failed[:WORST_SHOWN]:
            mark = "" if case.within else f"  outside its tolerance. {case.note or ''}"
            console.print(f"  {case.error:+7.1%}  {case.name[:140]}{mark}", soft_wrap=True)
    console.print("\npublished runs and servers that no fit saw:")
    for kind, error in unseen_errors().items():
        console.print(f"  {kind}: {error}", soft_wrap=True)
    for one in unseen_points() if cases else ():
        said = f"  ({one.uncertain})" if one.uncertain else ""
        console.print(f"  {one.error:+7.1%}  {one.kind}: {one.name}{said}", soft_wrap=True, markup=False)
    console.print("\nten published runs, by the efficiencies in use (predicted against published):")
    for one, error in headline:
        console.print(f"  {error:+6.1%}  {seconds(one.step_s):>9}  {one.name}", soft_wrap=True)
