"""What the planning commands share: the chips that are known, `this` machine among them; how answers are written."""

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from gcompute.cli.consoles import plain_console
from gcompute.hardware.catalogue import catalogue, catalogue_with
from gcompute.hardware.chip import Chip
from gcompute.hardware.target import Target

THIS = "this"
LEAST_WIDTH = 140


def known_chips(path: Path | None) -> Mapping[str, Chip]:
    """The catalogue, with what the user's file adds."""
    return catalogue_with(path) if path else catalogue()


def planning_target(text: str, chips: Mapping[str, Chip], *, again: bool = False) -> Target:
    """The target that `text` names; "this", or "this:1", is the device at hand, measured (anew with `again`).

    Raises:
      ValueError: the chip or slice does not exist, or the target is of fake devices, which have no figures.
    """
    name, _, number = text.strip().lower().partition(":")
    if name == THIS:
        from gcompute.cli.chips import measured_chip

        if number and (not number.isdecimal() or int(number) < 1):
            raise ValueError(f"target {text!r} is not understood. Plan for --on this, the device at hand.")
        if number and int(number) > 1:
            raise ValueError(
                f"target {text!r}: how fast the devices of this machine are joined was not measured. Plan for one, --on"
                " this, or name the chip, as in h100:8."
            )
        chip = measured_chip(again=again)
        return Target(chip=THIS, shape=(1,), known=chip)
    target = Target.parse(text, chips)
    if target.known is None:
        raise ValueError(
            f"{target} is of fake devices, which have no figures. Plan for --on this, measured, or a chip."
        )
    return target


def check_picture(path: Path | None) -> None:
    """Raise ValueError where a picture could not be written to `path`, before anything is worked out for it."""
    if path is None:
        return
    if path.suffix not in (".png", ".html"):
        raise ValueError(f"--plot {path}: the file must end in .png or .html.")
    if not path.absolute().parent.is_dir():
        raise ValueError(f"--plot {path}: there is no directory {path.absolute().parent}.")


def check_positive(flag: str, value: float | None) -> None:
    """Raise ValueError where a flag's number is not above 0, or not finite."""
    if value is not None and not (math.isfinite(value) and value > 0):
        raise ValueError(f"{flag} {value:g} must be a number above 0.")


def checked_json(values: Any) -> str:
    """JSON text; infinities and NaN, which JSON has not, are refused: a plan never prints them."""
    return json.dumps(values, allow_nan=False)


def gib(num_bytes: float) -> str:
    """Bytes for a reader."""
    if abs(num_bytes) >= 2**40:
        return f"{num_bytes / 2**40:,.2f} TiB"
    return f"{num_bytes / 2**30:,.2f} GiB" if abs(num_bytes) >= 2**25 else f"{num_bytes / 2**20:,.2f} MiB"


def seconds(value: float) -> str:
    """Seconds for a reader, from microseconds to days."""
    if value < 1e-3:
        return f"{value * 1e6:,.1f} us"
    if value < 1:
        return f"{value * 1e3:,.1f} ms"
    if value < 600:
        return f"{value:,.2f} s"
    return f"{value / 3600:,.1f} h" if value < 48 * 3600 else f"{value / 86400:,.1f} days"


def count(value: float) -> str:
    """A large number for a reader."""
    for size, letter in ((1e15, "P"), (1e12, "T"), (1e9, "G"), (1e6, "M")):
        if abs(value) >= size:
            return f"{value / size:,.3g} {letter}"
    return f"{value:,.0f}"


def dollars(value: float) -> str:
    """Dollars for a reader."""
    if value == 0 or not math.isfinite(value):
        return f"${value:,.0f}"
    return f"${value:,.0f}" if value >= 1000 else f"${value:,.2f}" if value >= 1 else f"${value:.3g}"


def wide_console() -> Console:
    """A console that does not cut tables short where there is no terminal to be as wide as."""
    console = plain_console()
    return console if console.is_terminal else plain_console(width=LEAST_WIDTH)


def two_columns(title: str, rows: Mapping[str, str], console: Console, *, bold: str | None = None) -> None:
    """Print names and values as a table; the row called `bold` stands out."""
    table = Table(title=title, title_justify="left", show_header=False)
    table.add_column(no_wrap=True)
    table.add_column(justify="right")
    for name, value in rows.items():
        table.add_row(name, value, style="bold" if name == bold else None)
    console.print(table)
