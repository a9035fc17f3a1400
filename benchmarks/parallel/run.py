"""What each way of splitting a program sends, keeps and waits for: the compiled program against the textbook.

    python benchmarks/parallel/run.py                          every strategy, over 8 fake CPU devices
    python benchmarks/parallel/run.py --only ring --only ZeRO  some of them
    python benchmarks/parallel/run.py --on v5e:2x4             by the TPU compiler, where libtpu is installed

On fake devices of one machine time means little, so this reports what is exact: the bytes that a device sends, by
collective and mesh axis; its memory, by the compiler; and the bubble of each pipeline schedule. Compile times are
measured once and noisy. Of bytes that differ from the textbook's a reason is given, which accounts for every one of
them; what nobody can account for is said to be unexplained, and makes the exit status 1. The last line is one JSON
object, `--json FILE` has all of it.
"""

import argparse
import dataclasses
import json
import os
import platform
import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from gcompute.aot.target import check_installed, target_environment
from gcompute.cli.environment import quiet_backends
from gcompute.hardware.target import Target

LEAST_DEVICES = 8
UNEXPLAINED = 1
BUBBLES = "bubbles"
# A terminal may wrap a row of the table; cut off, it would lose numbers.
WIDE = 240


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--on", default="cpu:8", help="devices to compile for, 8 or more (default: cpu:8)")
    parser.add_argument("--only", action="append", metavar="NAME", help=f"programs with NAME in them, or {BUBBLES}")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write every number to FILE")
    options = parser.parse_args()
    try:
        target = Target.parse(options.on)
        check_installed(target)
        if target.num_devices < LEAST_DEVICES:
            raise ValueError(f"{target} has {target.num_devices} devices and the programs are for {LEAST_DEVICES}.")
        if options.json and not options.json.absolute().parent.is_dir():
            raise ValueError(f"--json {options.json}: there is no directory {options.json.absolute().parent}.")
    except ValueError as error:
        parser.error(str(error))
    # Before JAX starts, which the modules of the programs import.
    os.environ.update(target_environment(target))
    quiet_backends()
    import explicit
    import trainer
    from bubbles import bubbles

    from gcompute.aot.compiler import CompilerError

    programs = [*explicit.programs(), *trainer.programs()]
    wanted = {name.lower() for name in options.only or ()}
    chosen = [one for one in programs if not wanted or any(part in f"{one.name} {one.mesh}".lower() for part in wanted)]
    counted = [] if wanted and BUBBLES not in wanted else list(bubbles())
    if not chosen and not counted:
        names = "; ".join(dict.fromkeys(one.name for one in programs))
        parser.error(f"--only {' '.join(options.only)} is in no name. Names: {names}; {BUBBLES}; or a mesh, as fsdp=8.")
    try:
        result = measure(target, chosen, counted)
    except (ValueError, CompilerError) as error:
        parser.error(str(error))
    show(result)
    if options.json:
        options.json.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    print(json.dumps({name: result[name] for name in ("target", "versions", "summary")}))
    return UNEXPLAINED if result["summary"]["unexplained"] else 0


def measure(target: Target, programs: list[Any], counted: list[Any]) -> dict[str, Any]:
    """Compile the programs; plain values."""
    from account import account

    from gcompute.aot.target import target_devices

    devices, accounts = target_devices(target), []
    for done, program in enumerate(programs, 1):
        if sys.stderr.isatty():
            print(f"\r\033[K{done}/{len(programs)} {program.name} {program.mesh}", end="", file=sys.stderr, flush=True)
        one = account(program, devices)
        sent = [{**dataclasses.asdict(row), "ratio": row.ratio} for row in one.sent]
        accounts.append({**dataclasses.asdict(one), "mesh": str(one.mesh), "sent": sent})
    if sys.stderr.isatty():
        print("\r\033[K", end="", file=sys.stderr, flush=True)
    rows = [row for one in accounts for row in one["sent"]]
    return {
        "target": str(target),
        "versions": versions(),
        "programs": accounts,
        "bubbles": [{**dataclasses.asdict(one), "agrees": one.agrees} for one in counted],
        "summary": {
            "collectives": len(rows),
            "as_the_textbook": sum(row["ratio"] == 1 for row in rows),
            "with_a_reason": sum(row["ratio"] != 1 and not row["unexplained_bytes"] for row in rows),
            "unexplained": sum(bool(row["unexplained_bytes"]) for row in rows) + sum(not one.agrees for one in counted),
        },
    }


def versions() -> dict[str, str]:
    """Of what decides the numbers."""
    found = {"python": platform.python_version()}
    for package in ("gcompute", "jax", "jaxlib", "libtpu"):
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found


def show(result: dict[str, Any]) -> None:
    """Print the tables as Markdown."""
    from rich.console import Console

    console = Console(markup=False, highlight=False, width=WIDE)
    named = ", ".join(f"{name} {number}" for name, number in result["versions"].items())
    console.print(f"{result['target']}; {named}", soft_wrap=True)
    if result["programs"]:
        reasons = _show_programs(result["programs"], console)
        for reason, letter in reasons.items():
            console.print(f"- {letter}: {reason}", soft_wrap=True)
        console.print()
    if result["bubbles"]:
        _show_bubbles(result["bubbles"], console)
    summary = result["summary"]
    console.print(
        f"{summary['collectives']} rows of collectives: {summary['as_the_textbook']} send exactly what the textbook"
        f" says, {summary['with_a_reason']} differ for the reasons given, {summary['unexplained']} are unexplained.",
        soft_wrap=True,
    )


def _show_programs(programs: list[dict[str, Any]], console: Any) -> dict[str, str]:
    """One row a program, axes and kind; the reasons, by the letter that stands for each."""
    table = _table("program", "mesh", "along", "collective")
    for name in ("runs", "sent, bytes", "textbook", "ratio", "why", "arguments", "temporaries", "compile, s"):
        table.add_column(name, justify="left" if name == "why" else "right", no_wrap=True)
    letters: dict[str, str] = {}
    for one in programs:
        memory = one["memory"]
        first = [one["name"], one["mesh"]]
        last = [f"{memory[name]:,}" for name in ("arguments_bytes", "temporaries_bytes")] + [f"{one['compile_s']:.1f}"]
        for row in one["sent"]:
            why = [letters.setdefault(reason, _letter(len(letters))) for reason in row["reasons"]]
            if row["unexplained_bytes"]:
                why.append(f"UNEXPLAINED: {row['unexplained_bytes']:+,.0f}")
            table.add_row(
                *first,
                "+".join(row["axes"]) if row["axes"] else "parts of axes",
                row["kind"],
                f"{row['runs']:,}",
                f"{row['sent_bytes']:,.0f}",
                f"{row['textbook_bytes']:,.0f}",
                _ratio(row["ratio"]),
                " ".join(why),
                *last,
            )
            first, last = ["", ""], ["", "", ""]
    console.print(table)
    return letters


def _show_bubbles(counted: list[dict[str, Any]], console: Any) -> None:
    table = _table("schedule")
    names = ("stages", "microbatches", "ticks", "slots", "idle", "bubble", "formula", "asynchronous", "formula", "")
    for name in names:
        table.add_column(name, justify="right", no_wrap=True)
    for one in counted:
        shares = ("lockstep", "lockstep_formula", "asynchronous", "asynchronous_formula")
        counts = ("stages", "microbatches", "ticks", "slots", "idle_slots")
        table.add_row(
            one["schedule"],
            *(str(one[name]) for name in counts),
            *(f"{one[name]:.4f}" for name in shares),
            "equal" if one["agrees"] else "UNEXPLAINED",
        )
    console.print(table)
    console.print()


def _table(*names: str) -> Any:
    from rich import box
    from rich.table import Table

    table = Table(box=box.MARKDOWN)
    for name in names:
        table.add_column(name, no_wrap=True)
    return table


def _ratio(ratio: float | None) -> str:
    return "none" if ratio is None else "1" if ratio == 1 else f"{ratio:.5f}"


def _letter(number: int) -> str:
    return chr(ord("a") + number)


if __name__ == "__main__":
    sys.exit(main())
