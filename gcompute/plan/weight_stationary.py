"""Decoding with weights split in both dims, over X and Y Z, so that activations move and weights do not.

A feed-forward layer gathers and scatters D over one part of the mesh and reduces F over the other.
"""

import math

from gcompute.plan.arguments import above_zero


def weight_stationary_s(
    batch: float,
    dim: float,
    width: float,
    *,
    dim_ways: float,
    width_ways: float,
    bytes_per_s: float,
    value_bytes: float = 2.0,
) -> float:
    """Seconds of communication of one layer: b (B D / (X W) + 2 B F / (Y W)).

    dim_ways, width_ways: X and Y. The stream, D over X, is gathered and scattered over two axes of the torus; partial
    sums, F over Y, are all-reduced over the one axis X. bytes_per_s: of one axis, both ways.

    Raises:
      ValueError: a size is not above 0.
    Source: scaling-book, "inference", question 7.
    """
    above_zero(batch=batch, dim=dim, width=width, dim_ways=dim_ways, width_ways=width_ways)
    above_zero(bytes_per_s=bytes_per_s, value_bytes=value_bytes)
    return value_bytes * batch / bytes_per_s * (dim / dim_ways + 2 * width / width_ways)


def best_dim_ways(dim: float, width: float, num_chips: float) -> float:
    """X that sends least: sqrt(N D / (2 F)).

    >>> best_dim_ways(1, 4, 128)
    4.0

    Raises:
      ValueError: a size is not above 0.
    """
    above_zero(dim=dim, width=width, num_chips=num_chips)
    return math.sqrt(num_chips * dim / (2 * width))


def weight_stationary_chips(dim: float, width: float, *, axes: int = 3) -> float:
    """Chips from which splitting both dims sends less than splitting F alone over `axes`: N > 2 axes axes F / D.

    2 B sqrt(8 D F / N) / W against 4 B D / (axes W).

    >>> weight_stationary_chips(1, 4)
    72.0

    Raises:
      ValueError: a size is not above 0.
    Source: scaling-book, "inference", question 7.
    """
    above_zero(dim=dim, width=width, axes=axes)
    return 2.0 * axes**2 * width / dim
