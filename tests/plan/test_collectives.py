"""Collective times against worked problems of the scaling-book, chapter "sharding"."""

import pytest

from gcompute.hardware.catalogue import find_chip
from gcompute.plan.collectives import Ring, all_gather_s, all_reduce_s, all_to_all_s, reduce_scatter_s, torus_ring

V4 = torus_ring(find_chip("v4"), 4, wraparound=True)


@pytest.mark.parametrize(("wraparound", "seconds"), [(False, 560e-6), (True, 377e-6)])
def test_gather_on_a_v5e_axis_of_4(wraparound: bool, seconds: float):
    ring = torus_ring(find_chip("v5e"), 4, wraparound=wraparound)
    assert all_gather_s(2 * 2048 * 8192, ring) == pytest.approx(seconds, rel=0.05)


def test_a_small_gather_is_bound_by_latency():
    assert all_gather_s(256, V4) == pytest.approx(2e-6, rel=0.1)


def test_gather_over_one_axis_and_two_of_a_v4():
    # bf16[1024, 4096], rows over X and columns over Y: the first leaves each device a quarter, the second the whole.
    whole = 2 * 1024 * 4096
    assert all_gather_s(whole / 4, V4) == pytest.approx(23e-6, rel=0.06)
    assert all_gather_s(whole, V4, V4) == pytest.approx(46e-6, rel=0.06)


def test_the_others_follow():
    ring = Ring(num_chips=8, link_bytes_per_s=1e9)
    gather = all_gather_s(1e9, ring)
    assert (gather, reduce_scatter_s(1e9, ring), all_reduce_s(1e9, ring)) == (0.5, 0.5, 1.0)
    assert all_to_all_s(1e9, ring) == gather / 4
    assert all_to_all_s(1e9, Ring(num_chips=1, link_bytes_per_s=1e9)) == 0


def test_axes_of_one_chip_cost_nothing():
    one = Ring(num_chips=1, link_bytes_per_s=1e9, hop_latency_s=1e-6)
    assert all_gather_s(1e9, one) == 0
    assert all_gather_s(1e9, one, V4) == all_gather_s(1e9, V4)


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda: Ring(num_chips=0, link_bytes_per_s=1.0), "at least 1"),
        (lambda: Ring(num_chips=2, link_bytes_per_s=0.0), "must be above 0"),
        (lambda: all_gather_s(-1, V4), "at least 0"),
        (lambda: all_to_all_s(-1, V4), "at least 0"),
        (lambda: all_gather_s(1), "at least one ring"),
        (lambda: torus_ring(find_chip("h100"), 8, wraparound=True), "has no ICI links"),
    ],
)
def test_refused(make, said: str):
    with pytest.raises(ValueError, match=said):
        make()
