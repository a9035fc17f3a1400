"""gcompute machine: what is here and what it can do."""

import json
from typing import Any

import click

from gcompute.cli.environment import quiet_backends, restart_fast
from gcompute.cli.flags import SectionedCommand
from gcompute.measure.cache import cache_directory


class MachineCommand(SectionedCommand):
    examples = ("gcompute machine", "gcompute machine --json", "gcompute machine --again")


@click.command(cls=MachineCommand)
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
@click.option("--again", is_flag=True, help="Measure the roofline anew, though it is known.")
@click.option("--fast/--no-fast", default=True, help="Restart once with huge pages where that is faster.  [fast]")
def command(as_json: bool, again: bool, fast: bool) -> None:
    """Show devices, cores and memory, and the measured roofline: matmul FLOP/s by dtype, memory bytes/s."""
    restart_fast(fast)
    quiet_backends()
    from gcompute.cli.consoles import plain_console
    from gcompute.cli.session import measured_roofline
    from gcompute.measure.machine import look

    cache = cache_directory()
    machine = look()
    roofline = measured_roofline(cache, plain_console(stderr=True), again=again)
    if as_json:
        print(json.dumps({"machine": machine.to_dict(), "roofline": roofline.to_dict()}))
        return
    show_machine(machine.to_dict(), roofline.to_dict(), plain_console())


def show_machine(machine: dict[str, Any], roofline: dict[str, Any], console: Any) -> None:
    """Print the machine and its roofline, each figure with where it comes from."""
    from rich.table import Table

    table = Table(title="this machine", title_justify="left", show_header=False)
    for name, value in machine.items():
        if value is not None:
            shown = f"{value / 2**30:.1f} GiB" if name.endswith("_bytes") and isinstance(value, int) else str(value)
            table.add_row(name.removesuffix("_bytes").replace("_", " "), shown)
    for dtype, rate in roofline["matmul_flops_per_s"].items():
        table.add_row(f"matmul, {dtype} (measured)", f"{rate / 1e9:,.0f} GFLOP/s")
    table.add_row("memory, read (measured)", f"{roofline['memory_bytes_per_s'] / 1e9:,.1f} GB/s")
    console.print(table)
