"""Which devices talk to each other: the three ways that XLA writes groups, and the mesh axes that they run along."""

import math
import re
from functools import lru_cache
from itertools import pairwise

import numpy as np
from jax.sharding import Mesh

Groups = tuple[tuple[int, ...], ...]

IOTA = re.compile(r"\[([\d,]+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?")
MESH = re.compile(r"@?mesh[\[<]([^\]>]*)[\]>](?:,\s*device_ids=\(([^()]*(?:\([^()]*\))?)\))?\s*\{([^}]*)\}")
DEVICE_IDS = re.compile(r"\[([\d,]+)\](?:T\(([\d,]+)\))?")
SUB_AXIS = re.compile(r"'?([^':]+)'?(?::\((\d+)\)(\d+))?")


def _numbers(text: str) -> tuple[int, ...]:
    return tuple(int(number) for number in re.findall(r"\d+", text))


@lru_cache(maxsize=256)
def parse_groups(text: str, num_devices: int) -> Groups:
    """Replica groups from their text, each a tuple of positions in the program's device order.

    Lists, an iota of tiles with a transpose, and axes (or parts of axes) of a mesh:

    >>> parse_groups("{{0,1},{2,3}}", 4)
    ((0, 1), (2, 3))
    >>> parse_groups("[2,2]<=[2,2]T(1,0)", 4)
    ((0, 2), (1, 3))
    >>> parse_groups("mesh['a'=2,'b'=4] {'a','b':(1)2}", 8)
    ((0, 2, 4, 6), (1, 3, 5, 7))

    Raises:
      ValueError: the text is none of the three.
    """
    text = text.strip()
    if text.startswith("{"):
        groups = tuple(_numbers(group) for group in re.findall(r"\{([\d,\s]*)\}", text.removeprefix("{")))
        return tuple(group for group in groups if group) or (tuple(range(num_devices)),)
    iota = IOTA.match(text)
    if iota:
        tiles, dims = _numbers(iota.group(1)), _numbers(iota.group(2))
        order = _numbers(iota.group(3)) if iota.group(3) else tuple(range(len(dims)))
        ids = np.arange(math.prod(dims)).reshape(dims).transpose(order).reshape(-1, tiles[-1])
        return tuple(map(tuple, ids.tolist()))
    mesh = MESH.match(text)
    if mesh:
        return _mesh_groups(*mesh.groups())
    raise ValueError(f"device groups {text[:60]!r} are written in a way that is not known.")


def _mesh_groups(mesh: str, device_ids: str | None, axes: str) -> Groups:
    """Groups along `axes` of a mesh; `name:(before)size` is the part of an axis with `before` of it further out."""
    sizes = {name: int(size) for name, size in re.findall(r"'?([^',=]+)'?=(\d+)", mesh)}
    num_devices = math.prod(sizes.values())
    ids = np.arange(num_devices)
    tiled = DEVICE_IDS.match(device_ids) if device_ids else None
    if tiled:
        dims = _numbers(tiled.group(1))
        order = _numbers(tiled.group(2)) if tiled.group(2) else tuple(range(len(dims)))
        ids = ids.reshape(dims).transpose(order).reshape(-1)
    elif device_ids:
        ids = np.array(_numbers(device_ids))
    wanted = []
    for name, before, size in (SUB_AXIS.fullmatch(part.strip()).groups() for part in axes.split(",")):  # type: ignore[union-attr]
        wanted.append((name, int(before or 1), int(size or sizes[name])))
    # Each axis becomes the pieces that its parts cut it into, so that a group runs along whole pieces.
    pieces: list[tuple[str, int, int]] = []
    for name, whole in sizes.items():
        cuts = sorted({1, whole, *(cut for n, before, size in wanted if n == name for cut in (before, before * size))})
        pieces += [(name, low, high // low) for low, high in pairwise(cuts)]
    inner = [
        index
        for name, before, size in wanted
        for index, (piece, low, high) in enumerate(pieces)
        if piece == name and before <= low and low * high <= before * size
    ]
    outer = [index for index in range(len(pieces)) if index not in inner]
    group_size = math.prod(pieces[index][2] for index in inner)
    ids = ids.reshape([size for _, _, size in pieces]).transpose(*outer, *inner).reshape(-1, group_size)
    return tuple(map(tuple, ids.tolist()))


@lru_cache(maxsize=256)
def parse_pairs(text: str) -> Groups:
    """(source, target) pairs of a permutation.

    >>> parse_pairs("{{0,1},{1,0}}")
    ((0, 1), (1, 0))
    """
    return tuple(_numbers(pair) for pair in re.findall(r"\{(\d+,\d+)\}", text))


def positions_in_mesh(mesh: Mesh, num_devices: int) -> np.ndarray:
    """Where in `mesh.devices.flat` the devices of a program lie: the device order of a program is that of its mesh.

    A program for several TPU slices is written for the devices of one of them.
    """
    if num_devices == mesh.size:
        return np.arange(mesh.size)
    slices = _slice_of(mesh)
    return np.flatnonzero(slices == slices.flat[0])[:num_devices]


def axes_of_groups(groups: Groups, mesh: Mesh, positions: np.ndarray) -> tuple[str, ...] | None:
    """The mesh axes that all groups run along, whole; None where they don't, as with half an axis.

    In a program for several slices an axis is whole when it is so within the slice.
    """
    axes = axes_between(groups, mesh, positions)
    if axes is None:
        return None
    coordinates = np.unravel_index(positions, mesh.devices.shape)
    sizes = {str(name): len(np.unique(where)) for name, where in zip(mesh.axis_names, coordinates, strict=True)}
    whole = math.prod(sizes[axis] for axis in axes)
    return axes if all(len(group) == whole for group in groups) else None


def axes_between(groups: Groups, mesh: Mesh, positions: np.ndarray) -> tuple[str, ...] | None:
    """The mesh axes along which the devices of any one group differ; None where they are not of this mesh."""
    varies = np.zeros(len(mesh.axis_names), bool)
    for group in groups:
        if max(group) >= len(positions):
            return None
        coordinates = np.stack(np.unravel_index(positions[list(group)], mesh.devices.shape))
        varies |= (coordinates != coordinates[:, :1]).any(axis=1)
    return tuple(str(name) for name, varied in zip(mesh.axis_names, varies, strict=True) if varied)


def axes_between_slices(mesh: Mesh) -> tuple[str, ...]:
    """The mesh axes that lead from one TPU slice to another."""
    slices = _slice_of(mesh)
    return tuple(str(name) for dim, name in enumerate(mesh.axis_names) if (slices != slices.take([0], axis=dim)).any())


def _slice_of(mesh: Mesh) -> np.ndarray:
    """The slice of each device; devices that are not of TPU slices all count as slice 0."""
    return np.vectorize(lambda device: getattr(device, "slice_index", 0), otypes=[int])(mesh.devices)
