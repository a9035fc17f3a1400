"""gcompute plan cost: what chips cost rented and bought, when buying pays, and what would change that."""

import dataclasses
import html
import io
import json
import textwrap
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click

from gcompute.cli.flags import FILE, SectionedCommand, config_options, given
from gcompute.config.figure_text import figure_text
from gcompute.hardware.catalogue import catalogue, catalogue_with
from gcompute.hardware.chip import Chip, Figure
from gcompute.hardware.target import Target
from gcompute.measure.whole_file import write_whole
from gcompute.plan.cost import (
    HOST_POWER,
    MONTHS_PER_YEAR,
    BuyOrRent,
    Change,
    OnPremise,
    Price,
    changes,
    price_of,
    usd_per_million_tokens,
)

ASSUMED = "assumed: the default"
# What is computed, by name: of rented chips and of bought ones, None where it has no meaning.
Results = dict[str, tuple[float | None, float | None]]
SHARE = 0.2
UNITS = {
    "purchase_usd": "USD a chip",
    "power_watts": "W a chip",
    "pue": "",
    "usd_per_kwh": "USD/kWh",
    "staff_usd_per_year": "USD a year",
    "utilization": "of all hours",
    "months": "months",
    "upkeep_share": "of the purchase a year",
    "usd_per_chip_hour": "USD a chip-hour",
}
NAMES = {
    "purchase_usd": "the purchase price",
    "utilization": "the utilization",
    "usd_per_chip_hour": "the price of renting",
    "staff_usd_per_year": "the cost of staff",
    "upkeep_share": "the cost of upkeep",
    "usd_per_kwh": "the cost of energy",
}


class PlanCostCommand(SectionedCommand):
    examples = (
        "gcompute plan cost h100:64 --purchase-usd 35000",
        "gcompute plan cost h100:64 --purchase-usd 35000 --utilization 0.6 --staff-usd-per-year 150000 --months 48",
        "gcompute plan cost h100:64 --purchase-usd 35000 --usd-per-hour 4.29 --plot cost.png",
        "gcompute plan cost a100-80:8 --purchase-usd 15000 --tokens-per-s 20000 --json",
        "gcompute plan cost b200:72 --purchase-usd 45000 --chips my-prices.toml --plot cost.html",
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class Input:
    """A number that goes in, and what it is: given, a list price with its source, assumed or computed."""

    value: float
    what: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Comparison:
    """All that is shown: what goes in, by name, what comes out, what would change it, and the same in words."""

    target: str
    case: BuyOrRent
    figures: dict[str, Input]
    results: Results
    found: tuple[Change, ...]
    said: str


@click.command(name="cost", cls=PlanCostCommand)
@click.argument("target")
@click.option("--usd-per-hour", type=float, help="Of renting one chip.  [the catalogue's list price]")
@click.option("--spot", is_flag=True, help="Compare with the spot price of the catalogue.")
@click.option("--tokens-per-s", type=float, help="Of all chips at work: dollars of a million tokens too.")
@click.option(
    "--chips",
    "chip_file",
    type=FILE,
    envvar="GCOMPUTE_CHIPS",
    help="TOML file with chips and prices of your own (or set GCOMPUTE_CHIPS).",
)
@click.option("--plot", type=FILE, help="Draw to this .png, or .html with all.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
@config_options(OnPremise, "Bought chips")
def command(
    target: str,
    usd_per_hour: float | None,
    spot: bool,
    tokens_per_s: float | None,
    chip_file: Path | None,
    plot: Path | None,
    as_json: bool,
    **values: Any,
) -> None:
    """Compare renting TARGET in the cloud with buying as many chips: month by month, and when buying pays.

    TARGET is a chip and a number, as in h100:64. Rented chips are paid for the hours in which they work; bought ones
    cost their price, then energy, upkeep and staff in all hours. Interest and what old chips sell for are left out.
    """
    if plot is not None:
        _check_plot(plot)
    wanted = Target.parse(target, catalogue_with(chip_file) if chip_file else catalogue())
    chip = _chip_to_buy(wanted, values["purchase_usd"])
    price = price_of(chip, given=usd_per_hour, spot=spot)
    figures = _figures(chip, price, given(OnPremise, values))
    own = {field.name: figures[field.name].value for field in dataclasses.fields(OnPremise)}
    case = BuyOrRent(
        bought=OnPremise(**{**own, "months": int(own["months"])}),
        num_chips=wanted.num_chips,
        usd_per_chip_hour=price.usd_per_chip_hour,
    )
    found = changes(case, share=SHARE)
    elsewhere = {_source(one): one.value for one in (price.figure.others if price.figure else ())}
    shown = Comparison(
        target=str(wanted),
        case=case,
        figures=figures,
        results=_results(case, tokens_per_s),
        found=found,
        said=in_words(str(wanted), case, found, elsewhere),
    )
    if plot is not None:
        _draw(plot, shown)
    if as_json:
        print(json.dumps(_plain(shown)))
    else:
        _show(shown)
        if plot is not None:
            print(f"drawn to {plot}")


def _check_plot(path: Path) -> None:
    if path.suffix not in (".png", ".html"):
        raise ValueError(f"--plot {path} is neither a picture nor a page. Legal: a name that ends in .png or .html.")
    if not path.parent.is_dir():
        raise ValueError(f"--plot {path} cannot be written: there is no directory {path.parent}.")


def _chip_to_buy(target: Target, purchase_usd: float | None) -> Chip:
    chip = target.known
    if chip is None:
        raise ValueError(f"{target} is this machine, which has no price. Give GPUs, as in h100:64.")
    if chip.kind == "tpu" and (chip.name in catalogue() or purchase_usd is None):
        raise ValueError(
            f"{chip.name} is a TPU, which is rented and cannot be bought. Compare GPUs, as in h100:64; for a chip of"
            " your own file (--chips) give --purchase-usd."
        )
    return chip


def _figures(chip: Chip, price: Price, values: dict[str, Any]) -> dict[str, Input]:
    """Every figure that goes in, by name, and what it is."""
    stated = f": {_source(price.figure)}" if price.figure else ""
    figures = {"usd_per_chip_hour": Input(value=price.usd_per_chip_hour, what=f"{price.what}{stated}")}
    for field in dataclasses.fields(OnPremise):
        if field.name in values:
            figures[field.name] = Input(value=values[field.name], what="given")
        elif field.name == "purchase_usd":
            if chip.purchase_usd is None:
                raise ValueError(
                    f"what one {chip.name} costs is not known: give --purchase-usd, with its share of host and network."
                )
            figures[field.name] = Input(value=chip.purchase_usd, what=_source(chip.figures["purchase_usd"]))
        elif field.name == "power_watts":
            if chip.power_watts is None:
                raise ValueError(f"{chip.name} has no power_watts in the catalogue. Give --power-watts.")
            stated = f"{chip.power_watts:,g} W, {_source(chip.figures['power_watts'])}"
            what = f"computed: {HOST_POWER} for its share of the host x {stated}"
            figures[field.name] = Input(value=HOST_POWER * chip.power_watts, what=what)
        else:
            default: Any = field.default
            figures[field.name] = Input(value=default, what=ASSUMED if default else f"{ASSUMED}, nothing")
    return figures


def _source(figure: Figure) -> str:
    return figure.source + (f" ({figure.date})" if figure.date else "")


def _results(case: BuyOrRent, tokens_per_s: float | None) -> Results:
    """(rented, bought) of everything that is computed."""
    life = case.bought.months
    results: Results = {
        "usd_at_once": (0.0, case.purchase_usd),
        "usd_per_month": (case.rented_usd_per_month, case.bought_usd_per_month),
        "energy_usd_per_month": (None, case.energy_usd_per_month),
        "upkeep_usd_per_month": (None, case.upkeep_usd_per_month),
        "staff_usd_per_month": (None, case.staff_usd_per_month),
        f"usd_after_{life}_months": (case.rented_usd(life), case.bought_usd(life)),
        "usd_per_useful_chip_hour": (case.usd_per_chip_hour, case.usd_per_useful_chip_hour),
    }
    if tokens_per_s is not None:
        rented, bought = case.num_chips * case.usd_per_chip_hour, case.num_chips * case.usd_per_useful_chip_hour
        results["usd_per_million_tokens"] = (
            usd_per_million_tokens(rented, tokens_per_s),
            usd_per_million_tokens(bought, tokens_per_s),
        )
    return results


def in_words(target: str, case: BuyOrRent, found: tuple[Change, ...], elsewhere: dict[str, float]) -> str:
    """When buying pays, and what would change that most and by how much, as one paragraph.

    elsewhere: prices of renting that other sources have.
    """
    life, month, own = case.bought.months, case.break_even_months, case.usd_per_useful_chip_hour
    if month is not None:
        said = (
            f"Buying {target} pays from month {month:.1f}, and has saved {_usd(case.saved_usd)} when the chips are"
            f" {life} months old. It pays within that time while they work {case.break_even_utilization or 0:.0%} of"
            f" the hours or more ({case.bought.utilization:.0%} here), and while a rented chip-hour costs {_usd(own)}"
            f" or more ({_usd(case.usd_per_chip_hour)} here)."
        )
    else:
        share = case.break_even_utilization
        busier = f"the chips worked {share:.0%} of the hours or more, or " if share is not None else ""
        said = (
            f"Buying {target} does not pay within {life} months: it costs {_usd(-case.saved_usd)} more than renting for"
            f" {case.bought.utilization:.0%} of the hours. It would pay if {busier}a rented chip-hour cost {_usd(own)}"
            f" or more ({_usd(case.usd_per_chip_hour)} here)."
        )
    for change, verb in zip(found, ("What changes that most is", "Next is"), strict=False):
        names = " or ".join(NAMES[name] for name in change.names)
        capped = "utilization" in change.names and case.bought.utilization * (1 + SHARE) > 1
        more = "all hours" if capped else f"{SHARE:.0%} more"
        said += f" {verb} {names}: {SHARE:.0%} less {_moves(change.less)}, {more} {_moves(change.more)}."
    for source, price in elsewhere.items():
        other = case.with_figure("usd_per_chip_hour", price)
        said += f" Renting for {_usd(price)} ({source}) {_moves(other)}."
    return said


def _moves(case: BuyOrRent) -> str:
    if case.break_even_months is None:
        return f"means that it does not pay (by {_usd(-case.saved_usd)})"
    return f"makes it month {case.break_even_months:.1f} ({_usd(case.saved_usd)} saved)"


def _usd(value: float | None) -> str:
    """Dollars, as many digits as one reads."""
    if value is None:
        return "-"
    if abs(value) >= 1e6:
        return f"${value / 1e6:,.2f}M"
    return f"${value:,.0f}" if abs(value) >= 1000 else f"${value:,.2f}"


def _amount(name: str, value: float) -> str:
    shown = f"{value:.0%}" if name in ("utilization", "upkeep_share") else f"{value:,.10g}"
    return f"{shown} {UNITS[name]}".strip()


def _rows(shown: Comparison) -> list[tuple[str, str, str]]:
    month, share = shown.case.break_even_months, shown.case.break_even_utilization
    return [
        *((_words(name), _usd(rented), _usd(bought)) for name, (rented, bought) in shown.results.items()),
        ("break-even month", "", f"none in {shown.case.bought.months}" if month is None else f"{month:.1f}"),
        ("break-even utilization", "", "none" if share is None else f"{share:.0%}"),
    ]


def _words(name: str) -> str:
    return name.replace("_", " ").replace("usd", "USD")


def _show(shown: Comparison) -> None:
    from rich.table import Table

    from gcompute.cli.consoles import plain_console

    console = plain_console()
    inputs = Table(title=f"{shown.target}: {shown.case.num_chips} chips; what goes in", title_justify="left")
    inputs.add_column("figure", no_wrap=True)
    inputs.add_column("value", justify="right", no_wrap=True)
    inputs.add_column("what it is")
    for name, figure in shown.figures.items():
        inputs.add_row(_words(name), _amount(name, figure.value), figure.what)
    console.print(inputs)
    table = Table(title="what comes out, computed", title_justify="left")
    table.add_column("all chips together", no_wrap=True)
    table.add_column("rented", justify="right", no_wrap=True)
    table.add_column("bought", justify="right", no_wrap=True)
    for row in _rows(shown):
        table.add_row(*row)
    console.print(table)
    console.print(shown.said)


def _plain(shown: Comparison) -> dict[str, Any]:
    def result(one: BuyOrRent) -> dict[str, float | None]:
        return {"break_even_months": one.break_even_months, "saved_usd": one.saved_usd}

    case, figures, results = shown.case, shown.figures, shown.results
    months = range(case.bought.months + 1)
    return {
        "target": shown.target,
        "num_chips": case.num_chips,
        "figures": {
            name: {"value": figure.value, "unit": UNITS[name], "what": figure.what} for name, figure in figures.items()
        },
        "computed": {
            "rented": {name: rented for name, (rented, _) in results.items() if rented is not None},
            "bought": {name: bought for name, (_, bought) in results.items()},
            **result(case),
            "break_even_utilization": case.break_even_utilization,
        },
        "changes": [
            {"figures": one.names, "share": SHARE, "less": result(one.less), "more": result(one.more)}
            for one in shown.found
        ],
        "cumulative_usd": {
            "months": list(months),
            "rented": [case.rented_usd(month) for month in months],
            "bought": [case.bought_usd(month) for month in months],
        },
        "in_words": shown.said,
    }


def picture_of(target: str, case: BuyOrRent, renting: str) -> bytes:
    """A PNG: cumulative dollars of both against months, the break-even marked. renting: what its price is."""
    from matplotlib.figure import Figure as Canvas
    from matplotlib.ticker import FuncFormatter, MultipleLocator

    def label(text: str) -> str:
        return figure_text(textwrap.fill(text, 72))

    life, month = case.bought.months, case.break_even_months
    ends = (0, life)
    canvas = Canvas(figsize=(8, 4.8), dpi=120, layout="constrained")
    axes = canvas.subplots()
    rent = label(f"rented: {_usd(case.usd_per_chip_hour)} a chip-hour, {renting}")
    buy = label(f"bought: {_usd(case.bought.purchase_usd)} a chip, then {_usd(case.bought_usd_per_month)} a month")
    axes.plot(ends, [case.rented_usd(end) for end in ends], color="#c44e52", linewidth=2, label=rent)
    axes.plot(ends, [case.bought_usd(end) for end in ends], color="#4c78a8", linewidth=2, label=buy)
    if month is None:
        axes.plot([], [], " ", label=f"no break-even within {life} months")
    else:
        height = case.rented_usd(month)
        axes.vlines(month, 0, height, color="#777777", linestyle=":")
        text = label(f"break-even: month {month:.1f}, {_usd(height)}")
        axes.plot(month, height, "o", color="#222222", markersize=8, label=text, clip_on=False)
    top = 1.35 * max(case.rented_usd(life), case.bought_usd(life))
    axes.set(xlim=ends, ylim=(0, top), xlabel="months since the purchase")
    axes.set_ylabel("dollars spent, all chips together")
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: label(_usd(value) if value else "$0")))
    if 24 <= life <= 120:
        axes.xaxis.set_major_locator(MultipleLocator(MONTHS_PER_YEAR))
    axes.set_title(label(f"{target}: rented for {case.bought.utilization:.0%} of the hours, or bought"))
    axes.grid(alpha=0.3)
    axes.legend(loc="upper left", frameon=False, fontsize="small")
    buffer = io.BytesIO()
    canvas.savefig(buffer, format="png")
    return buffer.getvalue()


def _draw(path: Path, shown: Comparison) -> None:
    from gcompute.cli.report import STYLE, picture, table

    case, title = shown.case, html.escape(shown.target)
    content = picture_of(shown.target, case, shown.figures["usd_per_chip_hour"].what)
    if path.suffix == ".html":
        going_in = [(_words(name), _amount(name, figure.value), figure.what) for name, figure in shown.figures.items()]
        content = f"""<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">
<title>{title}: rent or buy</title><style>{STYLE}</style></head><body>
<h1>{title}: rent or buy</h1>
<p class="lead">{case.num_chips:,} chips over {case.bought.months} months.</p>
<p>{html.escape(shown.said)}</p>
{picture(content, "cumulative dollars by month")}
<h2>What comes out, computed</h2>
{table(("all chips together", "rented", "bought"), _rows(shown))}
<h2>What goes in</h2>
{table(("figure", "value", "what it is"), going_in)}
</body></html>
""".encode()
    try:
        write_whole(path, content)
    except OSError as error:
        raise ValueError(f"--plot {path} cannot be written: {error.strerror}.") from None
