"""Bounds of parallelism against times of collectives and brute force: at a bound, sending takes what computing does."""

import math

import pytest

from gcompute.hardware.catalogue import find_chip
from gcompute.plan.collectives import Ring, Switch, all_gather_s, all_reduce_s
from gcompute.plan.parallel_bounds import (
    best_fsdp_ways,
    contraction_depth,
    data_parallel_tokens,
    decode_tensor_ways,
    expert_parallel_width,
    latency_bound_bytes,
    latency_bound_ways,
    mixed_headroom,
    mixed_tokens,
    pipeline_send_s,
    power_of_two_split,
    tensor_parallel_ways,
    tensor_parallel_width,
)
from gcompute.plan.roof import Roof, torus_roof
from gcompute.plan.weight_stationary import best_dim_ways, weight_stationary_chips, weight_stationary_s

V5P = find_chip("v5p")
ROOF = torus_roof(V5P)
# Bounds are of bytes alone, so hops take no time.
RING = Ring(num_chips=16, link_bytes_per_s=V5P.link_bytes_per_s or 0.0)
D, F = 8192, 32768


@pytest.mark.parametrize("axes", [1, 2, 3])
def test_data_parallel_times_are_equal_at_the_bound(axes: int):
    roof = torus_roof(V5P, axes)
    tokens = data_parallel_tokens(roof)
    backwards_s = 8 * tokens * D * F / roof.flops_per_s
    assert all_reduce_s(2 * 2 * D * F, *[RING] * axes) == pytest.approx(backwards_s)


def test_tensor_parallel_times_are_equal_at_the_bound():
    batch, ways = 1024, tensor_parallel_ways(F, ROOF)
    computing_s = 4 * batch * D * F / (ways * ROOF.flops_per_s)
    assert 2 * all_gather_s(2 * batch * D, RING) == pytest.approx(computing_s)
    assert tensor_parallel_width(ways, ROOF) == pytest.approx(F)


def test_half_the_bytes_at_twice_the_peak_changes_nothing():
    twice = torus_roof(V5P, dtype="int8")
    assert tensor_parallel_ways(F, twice, value_bytes=1) == pytest.approx(tensor_parallel_ways(F, ROOF))
    assert data_parallel_tokens(twice, value_bytes=1) == pytest.approx(data_parallel_tokens(ROOF))


def test_data_parallel_of_experts_few_nodes_and_adding_switches():
    tokens = data_parallel_tokens(ROOF)
    assert data_parallel_tokens(ROOF, experts=64, experts_per_token=2) == 32 * tokens
    assert data_parallel_tokens(ROOF, groups=2) == tokens / 2
    assert data_parallel_tokens(ROOF, in_network=True) == tokens / 2


@pytest.mark.oldest
def test_tensor_parallel_over_nodes_is_at_most_one_node_more():
    assert tensor_parallel_ways(F, ROOF, node_chips=8) == 8 + tensor_parallel_ways(F, ROOF)
    assert tensor_parallel_width(4, ROOF, node_chips=8) == 0


def _mixed_s(fsdp: float, tokens: float, chips: int, axes: tuple[int, int]) -> tuple[float, float]:
    """Seconds of FSDP's gathers and of tensor parallelism's, by the collectives' own formula."""
    tensor = chips / fsdp
    weights = 2 * all_gather_s(2 * D * F / tensor, *[RING] * axes[0])
    stream = 2 * all_gather_s(2 * tokens / fsdp * D, *[RING] * axes[1])
    return weights, stream


@pytest.mark.oldest
@pytest.mark.parametrize("axes", [(1, 1), (2, 1), (1, 2)])
@pytest.mark.parametrize("at_once", [True, False])
def test_best_mix_by_brute_force(axes: tuple[int, int], at_once: bool):
    tokens, chips = 48_000, 64
    both = max if at_once else lambda pair: sum(pair)
    ways = best_fsdp_ways(tokens, F, chips, fsdp_axes=axes[0], tensor_axes=axes[1])
    best = both(_mixed_s(ways, tokens, chips, axes))
    tried = [both(_mixed_s(2 ** (step / 64), tokens, chips, axes)) for step in range(6 * 64 + 1)]
    assert best <= min(tried) * (1 + 1e-9)
    computing_s = 4 * tokens * D * F / (chips * ROOF.flops_per_s)
    kinds = {"fsdp_axes": axes[0], "tensor_axes": axes[1], "at_once": at_once}
    assert mixed_headroom(tokens, F, chips, ROOF, **kinds) == pytest.approx(computing_s / best)
    bound = mixed_tokens(F, ROOF, **kinds)
    assert mixed_headroom(bound * chips, F, chips, ROOF, **kinds) == pytest.approx(1)


@pytest.mark.parametrize(
    ("chips", "ways", "split"),
    [(64, 13.7, (16, 4)), (4096, 1333, (1024, 4)), (8960, 1618, (2048, 4)), (8, 100, (8, 1)), (8, 0.1, (1, 8))],
)
def test_powers_of_two(chips: int, ways: float, split: tuple[int, int]):
    assert power_of_two_split(chips, ways) == split
    assert math.prod(split) <= chips


def test_decode_times_are_equal_at_the_bound():
    hbm, batch = V5P.hbm_bytes_per_s, 32
    ways = decode_tensor_ways(F, batch, hbm_bytes_per_s=hbm, link_bytes_per_s=ROOF.bytes_per_s)
    assert 2 * D * F / (ways * hbm) == pytest.approx(all_gather_s(2 * batch * D, RING))


@pytest.mark.oldest
def test_contraction_times_are_equal_at_the_bound():
    ways, batch = 4, 128
    depth = contraction_depth(ways, ROOF)
    computing_s = 2 * batch * depth * F / (ways * ROOF.flops_per_s)
    assert all_reduce_s(2 * batch * F, RING) == pytest.approx(computing_s)


@pytest.mark.oldest
def test_experts_inside_a_node_need_no_width():
    assert expert_parallel_width(8, 2, ROOF) == 0
    assert expert_parallel_width(64, 8, ROOF) == pytest.approx(ROOF.ridge * 56 / 8)
    assert expert_parallel_width(1024, 1, ROOF) == pytest.approx(ROOF.ridge * 1016 * 8 / 1024)


@pytest.mark.oldest
def test_pipeline_and_latency():
    assert pipeline_send_s(8e9, bytes_per_s=1e9, microbatches=8, stages=4) == 10.0
    assert latency_bound_bytes(link_bytes_per_s=1e9, hop_latency_s=1e-6) == pytest.approx(1000)
    ways = latency_bound_ways(8000, link_bytes_per_s=1e9, hop_latency_s=1e-6)
    assert ways == pytest.approx(8)
    ring = Ring(num_chips=8, link_bytes_per_s=1e9, hop_latency_s=1e-6)
    assert all_gather_s(8000, ring) == pytest.approx(4e-6)


def test_weights_split_in_both_dims_by_brute_force():
    chips, batch = 512, 64
    rate = {"bytes_per_s": ROOF.bytes_per_s}

    def seconds(ways: float) -> float:
        return weight_stationary_s(batch, D, F, dim_ways=ways, width_ways=chips / ways, **rate)

    best = best_dim_ways(D, F, chips)
    assert seconds(best) <= min(seconds(2 ** (step / 16)) for step in range(9 * 16))
    # The stream over two axes, partial sums over one, by the collectives' own formula.
    stream_s = 2 * all_gather_s(2 * batch * D / best, RING, RING)
    sums_s = all_reduce_s(2 * batch * F * best / chips, RING)
    assert seconds(best) == pytest.approx(stream_s + sums_s)


@pytest.mark.oldest
@pytest.mark.parametrize("axes", [1, 2, 3])
def test_both_dims_and_one_are_equal_at_the_bound(axes: int):
    chips = weight_stationary_chips(D, F, axes=axes)
    ways, batch = best_dim_ways(D, F, chips), 64
    both_s = weight_stationary_s(batch, D, F, dim_ways=ways, width_ways=chips / ways, bytes_per_s=ROOF.bytes_per_s)
    assert both_s == pytest.approx(2 * all_gather_s(2 * batch * D, *[RING] * axes))


def test_a_switch_has_the_same_bounds():
    roof = Roof(flops_per_s=989e12, bytes_per_s=450e9)
    many = Switch(num_devices=100_000, bytes_per_s=450e9)
    tokens = data_parallel_tokens(roof)
    assert all_reduce_s(4 * D * F, many) == pytest.approx(8 * tokens * D * F / 989e12, rel=1e-4)


RATES = {"hbm_bytes_per_s": 1, "link_bytes_per_s": 1}
STATIONARY = {"dim_ways": 1, "width_ways": 1, "bytes_per_s": 1}
REFUSED = [
    (lambda: data_parallel_tokens(ROOF, value_bytes=0), "value_bytes must be"),
    (lambda: data_parallel_tokens(ROOF, groups=1), "groups=1 exchange nothing"),
    (lambda: data_parallel_tokens(ROOF, experts=-1), "experts must be"),
    (lambda: data_parallel_tokens(ROOF, experts_per_token=2), "more than the 1 experts"),
    (lambda: tensor_parallel_ways(0, ROOF), "width must be"),
    (lambda: tensor_parallel_ways(1, ROOF, node_chips=-1), "node_chips must be a number of at least 0"),
    (lambda: tensor_parallel_width(-1, ROOF), "ways must be"),
    (lambda: decode_tensor_ways(1, 0, **RATES), "batch must be"),
    (lambda: decode_tensor_ways(1, 1, **RATES, weight_bytes=0), "weight_bytes must be"),
    (lambda: mixed_tokens(1, ROOF, fsdp_axes=0), "fsdp_axes must be"),
    (lambda: mixed_headroom(0, 1, 1, ROOF), "tokens must be"),
    (lambda: best_fsdp_ways(1, 1, -1), "num_chips must be"),
    (lambda: power_of_two_split(0, 1), "num_chips must be"),
    (lambda: power_of_two_split(8, math.inf), "ways must be"),
    (lambda: expert_parallel_width(0, 1, ROOF), "ways must be"),
    (lambda: contraction_depth(0, ROOF), "ways must be"),
    (lambda: pipeline_send_s(1, bytes_per_s=1, microbatches=0, stages=1), "microbatches must be"),
    (lambda: latency_bound_ways(0, link_bytes_per_s=1, hop_latency_s=1), "whole_bytes must be"),
    (lambda: latency_bound_bytes(link_bytes_per_s=1, hop_latency_s=0), "hop_latency_s must be"),
    (lambda: weight_stationary_s(0, 1, 1, **STATIONARY), "batch must be"),
    (lambda: weight_stationary_s(1, 1, 1, **{**STATIONARY, "bytes_per_s": 0}), "bytes_per_s must be"),
    (lambda: best_dim_ways(1, 1, 0), "num_chips must be"),
    (lambda: weight_stationary_chips(1, 1, axes=0), "axes must be"),
]


@pytest.mark.parametrize(("make", "said"), REFUSED)
def test_refused_in_one_line(make, said: str):
    with pytest.raises(ValueError, match=said) as caught:
        make()
    assert "\n" not in str(caught.value)
