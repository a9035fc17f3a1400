"""The catalogue of chips, and what a user's own file adds to it.

A user's file is TOML like `chips.toml`: a chip with new figures replaces those of the catalogue, one with a new name is
added. `source` may be any text there.
"""

import dataclasses
import math
import tomllib
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any

from gcompute.config.fields import nearest
from gcompute.hardware.chip import Chip, Figure

CATALOGUE = Path(__file__).with_name("chips.toml")
KINDS = ("tpu", "gpu", "cpu")
ALIASES = {"v5litepod": "v5e", "v4p": "v4", "trillium": "v6e", "tpu7x": "v7x", "ironwood": "v7x", "h100": "h100-sxm"}
PEAKS = "peak_flops_per_s"
DTYPES = ("float32", "float16", "bfloat16", "float8", "float4", "int8")
UNITS = {
    PEAKS: {"TFLOP/s": 1e12, "TOP/s": 1e12, "GFLOP/s": 1e9},
    "_bytes_per_s": {"GB/s": 1e9, "Gbit/s": 1e9 / 8, "TB/s": 1e12},
    "_bytes": {"GB": 1e9, "GiB": 2.0**30, "MiB": 2.0**20},
    "_latency_s": {"us": 1e-6},
    "usd_per_hour": {"USD/h": 1.0},
    "usd_per_hour_spot": {"USD/h": 1.0},
    "purchase_usd": {"USD": 1.0},
    "_watts": {"W": 1.0},
    "_chips": {"chips": 1.0},
    "wrap_multiple": {"chips": 1.0},
    "torus_dims": {"dims": 1.0},
    "matrix_dim": {"lanes": 1.0},
    "devices_per_chip": {"devices": 1.0},
}
WHOLE = {"chips", "dims", "devices", "lanes"}
# No chip costs this much; catalogues hold such values where they know no price.
MOST_USD_PER_HOUR = 200.0
FIELDS = {field.name for field in dataclasses.fields(Chip)} - {"name", "kind", "about", "figures", PEAKS}
NEEDED = ("kind", PEAKS, "hbm_bytes", "hbm_bytes_per_s")


def find_chip(name: str, chips: Mapping[str, Chip] | None = None) -> Chip:
    """The chip called `name` in `chips`, which are those of the catalogue unless given.

    >>> find_chip("v5e").peak_flops_per_s["bfloat16"]
    197000000000000.0

    Raises:
      ValueError: there is none; the message names the nearest.
    """
    known = catalogue() if chips is None else chips
    name = name.strip().lower()
    found = name if name in known else ALIASES.get(name, name)
    if found not in known:
        raise ValueError(f"chip {name!r} is not known. {nearest(name, [*known, *ALIASES])}")
    return known[found]


@cache
def catalogue() -> Mapping[str, Chip]:
    """Every chip of the catalogue by name."""
    document = tomllib.loads(CATALOGUE.read_text(encoding="utf-8"))
    return _chips({}, document, origin=CATALOGUE.name)


def catalogue_with(path: Path) -> Mapping[str, Chip]:
    """The catalogue, with what the user's file at `path` changes and adds.

    Raises:
      ValueError: the file cannot be read, or holds a field, unit or value that makes no sense; one line says which.
    """
    try:
        document = tomllib.loads(path.read_text(encoding="utf-8-sig"))
    except OSError as error:
        raise ValueError(f"chip file {path} cannot be read: {error.strerror}.") from None
    except (ValueError, RecursionError) as error:
        raise ValueError(f"chip file {path} does not parse as TOML: {error}.") from None
    return _chips(catalogue(), document, origin=str(path))


def _chips(known: Mapping[str, Chip], document: Mapping[str, Any], *, origin: str) -> Mapping[str, Chip]:
    for section in document:
        if section not in ("sources", "chips"):
            raise ValueError(f"{origin}: section {section!r} is not known. {nearest(section, ('sources', 'chips'))}")
    sources = document.get("sources", {})
    chips = dict(known)
    for name, values in document.get("chips", {}).items():
        if not isinstance(values, dict):
            raise ValueError(f"{origin}: [chips.{name}] must be a table of figures.")
        chips[name] = _chip(name, values, sources, chips.get(name), f"{origin} [chips.{name}]")
    return chips


def _chip(name: str, values: Mapping[str, Any], sources: Mapping[str, Any], before: Chip | None, origin: str) -> Chip:
    peaks = dict(before.peak_flops_per_s) if before else {}
    figures = dict(before.figures) if before else {}
    fields: dict[str, Any] = {}
    for key, value in values.items():
        if key in ("kind", "about"):
            if not isinstance(value, str) or (key == "kind" and value not in KINDS):
                raise ValueError(f"{origin}: {key} = {value!r} is not known. Legal: {', '.join(KINDS)}.")
            fields[key] = value
        elif key == PEAKS:
            if not isinstance(value, dict):
                raise ValueError(f"{origin}: {PEAKS} must be a table by dtype, as in {PEAKS}.bfloat16.")
            for dtype, peak in value.items():
                if dtype not in DTYPES:
                    raise ValueError(f"{origin}: dtype {dtype!r} is not known. {nearest(dtype, DTYPES)}")
                figures[f"{PEAKS}.{dtype}"] = figure = _figure(peak, sources, f"{origin} {PEAKS}.{dtype}")
                peaks[dtype] = _in_si(PEAKS, figure, f"{origin} {PEAKS}.{dtype}")
        elif key in FIELDS:
            figures[key] = figure = _figure(value, sources, f"{origin} {key}")
            fields[key] = _in_si(key, figure, f"{origin} {key}")
        else:
            raise ValueError(f"{origin}: field {key!r} is not known. {nearest(key, [*FIELDS, PEAKS, 'kind', 'about'])}")
    if before is not None:
        return dataclasses.replace(before, **fields, peak_flops_per_s=peaks, figures=figures)
    missing = [field for field in NEEDED if field not in values]
    if missing or not peaks:
        raise ValueError(f"{origin}: a new chip needs {', '.join(missing or [f'{PEAKS}.DTYPE'])} too.")
    return Chip(**{"about": name, **fields}, name=name, peak_flops_per_s=peaks, figures=figures)


def _figure(value: Any, sources: Mapping[str, Any], origin: str) -> Figure:
    """One figure of the file, with its source written out."""
    if not isinstance(value, dict) or not {"value", "unit", "source"} <= set(value):
        raise ValueError(f'{origin}: a figure is written {{ value = 1.2, unit = "USD/h", source = "where from" }}.')
    unknown = set(value) - {"value", "unit", "source", "date", "others"}
    if unknown:
        raise ValueError(f"{origin}: {', '.join(sorted(unknown))} is not part of a figure.")
    number = value["value"]
    if isinstance(number, bool) or not isinstance(number, int | float) or not math.isfinite(number) or number <= 0:
        raise ValueError(f"{origin}: {number!r} must be a number above 0.")
    source = sources.get(value["source"], {"about": value["source"]})
    return Figure(
        value=float(number),
        unit=str(value["unit"]),
        source=str(source["about"]),
        date=value.get("date", source.get("date")),
        others=tuple(_figure(other, sources, f"{origin} others") for other in value.get("others", ())),
    )


def _in_si(field: str, figure: Figure, origin: str) -> float | int:
    """The figure's value in the unit of its field."""
    units = UNITS.get(field) or next(units for ending, units in UNITS.items() if field.endswith(ending))
    if figure.unit not in units:
        raise ValueError(f"{origin}: unit {figure.unit!r} does not fit. Legal: {', '.join(units)}.")
    value = figure.value * units[figure.unit]
    if figure.unit == "USD/h" and value > MOST_USD_PER_HOUR:
        raise ValueError(
            f"{origin}: {figure.value} dollars an hour is more than any chip costs: a price list's mark for no price?"
        )
    if figure.unit in WHOLE:
        if value != int(value):
            raise ValueError(f"{origin}: {figure.value} must be a whole number of {figure.unit}.")
        return int(value)
    return value
