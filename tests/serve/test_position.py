"""The decode batch on its roofline, against the textbook's formulae on a model small enough to count by hand."""

import dataclasses

import pytest

from gcompute.config.presets import PRESETS
from gcompute.config.serve import ServeConfig
from gcompute.hardware.catalogue import find_chip
from gcompute.hardware.chip import Chip, Figure
from gcompute.hardware.target import Target
from gcompute.plan.decoding import Served, decode_step_s
from gcompute.plan.params import count_params
from gcompute.plan.roof import Roof
from gcompute.serve.position import DecodeRoofline, decode_roofline, position_json

pytestmark = pytest.mark.oldest

MODEL = PRESETS["llama3-8b"]
SERVE = ServeConfig(slots=8, precision="bfloat16")


@pytest.fixture(scope="module")
def roofline() -> DecodeRoofline:
    return decode_roofline(MODEL, SERVE, find_chip("v5e"))


def test_ceilings_and_critical_batch_are_the_chips(roofline):
    told = roofline.to_dict()
    assert (told["flops_per_s"], told["bytes_per_s"]) == (1.97e14, find_chip("v5e").hbm_bytes_per_s)
    assert told["ridge"] == told["flops_per_s"] / told["bytes_per_s"]
    # Two bytes and two operations a weight.
    assert told["critical_batch"] == pytest.approx(told["ridge"])
    assert told["source"] == "catalogue"
    assert told["params"] == count_params(MODEL).total


def test_a_step_takes_the_operations_and_bytes_of_the_textbook(roofline):
    one = roofline.at(16, 512)
    weights = count_params(MODEL).total - MODEL.vocab * MODEL.dim
    scores = 16 * MODEL.layers * 4 * MODEL.heads * MODEL.head_size * 512
    assert one.flops == pytest.approx(16 * 2 * weights + scores, rel=0.01)
    cache = 16 * 512 * MODEL.layers * 2 * MODEL.num_kv_heads * MODEL.head_size * 2
    # Activations come on top.
    assert 2 * weights + cache < one.moved_bytes < 1.25 * (2 * weights + cache)
    assert one.intensity == one.flops / one.moved_bytes


def test_small_batches_are_bound_by_memory_and_large_ones_by_compute(roofline):
    small, large = roofline.at(1, 16), roofline.at(4096, 16)
    assert (small.bound, large.bound) == ("memory", "compute")
    assert small.attainable_flops_per_s == small.intensity * roofline.roof.bytes_per_s
    assert large.attainable_flops_per_s == roofline.roof.flops_per_s


def test_nothing_predicted_is_above_the_roof(roofline):
    for cells in (16, 1024, 4096):
        for one in roofline.path(cells, 8):
            assert one.flops_per_s <= one.attainable_flops_per_s * (1 + 1e-9)
            assert one.tokens_per_s == pytest.approx(one.batch / one.step_s)


def test_a_measured_machine_agrees_with_the_two_term_estimate():
    figures = {
        name: Figure(value=1.0, unit="", source="measured here")
        for name in ("peak_flops_per_s.bfloat16", "hbm_bytes_per_s")
    }
    chip = Chip(
        name="this",
        kind="cpu",
        about="a processor",
        peak_flops_per_s={"bfloat16": 1e12},
        hbm_bytes=2**34,
        hbm_bytes_per_s=5e10,
        figures=figures,
    )
    roofline = decode_roofline(MODEL, SERVE, chip)
    assert roofline.to_dict()["source"] == "measured"
    weights = count_params(MODEL).total - MODEL.vocab * MODEL.dim
    cells = 256
    sequence = cells * MODEL.layers * 2 * MODEL.num_kv_heads * MODEL.head_size * 2
    served = Served(params=weights, weight_bytes=2, sequence_bytes=sequence)
    for batch in (1, 4, 8):
        estimate_s = decode_step_s(served, batch, num_chips=1, roof=Roof(flops_per_s=1e12, bytes_per_s=5e10))
        assert roofline.at(batch, cells).step_s == pytest.approx(estimate_s, rel=0.1)


def test_a_longer_context_lowers_the_intensity_and_the_rate(roofline):
    short, long = roofline.at(64, 64), roofline.at(64, 4096)
    assert long.intensity < short.intensity
    assert long.tokens_per_s < short.tokens_per_s


def test_the_path_rises_past_slots_and_critical_batch_and_is_kept(roofline):
    path = roofline.path(500, 6)
    batches = [one.batch for one in path]
    assert batches == sorted(set(batches))
    assert batches[0] == 1
    assert 6 in batches
    assert batches[-1] >= 4 * roofline.critical_batch
    assert {one.cells for one in path} == {496}
    assert roofline.path(503, 6) is path
    assert roofline.path(600, 6) is not path


def test_position_json_is_plain_numbers(roofline):
    body = position_json(roofline.at(8, 100))
    assert body["batch"] == 8
    assert body["tokens_per_s"] == pytest.approx(8 / body["step_s"])


def test_what_is_served_in_int8_is_counted_so(roofline):
    int8 = decode_roofline(MODEL, dataclasses.replace(SERVE, weights="int8", kv="int8"), find_chip("v5e"))
    assert int8.at(1, 100).moved_bytes == pytest.approx(roofline.at(1, 100).moved_bytes / 2, rel=0.05)


def test_devices_without_figures_are_refused(roofline):
    with pytest.raises(ValueError, match="no figures"):
        DecodeRoofline(roofline.run, Target(chip="cpu", shape=(1,)))
    with pytest.raises(ValueError, match="no peak for float32"):
        decode_roofline(MODEL, ServeConfig(precision="float32"), find_chip("v5e"))
