"""Predict dollars: of a million tokens, of a training run, and of chips that are bought against as many rented ones.

Bought chips cost their price at once, then energy, upkeep and people every month, however much they work. Rented ones
cost for the hours in which they work. What is left out is the same for both (storage, traffic, the model's own people)
or unknown (interest, what old chips sell for).
"""

import dataclasses
import math
from dataclasses import dataclass

from gcompute.config.fields import option
from gcompute.hardware.catalogue import MOST_USD_PER_HOUR
from gcompute.hardware.chip import Chip, Figure

HOURS_PER_MONTH = 365 * 24 / 12
MONTHS_PER_YEAR = 12
# Power of a chip with its share of the host over that of the chip. Source: NVIDIA's datasheets of DGX H100 (10.2 kW for
# 8 chips of 700 W) and DGX B200 (14.3 kW for 8 of 1000 W), the most that either draws.
HOST_POWER = 1.8
# No chip, building or staff goes beyond; such a figure is a slip of the hand.
MOST = {
    "purchase_usd": 1e6,
    "power_watts": 1e5,
    "pue": 5.0,
    "usd_per_kwh": 10.0,
    "staff_usd_per_year": 1e10,
    "utilization": 1.0,
    "months": 240,
    "upkeep_share": 1.0,
    "usd_per_chip_hour": MOST_USD_PER_HOUR,
    "num_chips": 1e7,
}
LEAST = {"pue": 1.0, "months": 1, "num_chips": 1, "usd_per_kwh": 0.0, "staff_usd_per_year": 0.0, "upkeep_share": 0.0}
# What may turn out otherwise than one thinks. Energy is a product of three figures, of which one stands for all.
UNCERTAIN = ("utilization", "usd_per_chip_hour", "purchase_usd", "staff_usd_per_year", "upkeep_share", "usd_per_kwh")


@dataclass(frozen=True, slots=True, kw_only=True)
class Price:
    """What renting one chip for an hour costs. what: "given", "list price" or "spot price", which `figure` states."""

    usd_per_chip_hour: float
    what: str
    figure: Figure | None = None

    def __str__(self) -> str:
        if self.figure is None:
            return self.what
        return f"{self.what}: {self.figure.source}" + (f", {self.figure.date}" if self.figure.date else "")


def known_price(chip: Chip, *, given: float | None = None, spot: bool = False) -> Price | None:
    """As `price_of`, but None where the catalogue has no such price and none was given."""
    if given is None and (chip.usd_per_hour_spot if spot else chip.usd_per_hour) is None:
        return None
    return price_of(chip, given=given, spot=spot)


def price_of(chip: Chip, *, given: float | None = None, spot: bool = False) -> Price:
    """The price that was given, else what the catalogue says.

    >>> from gcompute.hardware.catalogue import find_chip
    >>> price_of(find_chip("v5e"), spot=True).usd_per_chip_hour
    0.245

    Raises:
      ValueError: the catalogue has no such price, or the one given makes no sense.
    """
    if given is not None:
        if spot:
            raise ValueError("--spot takes the price from the catalogue: leave --usd-per-hour away, or --spot.")
        _check("--usd-per-hour", given, least=0, most=MOST_USD_PER_HOUR, above=True)
        return Price(usd_per_chip_hour=given, what="given")
    field = "usd_per_hour_spot" if spot else "usd_per_hour"
    price = chip.usd_per_hour_spot if spot else chip.usd_per_hour
    if price is None:
        kind = "spot price" if spot else "price"
        raise ValueError(f"{chip.name} has no {kind} in the catalogue. Give --usd-per-hour, or {field} in a chip file.")
    what = "spot price" if spot else "list price"
    return Price(usd_per_chip_hour=price, what=what, figure=chip.figures.get(field))


def usd_per_million_tokens(usd_per_hour_total: float, tokens_per_s: float) -> float:
    """Dollars of 10^6 tokens: 10^6 usd_per_hour / (3600 tokens_per_s), both of all chips together.

    >>> usd_per_million_tokens(36.0, 10_000)
    1.0

    Raises:
      ValueError: a figure is not above 0 (the price may be 0), or not finite.
    """
    _check("usd_per_hour_total", usd_per_hour_total, least=0)
    _check("tokens_per_s", tokens_per_s, least=0, above=True)
    return usd_per_hour_total / (3600 * tokens_per_s) * 1e6


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainingCost:
    """Predicted time and dollars of a training run. spot_usd: None where no spot price is known."""

    hours: float
    usd: float
    spot_usd: float | None

    @property
    def days(self) -> float:
        return self.hours / 24


def training_cost(
    chip: Chip, *, num_chips: int, tokens: float, tokens_per_s: float, usd_per_hour: float | None = None
) -> TrainingCost:
    """What it takes to train on `tokens` at `tokens_per_s` of all chips together.

        hours = tokens / (3600 tokens_per_s),   usd = hours num_chips usd_per_hour

    usd_per_hour: of one chip, in place of the catalogue's; the spot price is then not known. On spot chips time is lost
    to interruptions too, which are not counted.

    Raises:
      ValueError: the chip has no price, or a figure makes no sense.
    """
    _check("tokens", tokens, least=0, above=True)
    _check("tokens_per_s", tokens_per_s, least=0, above=True)
    _check("num_chips", num_chips, least=1, most=MOST["num_chips"])
    hours = tokens / tokens_per_s / 3600
    spot = chip.usd_per_hour_spot if usd_per_hour is None else None
    return TrainingCost(
        hours=hours,
        usd=hours * num_chips * price_of(chip, given=usd_per_hour).usd_per_chip_hour,
        spot_usd=None if spot is None else hours * num_chips * spot,
    )


def _needed(help: str) -> float:
    return dataclasses.field(metadata={"help": help, "choices": None})


@dataclass(frozen=True, slots=True, kw_only=True)
class OnPremise:
    """Chips that are bought, and what they cost from then on.

    Raises:
      ValueError: a figure is not a number, negative, or larger than any that makes sense.
    """

    purchase_usd: float = _needed("of one chip with its share of host and network  [default: the chip file's]")
    power_watts: float = _needed(f"of one chip with its share of the host  [default: {HOST_POWER} times the chip's]")
    pue: float = option(1.3, "power of the building over that of its computers")
    usd_per_kwh: float = option(0.10, "of electricity")
    staff_usd_per_year: float = option(0.0, "of the people who run all chips together")
    utilization: float = option(0.6, "share of hours in which the chips do work that would have been rented, 0 to 1")
    months: int = option(48, "life of the chips")
    upkeep_share: float = option(0.05, "of the purchase, every year: maintenance, repair, insurance")

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            _check_figure(field.name, getattr(self, field.name))


@dataclass(frozen=True, slots=True, kw_only=True)
class BuyOrRent:
    """`num_chips` bought, against as many rented at `usd_per_chip_hour` for the hours in which they work.

    Raises:
      ValueError: as `OnPremise`.
    """

    bought: OnPremise
    num_chips: int
    usd_per_chip_hour: float

    def __post_init__(self) -> None:
        _check_figure("num_chips", self.num_chips)
        _check_figure("usd_per_chip_hour", self.usd_per_chip_hour)

    @property
    def purchase_usd(self) -> float:
        return self.num_chips * self.bought.purchase_usd

    @property
    def energy_usd_per_month(self) -> float:
        """chips watts / 1000 pue usd_per_kwh hours: as if at work all the time, so no less than it comes to."""
        own = self.bought
        return self.num_chips * own.power_watts / 1000 * own.pue * own.usd_per_kwh * HOURS_PER_MONTH

    @property
    def upkeep_usd_per_month(self) -> float:
        return self.purchase_usd * self.bought.upkeep_share / MONTHS_PER_YEAR

    @property
    def staff_usd_per_month(self) -> float:
        return self.bought.staff_usd_per_year / MONTHS_PER_YEAR

    @property
    def bought_usd_per_month(self) -> float:
        """o = energy + upkeep + staff, after the purchase."""
        return self.energy_usd_per_month + self.upkeep_usd_per_month + self.staff_usd_per_month

    @property
    def rented_usd_per_month(self) -> float:
        """r = chips usd_per_chip_hour utilization hours."""
        return self.num_chips * self.usd_per_chip_hour * self.bought.utilization * HOURS_PER_MONTH

    def bought_usd(self, months: float) -> float:
        """P + o m: the purchase, and `months` of running the chips.

        Raises:
          ValueError: below 0, or longer than the chips live.
        """
        _check("months", months, least=0, most=self.bought.months)
        return self.purchase_usd + self.bought_usd_per_month * months

    def rented_usd(self, months: float) -> float:
        """r m. Raises as `bought_usd`."""
        _check("months", months, least=0, most=self.bought.months)
        return self.rented_usd_per_month * months

    @property
    def saved_usd(self) -> float:
        """What buying saves over the life of the chips; below 0 it costs more than renting."""
        return self.rented_usd(self.bought.months) - self.bought_usd(self.bought.months)

    @property
    def break_even_months(self) -> float | None:
        """m at which P + o m = r m, that is P / (r - o); None where the chips don't live as long.

        >>> own = OnPremise(purchase_usd=7300, power_watts=1000, pue=1, usd_per_kwh=0, upkeep_share=0, utilization=0.5)
        >>> BuyOrRent(bought=own, num_chips=1, usd_per_chip_hour=2.0).break_even_months
        10.0
        """
        saved = self.rented_usd_per_month - self.bought_usd_per_month
        if saved <= 0 or self.purchase_usd > saved * self.bought.months:
            return None
        return self.purchase_usd / saved

    @property
    def usd_per_useful_chip_hour(self) -> float:
        """(P + o life) / (chips utilization hours life); a rented hour costs more from this price on."""
        useful = self.num_chips * self.bought.utilization * HOURS_PER_MONTH * self.bought.months
        return self.bought_usd(self.bought.months) / useful

    @property
    def break_even_utilization(self) -> float | None:
        """The share of hours from which buying pays within the life of the chips; None where all are too few.

        u at which P + o life = chips usd_per_chip_hour u hours life.
        """
        share = self.bought.utilization * self.usd_per_useful_chip_hour / self.usd_per_chip_hour
        return share if share <= 1 else None

    def with_figure(self, name: str, value: float) -> "BuyOrRent":
        """The same with another value for one figure of its own or of `bought`."""
        if name in ("num_chips", "usd_per_chip_hour"):
            return dataclasses.replace(self, **{name: value})
        return dataclasses.replace(self, bought=dataclasses.replace(self.bought, **{name: value}))

    def figure(self, name: str) -> float:
        return getattr(self if name in ("num_chips", "usd_per_chip_hour") else self.bought, name)


@dataclass(frozen=True, slots=True, kw_only=True)
class Change:
    """The same chips with a figure less, and more: one of `names`, which all do the same. swing_usd: by how much that
    moves what buying saves, at most."""

    names: tuple[str, ...]
    less: BuyOrRent
    more: BuyOrRent
    swing_usd: float

    def equals(self, other: "Change") -> bool:
        """Whether both do the same, but for rounding."""
        pairs = ((self.less, other.less), (self.more, other.more))
        return all(math.isclose(one.saved_usd, two.saved_usd, rel_tol=1e-9) for one, two in pairs)


def changes(case: BuyOrRent, *, share: float = 0.2) -> tuple[Change, ...]:
    """What each uncertain figure does to the result when it is `share` less or more; what does most comes first.

    A figure does not go beyond what makes sense (a utilization of 1), and one of 0 is left out.
    """
    _check("share", share, least=0, most=0.99, above=True)
    found: list[Change] = []
    for name in (name for name in UNCERTAIN if case.figure(name) > 0):
        value = case.figure(name)
        less = case.with_figure(name, value * (1 - share))
        more = case.with_figure(name, min(MOST[name], value * (1 + share)))
        swing = max(abs(one.saved_usd - case.saved_usd) for one in (less, more))
        found.append(Change(names=(name,), less=less, more=more, swing_usd=swing))
    merged: list[Change] = []
    for change in sorted(found, key=lambda change: -change.swing_usd):
        if merged and change.equals(merged[-1]):
            merged[-1] = dataclasses.replace(merged[-1], names=(*merged[-1].names, *change.names))
        else:
            merged.append(change)
    return tuple(merged)


def _check_figure(name: str, value: float) -> None:
    if name in ("months", "num_chips") and (isinstance(value, bool) or not isinstance(value, int)):
        raise ValueError(f"{name} must be a whole number, got {value!r}.")
    _check(name, value, least=LEAST.get(name, 0.0), most=MOST[name], above=name not in LEAST)


def _check(name: str, value: float, *, least: float, most: float = math.inf, above: bool = False) -> None:
    """Raise ValueError where `value` is no number from `least` (or only above it) to `most`."""
    is_number = isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
    if is_number and (value > least if above else value >= least) and value <= most:
        return
    low = f"above {least:g}" if above else f"at least {least:g}"
    high = "" if most == math.inf else f", at most {most:,.12g}"
    raise ValueError(f"{name} must be {low}{high}, got {value!r}.")
