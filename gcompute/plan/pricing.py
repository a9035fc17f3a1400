"""What a chip costs an hour: as given, or from the catalogue, with where that comes from."""

import math
from dataclasses import dataclass

from gcompute.hardware.catalogue import MOST_USD_PER_HOUR
from gcompute.hardware.chip import Chip

CHINCHILLA_TOKENS_PER_PARAM = 20


@dataclass(frozen=True, slots=True, kw_only=True)
class Price:
    """Dollars of one chip for an hour, and in words where that is from."""

    usd_per_chip_hour: float
    source: str


def price_of(chip: Chip, *, usd_per_hour: float | None = None, spot: bool = False) -> Price | None:
    """The price of a chip: `usd_per_hour` where it is given, else the catalogue's; None where that has none.

    Raises:
      ValueError: the price given makes no sense.
    """
    if usd_per_hour is not None:
        check_price("--usd-per-hour", usd_per_hour)
        if usd_per_hour > MOST_USD_PER_HOUR:
            raise ValueError(
                f"--usd-per-hour {usd_per_hour:g} is more than any chip costs an hour. Give the price of one chip, not"
                " of a host or slice."
            )
        return Price(usd_per_chip_hour=usd_per_hour, source="given")
    name = "usd_per_hour_spot" if spot else "usd_per_hour"
    value: float | None = getattr(chip, name)
    if value is None:
        return None
    figure = chip.figures.get(name)
    source = figure.source + (f", {figure.date}" if figure and figure.date else "") if figure else "the catalogue"
    return Price(usd_per_chip_hour=value, source=("spot: " if spot else "on demand: ") + source)


def check_price(name: str, value: float | None) -> None:
    """Raise ValueError where a number that is paid or counted is not above 0, or not finite."""
    if value is not None and not (math.isfinite(value) and value > 0):
        raise ValueError(f"{name} {value:g} must be a number above 0.")
