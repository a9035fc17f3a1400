"""Predict how long a collective takes along one ring or line of chips. Predictions from formulae, not measurements.

Each chip has one link either way along a torus axis. Bytes are of whole arrays: what all devices of the axis have
together after an all-gather, or before a reduce-scatter.
"""

from dataclasses import dataclass

from gcompute.hardware.chip import Chip


@dataclass(frozen=True, slots=True, kw_only=True)
class Ring:
    """`num_chips` in a row, neighbours joined by links of `link_bytes_per_s` each way; `wraparound` closes the row.

    Raises:
      ValueError: a size, rate or latency makes no sense.
    """

    num_chips: int
    link_bytes_per_s: float
    hop_latency_s: float = 0.0
    wraparound: bool = True

    def __post_init__(self) -> None:
        if self.num_chips < 1:
            raise ValueError(f"num_chips={self.num_chips} must be at least 1.")
        if self.link_bytes_per_s <= 0 or self.hop_latency_s < 0:
            raise ValueError(
                f"link_bytes_per_s={self.link_bytes_per_s} must be above 0 and hop_latency_s={self.hop_latency_s} at"
                " least 0."
            )

    @property
    def num_hops(self) -> int:
        """The furthest that data goes: both directions are used, so half a ring, or the whole of a line."""
        return self.num_chips // 2 if self.wraparound else self.num_chips - 1


def torus_ring(chip: Chip, num_chips: int, *, wraparound: bool) -> Ring:
    """One axis of a slice of `chip`.

    Raises:
      ValueError: the chip has no ICI link in the catalogue.
    """
    if chip.link_bytes_per_s is None:
        raise ValueError(f"{chip.name} has no ICI links. TPUs have.")
    return Ring(
        num_chips=num_chips,
        link_bytes_per_s=chip.link_bytes_per_s,
        hop_latency_s=chip.hop_latency_s or 0.0,
        wraparound=wraparound,
    )


def all_gather_s(whole_bytes: float, *rings: Ring) -> float:
    """Seconds until every device has the whole array, of which each had an equal part.

    One ring: t = max(V / (2 W), hops latency): V / n leaves by each link at each of n / 2 steps. A line of n chips
    takes n - 1 steps, t = max((n - 1) / n V / W, hops latency). Several axes of a torus share the bytes and gather at
    once: t = max(V / (sum of their rates), total hops latency), where V is what each device has at the end.

    >>> ring = Ring(num_chips=16, link_bytes_per_s=45e9)
    >>> all_gather_s(90e9, ring)
    1.0

    Raises:
      ValueError: the bytes are below 0, or there is no ring.
    Source: scaling-book, "sharding", AllGather.
    """
    if whole_bytes < 0:
        raise ValueError(f"whole_bytes={whole_bytes} must be at least 0.")
    rings = _split(rings)
    if not rings:
        return 0.0
    bytes_per_s = sum(_gather_rate(ring) for ring in rings)
    return max(whole_bytes / bytes_per_s, sum(ring.num_hops * ring.hop_latency_s for ring in rings))


def reduce_scatter_s(whole_bytes: float, *rings: Ring) -> float:
    """Seconds until each device has its part of the sum: the same as an all-gather, run backwards."""
    return all_gather_s(whole_bytes, *rings)


def all_reduce_s(whole_bytes: float, *rings: Ring) -> float:
    """Seconds until every device has the sum: a reduce-scatter, then an all-gather."""
    return 2 * all_gather_s(whole_bytes, *rings)


def all_to_all_s(whole_bytes: float, ring: Ring) -> float:
    """Seconds until an array split over the ring along one dim is split along another.

    Half the chips' data cross the middle of the ring. Closed: t = V / (8 W), a quarter of an all-gather; a line has
    half of the links there and the largest distances, t = V / (4 W). At least hops latency.

    Source: scaling-book, "sharding", AllToAll.
    """
    if whole_bytes < 0:
        raise ValueError(f"whole_bytes={whole_bytes} must be at least 0.")
    if ring.num_chips == 1:
        return 0.0
    links = 8 if ring.wraparound else 4
    return max(whole_bytes / (links * ring.link_bytes_per_s), ring.num_hops * ring.hop_latency_s)


def _split(rings: tuple[Ring, ...]) -> tuple[Ring, ...]:
    if not rings:
        raise ValueError("a collective needs at least one ring.")
    return tuple(ring for ring in rings if ring.num_chips > 1)


def _gather_rate(ring: Ring) -> float:
    """Bytes of the whole array a second: over both links of a ring; to the end of a line, all by one link."""
    if ring.wraparound:
        return 2 * ring.link_bytes_per_s
    return ring.link_bytes_per_s * ring.num_chips / (ring.num_chips - 1)
