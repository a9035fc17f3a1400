"""The shapes in which TPU chips can be rented, and which of their axes close into a ring."""

import math
from functools import cache

from gcompute.hardware.chip import Chip

SMALL_2D = ((1, 1), (2, 2), (2, 4), (4, 4), (4, 8), (8, 8), (8, 16), (16, 16), (16, 32), (32, 32))
SMALL_3D = ((2, 2, 1), (2, 2, 2), (2, 2, 4), (2, 4, 4))
CUBE = 4


def legal_slices(torus_dims: int, max_chips: int) -> tuple[tuple[int, ...], ...]:
    """The shapes that can be rented, smallest first: 2D up to a pod (16x16, or 32x32 of a v3); 3D a few small, then
    cubes of 4x4x4 side by side up to a pod, sizes in rising order.

    >>> legal_slices(3, 128)[-2:]
    ((4, 4, 4), (4, 4, 8))

    Source: the slices that MaxText lists in accelerator_to_spec_map.py follow this rule.
    """
    if torus_dims == 2:
        return tuple(shape for shape in SMALL_2D if math.prod(shape) <= max_chips)
    return SMALL_3D + _cubes(max_chips)


@cache
def _cubes(max_chips: int) -> tuple[tuple[int, ...], ...]:
    most = max_chips // CUBE**3
    shapes = (
        (a, b, c)
        for a in range(1, round(most ** (1 / 3)) + 1)
        for b in range(a, math.isqrt(most // a) + 1)
        for c in range(b, most // (a * b) + 1)
    )
    return tuple(sorted((tuple(CUBE * size for size in shape) for shape in shapes), key=lambda s: (math.prod(s), s)))


def wraparound(chip: Chip, shape: tuple[int, ...]) -> tuple[bool, ...]:
    """For each axis of a slice, whether a link joins its last chip to its first.

    On 2D chips where the axis has all chips of a pod; on 3D ones in slices of whole cubes, whose optical switches close
    every axis.

    >>> from gcompute.hardware.catalogue import find_chip
    >>> wraparound(find_chip("v5e"), (8, 16)), wraparound(find_chip("v5p"), (4, 4, 8))
    ((False, True), (True, True, True))

    Raises:
      ValueError: it is not known of this chip, or the shape has another number of dims.
    Source: scaling-book, "tpus".
    """
    multiple = chip.wrap_multiple
    if chip.torus_dims is None or multiple is None:
        raise ValueError(f"which axes of a {chip.name} slice close into a ring is not known.")
    if len(shape) != chip.torus_dims:
        raise ValueError(f"a {chip.name} slice has {chip.torus_dims} dims, and {'x'.join(map(str, shape))} has not.")
    closed = tuple(size % multiple == 0 for size in shape)
    return closed if chip.torus_dims == 2 else (all(closed),) * len(shape)
