"""Weights on huge pages: streaming them from pages of 4 KiB costs a few percent of every product on CPU.

Large allocations have them already where the process was started so (`cli.environment`); what XLA's threads allocate
comes from memory of their own, which has not.
"""

import ctypes
import sys
from collections.abc import Iterable, Iterator

import jax

SIZE = 2 << 20
# Since Linux 6.1: it puts pages that are there already together, whatever the machine's setting says.
MADV_COLLAPSE = 25
MAPS = "/proc/self/maps"


def collapse(arrays: Iterable[jax.Array]) -> int:
    """Ask Linux to put arrays of this process's memory on huge pages; how many have been there since.

    It moves nothing that anybody sees. Where it is refused, or this is no Linux, all stays as it is.
    """
    if not sys.platform.startswith("linux"):
        return 0
    advise = ctypes.CDLL(None, use_errno=True).madvise
    advise.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)
    held = tuple(_mappings())
    # A page may have a bit of two arrays.
    starts = {start for array in arrays for start in _pages(array)}
    inside = (start for start in sorted(starts) if any(low <= start and start + SIZE <= high for low, high in held))
    return sum(advise(start, SIZE, MADV_COLLAPSE) == 0 for start in inside)


def _pages(array: jax.Array) -> Iterator[int]:
    """Where the huge pages begin that an array touches."""
    address = array.unsafe_buffer_pointer()
    yield from range(address // SIZE * SIZE, address + array.nbytes, SIZE)


def _mappings() -> Iterator[tuple[int, int]]:
    """The ends of what is mapped into this process's memory."""
    try:
        with open(MAPS, encoding="utf-8") as lines:
            for line in lines:
                low, high = line.split(maxsplit=1)[0].split("-")
                yield int(low, 16), int(high, 16)
    except OSError:
        return
