"""From one chip of a torus to another: hops, the links that a chip has, seconds of sending and of gathering to one."""

from collections.abc import Sequence

from gcompute.hardware.target import Target
from gcompute.hardware.torus import wraparound
from gcompute.plan.arguments import at_least_zero


def num_hops(shape: Sequence[int], closed: Sequence[bool], start: Sequence[int], end: Sequence[int]) -> int:
    """Links on a shortest way; round the back where an axis is closed and that is nearer.

    >>> num_hops((4, 4), (False, False), (0, 0), (3, 3)), num_hops((4, 4), (True, True), (0, 0), (3, 3))
    (6, 2)

    Raises:
      ValueError: a chip is not in the slice.
    """
    _check(shape, start, end)
    away = [abs(a - b) for a, b in zip(start, end, strict=True)]
    return sum(min(d, n - d) if ring else d for d, n, ring in zip(away, shape, closed, strict=True))


def num_links(shape: Sequence[int], closed: Sequence[bool], at: Sequence[int]) -> int:
    """Links to neighbours that a chip has: two an axis, one at the end of a line or on an axis of two.

    >>> num_links((4, 4), (False, False), (0, 0)), num_links((16, 16), (True, True), (0, 0))
    (2, 4)

    Raises:
      ValueError: the chip is not in the slice.
    """
    _check(shape, at)
    links = 0
    for size, ring, where in zip(shape, closed, at, strict=True):
        inside = 0 < where < size - 1
        links += 0 if size == 1 else 2 if inside or (ring and size > 2) else 1
    return links


def send_s(num_bytes: float, target: Target, start: Sequence[int], end: Sequence[int]) -> float:
    """Seconds from one chip of a slice to another: hops latency + V / (links W), by all links of the one with fewer.

    >>> round(send_s(2 * 8 * 128 * 8192, Target.parse("v5e:4x4"), (0, 0), (3, 3)) * 1e6)
    192

    Raises:
      ValueError: bytes below 0, a chip outside the slice, or a target that is no torus.
    Source: scaling-book, "tpus", question 5.
    """
    at_least_zero(num_bytes=num_bytes)
    closed, link_bytes_per_s, hop_latency_s = _torus(target)
    hops = num_hops(target.shape, closed, start, end)
    if hops == 0:
        return 0.0
    links = min(num_links(target.shape, closed, at) for at in (start, end))
    return hops * hop_latency_s + num_bytes / (links * link_bytes_per_s)


def gather_to_one_s(whole_bytes: float, target: Target, at: Sequence[int]) -> float:
    """Seconds until one chip has an array that is split over its slice: (n - 1) / n V by all of its links.

    Raises:
      ValueError: bytes below 0, a chip outside the slice, or a target that is no torus.
    Source: scaling-book, "tpus", question 6.
    """
    at_least_zero(whole_bytes=whole_bytes)
    closed, link_bytes_per_s, _ = _torus(target)
    links = num_links(target.shape, closed, at)
    if links == 0:
        return 0.0
    chips = target.num_chips
    return whole_bytes * (chips - 1) / chips / (links * link_bytes_per_s)


def _torus(target: Target) -> tuple[tuple[bool, ...], float, float]:
    """(axes that are closed, bytes a second of a link one way, latency of a hop)."""
    chip = target.known
    if chip is None or chip.link_bytes_per_s is None or chip.torus_dims is None:
        raise ValueError(f"{target} is no torus with known links. TPU slices are, as v5e:4x4.")
    if target.slices > 1:
        raise ValueError(f"{target} is {target.slices} slices: give one, as {target.chip}:{target.shape[0]}x...")
    return wraparound(chip, target.shape), chip.link_bytes_per_s, chip.hop_latency_s or 0.0


def _check(shape: Sequence[int], *chips: Sequence[int]) -> None:
    for at in chips:
        if len(at) != len(shape) or not all(0 <= where < size for where, size in zip(at, shape, strict=True)):
            raise ValueError(f"chip {tuple(at)} is not in a slice of {'x'.join(map(str, shape))}.")
