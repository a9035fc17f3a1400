"""gcompute plan cost: the table, the words, JSON, the picture and the page, and every mistake in one line."""

import json
import re
import shlex
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click
import pytest

from gcompute.cli.plan_cost import PlanCostCommand, command
from gcompute.plan.cost import HOST_POWER

H100 = ("h100:64", "--purchase-usd", "35000", "--staff-usd-per-year", "150000")
OWN = """
[chips.edge]
kind = "tpu"
peak_flops_per_s.bfloat16 = { value = 4, unit = "TFLOP/s", source = "datasheet" }
hbm_bytes = { value = 1, unit = "GiB", source = "datasheet" }
hbm_bytes_per_s = { value = 10, unit = "GB/s", source = "datasheet" }
power_watts = { value = 2, unit = "W", source = "datasheet" }
usd_per_hour = { value = 0.05, unit = "USD/h", source = "our contract", date = "2026-01-01" }
[chips.h100-sxm]
purchase_usd = { value = 30000, unit = "USD", source = "our quote", date = "2026-02-03" }
"""

Run = Callable[..., str]


@pytest.fixture
def cost(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Run:
    """Run the command and return what it prints; its mistakes are exceptions that `gcompute` turns into one line."""
    monkeypatch.setenv("COLUMNS", "110")
    monkeypatch.delenv("GCOMPUTE_CHIPS", raising=False)

    def run(*args: str | Path) -> str:
        capsys.readouterr()
        command.main([str(arg) for arg in args], prog_name="gcompute plan cost", standalone_mode=False)
        return capsys.readouterr().out

    return run


@pytest.fixture
def chip_file(tmp_path: Path) -> Path:
    path = tmp_path / "chips.toml"
    path.write_text(OWN)
    return path


def plain(cost: Run, *args: str | Path) -> dict[str, Any]:
    return json.loads(cost(*args, "--json"))


@pytest.mark.oldest
def test_the_table_says_of_every_number_what_it_is(cost: Run):
    shown = cost(*H100)
    for line in (
        r"USD per chip hour .* 10.8 USD a chip-hour .* list price: scaling-book, Google's list price \(2025-02\)",
        r"purchase USD .* 35,000 USD a chip .* given",
        r"power watts .* 1,260 W a chip .* computed: 1.8 for its share of the host x 700 W",
        r"utilization .* 60% of all hours .* assumed: the default",
        r"break-even month .* 8.2",
        r"what comes out, computed",
    ):
        assert re.search(line, shown), line


def test_json_by_hand(cost: Run):
    found = plain(cost, *H100)
    rented = 64 * 10.8 * 0.6 * 730
    bought = 64 * 35_000
    monthly = 64 * HOST_POWER * 0.7 * 1.3 * 0.10 * 730 + bought * 0.05 / 12 + 150_000 / 12
    assert found["computed"]["rented"]["usd_per_month"] == pytest.approx(rented)
    assert found["computed"]["bought"]["usd_per_month"] == pytest.approx(monthly)
    assert found["computed"]["break_even_months"] == pytest.approx(bought / (rented - monthly))
    assert found["computed"]["bought"]["usd_after_48_months"] == pytest.approx(bought + 48 * monthly)
    assert found["cumulative_usd"]["bought"][48] == pytest.approx(bought + 48 * monthly)
    assert len(found["cumulative_usd"]["months"]) == 49
    assert found["figures"]["staff_usd_per_year"] == {"value": 150000.0, "unit": "USD a year", "what": "given"}
    assert found["changes"][0]["figures"] == ["utilization", "usd_per_chip_hour"]
    tokens = plain(cost, *H100, "--tokens-per-s", "200000")["computed"]
    assert tokens["rented"]["usd_per_million_tokens"] == pytest.approx(64 * 10.8 / 3600 / 0.2)


def test_in_words(cost: Run):
    said = plain(cost, *H100)["in_words"]
    assert "\n" not in said
    assert said.startswith("Buying h100-sxm:64 pays from month 8.2, and has saved $10.88M when the chips are 48 months")
    assert "What changes that most is the utilization or the price of renting: 20% less makes it month 10.5" in said
    assert "Next is the purchase price: 20% less makes it month 6.5" in said
    # The catalogue's other prices are told too, for they say otherwise.
    assert "Renting for $4.29 (Lambda, in the SkyPilot catalogue v8; undated) makes it month" in said
    never = plain(cost, *H100, "--usd-per-hour", "2")["in_words"]
    assert never.startswith("Buying h100-sxm:64 does not pay within 48 months: it costs $964,259 more than renting")
    assert "It would pay if the chips worked 81% of the hours or more, or a rented chip-hour cost $2.72" in never
    assert "Lambda" not in never
    busy = plain(cost, *H100, "--utilization", "0.95")["in_words"]
    assert "What changes that most is the utilization: 20% less makes it month 6.3 ($14.75M saved), all hours" in busy
    cheap = plain(cost, *H100, "--usd-per-hour", "0.5")["in_words"]
    assert "It would pay if a rented chip-hour cost $2.72 or more" in cheap


def test_a_chip_file_has_prices_of_its_own(cost: Run, chip_file: Path):
    found = plain(cost, "h100:8", "--chips", chip_file)["figures"]
    assert found["purchase_usd"] == {"value": 30000.0, "unit": "USD a chip", "what": "our quote (2026-02-03)"}
    edge = plain(cost, "edge:4", "--chips", chip_file, "--purchase-usd", "150")["figures"]
    assert edge["usd_per_chip_hour"]["what"] == "list price: our contract (2026-01-01)"


@pytest.mark.parametrize("price", ["10.8", "2"], ids=["breaks even", "never"])
def test_picture_and_page(cost: Run, tmp_path: Path, price: str):
    png, page = tmp_path / "cost.png", tmp_path / "cost.html"
    assert f"drawn to {png}" in cost(*H100, "--usd-per-hour", price, "--plot", png)
    assert png.read_bytes().startswith(b"\x89PNG")
    cost(*H100, "--usd-per-hour", price, "--plot", page, "--json")
    text = page.read_text(encoding="utf-8")
    assert "data:image/png;base64," in text
    assert "Buying h100-sxm:64 " in text
    assert not re.search(r"""(src|href)=["']?(https?:)?//""", text)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["cost.html", "cost.png"]


def test_what_the_picture_shows(monkeypatch: pytest.MonkeyPatch):
    from matplotlib.figure import Figure

    from gcompute.cli.plan_cost import picture_of
    from gcompute.plan.cost import BuyOrRent, OnPremise

    drawn = []
    saved = Figure.savefig
    monkeypatch.setattr(
        Figure, "savefig", lambda self, *args, **kwargs: (drawn.append(self), saved(self, *args, **kwargs))
    )
    own = OnPremise(purchase_usd=35_000, power_watts=1260)
    picture_of("h100:64", BuyOrRent(bought=own, num_chips=64, usd_per_chip_hour=4.0), "given")
    (axes,) = drawn[0].axes
    assert axes.get_xlabel() == "months since the purchase"
    assert "dollars" in axes.get_ylabel()
    assert axes.get_title()
    labels = [text.get_text() for text in axes.get_legend().get_texts()]
    assert [label.split(":")[0] for label in labels] == ["rented", "bought", "break-even"]
    # No pair of dollar signs is left to be set as a formula.
    assert all(re.search(r"(?<!\\)\$", label) is None for label in labels)


@pytest.mark.parametrize(
    ("args", "said"),
    [
        (("v5e:4x4", "--purchase-usd", "9000"), "v5e is a TPU, which is rented and cannot be bought."),
        (("v5e:4x4",), "v5e is a TPU, which is rented and cannot be bought."),
        (("edge:4", "--chips", "FILE"), "edge is a TPU, which is rented and cannot be bought."),
        (("cpu:8", "--purchase-usd", "1"), "cpu:8 is this machine, which has no price."),
        (("h100:8",), "what one h100-sxm costs is not known: give --purchase-usd"),
        (("h100:9", "--purchase-usd", "1"), "9 GPUs are not whole hosts of 8"),
        (("h101:8", "--purchase-usd", "1"), "chip 'h101' is not known. Did you mean"),
        (("mi300x:8", "--purchase-usd", "1"), "mi300x has no price in the catalogue. Give --usd-per-hour"),
        ((*H100, "--spot"), "h100-sxm has no spot price in the catalogue. Give --usd-per-hour"),
        ((*H100, "--spot", "--usd-per-hour", "2"), "--spot takes the price from the catalogue"),
        ((*H100, "--usd-per-hour", "0"), "--usd-per-hour must be above 0"),
        ((*H100, "--usd-per-hour", "nan"), "--usd-per-hour must be above 0"),
        ((*H100, "--utilization", "60"), "utilization must be above 0, at most 1, got 60.0."),
        ((*H100, "--utilization", "0"), "utilization must be above 0"),
        ((*H100, "--purchase-usd", "-5"), "purchase_usd must be above 0"),
        ((*H100, "--purchase-usd", "1e9"), "purchase_usd must be above 0, at most 1,000,000, got 1000000000.0."),
        ((*H100, "--purchase-usd", "inf"), "purchase_usd must be above 0"),
        ((*H100, "--months", "0"), "months must be at least 1"),
        ((*H100, "--months", "4.5"), "'4.5' is not a valid integer"),
        ((*H100, "--pue", "0.5"), "pue must be at least 1"),
        ((*H100, "--tokens-per-s", "0"), "tokens_per_s must be above 0"),
        ((*H100, "--plot", "cost.svg"), "--plot cost.svg is neither a picture nor a page. Legal: a name that ends in"),
        ((*H100, "--plot", "no/such/cost.png"), "there is no directory no/such"),
        ((*H100, "--chips", "none.toml"), "chip file none.toml cannot be read"),
        ((), "Missing argument 'TARGET'"),
    ],
)
def test_mistakes_are_told_in_one_line(cost: Run, chip_file: Path, args: tuple[str, ...], said: str):
    with pytest.raises((ValueError, click.ClickException)) as refused:
        cost(*(str(chip_file) if arg == "FILE" else arg for arg in args))
    error = refused.value
    message = error.format_message() if isinstance(error, click.ClickException) else str(error)
    assert said in message
    assert "\n" not in message


def test_a_chip_without_power_or_a_file_that_cannot_be_written(cost: Run, chip_file: Path, tmp_path: Path):
    chip_file.write_text(OWN.replace("power_watts", "pcie_bytes_per_s").replace('2, unit = "W"', '2, unit = "GB/s"'))
    with pytest.raises(ValueError, match="edge has no power_watts in the catalogue"):
        cost("edge:4", "--chips", chip_file, "--purchase-usd", "150")
    taken = tmp_path / "taken.png"
    taken.mkdir()
    with pytest.raises((ValueError, click.ClickException), match=r"taken\.png"):
        cost(*H100, "--plot", taken)


@pytest.mark.oldest
def test_help_ends_in_examples_that_run(cost: Run, chip_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    shown = cost("--help")
    assert "Examples:" in shown
    monkeypatch.chdir(tmp_path)
    price = '{ value = 6, unit = "USD/h", source = "our contract" }'
    chip_file.rename("my-prices.toml").write_text(f"{OWN}[chips.b200]\nusd_per_hour = {price}")
    for example in PlanCostCommand.examples:
        assert f"$ {example}" in shown
        words = shlex.split(example)
        assert words[:3] == ["gcompute", "plan", "cost"]
        assert cost(*words[3:])
