"""The part of an array that one device holds, and how many copies there are of it."""

import math
from collections.abc import Sequence

from gcompute.plan.arguments import above_zero


def shard_shape(shape: Sequence[int], splits: Sequence[int]) -> tuple[int, ...]:
    """The shape that one device holds of an array whose dims are split so many ways each.

    >>> shard_shape((1024, 4096), (16, 1))
    (64, 4096)

    Raises:
      ValueError: other numbers of dims, a size below 1, or a dim that does not divide.
    """
    if len(shape) != len(splits):
        raise ValueError(f"shape {tuple(shape)} has {len(shape)} dims and splits {tuple(splits)} has {len(splits)}.")
    for size, ways in zip(shape, splits, strict=True):
        if size < 1 or ways < 1 or size % ways:
            raise ValueError(f"a dim of {size} does not split {ways} ways: give a whole share of at least 1.")
    return tuple(size // ways for size, ways in zip(shape, splits, strict=True))


def shard_bytes(shape: Sequence[int], splits: Sequence[int], *, value_bytes: float = 2.0) -> float:
    """Bytes that one device holds."""
    above_zero(value_bytes=value_bytes)
    return math.prod(shard_shape(shape, splits)) * value_bytes


def num_copies(num_devices: int, splits: Sequence[int]) -> int:
    """How often a mesh of `num_devices` holds each part of an array.

    >>> num_copies(64, (4, 1))
    16

    Raises:
      ValueError: the splits do not divide the devices.
    """
    ways = math.prod(splits)
    if num_devices < 1 or ways < 1 or num_devices % ways:
        raise ValueError(f"{num_devices} devices do not split {ways} ways: give splits that divide them.")
    return num_devices // ways
