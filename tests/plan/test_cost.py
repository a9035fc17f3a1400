"""Dollars: hand-computed break-evens, what holds for any figures, and every bad figure in one line."""

import dataclasses
import math
import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gcompute.hardware.catalogue import find_chip
from gcompute.plan.cost import (
    HOURS_PER_MONTH,
    MOST,
    BuyOrRent,
    OnPremise,
    changes,
    price_of,
    training_cost,
    usd_per_million_tokens,
)


def case(*, num_chips: int = 10, usd_per_chip_hour: float = 2.0, **changed: float) -> BuyOrRent:
    """10 chips of 29,200 dollars and 1000 W; a month of 730 hours, of which they work half."""
    figures = {
        "purchase_usd": 29_200.0,
        "power_watts": 1000.0,
        "pue": 1.5,
        "usd_per_kwh": 0.1,
        "staff_usd_per_year": 12_000.0,
        "utilization": 0.5,
        "months": 100,
        "upkeep_share": 0.06,
        **changed,
    }
    own = OnPremise(**figures)  # pyright: ignore[reportArgumentType]
    return BuyOrRent(bought=own, num_chips=num_chips, usd_per_chip_hour=usd_per_chip_hour)


def test_by_hand():
    one = case()
    assert HOURS_PER_MONTH == 730
    assert one.purchase_usd == 292_000
    # 10 kW x 1.5 x 730 h x 0.1 USD; 6% of 292,000 over 12; 12,000 over 12.
    assert one.energy_usd_per_month == pytest.approx(1095)
    assert one.upkeep_usd_per_month == pytest.approx(1460)
    assert one.staff_usd_per_month == 1000
    assert one.bought_usd_per_month == pytest.approx(3555)
    # 10 chips x 2 USD x 365 h.
    assert one.rented_usd_per_month == pytest.approx(7300)
    # 292,000 / (7300 - 3555).
    assert one.break_even_months == pytest.approx(77.9706, abs=1e-3)
    assert one.bought_usd(100) == pytest.approx(292_000 + 355_500)
    assert one.rented_usd(100) == pytest.approx(730_000)
    assert one.saved_usd == pytest.approx(82_500)
    # 647,500 USD over 10 x 365 h x 100 months.
    assert one.usd_per_useful_chip_hour == pytest.approx(647_500 / 365_000)
    # All hours cost 1,460,000 USD.
    assert one.break_even_utilization == pytest.approx(647_500 / 1_460_000)


def test_never_within_the_life_of_the_chips():
    short = case(months=60)
    assert short.break_even_months is None
    assert short.saved_usd == pytest.approx(60 * 7300 - 292_000 - 60 * 3555)
    # It would pay if they worked more; and not at any rate where renting is cheap enough.
    assert short.break_even_utilization == pytest.approx((292_000 + 60 * 3555) / (60 * 14_600))
    cheap = case(usd_per_chip_hour=0.4)
    assert cheap.rented_usd_per_month < cheap.bought_usd_per_month
    assert cheap.break_even_months is None
    assert cheap.break_even_utilization is None


def test_it_breaks_even_just_at_the_break_even_utilization_and_price():
    one = case()
    assert one.break_even_utilization is not None
    just = one.with_figure("utilization", one.break_even_utilization * (1 + 1e-9))
    assert just.break_even_months == pytest.approx(100)
    assert one.with_figure("utilization", one.break_even_utilization * (1 - 1e-6)).break_even_months is None
    assert one.with_figure("usd_per_chip_hour", one.usd_per_useful_chip_hour * (1 + 1e-9)).break_even_months is not None


def test_what_changes_the_result_most():
    found = changes(case(), share=0.1)
    # A tenth of 730,000 USD of rent, by either figure; then a tenth of 292,000 and its upkeep of 146,000.
    assert found[0].names == ("utilization", "usd_per_chip_hour")
    assert [one.names[0] for one in found[1:]] == ["purchase_usd", "upkeep_share", "usd_per_kwh", "staff_usd_per_year"]
    assert [one.swing_usd for one in found] == pytest.approx([73_000, 43_800, 14_600, 10_950, 10_000])
    assert found[0].less.saved_usd == pytest.approx(82_500 - 73_000)
    assert found[1].less.break_even_months == pytest.approx(262_800 / (7300 - 3409))
    assert found[1].more.break_even_months == pytest.approx(321_200 / (7300 - 3701))
    # A utilization of 1 is the most, so it and the price are no longer the same.
    busy = changes(case(utilization=0.9))
    assert {one.names for one in busy[:2]} == {("utilization",), ("usd_per_chip_hour",)}
    assert next(one for one in busy if one.names == ("utilization",)).more.bought.utilization == 1
    assert "staff_usd_per_year" not in {name for one in changes(case(staff_usd_per_year=0)) for name in one.names}


CASES = st.builds(
    case,
    num_chips=st.integers(1, 10_000),
    usd_per_chip_hour=st.floats(0.01, 100),
    purchase_usd=st.floats(10, 1e6),
    power_watts=st.floats(1, 1e4),
    pue=st.floats(1, 3),
    usd_per_kwh=st.floats(0, 1),
    staff_usd_per_year=st.floats(0, 1e7),
    utilization=st.floats(0.01, 1),
    months=st.integers(1, 240),
    upkeep_share=st.floats(0, 1),
)


@given(CASES)
def test_break_even_is_where_both_cost_the_same(one: BuyOrRent):
    month, life = one.break_even_months, one.bought.months
    if month is None:
        assert one.saved_usd <= 1e-9 * one.bought_usd(life)
        return
    assert 0 < month <= life
    assert one.bought_usd(month) == pytest.approx(one.rented_usd(month), rel=1e-6)
    assert one.bought_usd(month / 2) > one.rented_usd(month / 2)
    assert one.saved_usd >= -1e-9 * one.bought_usd(life)


@given(CASES, st.floats(1, 2))
def test_monotone_in_every_figure(one: BuyOrRent, factor: float):
    def months(case: BuyOrRent) -> float:
        return math.inf if case.break_even_months is None else case.break_even_months

    for name in ("purchase_usd", "power_watts", "pue", "usd_per_kwh", "staff_usd_per_year", "upkeep_share"):
        dearer = one.with_figure(name, min(MOST[name], one.figure(name) * factor))
        assert months(dearer) >= months(one) * (1 - 1e-9)
        assert dearer.usd_per_useful_chip_hour >= one.usd_per_useful_chip_hour * (1 - 1e-9)
    for name in ("utilization", "usd_per_chip_hour"):
        busier = one.with_figure(name, min(MOST[name], one.figure(name) * factor))
        assert months(busier) <= months(one) * (1 + 1e-9)
        assert busier.saved_usd >= one.saved_usd
    swings = [change.swing_usd for change in changes(one)]
    assert swings == sorted(swings, reverse=True)


@pytest.mark.parametrize(
    ("field", "bad"),
    [
        *((name, bad) for name in ("purchase_usd", "power_watts", "utilization") for bad in (0.0, -1.0)),
        *((name, bad) for name in ("usd_per_kwh", "staff_usd_per_year", "upkeep_share") for bad in (-0.01, 1e12)),
        *((field.name, bad) for field in dataclasses.fields(OnPremise) for bad in (math.nan, math.inf, True, "7")),
        ("purchase_usd", 1e9),
        ("power_watts", 1e7),
        ("pue", 0.9),
        ("pue", 50.0),
        ("utilization", 1.01),
        ("months", 0),
        ("months", 12.5),
        ("months", 5000),
        ("num_chips", 0),
        ("num_chips", 2.0),
        ("usd_per_chip_hour", 0.0),
        ("usd_per_chip_hour", 700.0),
    ],
)
def test_figures_that_make_no_sense_are_refused(field: str, bad: float):
    with pytest.raises(ValueError, match=f"^{field} must be [^\n]*, got {re.escape(repr(bad))}.$"):
        case(**{field: bad})


@pytest.mark.parametrize("months", [-1, 101, math.nan])
def test_no_cost_before_the_purchase_or_after_the_end(months: float):
    for cost in (case().bought_usd, case().rented_usd):
        with pytest.raises(ValueError, match="months must be at least 0, at most 100"):
            cost(months)


def test_tokens():
    assert usd_per_million_tokens(36, 10_000) == 1
    assert usd_per_million_tokens(0, 5) == 0
    for bad in (0, -1, math.nan, math.inf):
        with pytest.raises(ValueError, match="tokens_per_s must be above 0"):
            usd_per_million_tokens(1, bad)
    with pytest.raises(ValueError, match="usd_per_hour_total must be at least 0"):
        usd_per_million_tokens(-1, 1)


@given(st.floats(1e-3, 1e6), st.floats(1, 1e9), st.floats(1, 10))
def test_tokens_cost_less_when_they_come_faster(usd: float, tokens_per_s: float, factor: float):
    assert usd_per_million_tokens(usd, tokens_per_s * factor) <= usd_per_million_tokens(usd, tokens_per_s)
    assert usd_per_million_tokens(usd * factor, tokens_per_s) >= usd_per_million_tokens(usd, tokens_per_s)


@pytest.mark.oldest
def test_a_training_run():
    # 36e9 tokens at 1e6 a second are 10 hours; 256 v5e at 1.20 and 0.245 USD.
    run = training_cost(find_chip("v5e"), num_chips=256, tokens=36e9, tokens_per_s=1e6)
    assert (run.hours, run.days) == (10, 10 / 24)
    assert run.usd == pytest.approx(3072)
    assert run.spot_usd == pytest.approx(627.2)
    ours = training_cost(find_chip("v5e"), num_chips=256, tokens=36e9, tokens_per_s=1e6, usd_per_hour=1.0)
    assert (ours.usd, ours.spot_usd) == (2560, None)
    assert training_cost(find_chip("h100"), num_chips=8, tokens=1e9, tokens_per_s=1e5).spot_usd is None
    same = training_cost(find_chip("v5e"), num_chips=1, tokens=1e6, tokens_per_s=500).usd
    assert same == pytest.approx(usd_per_million_tokens(1.2, 500))


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"chip": "mi300x"}, "mi300x has no price in the catalogue. Give --usd-per-hour"),
        ({"tokens": 0}, "tokens must be above 0"),
        ({"tokens_per_s": math.nan}, "tokens_per_s must be above 0"),
        ({"num_chips": 0}, "num_chips must be at least 1"),
        ({"usd_per_hour": -2.0}, "--usd-per-hour must be above 0, at most 200, got -2.0."),
        ({"usd_per_hour": 700.0}, "--usd-per-hour must be above 0, at most 200, got 700.0."),
    ],
)
def test_a_training_run_that_makes_no_sense(changed: dict, said: str):
    figures = {"num_chips": 8, "tokens": 1e9, "tokens_per_s": 1e5, **changed}
    chip = find_chip(figures.pop("chip", "h100"))
    with pytest.raises(ValueError, match=re.escape(said)) as refused:
        training_cost(chip, **figures)
    assert "\n" not in str(refused.value)


def test_a_price_says_what_it_is():
    listed = price_of(find_chip("h100"))
    assert (listed.usd_per_chip_hour, listed.what) == (10.8, "list price")
    assert listed.figure is not None
    assert (listed.figure.source, listed.figure.date) == ("scaling-book, Google's list price", "2025-02")
    assert price_of(find_chip("v5e"), spot=True).what == "spot price"
    assert price_of(find_chip("v7x"), given=3.0).what == "given"
    with pytest.raises(ValueError, match="has no spot price in the catalogue"):
        price_of(find_chip("h100"), spot=True)
    with pytest.raises(ValueError, match="--spot takes the price from the catalogue"):
        price_of(find_chip("v5e"), given=1.0, spot=True)
