"""Which links each axis of a mesh runs on: rings of a torus, a switch that joins GPUs, the network between slices.

The same choices as `parallel.mesh` makes with JAX's `create_device_mesh`: the innermost axes first, each on whole axes
of the torus where some fit, the most of them; where none fits, on a part of one.
"""

import itertools
import math
from dataclasses import dataclass, replace

from gcompute.config.mesh import Axis, MeshShape
from gcompute.hardware.chip import Chip
from gcompute.hardware.target import Target
from gcompute.hardware.torus import wraparound
from gcompute.plan.collectives import Network, Ring, Route, Switch

# What these send can wait for the slower network between slices; `parallel.mesh.MAY_CROSS_SLICES`.
MAY_CROSS_SLICES = (Axis.DATA, Axis.STAGE, Axis.FSDP)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Free:
    """A part of a torus axis that no mesh axis has taken: `size` chips, each `stride` links from the next."""

    size: int
    closed: bool
    stride: int = 1


def routes(mesh: MeshShape, target: Target) -> dict[Axis, Route]:
    """The links of every mesh axis of a size above 1, but one that stays inside a chip of several devices.

    >>> found = routes(MeshShape(fsdp=256, tensor=4), Target.parse("v5p:8x8x16"))
    >>> found[Axis.TENSOR].rings[0].num_chips
    4

    Raises:
      ValueError: the mesh has another number of devices than the target, its axes cannot be split over the slices, or
        the catalogue does not know a link that is needed.
    """
    if mesh.num_devices != target.num_devices:
        raise ValueError(
            f"mesh {mesh} is of {mesh.num_devices} devices and {target} has {target.num_devices}. Give axes whose"
            f" product is {target.num_devices}, as in --mesh fsdp={target.num_devices}."
        )
    chip = target.known
    if chip is None or mesh.num_devices == 1:
        return {}
    if chip.torus_dims is None:
        return _switched(mesh, target, chip)
    return _torus(mesh, target, chip)


def _switched(mesh: MeshShape, target: Target, chip: Chip) -> dict[Axis, Route]:
    """GPUs: the innermost axes fill a host's switch, the rest crosses the network."""
    left, found = target.domain_devices, {}
    link, latency = chip.domain_bytes_per_s or chip.pcie_bytes_per_s, chip.hop_latency_s or 0.0
    for axis in reversed(Axis):
        size = mesh.size(axis)
        if size == 1:
            continue
        inside = math.gcd(size, left)
        left //= inside
        if inside > 1 and link is None:
            raise ValueError(_no_link(chip, "domain_bytes_per_s"))
        switch = None
        if inside > 1 and link:
            switch = Switch(num_devices=inside, bytes_per_s=link, latency_s=latency, name=_link_name(chip))
        found[axis] = Route(switch=switch, network=_network(chip, size // inside), pipelined=True)
    return found


def _torus(mesh: MeshShape, target: Target, chip: Chip) -> dict[Axis, Route]:
    if chip.link_bytes_per_s is None:
        raise ValueError(_no_link(chip, "link_bytes_per_s"))
    crossing = _across_slices(mesh, target.slices)
    free = [
        _Free(size=size, closed=closed)
        for size, closed in zip(target.shape, wraparound(chip, target.shape), strict=True)
        if size > 1
    ]
    # The innermost axis that can has the devices of one chip beside each other, and its links for itself; along every
    # other axis each device of a chip has a group of its own, and they share the links.
    together, found = chip.devices_per_chip, {}
    for axis in reversed(Axis):
        size = mesh.size(axis) // crossing[axis]
        own = math.gcd(size, together)
        together //= own
        taken, free = _take(size // own, free)
        rings = tuple(
            Ring(
                num_chips=part.size,
                link_bytes_per_s=chip.link_bytes_per_s / part.stride / (chip.devices_per_chip // own),
                hop_latency_s=(chip.hop_latency_s or 0.0) * part.stride,
                wraparound=part.closed and part.size > 2,
            )
            for part in taken
        )
        network = _network(chip, crossing[axis])
        if rings or network:
            found[axis] = Route(rings=rings, network=network)
    return found


def _across_slices(mesh: MeshShape, slices: int) -> dict[Axis, int]:
    """How many slices each axis spans; the outermost axes take what they can, as `parallel.mesh.split_over_slices`."""
    left, crossing = slices, dict.fromkeys(Axis, 1)
    for axis in (axis for axis in Axis if axis in MAY_CROSS_SLICES):
        crossing[axis] = math.gcd(mesh.size(axis), left)
        left //= crossing[axis]
    if left > 1:
        allowed = ", ".join(MAY_CROSS_SLICES)
        raise ValueError(
            f"mesh {mesh} does not split over {slices} slices: only {allowed} may cross the network between them, and"
            f" their sizes lack a factor of {left}. Use {Axis.DATA.value}={mesh.data * left}, and so much less of"
            " another axis."
        )
    return crossing


def _take(size: int, free: list[_Free]) -> tuple[list[_Free], list[_Free]]:
    """(parts whose sizes multiply to `size`, what is left)."""
    if size == 1:
        return [], free
    for number in range(len(free), 0, -1):
        for chosen in itertools.combinations(range(len(free)), number):
            if math.prod(free[index].size for index in chosen) == size:
                return [free[i] for i in chosen], [part for i, part in enumerate(free) if i not in chosen]
    # Part of an axis: from the longest that has all of it, else a factor of each.
    whole = [part for part in free if part.size % size == 0]
    order = sorted(whole or free, key=lambda part: -part.size)
    taken, left = [], list(free)
    for part in order:
        factor = math.gcd(part.size, size)
        if factor == 1:
            continue
        size //= factor
        left.remove(part)
        if factor == part.size:
            taken.append(part)
        else:
            taken.append(replace(part, size=factor, closed=False))
            left.append(replace(part, size=part.size // factor, stride=part.stride * factor))
        if size == 1:
            break
    return taken, left


def _network(chip: Chip, num_groups: int) -> Network | None:
    if num_groups == 1:
        return None
    if chip.dcn_bytes_per_s is None:
        raise ValueError(_no_link(chip, "dcn_bytes_per_s"))
    return Network(num_groups=num_groups, bytes_per_s=chip.dcn_bytes_per_s / chip.devices_per_chip)


def _link_name(chip: Chip) -> str:
    if chip.domain_bytes_per_s is None:
        return "PCIe"
    return "NVLink" if "NVIDIA" in chip.about else "GPU links"


def _no_link(chip: Chip, field: str) -> str:
    return f"{chip.name}: {field} is not in the catalogue, and this mesh needs it. Give it in a chip file (--chips)."
