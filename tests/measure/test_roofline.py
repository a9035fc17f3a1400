"""The measured roofline: its programs, its numbers' sanity, and its cache."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gcompute.measure.machine import look
from gcompute.measure.roofline import MeasuredRoofline, cache_key, load_or_measure, matmul, measure_roofline

TINY = {"seconds": 0.05, "sizes": (64, 128), "read_bytes": 1 << 20}


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
