"""Collectives through a fat tree: GPUs on a node's switch, nodes on a leaf, leaves on a spine.

All levels work at once, piece by piece, so the slowest sets the time. Predictions from formulae, not measurements.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from gcompute.plan.arguments import above_zero, at_least_zero


@dataclass(frozen=True, slots=True, kw_only=True)
class Level:
    """A level of the tree: `degree` children, each with `bytes_per_s` one way out of it.

    Raises:
      ValueError: no child or no rate.
    """

    degree: int
    bytes_per_s: float

    def __post_init__(self) -> None:
        above_zero(degree=self.degree, bytes_per_s=self.bytes_per_s)


def tree_gather_s(whole_bytes: float, levels: Sequence[Level]) -> float:
    """Seconds of an all-gather or a reduce-scatter: V max over levels of (D - 1) / (D W); an all-reduce is two.

    >>> pod = (Level(degree=8, bytes_per_s=450e9), Level(degree=32, bytes_per_s=400e9))
    >>> round(413e9 * tree_gather_s(1, pod), 2)
    1.0

    Raises:
      ValueError: bytes below 0, or no level.
    Source: scaling-book, "gpus", collectives across nodes.
    """
    at_least_zero(whole_bytes=whole_bytes)
    _check(levels)
    return whole_bytes * max((level.degree - 1) / (level.degree * level.bytes_per_s) for level in levels)


def in_network_reduce_s(whole_bytes: float, levels: Sequence[Level]) -> float:
    """Seconds of an all-reduce whose switches add up (SHARP): V max 1 / W, for each child sends all and receives all.

    Raises:
      ValueError: bytes below 0, or no level.
    Source: scaling-book, "gpus", in-network reductions.
    """
    at_least_zero(whole_bytes=whole_bytes)
    _check(levels)
    return whole_bytes / min(level.bytes_per_s for level in levels)


def gather_beside_inner_s(
    whole_bytes: float, *, inner: int, node_chips: int, chip_bytes_per_s: float, node_bytes_per_s: float
) -> float:
    """Seconds of gathering, over an outer axis of many nodes, an array whose other dim an inner axis of `inner` splits.

    t = max(V / (W_chip min(Y, n)), V n / (W_node max(Y, n))): nothing is gained until the inner axis leaves the node.

    >>> rates = {"node_chips": 8, "chip_bytes_per_s": 450e9, "node_bytes_per_s": 400e9}
    >>> [gather_beside_inner_s(400e9, inner=inner, **rates) for inner in (4, 8, 16)]
    [1.0, 1.0, 0.5]

    Raises:
      ValueError: a size is not above 0.
    Source: scaling-book, "gpus", reductions when an array is sharded over a separate axis.
    """
    at_least_zero(whole_bytes=whole_bytes)
    above_zero(inner=inner, node_chips=node_chips)
    above_zero(chip_bytes_per_s=chip_bytes_per_s, node_bytes_per_s=node_bytes_per_s)
    inside_s = whole_bytes / (chip_bytes_per_s * min(inner, node_chips))
    return max(inside_s, whole_bytes * node_chips / (node_bytes_per_s * max(inner, node_chips)))


def _check(levels: Sequence[Level]) -> None:
    if not levels:
        raise ValueError("a tree needs at least one level, as Level(degree=8, bytes_per_s=450e9).")
