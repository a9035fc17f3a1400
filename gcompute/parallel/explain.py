"""What a sharding does to each array of a tree: its piece on a device, the bytes of that, and what is held twice."""

import json
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec, Sharding

from gcompute.parallel.rules import nearest_divisor

HEADINGS = ("array", "shape", "dtype", "split over", "piece", "bytes a device", "copies")
WHOLE = "-"


@dataclass(frozen=True, slots=True, kw_only=True)
class Placement:
    """One array: `split[i]` are the axes that cut dim i, None where the sharding has no named axes.

    num_devices = (pieces of the array) copies; the copies lie along `copied_over`.
    """

    path: str
    dims: str | None
    shape: tuple[int, ...]
    dtype: str
    split: tuple[tuple[str, ...], ...] | None
    piece: tuple[int, ...]
    bytes_per_device: int
    total_bytes: int
    num_devices: int
    copies: int
    copied_over: tuple[str, ...]

    @property
    def whole(self) -> bool:
        """Whether each device of several holds all of it."""
        return self.num_devices > 1 and self.copies == self.num_devices


@dataclass(frozen=True, slots=True, kw_only=True)
class Explanation:
    """The placements of a tree. Print it for a table; `to_dict()` is its JSON."""

    placements: tuple[Placement, ...]

    @property
    def num_devices(self) -> int:
        return max((row.num_devices for row in self.placements), default=0)

    @property
    def bytes_per_device(self) -> int:
        """Of the fullest device: arrays on fewer devices than others are all taken to share one."""
        return sum(row.bytes_per_device for row in self.placements)

    @property
    def total_bytes(self) -> int:
        """One copy of everything."""
        return sum(row.total_bytes for row in self.placements)

    @property
    def whole_bytes(self) -> int:
        """Of the arrays that every device holds all of, on each device."""
        return sum(row.bytes_per_device for row in self.placements if row.whole)

    def to_dict(self) -> dict[str, Any]:
        """
        >>> explain(jax.numpy.zeros((2, 2))).to_dict()["bytes_per_device"]
        16
        """
        return {
            "num_devices": self.num_devices,
            "bytes_per_device": self.bytes_per_device,
            "total_bytes": self.total_bytes,
            "whole_bytes": self.whole_bytes,
            # Through JSON, so that what a caller compares is what a reader of the file gets: lists, not tuples.
            "tensors": [json.loads(json.dumps(asdict(row))) for row in self.placements],
        }

    def __str__(self) -> str:
        rows = [HEADINGS, *map(_cells, self.placements)]
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        lines = ["  ".join(map(str.ljust, row, widths)).rstrip() for row in rows]
        lines.append(
            f"bytes a device: {self.bytes_per_device:,} of {self.total_bytes:,},"
            f" {self.whole_bytes:,} of them in arrays that all {self.num_devices} devices hold whole"
        )
        return "\n".join(lines)


def explain(arrays: Any, shardings: Any = None, *, dims: Any = None) -> Explanation:
    """What each device holds of each array of a tree.

    >>> mesh = jax.make_mesh((4, 2), ("rows", "columns"))
    >>> arrays = {"w": jax.ShapeDtypeStruct((8, 6), np.float32), "b": jax.ShapeDtypeStruct((6,), np.float32)}
    >>> specs = {"w": PartitionSpec("rows", "columns"), "b": PartitionSpec()}
    >>> print(explain(arrays, jax.tree.map(lambda spec: NamedSharding(mesh, spec), specs)))
    array  shape  dtype    split over     piece  bytes a device  copies
    b      6      float32  -              6      24              8 (rows, columns)
    w      8,6    float32  rows, columns  2,3    24              1
    bytes a device: 48 of 216, 24 of them in arrays that all 8 devices hold whole

    Args:
      arrays: a tree of arrays or jax.ShapeDtypeStructs.
      shardings: the same tree of shardings, or one for all; by default, where the arrays are. A NamedSharding on
        `abstract_mesh` needs no devices.
      dims: the same tree of strings that name the dims, as in "DF".

    Raises:
      ValueError: the trees differ, an array has no sharding, or its mesh does not divide it.
    """
    leaves, structure = jax.tree_util.tree_flatten_with_path(arrays)
    placed = [getattr(leaf, "sharding", None) for _, leaf in leaves]
    if shardings is not None:
        placed = _leaves_like(structure, shardings, "shardings", Sharding)
    named = [None] * len(leaves) if dims is None else _leaves_like(structure, dims, "dims", str)
    rows = zip(leaves, placed, named, strict=True)
    return Explanation(placements=tuple(_placement(path_name(path), leaf, *rest) for (path, leaf), *rest in rows))


def path_name(path: Sequence[Any]) -> str:
    """A tree's path as it is written here and in errors: keys and names with dots between.

    >>> path_name(jax.tree_util.tree_flatten_with_path({"blocks": [1]})[0][0][0])
    'blocks.0'
    """
    return jax.tree_util.keystr(tuple(path), simple=True, separator=".") or "array"


def cut_axes(sharding: NamedSharding, num_dims: int) -> tuple[tuple[str, ...], ...]:
    """For each dim the axes above size 1 that cut it, the outermost first."""
    entries = [*sharding.spec, *[None] * (num_dims - len(sharding.spec))]
    names = [(entry,) if isinstance(entry, str) else tuple(entry or ()) for entry in entries]
    return tuple(tuple(str(name) for name in dim if sharding.mesh.shape[name] > 1) for dim in names)


def holders(sharding: Sharding, shape: Sequence[int]) -> dict[tuple[int, ...], list[int]]:
    """For each piece of an array, by its place in the grid of pieces, the devices that hold it.

    Devices go by their ids; those of an abstract mesh by their place in it.

    >>> mesh = jax.make_mesh((2, 2), ("x", "y"))
    >>> holders(NamedSharding(mesh, PartitionSpec("y")), (4,))
    {(0,): [0, 2], (1,): [1, 3]}
    """
    piece = sharding.shard_shape(tuple(shape))
    found: dict[tuple[int, ...], list[int]] = {}
    if isinstance(sharding, NamedSharding):
        sizes = dict(sharding.mesh.shape)
        along = dict(zip(sizes, np.indices(tuple(sizes.values())).reshape(len(sizes), -1), strict=True))
        places = np.zeros((sharding.num_devices, len(shape)), int)
        for dim, axes in enumerate(cut_axes(sharding, len(shape))):
            for axis in axes:
                places[:, dim] = places[:, dim] * sizes[axis] + along[axis]
        mesh = sharding.mesh
        ids = [device.id for device in mesh.devices.flat] if isinstance(mesh, Mesh) else range(mesh.size)
        pairs = zip(map(tuple, places.tolist()), ids, strict=True)
    else:
        indices = sharding.devices_indices_map(tuple(shape)).items()
        pairs = (
            (tuple((part.start or 0) // max(size, 1) for part, size in zip(index, piece, strict=True)), device.id)
            for device, index in indices
        )
    for place, device in pairs:
        found.setdefault(place, []).append(device)
    return dict(sorted(found.items()))


def _leaves_like(structure: Any, tree: Any, called: str, kind: type) -> list[Any]:
    if isinstance(tree, kind):
        return [tree] * structure.num_leaves
    # A PartitionSpec is not a sharding: it names no mesh.
    leaves, other = jax.tree.flatten(tree, is_leaf=lambda node: isinstance(node, PartitionSpec))
    wrong = next((leaf for leaf in leaves if not isinstance(leaf, kind)), None)
    if wrong is not None:
        raise ValueError(
            f"{called} must be a tree of {kind.__name__}, got {wrong!r}: wrap a PartitionSpec in a NamedSharding."
            if isinstance(wrong, PartitionSpec)
            else f"{called} must be a tree of {kind.__name__}, got {wrong!r}."
        )
    if other != structure:
        raise ValueError(f"{called} and arrays are trees of different structure: {other} and {structure}.")
    return leaves


def _placement(path: str, leaf: Any, sharding: Sharding | None, dims: str | None) -> Placement:
    if sharding is None:
        raise ValueError(f"{path} has no sharding: pass `shardings`, or jax.Arrays, which have one.")
    shape = tuple(leaf.shape)
    if dims is not None and len(dims) != len(shape):
        raise ValueError(f"{path}: dims {dims!r} name {len(dims)} dims, and its shape {shape} has {len(shape)}.")
    split, copied_over = None, ()
    if isinstance(sharding, NamedSharding):
        split = _checked_cuts(path, sharding, shape)
        used = {axis for axes in split for axis in axes}
        copied_over = tuple(str(axis) for axis, size in sharding.mesh.shape.items() if size > 1 and axis not in used)
    piece = sharding.shard_shape(shape)
    num_devices = sharding.num_devices
    num_pieces = math.prod(-(-size // part) for size, part in zip(shape, piece, strict=True) if part)
    return Placement(
        path=path,
        dims=dims,
        shape=shape,
        dtype=str(leaf.dtype),
        split=split,
        piece=piece,
        bytes_per_device=math.prod(piece) * leaf.dtype.itemsize,
        total_bytes=math.prod(shape) * leaf.dtype.itemsize,
        num_devices=num_devices,
        copies=num_devices // num_pieces,
        copied_over=copied_over,
    )


def _checked_cuts(path: str, sharding: NamedSharding, shape: tuple[int, ...]) -> tuple[tuple[str, ...], ...]:
    if len(sharding.spec) > len(shape):
        raise ValueError(f"{path}: {sharding.spec} names {len(sharding.spec)} dims, and its shape is {shape}.")
    split = cut_axes(sharding, len(shape))
    for dim, (size, axes) in enumerate(zip(shape, split, strict=True)):
        ways = math.prod(sharding.mesh.shape[axis] for axis in axes)
        if size % ways:
            cut = " x ".join(f"{axis}={sharding.mesh.shape[axis]}" for axis in axes)
            raise ValueError(
                f"{path}: mesh {cut} cuts dim {dim} of size {size} into {ways}, which does not divide it."
                f" Nearest legal: {nearest_divisor(size, ways)}."
            )
    return split


def _cells(row: Placement) -> tuple[str, ...]:
    if row.split is None:
        split = "on one device" if row.num_devices == 1 else "not by name"
    else:
        split = ", ".join("+".join(axes) or WHOLE for axes in row.split) if any(row.split) else WHOLE
    copied = f" ({', '.join(row.copied_over)})" if row.copies > 1 and row.copied_over else ""
    return (
        f"{row.path} {row.dims}" if row.dims else row.path,
        _sizes(row.shape),
        row.dtype,
        split,
        _sizes(row.piece),
        f"{row.bytes_per_device:,}",
        f"{row.copies}{copied}",
    )


def _sizes(shape: tuple[int, ...]) -> str:
    return ",".join(map(str, shape)) or "scalar"
