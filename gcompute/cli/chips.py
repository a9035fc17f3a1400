"""gcompute chips: the catalogue of chips, with the source of every figure."""

import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import click

from gcompute.cli.flags import FILE, SectionedCommand
from gcompute.hardware.catalogue import catalogue, catalogue_with, find_chip
from gcompute.hardware.chip import Chip, Figure

THIS = "this"
MEASURED = "measured here by gcompute machine"
TABLE_DTYPES = ("bfloat16", "int8", "float8")


class ChipsCommand(SectionedCommand):
    examples = (
        "gcompute chips",
        "gcompute chips v5p",
        "gcompute chips v6e --json",
        "gcompute chips this",
        "gcompute chips v5e --file my-prices.toml",
    )


@click.command(cls=ChipsCommand)
@click.argument("name", required=False)
@click.option(
    "--file",
    "path",
    type=FILE,
    envvar="GCOMPUTE_CHIPS",
    help="TOML file with chips and prices of your own (or set GCOMPUTE_CHIPS).",
)
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
def command(name: str | None, path: Path | None, as_json: bool) -> None:
    """List the known chips, or every figure of chip NAME with where it comes from.

    NAME "this" stands for the device at hand, measured. Peaks are dense; links and networks are one direction.

    The file holds tables such as [chips.v5e] with figures such as
    usd_per_hour = { value = 0.9, unit = "USD/h", source = "our contract" }.
    """
    chips = catalogue_with(path) if path else catalogue()
    if name is None:
        if as_json:
            print(json.dumps({"chips": {name: _plain(chip) for name, chip in chips.items()}}))
        else:
            _show_all(chips)
        return
    chip = measured_chip() if name == THIS else find_chip(name, chips)
    if as_json:
        print(json.dumps(_plain(chip)))
    else:
        _show_one(chip)


def _plain(chip: Chip) -> dict[str, Any]:
    return {"name": chip.name, **dataclasses.asdict(chip)}


def measured_chip(*, again: bool = False) -> Chip:
    """The device at hand as a chip: what its roofline came to (measured anew with `again`), and its memory."""
    from gcompute.cli.consoles import plain_console
    from gcompute.cli.environment import quiet_backends

    quiet_backends()
    from gcompute.cli.session import measured_roofline
    from gcompute.measure.cache import cache_directory
    from gcompute.measure.machine import look

    machine = look()
    roofline = measured_roofline(cache_directory(), plain_console(stderr=True), again=again)
    peaks = dict(roofline.matmul_flops_per_s)
    figures = {
        f"peak_flops_per_s.{dtype}": Figure(value=peak, unit="FLOP/s", source=MEASURED) for dtype, peak in peaks.items()
    }
    figures["hbm_bytes_per_s"] = Figure(value=roofline.memory_bytes_per_s, unit="B/s", source=MEASURED)
    of_device = machine.device_memory_bytes
    hbm_bytes = of_device or machine.memory_bytes
    figures["hbm_bytes"] = Figure(value=hbm_bytes, unit="B", source="the device" if of_device else "the host's memory")
    return Chip(
        name=THIS,
        kind=machine.backend,
        about=machine.cpu or machine.device_kind,
        peak_flops_per_s=peaks,
        hbm_bytes=hbm_bytes,
        hbm_bytes_per_s=roofline.memory_bytes_per_s,
        figures=figures,
    )


def _show_all(chips: Mapping[str, Chip]) -> None:
    from rich.table import Table

    from gcompute.cli.consoles import plain_console

    table = Table(title="chips: dense peaks in TFLOP/s or TOP/s (datasheets)", title_justify="left")
    table.add_column("chip", no_wrap=True)
    for heading in (*TABLE_DTYPES, "HBM GB", "GB/s", "link GB/s", "USD/h"):
        table.add_column(heading, justify="right")
    for name, chip in chips.items():
        link = chip.link_bytes_per_s or chip.domain_bytes_per_s
        table.add_row(
            name,
            *(_number(chip.peak_flops_per_s.get(dtype), 1e12) for dtype in TABLE_DTYPES),
            _number(chip.hbm_bytes, 1e9),
            _number(chip.hbm_bytes_per_s, 1e9),
            _number(link, 1e9),
            _number(chip.usd_per_hour, 1),
        )
    console = plain_console()
    console.print(table)
    console.print("link: one direction of an ICI link, or of one GPU into NVLink. `gcompute chips NAME` shows sources.")


def _number(value: float | None, unit: float) -> str:
    return "-" if value is None else f"{value / unit:,.5g}"


def _show_one(chip: Chip) -> None:
    from rich.table import Table

    from gcompute.cli.consoles import plain_console

    console = plain_console()
    console.print(f"{chip.name}: {chip.about} ({chip.kind})")
    table = Table()
    table.add_column("figure", no_wrap=True)
    table.add_column("value", justify="right", no_wrap=True)
    table.add_column("source")
    for name, figure in chip.figures.items():
        table.add_row(name, _value(figure), _source(figure))
        for other in figure.others:
            table.add_row("  elsewhere", _value(other), _source(other))
    console.print(table)
    for dtype, weight_bytes in (("bfloat16", 2), ("float32", 4)):
        if dtype in chip.peak_flops_per_s:
            batch = chip.critical_batch(dtype, weight_bytes=weight_bytes)
            console.print(f"critical batch, {dtype}: {batch:,.0f} tokens (predicted: peak / bandwidth x bytes / 2)")


def _value(figure: Figure) -> str:
    return f"{figure.value:,.5g} {figure.unit}"


def _source(figure: Figure) -> str:
    return figure.source + (f" ({figure.date})" if figure.date else "")
