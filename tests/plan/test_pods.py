"""What a target adds up to, ways through its torus, parts of arrays, and trees of switches."""

import pytest

from gcompute.hardware.target import Target
from gcompute.plan.collectives import Network, Switch, all_gather_s
from gcompute.plan.fat_tree import Level, gather_beside_inner_s, in_network_reduce_s, tree_gather_s
from gcompute.plan.pods import clock_of, matrix_unit_flops_per_s, pod, vector_flops_per_s
from gcompute.plan.shards import num_copies, shard_bytes, shard_shape
from gcompute.plan.torus_paths import gather_to_one_s, num_hops, num_links, send_s

V5E = Target.parse("v5e:4x4")
NODE, LEAF = Level(degree=8, bytes_per_s=450e9), Level(degree=32, bytes_per_s=400e9)
RATES = {"node_chips": 8, "chip_bytes_per_s": 450e9, "node_bytes_per_s": 400e9}


@pytest.mark.oldest("h100:64-8-64")
@pytest.mark.parametrize(
    ("text", "hosts", "cores"), [("v5e:16x16", 32, 256), ("v5p:4x4x4", 16, 128), ("h100:64", 8, 64), ("l4:4", None, 4)]
)
def test_pod(text: str, hosts: int | None, cores: int):
    target = Target.parse(text)
    found = pod(target)
    assert (found.chips, found.hosts, found.cores) == (target.num_chips, hosts, cores)


@pytest.mark.oldest
def test_units():
    assert matrix_unit_flops_per_s(256, 1e9) == 4 * matrix_unit_flops_per_s(128, 1e9)
    assert clock_of(vector_flops_per_s(100, 2e9, flops_per_cycle=2), 100, flops_per_cycle=2) == 2e9


def test_hops_and_links():
    assert num_hops((16, 16), (True, True), (0, 1), (15, 9)) == 1 + 8
    assert num_hops((4, 4), (False, False), (0, 1), (3, 2)) == 4
    assert num_links((4, 4), (False, False), (1, 2)) == 4
    assert num_links((4, 4), (False, False), (0, 2)) == 3
    assert num_links((2, 2, 1), (False, False, False), (0, 1, 0)) == 2
    assert num_links((2, 4), (True, True), (0, 0)) == 3


@pytest.mark.oldest
def test_sending():
    assert send_s(1e9, V5E, (0, 0), (0, 0)) == 0
    assert send_s(0, V5E, (0, 0), (3, 3)) == pytest.approx(6e-6)
    assert send_s(45e9, V5E, (1, 1), (2, 2)) == pytest.approx(0.25 + 2e-6)
    assert gather_to_one_s(16 * 90e9, V5E, (0, 0)) == pytest.approx(15)
    assert gather_to_one_s(1e9, Target.parse("v5e:1x1"), (0, 0)) == 0


@pytest.mark.oldest
def test_shards():
    assert shard_shape((8, 6), (4, 3)) == (2, 2)
    assert shard_bytes((8, 6), (4, 3), value_bytes=4) == 16
    assert num_copies(24, (4, 3)) == 2


@pytest.mark.oldest
def test_a_tree_is_as_fast_as_its_slowest_level():
    # The same by a switch and the network between nodes, each GPU having an eighth of its node's share.
    by_links = all_gather_s(1e9, Switch(num_devices=8, bytes_per_s=450e9), Network(num_groups=32, bytes_per_s=50e9))
    assert tree_gather_s(1e9, (NODE, LEAF)) == pytest.approx(by_links)
    assert in_network_reduce_s(400e9, (NODE, LEAF)) == 1
    assert tree_gather_s(0, (NODE,)) == 0


def test_an_inner_axis_helps_once_it_leaves_the_node():
    seconds = [gather_beside_inner_s(1e12, inner=inner, **RATES) for inner in (1, 4, 8, 16, 64)]
    assert seconds == pytest.approx([2.5, 2.5, 2.5, 1.25, 0.3125])


REFUSED = [
    (lambda: pod(Target.parse("cpu:8")), "cpu:8 has no figures"),
    (lambda: pod(V5E, "float4"), "v5e has no peak for float4"),
    (lambda: matrix_unit_flops_per_s(0, 1), "dim must be"),
    (lambda: vector_flops_per_s(1, -1), "clock_hz must be"),
    (lambda: clock_of(1, 0), "lanes must be"),
    (lambda: num_hops((4, 4), (False, False), (0, 0), (4, 0)), r"chip \(4, 0\) is not in a slice of 4x4"),
    (lambda: num_links((4, 4), (False, False), (0,)), "is not in a slice"),
    (lambda: send_s(-1, V5E, (0, 0), (1, 1)), "num_bytes must be"),
    (lambda: send_s(1, Target.parse("h100:8"), (0,), (1,)), "h100-sxm:8 is no torus"),
    (lambda: send_s(1, Target.parse("2*v5e:4x4"), (0, 0), (1, 1)), "is 2 slices: give one"),
    (lambda: gather_to_one_s(-1, V5E, (0, 0)), "whole_bytes must be"),
    (lambda: gather_to_one_s(1, V5E, (0, -1)), "is not in a slice"),
    (lambda: shard_shape((8,), (2, 2)), "has 1 dims and splits"),
    (lambda: shard_shape((8,), (3,)), "a dim of 8 does not split 3 ways"),
    (lambda: shard_shape((8,), (0,)), "does not split 0 ways"),
    (lambda: shard_bytes((8,), (2,), value_bytes=0), "value_bytes must be"),
    (lambda: num_copies(8, (3,)), "8 devices do not split 3 ways"),
    (lambda: Level(degree=0, bytes_per_s=1), "degree must be"),
    (lambda: tree_gather_s(-1, (NODE,)), "whole_bytes must be"),
    (lambda: tree_gather_s(1, ()), "at least one level"),
    (lambda: in_network_reduce_s(1, ()), "at least one level"),
    (lambda: gather_beside_inner_s(1, inner=0, **RATES), "inner must be"),
]


@pytest.mark.parametrize(("make", "said"), REFUSED)
def test_refused_in_one_line(make, said: str):
    with pytest.raises(ValueError, match=said) as caught:
        make()
    assert "\n" not in str(caught.value)
