"""Collective times against worked problems of the scaling-book, chapters "sharding" and "gpus", and by hand."""

import dataclasses
import math
from collections.abc import Callable

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gcompute.hardware.catalogue import find_chip
from gcompute.plan.collectives import (
    Network,
    Ring,
    Route,
    Switch,
    all_gather_s,
    all_reduce_s,
    all_to_all_s,
    permute_s,
    reduce_scatter_s,
    torus_ring,
)

HOST = Switch(num_devices=8, bytes_per_s=450e9)
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


@pytest.mark.oldest
def test_behind_a_switch():
    # Each of 8 GPUs receives 7/8 of 90 GB at 450 GB/s.
    assert all_gather_s(90e9, HOST) == reduce_scatter_s(90e9, HOST) == pytest.approx(0.175)
    assert all_reduce_s(90e9, HOST) == pytest.approx(0.35)
    assert all_reduce_s(90e9, HOST, in_network=True) == pytest.approx(0.175)
    # Each sends 7/8 of its eighth.
    assert all_to_all_s(90e9, HOST) == pytest.approx(0.175 / 8)
    assert permute_s(90e9, HOST) == pytest.approx(0.2)
    slow = Switch(num_devices=8, bytes_per_s=450e9, latency_s=1e-5)
    assert all_gather_s(1, slow) == all_to_all_s(1, slow) == permute_s(1, slow) == 1e-5
    assert all_gather_s(1e9, Switch(num_devices=1, bytes_per_s=1.0, latency_s=1.0)) == 0


def test_over_a_network_alone():
    network = Network(num_groups=4, bytes_per_s=50e9)
    assert all_gather_s(200e9, network) == pytest.approx(3.0)
    # Of its quarter each sends three quarters.
    assert all_to_all_s(200e9, network) == pytest.approx(0.75)
    assert permute_s(200e9, network) == pytest.approx(4.0)
    one = Network(num_groups=1, bytes_per_s=1.0)
    assert all_gather_s(1e9, one) == all_to_all_s(1e9, one) == permute_s(1e9, one) == 0


def test_two_levels_of_gpus_work_at_once():
    """scaling-book, "gpus", across nodes: t = max of both levels; a node's share of the network bounds it."""
    network = Network(num_groups=2, bytes_per_s=50e9)
    # Inside 7/8 of 16 GB at 450 GB/s; across half of each device's 2 GB at 50 GB/s.
    assert all_gather_s(16e9, HOST, network) == pytest.approx(max(14 / 450, 1 / 50))
    assert all_gather_s(16e9, HOST, Network(num_groups=2, bytes_per_s=5e9)) == pytest.approx(1 / 5)
    # Of its own 1 GB each sends half to the other host, and 7/16 inside its own.
    assert all_to_all_s(16e9, HOST, network) == pytest.approx(max(0.5 / 50, 7 / 16 / 450))
    assert permute_s(1e9, HOST, network) == pytest.approx(1 / 50)


def test_two_levels_of_slices_wait_for_each_other():
    ring, network = Ring(num_chips=4, link_bytes_per_s=50e9), Network(num_groups=2, bytes_per_s=5e9)
    assert all_gather_s(8e9, ring, network) == pytest.approx(8 / 100 + 1 / 5)
    route = Route(rings=(ring,), network=network)
    assert all_gather_s(8e9, route) == all_gather_s(8e9, ring, network)
    assert (route.num_inside, route.slowest) == (4, "DCN")
    # Each slice has 4 of the 8 GB, half of which stays: 2 GB inside. Of its own 1 GB each chip sends half across.
    assert all_to_all_s(8e9, ring, network) == pytest.approx(2 / (8 * 50) + 0.5 / 5)


def test_all_to_all_on_a_line_and_on_two_rings():
    ring, line = (Ring(num_chips=4, link_bytes_per_s=50e9, wraparound=closed) for closed in (True, False))
    assert all_to_all_s(8e9, line) == 2 * all_to_all_s(8e9, ring) == pytest.approx(8 / (4 * 50))
    # A quarter of the bytes crosses the middle of each of four rings, once along either axis.
    assert all_to_all_s(8e9, ring, ring) == pytest.approx(2 * 2 / (8 * 50))
    assert permute_s(8e9, ring, line) == pytest.approx(8 / 50)


RATES = st.floats(min_value=1e6, max_value=1e13)
LATENCIES = st.floats(min_value=0, max_value=1e-3)
RINGS = st.builds(
    Ring,
    num_chips=st.integers(1, 64),
    link_bytes_per_s=RATES,
    hop_latency_s=LATENCIES,
    wraparound=st.booleans(),
)
SWITCHES = st.builds(Switch, num_devices=st.integers(1, 72), bytes_per_s=RATES, latency_s=LATENCIES)
ROUTES = st.builds(
    Route,
    rings=st.lists(RINGS, max_size=3).map(tuple),
    switch=st.none() | SWITCHES,
    network=st.none() | st.builds(Network, num_groups=st.integers(1, 512), bytes_per_s=RATES),
    pipelined=st.booleans(),
)
COLLECTIVES = (all_gather_s, reduce_scatter_s, all_reduce_s, all_to_all_s, permute_s)


@pytest.mark.parametrize("collective", COLLECTIVES, ids=lambda collective: collective.__name__)
@given(ROUTES, st.lists(st.floats(0, 1e18), min_size=2, max_size=4))
def test_a_time_that_grows_with_the_bytes(collective: Callable[..., float], route: Route, sizes: list[float]):
    times = [collective(size, route) for size in (0.0, *sorted(sizes))]
    assert all(0 <= time < math.inf for time in times)
    assert times == sorted(times)


@given(ROUTES, st.floats(0, 1e18))
def test_an_all_reduce_is_two_gathers_and_pieces_at_once_take_no_longer(route: Route, size: float):
    assert all_reduce_s(size, route) == 2 * all_gather_s(size, route)
    for collective in COLLECTIVES:
        at_once = collective(size, dataclasses.replace(route, pipelined=True))
        assert at_once <= collective(size, dataclasses.replace(route, pipelined=False))


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda: Ring(num_chips=0, link_bytes_per_s=1.0), "at least 1"),
        (lambda: Ring(num_chips=2, link_bytes_per_s=0.0), "must be above 0"),
        (lambda: all_gather_s(-1, V4), "at least 0"),
        (lambda: all_to_all_s(-1, V4), "at least 0"),
        (lambda: permute_s(-1, V4), "at least 0"),
        (lambda: all_gather_s(math.nan, V4), "at least 0"),
        (lambda: all_gather_s(math.inf, V4), "finite"),
        (lambda: all_gather_s(1), "at least one ring"),
        (lambda: all_to_all_s(1), "at least one ring"),
        (lambda: permute_s(1), "at least one ring"),
        (lambda: all_gather_s(1, HOST, HOST), "at most one switch"),
        (lambda: all_gather_s(1, Route(), V4), "one route alone"),
        (lambda: Ring(num_chips=2, link_bytes_per_s=math.nan), "must be above 0"),
        (lambda: Ring(num_chips=2, link_bytes_per_s=1.0, hop_latency_s=math.inf), "at least 0"),
        (lambda: Switch(num_devices=0, bytes_per_s=1.0), "a switch needs"),
        (lambda: Switch(num_devices=2, bytes_per_s=math.inf), "a switch needs"),
        (lambda: Switch(num_devices=2, bytes_per_s=1.0, latency_s=-1.0), "a switch needs"),
        (lambda: Network(num_groups=0, bytes_per_s=1.0), "a network needs"),
        (lambda: Network(num_groups=2, bytes_per_s=math.nan), "a network needs"),
        (lambda: torus_ring(find_chip("h100"), 8, wraparound=True), "has no ICI links"),
    ],
)
def test_refused(make, said: str):
    with pytest.raises(ValueError, match=said):
        make()
