"""The measured roofline: its programs, its numbers' sanity, and its cache."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gcompute.measure import roofline as roofline_module
from gcompute.measure.machine import look
from gcompute.measure.roofline import MeasuredRoofline, cache_key, load_or_measure, matmul, measure_roofline

TINY = {"seconds": 0.05, "sizes": (64, 128), "read_bytes": 1 << 20}


@pytest.fixture(autouse=True)
def quiet(monkeypatch):
    """As on a machine that does nothing else, whatever runs beside the tests."""
    monkeypatch.setattr(roofline_module, "QUIET_SPREAD", float("inf"))
    monkeypatch.setattr(roofline_module, "_load", lambda: 0.0)


@pytest.fixture(scope="module")
def measured():
    return measure_roofline(**TINY)


@pytest.mark.oldest
def test_matmul_is_a_matrix_product_with_a_float32_result():
    a, w = np.arange(12.0).reshape(3, 4), np.arange(8.0).reshape(4, 2)
    for dtype in (jnp.float32, jnp.bfloat16):
        result = matmul(jnp.asarray(a, dtype), jnp.asarray(w, dtype))
        assert result.dtype == jnp.float32
        np.testing.assert_array_equal(result, a @ w)
    dot = jax.jit(matmul).lower(jnp.ones((2, 2), jnp.bfloat16), jnp.ones((2, 2), jnp.bfloat16)).as_text()
    assert "(tensor<2x2xbf16>, tensor<2x2xbf16>) -> tensor<2x2xf32>" in dot


def test_ceilings_are_those_of_a_computer(measured):
    assert set(measured.matmul_flops_per_s) == {"float32", "bfloat16"}
    for ceiling in measured.matmul_flops_per_s.values():
        assert 1e7 < ceiling < 1e17
    assert 1e7 < measured.memory_bytes_per_s < 1e15
    assert (measured.backend, measured.num_devices_measured) == (jax.default_backend(), 1)


def test_progress_counts_up_to_the_end():
    reports = []
    measure_roofline(**TINY, progress=lambda what, done, total: reports.append((done, total)))
    assert reports == [(done, 3) for done in range(4)]


@pytest.mark.oldest
def test_a_size_that_would_overrun_is_left_out():
    # 2 x 32768^3 operations are minutes of a processor: the test would not end if the size were tried.
    assert measure_roofline(seconds=0.05, sizes=(64, 32768), read_bytes=1 << 20).matmul_flops_per_s["float32"] > 0


def test_dict_round_trip(measured):
    assert MeasuredRoofline.from_dict(json.loads(json.dumps(measured.to_dict()))) == measured


def load(path, **options):
    """The roofline of `path`, and whether it was measured for it: a cached one reports no progress."""
    reports = []
    return load_or_measure(path, seconds=0.05, progress=lambda *report: reports.append(report), **options), bool(
        reports
    )


def test_is_measured_once(tmp_path):
    path = tmp_path / "deep" / "roofline.json"
    first, was_measured = load(path)
    assert was_measured
    assert load(path) == (first, False)
    assert [entry.name for entry in path.parent.iterdir()] == ["roofline.json"]
    assert load(path, again=True)[1]


def test_another_machines_entry_is_kept_and_not_used(tmp_path):
    path = tmp_path / "roofline.json"
    path.write_text(json.dumps({"another machine": {"matmul_flops_per_s": {}}}))
    assert load(path)[1]
    assert set(json.loads(path.read_text())) == {"another machine", cache_key(look())}


@pytest.mark.parametrize("text", ["{", "[]", "{KEY: 3}", '{KEY: {"matmul_flops_per_s": {"float32": 1}}}'])
def test_a_broken_file_is_measured_over(tmp_path, text):
    path = tmp_path / "roofline.json"
    path.write_text(text.replace("KEY", json.dumps(cache_key(look()))))
    first, was_measured = load(path)
    assert was_measured
    assert load(path) == (first, False)


def test_a_file_that_cannot_be_written_loses_only_the_cache(tmp_path):
    (tmp_path / "file").write_text("")
    assert load(tmp_path / "file" / "roofline.json")[1]


@pytest.mark.parametrize(
    "change",
    [
        {"memory_bytes_per_s": 0.0},
        {"memory_bytes_per_s": float("nan")},
        {"matmul_flops_per_s": {"float32": 1e9}},
        {"extra": 1},
    ],
)
def test_from_dict_refuses_nonsense(measured, change):
    with pytest.raises(ValueError, match="Measure it again"):
        MeasuredRoofline.from_dict({**measured.to_dict(), **change})


@pytest.mark.parametrize("options", [{"seconds": 0.0}, {"sizes": ()}, {"sizes": (0,)}])
def test_refuses_no_time_and_no_sizes(options):
    with pytest.raises(ValueError, match="above 0"):
        measure_roofline(**{**TINY, **options})


def test_repeats_that_disagree_are_measured_again_and_the_best_round_counts(monkeypatch):
    monkeypatch.setattr(roofline_module, "QUIET_SPREAD", 0.1)
    rounds = iter([(5.0, 0.4), (9.0, 0.3), (8.0, 0.05), (99.0, 0.0)])
    assert roofline_module._best_round(lambda: next(rounds)) == (9.0, 0.3)
    assert next(rounds) == (99.0, 0.0)
    rounds = iter([(5.0, 0.02), (9.0, 0.0)])
    assert roofline_module._best_round(lambda: next(rounds)) == (5.0, 0.02)


def test_a_median_and_its_distance_from_the_shortest(monkeypatch):
    samples = iter([1.0, 1.5, 2.0])

    class Timed:
        samples_s = (next(samples), next(samples), next(samples))

    monkeypatch.setattr(roofline_module, "measure", lambda run, **options: Timed)
    assert roofline_module._median_s(lambda: None, deadline_s=0.0) == (1.5, 0.5)


def test_a_disturbed_measurement_says_why(measured):
    calm = dataclasses.replace(measured, spread=dict.fromkeys(measured.spread, 0.0), load=0.1)
    assert calm.disturbed is None
    assert dataclasses.replace(calm, load=0.75).disturbed == "other work took 75% of the processors"


def test_one_measured_beside_other_work_is_measured_again_and_keeps_what_is_higher(tmp_path, monkeypatch):
    monkeypatch.setattr(roofline_module, "_load", lambda: 0.9)
    path = tmp_path / "roofline.json"
    seen = [load(path)]
    fields = seen[0][0].to_dict()
    fields["matmul_flops_per_s"]["float32"] = 1e18
    path.write_text(json.dumps({cache_key(look()): fields}))
    seen += [load(path) for _ in range(3)]
    assert [was_measured for _, was_measured in seen] == [True, True, True, False]
    assert [one.num_sessions for one, _ in seen] == [1, 2, 3, 3]
    assert all(one.matmul_flops_per_s["float32"] == 1e18 for one, _ in seen[1:])
    assert seen[-1][0].disturbed
    # Not for ever: the other work may have ended since.
    hours = seen[-1][0].measured_at_s + 2 * roofline_module.DOUBTED_S
    monkeypatch.setattr(roofline_module.time, "time", lambda: hours)
    assert [load(path)[1], load(path)[1]] == [True, False]


def test_an_emulated_processor_has_a_roofline_of_its_own():
    assert cache_key(look()) != cache_key(dataclasses.replace(look(), instruction_set="SSE4_2"))
