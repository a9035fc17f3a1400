"""Roofs of the catalogue's chips, and single operations under them."""

import math

import pytest

from gcompute.hardware.catalogue import find_chip
from gcompute.plan.roof import (
    Roof,
    across_nodes_roof,
    host_roof,
    memory_roof,
    network_roof,
    node_roof,
    peak_of,
    torus_roof,
)
from gcompute.plan.rooflines import (
    attention_product,
    attention_tokens,
    contraction_flops,
    critical_batch,
    dot_product,
    elementwise,
    exact_critical_batch,
    overlap_bounds,
    product,
    roofline_s,
    sparsity,
    tile_intensity,
    transfer_s,
)

ROOF = Roof(flops_per_s=1e12, bytes_per_s=1e10)


@pytest.mark.oldest
def test_roofs_of_one_chip():
    v5e, h100 = find_chip("v5e"), find_chip("h100")
    assert memory_roof(v5e, "int8").flops_per_s == peak_of(v5e, "int8") == v5e.peak_flops_per_s["int8"]
    assert torus_roof(v5e, 2).bytes_per_s == 2 * 2 * 45e9
    assert host_roof(v5e).bytes_per_s == v5e.pcie_bytes_per_s
    assert network_roof(v5e).bytes_per_s == v5e.dcn_bytes_per_s
    assert node_roof(h100).bytes_per_s == 450e9
    assert across_nodes_roof(h100, 8).bytes_per_s == 8 * 8 * 50e9


def test_a_chip_of_two_devices_counts_whole():
    v7x = find_chip("v7x")
    assert peak_of(v7x) == v7x.peak_flops_per_s["bfloat16"]


def test_a_product_counts_each_operand_once():
    one = product(3, 5, 7, weight_bytes=1, activation_bytes=2)
    assert (one.flops, one.moved_bytes) == (2 * 3 * 5 * 7, 5 * 7 + 2 * (3 * 5 + 3 * 7))
    own = product(3, 5, 7, weight_bytes=1, activation_bytes=2, num_weights=3)
    assert own.moved_bytes == 3 * 5 * 7 + 2 * (3 * 5 + 3 * 7)


@pytest.mark.parametrize(("dim", "width", "weight", "activation"), [(4096, 4096, 1, 2), (1024, 8192, 2, 2)])
def test_at_the_exact_critical_batch_both_times_are_equal(dim: int, width: int, weight: float, activation: float):
    batch = exact_critical_batch(dim, width, ROOF, weight_bytes=weight, activation_bytes=activation)
    one = product(batch, dim, width, weight_bytes=weight, activation_bytes=activation)
    assert one.flops / ROOF.flops_per_s == pytest.approx(one.moved_bytes / ROOF.bytes_per_s)


def test_no_batch_will_do_for_small_matrices():
    assert exact_critical_batch(64, 64, ROOF) == math.inf


@pytest.mark.oldest
def test_activations_not_counted_is_the_limit_of_large_matrices():
    exact = exact_critical_batch(1e9, 1e9, ROOF, weight_bytes=1)
    assert critical_batch(ROOF, weight_bytes=1) == pytest.approx(exact, rel=1e-4)
    assert critical_batch(ROOF, experts=64, experts_per_token=4) == 16 * critical_batch(ROOF)


@pytest.mark.oldest
def test_intensities():
    assert dot_product(10, value_bytes=2).intensity == 19 / 42
    assert elementwise(8, operands=2, value_bytes=4).moved_bytes == 12 * 8
    t, s, n, k = 16, 64, 8, 2
    assert attention_product(t, s, heads=n, kv_heads=k, head_dim=4).intensity == pytest.approx(
        t * s * (n // k) / (t * (n // k) + s)
    )
    assert tile_intensity(128, 128) == pytest.approx(product(128, 1e9, 128).intensity, rel=1e-3)
    assert contraction_flops(2, 3, 5) == 60


def test_attention_costs_as_much_as_matrices():
    params, heads, head_dim = 3_000_000, 8, 64
    tokens = attention_tokens(params, heads=heads, head_dim=head_dim)
    scores = attention_product(tokens, tokens, heads=heads, kv_heads=heads, head_dim=head_dim)
    assert scores.flops == pytest.approx(2 * params * tokens)


@pytest.mark.oldest
def test_seconds():
    memory_bound, compute_bound = product(1, 4096, 4096), product(4096, 4096, 4096)
    assert roofline_s(memory_bound, ROOF) == memory_bound.moved_bytes / 1e10
    assert roofline_s(compute_bound, ROOF, num_chips=4) == compute_bound.flops / 1e12 / 4
    assert transfer_s(0, 1e9) == 0
    assert overlap_bounds(1.0, 2.0, 4.0) == (4.0, 7.0)


REFUSED = [
    (lambda: Roof(flops_per_s=0, bytes_per_s=1), "flops_per_s must be a number above 0"),
    (lambda: Roof(flops_per_s=1, bytes_per_s=math.nan), "bytes_per_s must be a number above 0"),
    (lambda: peak_of(find_chip("v5e"), "float4"), "v5e has no peak for float4"),
    (lambda: memory_roof(find_chip("h100"), "nothing"), "no peak for nothing"),
    (lambda: torus_roof(find_chip("h100")), "h100-sxm has no link_bytes_per_s"),
    (lambda: torus_roof(find_chip("v5e"), 3), "axes=3 is not one"),
    (lambda: torus_roof(find_chip("v5e"), 0), "axes=0 is not one"),
    (lambda: node_roof(find_chip("v5e")), "v5e has no domain_bytes_per_s"),
    (lambda: across_nodes_roof(find_chip("h100"), 0), "nodes must be"),
    (lambda: across_nodes_roof(find_chip("mi300x")), "mi300x has no dcn_bytes_per_s"),
    (lambda: network_roof(find_chip("v3")), "v3 has no dcn_bytes_per_s"),
    (lambda: host_roof(find_chip("v4")), "v4 has no pcie_bytes_per_s"),
    (lambda: product(0, 1, 1), "rows must be"),
    (lambda: product(1, 1, -1), "width must be"),
    (lambda: product(1, 1, 1, weight_bytes=0), "weight_bytes must be"),
    (lambda: dot_product(-1), "length must be"),
    (lambda: elementwise(0), "values must be"),
    (lambda: attention_product(1, 0, heads=1, kv_heads=1, head_dim=1), "keys must be"),
    (lambda: contraction_flops(2, 0), "dim 1 must be"),
    (lambda: tile_intensity(0, 1), "rows must be"),
    (lambda: roofline_s(product(1, 1, 1), ROOF, num_chips=0), "num_chips must be"),
    (lambda: transfer_s(-1, 1), "num_bytes must be a number of at least 0"),
    (lambda: transfer_s(1, 0), "bytes_per_s must be"),
    (lambda: overlap_bounds(), "nothing to overlap"),
    (lambda: overlap_bounds(1, -1), "part 1 must be"),
    (lambda: critical_batch(ROOF, weight_bytes=0), "weight_bytes must be"),
    (lambda: critical_batch(ROOF, experts=2, experts_per_token=4), "is more than the 2 experts"),
    (lambda: exact_critical_batch(0, 1, ROOF), "depth must be"),
    (lambda: attention_tokens(0, heads=1, head_dim=1), "matrix_params must be"),
    (lambda: sparsity(0, 1), "experts must be"),
]


@pytest.mark.parametrize(("make", "said"), REFUSED)
def test_refused_in_one_line(make, said: str):
    with pytest.raises(ValueError, match=said) as caught:
        make()
    assert "\n" not in str(caught.value)
