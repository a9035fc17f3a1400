"""The few sizes that programs are compiled for: whatever is smaller is padded to the next one. No arrays here."""

from collections.abc import Sequence
from functools import cache as remember

# Smaller ones would save little time and cost as much compiling as large ones.
SMALLEST_BUCKET = 32
# Up to so many rows reading the weights is all the work, on any device.
FEW_ROWS = 4


def round_up(size: int, multiple: int) -> int:
    """The smallest multiple that is at least `size`.

    >>> round_up(33, 16), round_up(32, 16)
    (48, 32)
    """
    return -(-size // multiple) * multiple


@remember
def make_buckets(largest: int, multiple: int = 1) -> tuple[int, ...]:
    """Powers of two from 32 up, rounded up to `multiple`, and `largest` rounded up, always the last.

    >>> make_buckets(100), make_buckets(100, 16), make_buckets(100, 48)
    ((32, 64, 100), (32, 64, 112), (48, 96, 144))
    """
    last = round_up(largest, multiple)
    sizes = []
    size = SMALLEST_BUCKET
    while size < last:
        sizes.append(round_up(size, multiple))
        size *= 2
    return tuple(sorted({size for size in sizes if size < last} | {last}))


@remember
def batch_buckets(slots: int) -> tuple[int, ...]:
    """Batches that decode programs are made for: one row, then four and its doublings, up to all slots.

    >>> batch_buckets(32), batch_buckets(6), batch_buckets(1)
    ((1, 4, 8, 16, 32), (1, 4, 6), (1,))
    """
    sizes = {1, slots}
    size = FEW_ROWS
    while size < slots:
        sizes.add(size)
        size *= 2
    return tuple(sorted(sizes))


def bucket_of(size: int, buckets: Sequence[int]) -> int:
    """The smallest bucket that holds `size`."""
    return next(bucket for bucket in buckets if bucket >= size)
