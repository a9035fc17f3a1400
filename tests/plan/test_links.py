"""Which links the axes of a mesh run on, worked out by hand for slices and hosts, and what holds for every mesh."""

import dataclasses
import math
import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gcompute.config.mesh import Axis, MeshShape
from gcompute.hardware.catalogue import catalogue
from gcompute.hardware.target import Target
from gcompute.plan.collectives import Network, Ring, Route, Switch, all_gather_s
from gcompute.plan.links import routes

GB = 1e9
V5E, V5P, V6E = 45 * GB, 90 * GB, 90 * GB


def found(mesh: str, target: str) -> dict[Axis, Route]:
    return routes(MeshShape.parse(mesh), Target.parse(target))


def ring(size: int, rate: float, *, closed: bool, hop_s: float = 1e-6) -> Ring:
    return Ring(num_chips=size, link_bytes_per_s=rate, hop_latency_s=hop_s, wraparound=closed)


@pytest.mark.parametrize(
    ("target", "mesh", "expected"),
    [
        # A whole pod closes both axes.
        ("v5e:16x16", "fsdp=16,tensor=16", {"fsdp": [(16, 1, True)], "tensor": [(16, 1, True)]}),
        # Smaller slices are lines, and 8x16 closes its long axis alone.
        ("v5e:4x4", "fsdp=4,tensor=4", {"fsdp": [(4, 1, False)], "tensor": [(4, 1, False)]}),
        ("v5e:8x16", "fsdp=16,tensor=8", {"fsdp": [(16, 1, True)], "tensor": [(8, 1, False)]}),
        # One axis of the mesh may have both of the torus.
        ("v6e:2x4", "tensor=8", {"tensor": [(2, 1, False), (4, 1, False)]}),
        ("v6e:16x16", "fsdp=256", {"fsdp": [(16, 1, True), (16, 1, True)]}),
        # Where no axis is of 4, a line of 4 of one of 16; the rest is a ring whose neighbours are 4 links apart.
        ("v5e:16x16", "fsdp=64,tensor=4", {"fsdp": [(16, 1, True), (4, 4, True)], "tensor": [(4, 1, False)]}),
        # Each takes its piece where most is left, and two rings of every other chip remain.
        (
            "v5e:16x16",
            "data=64,context=2,tensor=2",
            {"data": [(8, 2, True), (8, 2, True)], "context": [(2, 1, False)], "tensor": [(2, 1, False)]},
        ),
        # 6 of 12 chips in a row, and the other half 6 links away.
        (
            "v5p:4x4x12",
            "data=2,fsdp=16,tensor=6",
            {"data": [(2, 6, False)], "fsdp": [(4, 1, True)] * 2, "tensor": [(6, 1, False)]},
        ),
        # Cubes of 4x4x4 close all axes.
        ("v5p:4x4x4", "fsdp=16,tensor=4", {"fsdp": [(4, 1, True)] * 2, "tensor": [(4, 1, True)]}),
        ("v5p:4x4x8", "fsdp=8,tensor=16", {"fsdp": [(8, 1, True)], "tensor": [(4, 1, True)] * 2}),
        ("v5p:2x2x4", "fsdp=4,tensor=4", {"fsdp": [(4, 1, False)], "tensor": [(2, 1, False)] * 2}),
    ],
)
def test_on_one_slice(target: str, mesh: str, expected: dict[str, list[tuple[int, int, bool]]]):
    """expected: (chips, links from one to the next, closed) of each ring."""
    rate = V5E if target.startswith("v5e") else V5P
    made = {
        Axis(axis): Route(
            rings=tuple(ring(n, rate / stride, closed=closed, hop_s=stride * 1e-6) for n, stride, closed in rings)
        )
        for axis, rings in expected.items()
    }
    assert found(mesh, target) == made


def test_two_devices_of_a_chip_share_its_links():
    # tensor=2 stays inside a chip; along fsdp both devices send, each in a group of its own.
    assert found("fsdp=64,tensor=2", "v7x:4x4x4") == {Axis.FSDP: Route(rings=(ring(4, V5P / 2, closed=True),) * 3)}
    # tensor=8 has both devices of 4 chips, and their links to itself.
    assert found("fsdp=16,tensor=8", "v7x:4x4x4") == {
        Axis.FSDP: Route(rings=(ring(4, V5P / 2, closed=True),) * 2),
        Axis.TENSOR: Route(rings=(ring(4, V5P, closed=True),)),
    }
    # All bytes that leave a chip are the same, whichever axis is inside it: half the bytes at half the rate.
    inner = all_gather_s(GB / 2, found("fsdp=64,tensor=2", "v7x:4x4x4")[Axis.FSDP])
    assert inner == all_gather_s(GB, found("fsdp=128", "v7x:4x4x4")[Axis.FSDP])


def test_over_several_slices():
    dcn = 25e9 / 8
    two = found("data=2,fsdp=4,tensor=4", "2*v5e:4x4")
    line = ring(4, V5E, closed=False)
    assert two == {
        Axis.DATA: Route(network=Network(num_groups=2, bytes_per_s=dcn)),
        Axis.FSDP: Route(rings=(line,)),
        Axis.TENSOR: Route(rings=(line,)),
    }
    assert [two[axis].slowest for axis in two] == ["ICI", "ICI", "DCN"]
    # data takes the factor of 2 that it has, fsdp the other.
    four = found("data=2,fsdp=8,tensor=4", "4*v5e:4x4")
    assert four[Axis.DATA] == Route(network=Network(num_groups=2, bytes_per_s=dcn))
    assert four[Axis.FSDP] == Route(rings=(line,), network=Network(num_groups=2, bytes_per_s=dcn))
    # The two devices of a v7x share the network too.
    ironwood = found("data=2,fsdp=128", "2*v7x:4x4x4")[Axis.DATA].network
    assert ironwood == Network(num_groups=2, bytes_per_s=100e9 / 8 / 2)


def test_gpus_in_a_host_and_across():
    switch, network = Switch(num_devices=8, bytes_per_s=450 * GB), Network(num_groups=8, bytes_per_s=50 * GB)
    assert found("tensor=8", "h100:8") == {Axis.TENSOR: Route(switch=switch, pipelined=True)}
    apart = found("fsdp=8,tensor=8", "h100:64")
    assert apart == {
        Axis.FSDP: Route(network=network, pipelined=True),
        Axis.TENSOR: Route(switch=switch, pipelined=True),
    }
    assert apart[Axis.TENSOR].slowest == "NVLink"
    assert found("fsdp=64", "h100:64") == {Axis.FSDP: Route(switch=switch, network=network, pipelined=True)}
    # Half a host each: the outer axis has what is left of it.
    half = found("fsdp=16,tensor=4", "h100:64")
    assert (half[Axis.FSDP].num_inside, half[Axis.TENSOR].num_inside) == (2, 4)
    assert half[Axis.FSDP].network == network
    rack = found("data=2,tensor=36", "gb200:72")
    assert (rack[Axis.DATA].num_inside, rack[Axis.TENSOR].num_inside) == (2, 36)
    # Without NVLink, PCIe joins those of a host.
    assert found("tensor=4", "l4:4")[Axis.TENSOR].switch == Switch(num_devices=4, bytes_per_s=32 * GB, name="PCIe")


def test_one_device_and_this_machine_need_no_links():
    assert found("", "h100:1") == {}
    assert found("fsdp=4,tensor=2", "cpu:8") == {}


@pytest.mark.parametrize(
    ("target", "mesh", "lacking", "said"),
    [
        ("v5e:4x4", "fsdp=8", None, "mesh fsdp=8 is of 8 devices and v5e:4x4 has 16. Give axes whose product is 16"),
        ("v7x:4x4x4", "fsdp=64", None, "v7x:4x4x4 has 128"),
        ("2*v5e:4x4", "tensor=32", None, "their sizes lack a factor of 2. Use data=2"),
        ("4*v5e:4x4", "data=2,expert=32", None, "their sizes lack a factor of 2. Use data=4"),
        ("v5e:4x4", "fsdp=16", "link_bytes_per_s", "v5e: link_bytes_per_s is not in the catalogue"),
        ("v5e:4x4", "fsdp=16", "wrap_multiple", "which axes of a v5e slice close into a ring is not known"),
        ("2*v5e:4x4", "fsdp=32", "dcn_bytes_per_s", "v5e: dcn_bytes_per_s is not in the catalogue"),
        ("t4:4", "fsdp=4", "pcie_bytes_per_s", "t4: domain_bytes_per_s is not in the catalogue"),
        ("t4:16", "fsdp=16", None, "t4: dcn_bytes_per_s is not in the catalogue"),
        ("mi300x:16", "fsdp=16", None, "Give it in a chip file (--chips)."),
    ],
)
def test_refused(target: str, mesh: str, lacking: str | None, said: str):
    chips = dict(catalogue())
    if lacking:
        name = Target.parse(target).chip
        chips[name] = dataclasses.replace(chips[name], **{lacking: None})
    with pytest.raises(ValueError, match=re.escape(said)) as refused:
        routes(MeshShape.parse(mesh), Target.parse(target, chips))
    assert "\n" not in str(refused.value)


TARGETS = (
    *("v5e:4x4", "v5e:8x16", "v5e:16x16", "v6e:16x16", "v5p:4x4x4", "v5p:8x8x12", "v4:4x4x8", "v7x:4x4x8", "v3:16x16"),
    *("2*v5e:8x8", "4*v5p:4x4x4", "2*v7x:4x4x4", "h100:8", "h100:128", "gb200:144", "l4:12"),
)


@st.composite
def meshes(draw: st.DrawFn) -> tuple[MeshShape, Target]:
    """A target, and its devices split at random over the axes."""
    target = Target.parse(draw(st.sampled_from(TARGETS)))
    left, sizes = target.num_devices // target.slices, dict.fromkeys(Axis, 1)
    sizes[Axis.DATA] = target.slices
    for prime in (2, 3, 5, 7):
        while left % prime == 0:
            sizes[draw(st.sampled_from(list(Axis)))] *= prime
            left //= prime
    assert left == 1
    return MeshShape(**{axis.value: size for axis, size in sizes.items()}), target


@given(meshes())
def test_every_axis_has_links_for_all_its_devices(drawn: tuple[MeshShape, Target]):
    mesh, target = drawn
    made = routes(mesh, target)
    assert target.known is not None
    together = target.known.devices_per_chip if target.backend == "tpu" else 1
    in_chip = {}
    for axis in Axis:
        route = made.get(axis, Route())
        groups = route.network.num_groups if route.network else 1
        in_chip[axis] = mesh.size(axis) / (route.num_inside * groups)
        assert axis not in made or all_gather_s(GB, route) > 0
        for one in route.rings:
            assert 2 <= one.num_chips <= max(target.shape)
    assert all(inside in (1, together) for inside in in_chip.values())
    assert math.prod(in_chip.values()) == together
    across = math.prod(route.network.num_groups for route in made.values() if route.network)
    assert across == target.slices if target.backend == "tpu" else target.num_devices // target.domain_devices <= across
