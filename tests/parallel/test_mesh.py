"""From MeshShape to a mesh: the order of devices on slices that are not here, and what cannot be laid out."""

import dataclasses
import itertools
import os
import subprocess
import sys
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from gcompute.config.mesh import Axis, MeshShape
from gcompute.parallel.mesh import (
    MAY_CROSS_SLICES,
    abstract_mesh,
    arrange,
    build_mesh,
    links_by_axis,
    split_over_slices,
    use_mesh,
)

SIZES = st.sampled_from([1, 2, 3, 4, 6, 8])


@dataclass(frozen=True)
class Chip:
    """What JAX's ordering reads of a TPU chip."""

    id: int
    coords: tuple[int, int, int]
    slice_index: int
    process_index: int
    core_on_chip: int = 0
    device_kind: str = "TPU v5"
    platform: str = "tpu"


@dataclass(frozen=True)
class Gpu:
    """A GPU of a machine of eight: JAX counts machines as slices."""

    id: int
    slice_index: int
    process_index: int
    device_kind: str = "H100"
    platform: str = "gpu"


def slices(num_slices: int, sides: tuple[int, int, int]) -> list[Chip]:
    places = list(itertools.product(*map(range, reversed(sides))))
    return [
        Chip(s * len(places) + i, (x, y, z), s, (s * len(places) + i) // 4)
        for s in range(num_slices)
        for i, (z, y, x) in enumerate(places)
    ]


def lines(array: np.ndarray, axis: Axis) -> np.ndarray:
    """The devices along `axis`, a row for each line of them."""
    return np.moveaxis(array, list(Axis).index(axis), -1).reshape(-1, array.shape[list(Axis).index(axis)])


def torus_steps(line: np.ndarray, sides: tuple[int, int, int]) -> list[int]:
    """Links between each chip of a line and the next, in a torus."""
    return [
        sum(min((a - b) % side, (b - a) % side) for a, b, side in zip(one.coords, other.coords, sides, strict=True))
        for one, other in itertools.pairwise(line)
    ]


def test_all_six_axes_in_their_order_over_the_first_devices():
    mesh = build_mesh(MeshShape(data=2, fsdp=2))
    assert mesh.axis_names == tuple(Axis)
    assert dict(mesh.shape) == {**dict.fromkeys(Axis, 1), "data": 2, "fsdp": 2}
    assert mesh.axis_types == (AxisType.Auto,) * 6
    assert [device.id for device in mesh.devices.flat] == [0, 1, 2, 3]
    chosen = jax.devices()[6:]
    assert list(build_mesh(MeshShape(tensor=2), chosen).devices.flat) == chosen


def test_an_abstract_mesh_splits_as_the_real_one_does():
    shape = MeshShape(data=2, fsdp=2, tensor=2)
    spec = PartitionSpec((Axis.DATA, Axis.FSDP), Axis.TENSOR)
    abstract, real = abstract_mesh(shape), build_mesh(shape)
    assert (abstract.shape, abstract.axis_types) == (real.shape, real.axis_types)
    assert NamedSharding(abstract, spec).shard_shape((8, 6)) == NamedSharding(real, spec).shard_shape((8, 6)) == (2, 3)


def test_inside_use_mesh_specs_and_nested_shard_maps_need_no_mesh():
    mesh = build_mesh(MeshShape(data=2, stage=2, tensor=2))

    def inner(x):
        return jax.lax.psum(x, Axis.TENSOR)

    def outer(x):
        x = jax.lax.with_sharding_constraint(x, PartitionSpec(Axis.DATA))
        x = jax.shard_map(
            inner, in_specs=PartitionSpec(None, Axis.TENSOR), out_specs=PartitionSpec(), axis_names={Axis.TENSOR}
        )(x)
        return jax.lax.ppermute(x, Axis.STAGE, [(0, 1), (1, 0)])

    @jax.jit
    def run(x):
        split = PartitionSpec(Axis.STAGE)
        return jax.shard_map(outer, mesh=mesh, in_specs=split, out_specs=split, axis_names={Axis.STAGE})(x)

    x = np.arange(32.0, dtype=np.float32).reshape(8, 4)
    with use_mesh(mesh):
        y, dx = run(x), jax.jit(jax.grad(lambda x: run(x).sum()))(x)
    halves = x[:, :2] + x[:, 2:]
    np.testing.assert_array_equal(y, np.concatenate([halves[4:], halves[:4]]))
    np.testing.assert_array_equal(dx, np.ones_like(x))


def test_use_mesh_ends_with_its_block():
    mesh = build_mesh(MeshShape(data=2))
    with use_mesh(mesh):
        pass
    with pytest.raises(RuntimeError, match="mesh"):
        jax.lax.with_sharding_constraint(jnp.zeros(4), PartitionSpec(Axis.DATA))


# Within a slice.


@pytest.mark.parametrize(
    ("sides", "mesh", "axis"),
    [
        ((4, 4, 1), "fsdp=4,tensor=4", Axis.TENSOR),
        ((4, 4, 1), "data=2,fsdp=2,tensor=4", Axis.TENSOR),
        ((4, 4, 4), "fsdp=16,tensor=4", Axis.TENSOR),
        ((4, 4, 4), "data=4,context=4,tensor=4", Axis.CONTEXT),
        ((4, 4, 4), "fsdp=32,tensor=2", Axis.TENSOR),
        ((8, 8, 16), "fsdp=64,tensor=16", Axis.TENSOR),
    ],
)
def test_an_inner_axis_runs_along_links(sides, mesh, axis):
    array = arrange(MeshShape.parse(mesh), slices(1, sides))
    for line in lines(array, axis):
        assert set(torus_steps(line, sides)) == {1}


@pytest.mark.oldest("TPU v5 lite-sides0-tensor=4-links0")
@pytest.mark.parametrize(
    ("sides", "mesh", "links"),
    [
        # A closed ring of n chips needs n links, and a pair 2: there and back.
        ((2, 2, 1), "tensor=4", {Axis.TENSOR: 4}),
        ((2, 2, 1), "fsdp=2,tensor=2", {Axis.TENSOR: 4, Axis.FSDP: 4}),
        ((2, 4, 1), "tensor=8", {Axis.TENSOR: 8}),
        ((2, 4, 1), "fsdp=2,tensor=4", {Axis.TENSOR: 8}),
        ((2, 4, 1), "fsdp=4,tensor=2", {Axis.TENSOR: 8}),
        ((2, 2, 2), "tensor=8", {Axis.TENSOR: 8}),
        ((2, 2, 2), "fsdp=2,tensor=4", {Axis.TENSOR: 8, Axis.FSDP: 8}),
        ((2, 2, 2), "data=2,fsdp=2,tensor=2", {Axis.TENSOR: 8, Axis.FSDP: 8, Axis.DATA: 8}),
    ],
)
@pytest.mark.parametrize("kind", ["TPU v5 lite", "TPU v5p"])
def test_rings_of_a_small_slice_are_as_short_as_can_be(kind, sides, mesh, links):
    chips = [dataclasses.replace(chip, device_kind=kind, process_index=0) for chip in slices(1, sides)]
    array = arrange(MeshShape.parse(mesh), chips)
    assert {chip.id for chip in array.flat} == {chip.id for chip in chips}
    found = dict(zip(reversed(Axis), links_by_axis(array), strict=True))
    assert {axis: found[axis] for axis in links} == links


# Over several slices.


def test_only_the_outermost_axis_crosses_two_slices():
    array = arrange(MeshShape(data=2, fsdp=16, tensor=4), slices(2, (4, 4, 4)))
    for axis in Axis:
        crossing = {len({chip.slice_index for chip in line}) for line in lines(array, axis)}
        assert crossing == {2 if axis is Axis.DATA else 1}
    assert all(set(torus_steps(line, (4, 4, 4))) == {1} for line in lines(array, Axis.TENSOR))


def test_what_data_lacks_the_next_axes_give():
    array = arrange(MeshShape(data=2, stage=2, fsdp=8, tensor=4), slices(8, (4, 4, 1)))
    assert {len({chip.slice_index for chip in line}) for line in lines(array, Axis.FSDP)} == {2}
    # The part of fsdp that crosses is its outer one: its first half lies in one slice.
    for line in lines(array, Axis.FSDP):
        assert [chip.slice_index for chip in line] == sorted(chip.slice_index for chip in line)
    assert {len({chip.slice_index for chip in line}) for line in lines(array, Axis.TENSOR)} == {1}


def test_gpus_of_one_machine_hold_the_inner_axes():
    gpus = [Gpu(i, i // 8, i // 8) for i in range(16)]
    array = arrange(MeshShape(data=2, tensor=8), gpus)
    assert [{gpu.slice_index for gpu in line} for line in lines(array, Axis.TENSOR)] == [{0}, {1}]


@given(st.builds(MeshShape, **{axis.value: SIZES for axis in Axis}), st.sampled_from([1, 2, 3, 4, 6, 8, 12]))
@settings(deadline=None, max_examples=200)
def test_a_split_is_exact_outermost_first_and_refused_only_where_none_exists(shape, num_slices):
    room = np.prod([shape.size(axis) for axis in MAY_CROSS_SLICES])
    if room % num_slices:
        with pytest.raises(ValueError, match="does not split"):
            split_over_slices(shape, num_slices)
        return
    within, across = split_over_slices(shape, num_slices)
    assert across.num_devices == num_slices
    for axis in Axis:
        assert within.size(axis) * across.size(axis) == shape.size(axis)
        assert across.size(axis) == 1 or axis in MAY_CROSS_SLICES
    assert across.data == np.gcd(shape.data, num_slices)


def test_the_nearest_legal_mesh_is_legal_and_as_large():
    with pytest.raises(ValueError, match=r"mesh fsdp=2,context=2,tensor=16 does not split over 4 slices: .*"):
        split_over_slices(MeshShape(fsdp=2, context=2, tensor=16), 4)
    try:
        split_over_slices(MeshShape(fsdp=2, context=2, tensor=16), 4)
    except ValueError as error:
        nearest = MeshShape.parse(str(error).rpartition("Nearest legal: ")[2].removesuffix("."))
    assert nearest == MeshShape(data=2, fsdp=2, context=2, tensor=8)
    assert split_over_slices(nearest, 4)[1] == MeshShape(data=2, fsdp=2)


def test_a_slow_axis_may_be_allowed_to_cross():
    within, across = split_over_slices(MeshShape(tensor=8), 2, may_cross=[Axis.TENSOR])
    assert (within, across) == (MeshShape(tensor=4), MeshShape(tensor=2))
    array = arrange(MeshShape(tensor=32), slices(2, (4, 4, 1)), may_cross=[Axis.TENSOR])
    assert {len({chip.slice_index for chip in line}) for line in lines(array, Axis.TENSOR)} == {2}


# What cannot be laid out.


@pytest.mark.parametrize(
    ("shape", "devices", "message"),
    [
        (
            MeshShape(data=16),
            None,
            r"mesh data=16 needs 16 devices and there are 8\. .*JAX_PLATFORMS=cpu JAX_NUM_CPU_DEVICES=16",
        ),
        (MeshShape(), [], r"mesh data=1 needs 1 devices and there are 0"),
        (MeshShape(fsdp=4), slices(1, (4, 4, 1)), r"leaves 3 of 4 processes idle\. Use a mesh over all 16"),
        (MeshShape(fsdp=24), slices(2, (4, 4, 1)), r"leaves 2 of 8 processes idle"),
        (
            MeshShape(tensor=32),
            slices(2, (4, 4, 1)),
            r"only data, stage, fsdp may cross .* Nearest legal: data=2,tensor",
        ),
        (
            MeshShape(fsdp=3),
            [Chip(i, (i % 2, i // 2, 0), 0, 0) for i in range(4)],
            r"mesh fsdp=3 takes 3 of 4 chips, and those do not fill a box",
        ),
        (
            MeshShape(fsdp=3),
            [Chip(i, (i % 2, 0, 0), i // 2, 0) for i in range(4)],
            r"takes 3 of 4 devices, not as many of each of 2 slices",
        ),
    ],
)
def test_what_cannot_be_laid_out_is_refused_in_a_line(shape, devices, message):
    with pytest.raises(ValueError, match=message) as caught:
        build_mesh(shape, devices)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("num_slices", "may_cross", "message"),
    [
        (0, MAY_CROSS_SLICES, "num_slices=0 must be at least 1"),
        (2, (), "Allow some axis to cross"),
        (5, MAY_CROSS_SLICES, "a multiple of 5 devices"),
    ],
)
def test_splits_that_no_mesh_mends(num_slices, may_cross, message):
    with pytest.raises(ValueError, match=message):
        split_over_slices(MeshShape(data=2, tensor=4), num_slices, may_cross=may_cross)


@pytest.mark.slow
def test_without_any_device_it_says_how_to_get_some():
    program = (
        "from gcompute.config.mesh import MeshShape; from gcompute.parallel.mesh import build_mesh\n"
        "try: build_mesh(MeshShape())\n"
        "except ValueError as error: print(error)"
    )
    environment = {**os.environ, "JAX_PLATFORMS": "rocm"}
    result = subprocess.run(
        [sys.executable, "-c", program], env=environment, capture_output=True, text=True, timeout=60
    )
    assert result.stdout.startswith("JAX finds no device ("), result.stderr
    assert "JAX_PLATFORMS=cpu JAX_NUM_CPU_DEVICES=8" in result.stdout
