"""The catalogue: every figure has a source and a unit, and a user's file is held to the same."""

import dataclasses
import re
from pathlib import Path

import pytest

from gcompute.hardware.catalogue import PEAKS, catalogue, catalogue_with, find_chip
from gcompute.hardware.torus import legal_slices, wraparound

PRICE = '{ value = %s, unit = "%s", source = "our contract" }'
NEW = """
[chips.ours]
kind = "gpu"
peak_flops_per_s.bfloat16 = { value = 100, unit = "TFLOP/s", source = "datasheet", date = "2026-01-01" }
hbm_bytes = { value = 24, unit = "GiB", source = "datasheet" }
hbm_bytes_per_s = { value = 0.5, unit = "TB/s", source = "datasheet" }
"""


@pytest.fixture
def with_file(tmp_path: Path):
    def read(text: str):
        path = tmp_path / "chips.toml"
        path.write_text(text)
        return catalogue_with(path)

    return read


def test_a_byte_order_mark_is_no_part_of_a_file(with_file):
    assert with_file("\ufeff# mine").keys() == catalogue().keys()


@pytest.mark.parametrize("name", catalogue())
def test_every_figure_has_a_source(name: str):
    chip = find_chip(name)
    stated = {field.name for field in dataclasses.fields(chip) if getattr(chip, field.name) is not None}
    stated -= {"name", "kind", "about", "figures", PEAKS}
    if chip.devices_per_chip == 1:
        stated -= {"devices_per_chip"}
    assert set(chip.figures) == stated | {f"{PEAKS}.{dtype}" for dtype in chip.peak_flops_per_s}
    for figure in chip.figures.values():
        assert figure.source
        assert figure.value > 0


@pytest.mark.parametrize(
    ("dtype", "weight_bytes", "tokens"), [("bfloat16", 2, 240), ("bfloat16", 1, 120), ("int8", 1, 243)]
)
def test_critical_batch_of_the_scaling_book(dtype: str, weight_bytes: int, tokens: int):
    assert find_chip("v5e").critical_batch(dtype, weight_bytes=weight_bytes) == pytest.approx(tokens, rel=0.02)


def test_units_become_si():
    v5e = find_chip("v5e")
    assert v5e.dcn_bytes_per_s == 25e9 / 8
    assert v5e.host_memory_bytes == 512 * 2**30
    assert (v5e.hop_latency_s, v5e.usable_hbm_bytes) == (1e-6, 15.75 * 2**30)
    assert find_chip("Trillium") is find_chip("v6e")


def test_wraparound():
    v6e, v4 = find_chip("v6e"), find_chip("v4")
    assert wraparound(v6e, (4, 4)) == (False, False)
    assert wraparound(v6e, (16, 16)) == (True, True)
    assert wraparound(v4, (2, 2, 4)) == (False, False, False)
    assert wraparound(v4, (4, 4, 4)) == (True, True, True)
    with pytest.raises(ValueError, match="has 3 dims, and 4x4 has not"):
        wraparound(v4, (4, 4))
    with pytest.raises(ValueError, match="is not known"):
        wraparound(find_chip("h100"), (8,))
    assert legal_slices(2, 256)[-1] == (16, 16)


@pytest.mark.oldest
def test_a_users_file_adds_and_replaces(with_file):
    chips = with_file(NEW + f"[chips.v5e]\nusd_per_hour = {PRICE % (0.9, 'USD/h')}")
    assert chips["v5e"].usd_per_hour == 0.9
    assert chips["v5e"].figures["usd_per_hour"].source == "our contract"
    assert chips["v5e"].hbm_bytes == find_chip("v5e").hbm_bytes
    assert find_chip("v5e").usd_per_hour == 1.2
    ours = find_chip("ours", chips)
    assert (ours.hbm_bytes_per_s, ours.peak_flops_per_s) == (5e11, {"bfloat16": 1e14})
    assert ours.figures["peak_flops_per_s.bfloat16"].date == "2026-01-01"
    with pytest.raises(ValueError, match=r"ours has no peak for int8. Legal: bfloat16\."):
        ours.critical_batch("int8", weight_bytes=1)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (f"[chips.v5e]\nusd_per_hour = {PRICE % (700.0, 'USD/h')}", "more than any chip costs"),
        (f"[chips.v5e]\nusd_per_hour = {PRICE % (1.0, 'EUR')}", "unit 'EUR' does not fit. Legal: USD/h"),
        (f"[chips.v5e]\nhbm_bytes = {PRICE % (16, 'GB/s')}", "Legal: GB, GiB, MiB"),
        (f"[chips.v5e]\nusd_per_hour = {PRICE % (-1, 'USD/h')}", "must be a number above 0"),
        (f"[chips.v5e]\nusd_per_hour = {PRICE % ('nan', 'USD/h')}", "must be a number above 0"),
        (f"[chips.v5e]\nusd_per_hour = {PRICE % ('true', 'USD/h')}", "must be a number above 0"),
        ("[chips.v5e]\nusd_per_hour = 1.0", "a figure is written"),
        (f"[chips.v5e]\nusd_per_hours = {PRICE % (1, 'USD/h')}", "Did you mean 'usd_per_hour'?"),
        (f"[chips.v5e]\nmax_chips = {PRICE % (2.5, 'chips')}", "whole number of chips"),
        (f"[chips.v5e]\npeak_flops_per_s.bf16 = {PRICE % (1, 'TFLOP/s')}", "Did you mean 'bfloat16'?"),
        ("[chips.v5e]\npeak_flops_per_s = 1", "must be a table by dtype"),
        ('[chips.v5e]\nkind = "npu"', "Legal: tpu, gpu, cpu"),
        ("[chips]\nv5e = 3", "must be a table"),
        ("[prices]\n", "section 'prices' is not known"),
        ('[chips.new]\nkind = "gpu"', "a new chip needs peak_flops_per_s, hbm_bytes, hbm_bytes_per_s too"),
        ("[chips.v5e\n", "does not parse as TOML"),
    ],
)
def test_a_users_file_is_refused_with_one_line(with_file, text: str, said: str):
    with pytest.raises(ValueError, match=re.escape(said)) as refused:
        with_file(text)
    assert "\n" not in str(refused.value)


def test_unknown_names(tmp_path: Path):
    with pytest.raises(ValueError, match="Did you mean 'v5p'"):
        find_chip("v5pp")
    with pytest.raises(ValueError, match="cannot be read"):
        catalogue_with(tmp_path / "none.toml")
