"""Predict how long a collective takes: on rings or lines of a torus, through a switch, over the network between them.

Predictions from formulae, not measurements. Each TPU chip has one link either way along a torus axis. Bytes are of
whole arrays: what a device has after an all-gather, or before a reduce-scatter.
"""

import math
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
        if not (_is_rate(self.link_bytes_per_s) and _is_latency(self.hop_latency_s)):
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


@dataclass(frozen=True, slots=True, kw_only=True)
class Switch:
    """`num_devices` that a switch joins all to all, each with `bytes_per_s` one way into it."""

    num_devices: int
    bytes_per_s: float
    latency_s: float = 0.0
    name: str = "NVLink"

    def __post_init__(self) -> None:
        if self.num_devices < 1 or not (_is_rate(self.bytes_per_s) and _is_latency(self.latency_s)):
            raise ValueError(
                f"a switch needs num_devices of at least 1, bytes_per_s above 0 and latency_s of at least 0, got"
                f" {self.num_devices}, {self.bytes_per_s} and {self.latency_s}."
            )


@dataclass(frozen=True, slots=True, kw_only=True)
class Network:
    """`num_groups` hosts or slices that a network joins; each of their devices has a share of `bytes_per_s` one way."""

    num_groups: int
    bytes_per_s: float

    def __post_init__(self) -> None:
        if self.num_groups < 1 or not _is_rate(self.bytes_per_s):
            raise ValueError(
                f"a network needs num_groups of at least 1 and bytes_per_s above 0, got {self.num_groups} and"
                f" {self.bytes_per_s}."
            )


@dataclass(frozen=True, slots=True, kw_only=True)
class Route:
    """What one mesh axis runs on: fast links inside, `rings` or a `switch`, and a `network` between groups of them.

    pipelined: both levels work at once, piece by piece, as NCCL does; else one waits for the other.
    """

    rings: tuple[Ring, ...] = ()
    switch: Switch | None = None
    network: Network | None = None
    pipelined: bool = False

    @property
    def num_inside(self) -> int:
        """Devices that the fast links join, where rings or a switch do."""
        rings = math.prod(ring.num_chips for ring in self.rings)
        return rings * (self.switch.num_devices if self.switch else 1)

    @property
    def slowest(self) -> str:
        """What to call the links that bound it: "DCN", "ICI", or the name of the switch."""
        if self.network is not None:
            return "DCN"
        return self.switch.name if self.switch is not None else "ICI"


Link = Ring | Switch | Network | Route


def all_gather_s(whole_bytes: float, *links: Link) -> float:
    """Seconds until every device has the whole array, of which each had an equal part.

    One ring: t = max(V / (2 W), hops latency): V / n leaves by each link at each of n / 2 steps. A line of n chips
    takes n - 1 steps, t = max((n - 1) / n V / W, hops latency). Several axes of a torus share the bytes and gather at
    once, t = max(V / (sum of their rates), total hops latency); where some are lines, a chip at the corner gets what it
    lacks by its fewest links. A switch or network of n: t = (n - 1) / n V / W, W of one device. Two levels: first each
    device gets its share from the other groups, then all get all inside; NCCL does both at once.

    >>> ring = Ring(num_chips=16, link_bytes_per_s=45e9)
    >>> all_gather_s(90e9, ring)
    1.0
    >>> round(all_gather_s(90e9, Switch(num_devices=8, bytes_per_s=450e9)), 3)
    0.175

    Raises:
      ValueError: the bytes are below 0, or there are no links.
    Source: scaling-book, "sharding", AllGather; "gpus", collectives inside a node and across nodes.
    """
    _check_bytes("whole_bytes", whole_bytes)
    route = _as_route(links)
    inside = max(_rings_s(whole_bytes, route.rings), _switch_s(whole_bytes, route.switch))
    if route.network is None or route.network.num_groups == 1:
        return inside
    groups = route.network.num_groups
    across = whole_bytes / route.num_inside * (groups - 1) / groups / route.network.bytes_per_s
    return max(inside, across) if route.pipelined else inside + across


def reduce_scatter_s(whole_bytes: float, *links: Link) -> float:
    """Seconds until each device has its part of the sum: the same as an all-gather, run backwards."""
    return all_gather_s(whole_bytes, *links)


def all_reduce_s(whole_bytes: float, *links: Link, in_network: bool = False) -> float:
    """Seconds until every device has the sum: a reduce-scatter, then an all-gather.

    in_network: the switch adds up by itself (SHARP), and each device sends and receives the array once.

    Source: scaling-book, "gpus", in-network reductions.
    """
    return all_gather_s(whole_bytes, *links) * (1 if in_network else 2)


def all_to_all_s(whole_bytes: float, *links: Link) -> float:
    """Seconds until an array split over the links along one dim is split along another.

    Half the chips' data cross the middle of a ring. Closed: t = V / (8 W), a quarter of an all-gather; a line has half
    of the links there and the largest distances, t = V / (4 W). At least hops latency. On several rings each is crossed
    by all bytes. Behind a switch each of n devices sends (n - 1) / n of its V / n; over a network of g groups what goes
    to other groups leaves through the device's own share of it, and V / g^2 stays in each.

    Raises:
      ValueError: the bytes are below 0, or there are no links.
    Source: scaling-book, "sharding", AllToAll; "gpus", AllToAll.
    """
    _check_bytes("whole_bytes", whole_bytes)
    route = _as_route(links)
    groups, seconds = route.network.num_groups if route.network else 1, 0.0
    for ring in (ring for ring in route.rings if ring.num_chips > 1):
        # The other rings carry their own parts of the array.
        share = whole_bytes / groups**2 * ring.num_chips / route.num_inside
        crossing = share / ((8 if ring.wraparound else 4) * ring.link_bytes_per_s)
        seconds += max(crossing, ring.num_hops * ring.hop_latency_s)
    devices = route.num_inside * groups
    own = whole_bytes / devices
    if route.switch is not None and route.switch.num_devices > 1:
        n = route.switch.num_devices
        seconds = max(seconds, own * (n - 1) / devices / route.switch.bytes_per_s, route.switch.latency_s)
    if route.network is not None and groups > 1:
        across = own * (groups - 1) / groups / route.network.bytes_per_s
        seconds = max(seconds, across) if route.pipelined else seconds + across
    return seconds


def permute_s(sent_bytes: float, *links: Link) -> float:
    """Seconds until every device has sent `sent_bytes` to the next one of its axis, and got as much.

    Inside one hop over one link; at the border of a group over the network.

    Raises:
      ValueError: the bytes are below 0, or there are no links.
    """
    _check_bytes("sent_bytes", sent_bytes)
    route = _as_route(links)
    seconds = 0.0
    for ring in (ring for ring in route.rings if ring.num_chips > 1):
        seconds = max(seconds, sent_bytes / ring.link_bytes_per_s, ring.hop_latency_s)
    if route.switch is not None and route.switch.num_devices > 1:
        seconds = max(seconds, sent_bytes / route.switch.bytes_per_s, route.switch.latency_s)
    if route.network is not None and route.network.num_groups > 1:
        seconds = max(seconds, sent_bytes / route.network.bytes_per_s)
    return seconds


def _is_rate(value: float) -> bool:
    return 0 < value < math.inf


def _is_latency(value: float) -> bool:
    return 0 <= value < math.inf


def _check_bytes(name: str, value: float) -> None:
    if not 0 <= value < math.inf:
        raise ValueError(f"{name}={value} must be at least 0, and finite.")


def _as_route(links: tuple[Link, ...]) -> Route:
    if not links:
        raise ValueError("a collective needs at least one ring, switch or network.")
    if len(links) == 1 and isinstance(links[0], Route):
        return links[0]
    rings = tuple(link for link in links if isinstance(link, Ring))
    switches = [link for link in links if isinstance(link, Switch)]
    networks = [link for link in links if isinstance(link, Network)]
    if len(switches) > 1 or len(networks) > 1 or any(isinstance(link, Route) for link in links):
        raise ValueError("links are rings with at most one switch and one network, or one route alone.")
    return Route(
        rings=rings,
        switch=switches[0] if switches else None,
        network=networks[0] if networks else None,
        pipelined=bool(switches),
    )


def _rings_s(whole_bytes: float, rings: tuple[Ring, ...]) -> float:
    rings = tuple(ring for ring in rings if ring.num_chips > 1)
    if not rings:
        return 0.0
    latency_s = sum(ring.num_hops * ring.hop_latency_s for ring in rings)
    # A ring brings bytes by two links, the end of a line by one.
    bytes_per_s = sum((2 if ring.wraparound else 1) * ring.link_bytes_per_s for ring in rings)
    if not all(ring.wraparound for ring in rings):
        chips = math.prod(ring.num_chips for ring in rings)
        bytes_per_s *= chips / (chips - 1)
    return max(whole_bytes / bytes_per_s, latency_s)


def _switch_s(whole_bytes: float, switch: Switch | None) -> float:
    if switch is None or switch.num_devices == 1:
        return 0.0
    n = switch.num_devices
    return max(whole_bytes * (n - 1) / n / switch.bytes_per_s, switch.latency_s)
