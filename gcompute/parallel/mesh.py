"""From a MeshShape to a jax.sharding.Mesh: which device gets which place, so that fast axes have fast links.

The links of a TPU slice (ICI) join neighbouring chips, and slices are joined by the far slower data-centre network
(DCN). Axes are in the order of `Axis`, so the last ones (tensor) get neighbours and the first ones (data) cross slices.
"""

import itertools
import math
from collections.abc import Collection, Iterator, Sequence
from contextlib import AbstractContextManager
from typing import Any

import jax
import numpy as np
from jax.experimental import mesh_utils
from jax.sharding import AbstractMesh, AxisType, Mesh

from gcompute.config.mesh import Axis, MeshShape

NAMES = tuple(axis.value for axis in Axis)
# Auto, stated because the default differs between JAX 0.7 and later versions.
AXIS_TYPES = (AxisType.Auto,) * len(NAMES)
# What these send can hide behind the work of a whole step or stage; the other axes wait for theirs inside each layer.
MAY_CROSS_SLICES = (Axis.DATA, Axis.STAGE, Axis.FSDP)
SMALL_SLICE = 8


def build_mesh(
    shape: MeshShape, devices: Sequence[Any] | None = None, *, may_cross: Collection[Axis] = MAY_CROSS_SLICES
) -> Mesh:
    """A mesh with all six axes, in the order of `Axis`, over the first devices of this job, or of `devices`.

    The devices may be fake ones of a CPU, GPUs, the chips of one or several TPU slices, or those of a TPU topology
    that is only described. `may_cross` are the axes that may cross slices; see `split_over_slices`.

    >>> build_mesh(MeshShape(fsdp=4, tensor=2)).shape["fsdp"]
    4

    Raises:
      ValueError: there are too few devices or none, some process would have none, or the mesh does not fit the slices.
    """
    return Mesh(arrange(shape, _devices() if devices is None else devices, may_cross=may_cross), NAMES, AXIS_TYPES)


def abstract_mesh(shape: MeshShape) -> AbstractMesh:
    """The mesh of `build_mesh` without devices: shardings on it say how arrays would be split, on any machine.

    >>> abstract_mesh(MeshShape(data=64, fsdp=16)).size
    1024
    """
    return AbstractMesh(shape_of(shape), NAMES, axis_types=AXIS_TYPES)


def use_mesh(mesh: Mesh) -> AbstractContextManager[Any]:
    """Inside it, a PartitionSpec and a nested `jax.shard_map` need not name the mesh: they mean `mesh`.

    >>> with use_mesh(build_mesh(MeshShape(data=2))):
    ...     halves = jax.lax.with_sharding_constraint(jax.numpy.zeros(4), jax.P(Axis.DATA))
    >>> halves.addressable_shards[0].data.shape
    (2,)
    """
    # jax.set_mesh of 0.7 is for meshes of explicit axes: partly manual shard_map does not nest under it.
    return mesh if jax.__version_info__ < (0, 8, 0) else jax.set_mesh(mesh)


def check_automatic(mesh: Mesh | AbstractMesh) -> None:
    """Refuse a mesh with explicit axes, as `jax.make_mesh` makes them by default in newer versions of JAX.

    Sharding constraints, which tell the compiler how to split the work, are for automatic axes alone.

    Raises:
      ValueError: an axis of `mesh` is explicit.
    """
    explicit = [
        str(name) for name, kind in zip(mesh.axis_names, mesh.axis_types, strict=True) if kind == AxisType.Explicit
    ]
    if explicit:
        raise ValueError(
            f"the mesh has explicit axes ({', '.join(explicit)}), and this needs automatic ones. Make it with"
            " gcompute.parallel.mesh.build_mesh, or with jax.make_mesh(..., axis_types=(AxisType.Auto,) *"
            f" {len(mesh.axis_names)})."
        )


def shape_of(shape: MeshShape) -> tuple[int, ...]:
    """The sizes in the order of `Axis`."""
    return tuple(shape.size(axis) for axis in Axis)


def arrange(
    shape: MeshShape, devices: Sequence[Any], *, may_cross: Collection[Axis] = MAY_CROSS_SLICES
) -> np.ndarray[Any, np.dtype[np.object_]]:
    """The first devices of `devices` as an array with a dim for each axis, in the order of their links.

    Raises:
      ValueError: as `build_mesh`.
    """
    available = list(devices)
    used = available[: shape.num_devices]
    if shape.num_devices > len(available):
        raise ValueError(
            f"mesh {shape} needs {shape.num_devices} devices and there are {len(available)}. Use a smaller mesh, or"
            f" try it on fake ones: {_fake_devices(shape.num_devices)}."
        )
    processes, used_processes = {d.process_index for d in available}, {d.process_index for d in used}
    if processes != used_processes:
        raise ValueError(
            f"mesh {shape} covers {len(used)} of {len(available)} devices and leaves {len(processes - used_processes)}"
            f" of {len(processes)} processes idle. Use a mesh over all {len(available)} devices."
        )
    slices: dict[int, list[Any]] = {}
    for device in used:
        slices.setdefault(_slice(device), []).append(device)
    if len({len(members) for members in slices.values()}) > 1:
        raise ValueError(
            f"mesh {shape} takes {len(used)} of {len(available)} devices, not as many of each of {len(slices)} slices."
            f" Use a mesh over all {len(available)} devices."
        )
    within, across = split_over_slices(shape, len(slices), may_cross=may_cross)
    try:
        arranged = [_arrange_slice(shape_of(within), members) for _, members in sorted(slices.items())]
    except AssertionError:
        # Only TPU chips have coordinates, and JAX wants those that it is given to fill a box.
        raise ValueError(
            f"mesh {shape} takes {len(used)} of {len(available)} chips, and those do not fill a box. Use a mesh over"
            f" all {len(available)}, or pass `devices` that fill one."
        ) from None
    # Each axis is its part across slices, outside, times its part within one.
    parts = np.stack(arranged).reshape(*shape_of(across), *shape_of(within))
    return parts.transpose([dim + part for dim in range(len(NAMES)) for part in (0, len(NAMES))]).reshape(
        shape_of(shape)
    )


def split_over_slices(
    shape: MeshShape, num_slices: int, *, may_cross: Collection[Axis] = MAY_CROSS_SLICES
) -> tuple[MeshShape, MeshShape]:
    """(within, across): the part of each axis inside a slice, and the part that crosses slices, outermost axes first.

    size(axis) = across.size(axis) within.size(axis) for every axis, and across.num_devices = num_slices.

    >>> within, across = split_over_slices(MeshShape(data=2, fsdp=8, tensor=4), num_slices=4)
    >>> print(within, "|", across)
    fsdp=4,tensor=4 | data=2,fsdp=2

    Raises:
      ValueError: the axes that may cross slices cannot be split into as many parts, with the nearest mesh that can.
    """
    if num_slices < 1:
        raise ValueError(f"num_slices={num_slices} must be at least 1.")
    left, crossing = num_slices, dict.fromkeys(Axis, 1)
    # Prime by prime this takes all that each axis has, so what is left at the end no other choice could have placed.
    for axis in (axis for axis in Axis if axis in may_cross):
        crossing[axis] = math.gcd(shape.size(axis), left)
        left //= crossing[axis]
    if left > 1:
        allowed = [axis for axis in Axis if axis in may_cross]
        raise ValueError(
            f"mesh {shape} does not split over {num_slices} slices: only {', '.join(allowed)} may cross the network"
            f" between them, and their sizes lack a factor of {left}. {_advice(shape, num_slices, left, allowed)}"
        )
    within = MeshShape(**{axis.value: shape.size(axis) // crossing[axis] for axis in Axis})
    return within, MeshShape(**{axis.value: size for axis, size in crossing.items()})


def _advice(shape: MeshShape, num_slices: int, lacking: int, allowed: Sequence[Axis]) -> str:
    """The mesh over as many devices that gives the factor to the outermost axis that may cross, or why none does."""
    if not allowed:
        return "Allow some axis to cross."
    if shape.num_devices % num_slices:
        return f"Use a mesh over a multiple of {num_slices} devices: each slice gives as many."
    sizes = {axis: shape.size(axis) for axis in Axis}
    sizes[allowed[0]] *= lacking
    for axis in (axis for axis in reversed(Axis) if axis not in allowed):
        factor = math.gcd(sizes[axis], lacking)
        sizes[axis] //= factor
        lacking //= factor
    return f"Nearest legal: {MeshShape(**{axis.value: size for axis, size in sizes.items()})}."


def _arrange_slice(sizes: tuple[int, ...], devices: list[Any]) -> np.ndarray[Any, np.dtype[np.object_]]:
    arranged = mesh_utils.create_device_mesh(sizes, devices, allow_split_physical_axes=True)
    one_per_chip = devices[0].platform == "tpu" and len({tuple(chip.coords) for chip in devices}) == len(devices)
    if not one_per_chip or len(devices) > SMALL_SLICE:
        return arranged
    # JAX has one order by hand for each kind of small slice. That is a ring at best (for a v5e:2x4 of libtpu, whose
    # short side is x, it is not), and it puts the diagonals of a 2x2 on one axis: look for a better one.
    orders = (order for major_first in itertools.permutations(range(3)) for order in _rows(devices, major_first))
    return min([arranged, *(np.array(order).reshape(sizes) for order in orders)], key=links_by_axis)


def _rows(chips: list[Any], major_first: Sequence[int]) -> Iterator[list[Any]]:
    """The chips of a box row by row: all rows one way, every other turned round in each plane, or all on one path."""
    at = np.array([chip.coords for chip in chips])[:, major_first]
    a, b, c = (at - at.min(0)).T
    _, num_b, num_c = at.max(0) - at.min(0) + 1

    def turned(place: np.ndarray, size: int, odd: np.ndarray) -> np.ndarray:
        return np.where(odd % 2, size - 1 - place, place)

    path_b = turned(b, num_b, a)
    for keys in ((c, b, a), (turned(c, num_c, b), b, a), (turned(c, num_c, a * num_b + path_b), path_b, a)):
        yield [chips[index] for index in np.lexsort(keys)]


def links_by_axis(chips: np.ndarray[Any, np.dtype[np.object_]]) -> tuple[int, ...]:
    """For each axis, the innermost first, the links that its rings cross: each chip to the next, the last to the first.

    For boxes without links that wrap around, as those of up to 8 chips are.
    """
    coords = np.array([chip.coords for chip in chips.ravel().tolist()]).reshape(*chips.shape, -1)
    return tuple(int(abs(coords - np.roll(coords, -1, axis)).sum()) for axis in reversed(range(chips.ndim)))


def _devices() -> list[Any]:
    try:
        return jax.devices()
    except RuntimeError as error:
        reason = str(error).partition("\n")[0].rstrip(".")
        raise ValueError(f"JAX finds no device ({reason}). Try fake ones: {_fake_devices(8)}.") from None


def _fake_devices(num: int) -> str:
    return f"set JAX_PLATFORMS=cpu JAX_NUM_CPU_DEVICES={num} before Python starts"


def _slice(device: Any) -> int:
    """The slice that a device is in: chips alone and CPU devices, whose slices share one memory, are all in one."""
    return 0 if device.platform == "cpu" else getattr(device, "slice_index", None) or 0
