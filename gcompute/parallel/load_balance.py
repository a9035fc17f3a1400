"""Which positions of a causal sequence each device of a context axis holds, so that all have the same work.

A query at position p has p + 1 keys, so a contiguous split leaves the first device almost idle while the last one works
twice the mean. The zigzag layout cuts the sequence into 2n pieces and gives device i pieces i and 2n - 1 - i: one that
sees few keys and one that sees many. Scores of device 1 of 4, by pieces; x is a causal triangle:

                contiguous                    zigzag
    queries 2   X X x . . . . .   queries 1   X x . . . . . .
    queries 3   X X X x . . . .   queries 6   X X X X X X x .
    keys        0 1 2 3 4 5 6 7   keys        0 1 2 3 4 5 6 7

Source: Llama 3 herd of models 2024, arXiv:2407.21783, section 3.3.2 (the 2n chunks); Brandon et al. 2023, "Striped
Attention", arXiv:2311.09431 (why contiguous rings are unbalanced).
"""

from typing import Literal, get_args

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, Shaped

from gcompute.parallel.collectives import axis_index

Layout = Literal["contiguous", "zigzag"]
LAYOUTS: tuple[Layout, ...] = get_args(Layout)


def pieces_per_shard(layout: Layout) -> int:
    """Runs of consecutive positions that a device holds: 1 if contiguous, 2 if zigzag.

    Raises:
      ValueError: the layout is not known.
    """
    if layout not in LAYOUTS:
        raise ValueError(f"layout {layout!r} is not known. Use one of {', '.join(LAYOUTS)}.")
    return 1 + (layout == "zigzag")


def check_sequence(seq: int, num_shards: int, layout: Layout) -> None:
    """Refuse a sequence that the layout cannot cut into equal pieces.

    Raises:
      ValueError: `seq` is no multiple of the pieces, `num_shards` if contiguous and 2 `num_shards` if zigzag.
    """
    pieces = num_shards * pieces_per_shard(layout)
    if num_shards < 1 or seq < 1 or seq % pieces:
        raise ValueError(
            f"a sequence of {seq} does not divide into {pieces} equal pieces, {layout} over {num_shards} devices:"
            f" use a multiple of {pieces}."
        )


def sequence_order(seq: int, num_shards: int, layout: Layout) -> Int[np.ndarray, "seq"]:
    """The permutation of a layout: order[i] is the position that stands at place i of the shards joined end to end.

    `tokens[:, order]`, split evenly over the axis, gives each device its pieces; `positions = order` goes with it.

    >>> sequence_order(8, 2, "zigzag").reshape(2, 4)  # a row is a device
    array([[0, 1, 6, 7],
           [2, 3, 4, 5]])

    Raises:
      ValueError: the pieces are not equal (see `check_sequence`).
    """
    check_sequence(seq, num_shards, layout)
    runs = np.arange(seq).reshape(num_shards * pieces_per_shard(layout), -1)
    if layout == "zigzag":
        runs = np.concatenate([runs[:num_shards], runs[: num_shards - 1 : -1]], axis=1)
    return runs.reshape(-1)


def inverse_order(seq: int, num_shards: int, layout: Layout) -> Int[np.ndarray, "seq"]:
    """Where each position went: `x[order][inverse]` is x again.

    >>> inverse_order(8, 2, "zigzag")
    array([0, 1, 4, 5, 6, 7, 2, 3])
    """
    return np.argsort(sequence_order(seq, num_shards, layout))


def local_positions(axis: str, t_local: int, layout: Layout) -> Int[Array, "t"]:
    """The positions in the whole sequence of this device's tokens. Per-device code, no collective.

    Raises:
      ValueError: a zigzag shard of an odd length.
    """
    num_shards, shard = jax.lax.axis_size(axis), axis_index(axis)
    check_sequence(t_local * num_shards, num_shards, layout)
    if layout == "contiguous":
        return shard * t_local + jnp.arange(t_local)
    size = t_local // 2
    firsts = jnp.stack([shard, 2 * num_shards - 1 - shard]) * size
    return (firsts[:, None] + jnp.arange(size)).reshape(t_local)


def to_sequence(x_bT: Shaped[Array, "b seq ..."], num_shards: int, layout: Layout) -> Shaped[Array, "b seq ..."]:
    """Shards joined end to end along dim 1, put in the order of positions: x[:, inverse_order], by slices alone.

    A gather by `inverse_order` says the same, but its gradient is a scatter.
    """
    check_sequence(x_bT.shape[1], num_shards, layout)
    if layout == "contiguous":
        return x_bT
    b, seq, *rest = x_bT.shape
    pieces = x_bT.reshape(b, num_shards, 2, seq // (2 * num_shards), *rest)
    return jnp.concatenate([pieces[:, :, 0], pieces[:, ::-1, 1]], axis=1).reshape(x_bT.shape)


def to_shards(x_bT: Shaped[Array, "b seq ..."], num_shards: int, layout: Layout) -> Shaped[Array, "b seq ..."]:
    """The opposite of `to_sequence`: x[:, sequence_order]."""
    check_sequence(x_bT.shape[1], num_shards, layout)
    if layout == "contiguous":
        return x_bT
    b, seq, *rest = x_bT.shape
    pieces = x_bT.reshape(b, 2 * num_shards, seq // (2 * num_shards), *rest)
    return jnp.stack([pieces[:, :num_shards], pieces[:, : num_shards - 1 : -1]], axis=2).reshape(x_bT.shape)


def work_shares(seq: int, num_shards: int, layout: Layout) -> Float[np.ndarray, "num_shards"]:
    """The share of all causal scores that falls to each device; they sum to 1, and 1/n each is balance.

    share[i] = sum of (p + 1) over the positions p of device i / (seq (seq + 1) / 2)

    The slowest device sets the pace: contiguous, the last one has (2n - 1) / n times the mean, nearly twice.

    >>> (4 * work_shares(4096, 4, "contiguous")).round(2).tolist()
    [0.25, 0.75, 1.25, 1.75]
    >>> (4 * work_shares(4096, 4, "zigzag")).round(2).tolist()
    [1.0, 1.0, 1.0, 1.0]
    """
    keys = sequence_order(seq, num_shards, layout).reshape(num_shards, -1) + 1
    return keys.sum(axis=1) / (seq * (seq + 1) / 2)
