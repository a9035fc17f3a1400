"""gcompute chips: the table, one chip, the one at hand, and a file of one's own."""

import json
from pathlib import Path

import pytest
from command_line import Command

from gcompute.hardware.catalogue import catalogue


@pytest.mark.oldest
def test_all_as_table_and_json(gcompute: Command):
    table = gcompute("chips")
    assert table.status == 0
    assert all(f" {name} " in table.out for name in catalogue())
    chips = json.loads(gcompute("chips", "--json").out)["chips"]
    assert set(chips) == set(catalogue())
    assert chips["v6e"]["figures"]["usable_hbm_bytes"]["unit"] == "GiB"


@pytest.mark.oldest
def test_one_with_its_sources(gcompute: Command):
    shown = gcompute("chips", "h100-sxm")
    assert shown.status == 0
    assert "989 TFLOP/s" in shown.out
    assert "(2025-02)" in shown.out
    assert "critical batch, bfloat16: 295 tokens (predicted" in shown.out


def test_the_device_at_hand_is_measured(gcompute: Command):
    shown = gcompute("chips", "this", "--json")
    assert shown.status == 0, shown.err
    chip = json.loads(shown.out)
    assert chip["kind"] == "cpu"
    assert chip["peak_flops_per_s"]["float32"] > 0
    assert chip["figures"]["hbm_bytes_per_s"]["source"].startswith("measured")


def test_bad_names_and_files(gcompute: Command, tmp_path: Path):
    unknown = gcompute("chips", "v5f")
    assert (unknown.status, unknown.out) == (2, "")
    assert "Did you mean" in unknown.err
    prices = tmp_path / "prices.toml"
    prices.write_text('[chips.v5e]\nusd_per_hour = { value = 700.0, unit = "USD/h", source = "list" }')
    refused = gcompute("chips", "v5e", "--file", str(prices))
    assert refused.status == 2
    assert refused.err.count("\n") == 1
    assert "no price" in refused.err
