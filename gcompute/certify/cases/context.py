"""Rows of attention over a split sequence, against attention a head and a query at a time."""

from functools import partial
from typing import Any

import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec as P

from gcompute.certify.collectives import Expected, expect
from gcompute.certify.explicit import Case, Function, normals, spread
from gcompute.certify.reference import softmax
from gcompute.config.mesh import Axis, MeshShape
from gcompute.parallel.load_balance import LAYOUTS, Layout
from gcompute.parallel.ring_attention import ring_attention
from gcompute.parallel.ulysses import gathered_attention, ulysses_attention

AXIS, N = Axis.CONTEXT, 4
B, T, HEADS, KV_HEADS, H = 2, 16, 4, 2, 4


def positions_of(layout: Layout) -> np.ndarray:
    """The position of each token as the shards lie end to end: in zigzag, device i has pieces i and 2n - 1 - i."""
    if layout == "contiguous":
        return np.arange(T)
    pieces = np.arange(T).reshape(2 * N, -1)
    return np.concatenate([np.concatenate([pieces[i], pieces[2 * N - 1 - i]]) for i in range(N)])


def attention(q: Any, k: Any, v: Any, positions: np.ndarray) -> Any:
    """softmax(q k^T / sqrt(H)) v over the keys whose position is not later, a head at a time."""
    hidden = positions[None] > positions[:, None]
    heads = []
    for n in range(q.shape[2]):
        g = n // (q.shape[2] // k.shape[2])
        scores = q[:, :, n] @ k[:, :, g].swapaxes(1, 2) / q.shape[3] ** 0.5
        heads.append(softmax(jnp.where(hidden, -jnp.inf, scores)) @ v[:, :, g])
    return jnp.stack(heads, axis=2)


def _masked(q: Any, k: Any, v: Any, visible: Any) -> Any:
    """What `gathered_attention` asks for: attention under a given mask."""
    groups = q.shape[2] // k.shape[2]
    scores = jnp.einsum("btnh,bsnh->bnts", q, jnp.repeat(k, groups, axis=2)) / q.shape[3] ** 0.5
    return jnp.einsum(
        "bnts,bsnh->btnh", softmax(jnp.where(visible[:, None], scores, -jnp.inf)), jnp.repeat(v, groups, axis=2)
    )


def _whole(q: Any, k: Any, v: Any) -> Any:
    """What `ulysses_attention` asks for: causal attention of whole sequences in order."""
    return _masked(q, k, v, jnp.tril(jnp.ones((q.shape[1],) * 2, bool))[None])


def cases() -> list[Case]:
    """Ring, all-to-all and all-gather attention in both layouts."""

    def case(name: str, what: str, layout: Layout, run: Function, expected: Expected) -> Case:
        return Case(
            name=f"{name} {what}",
            certifies=(name,),
            strategies=(AXIS.value,),
            mesh=MeshShape(context=N),
            build=spread(partial(run, axis=AXIS, layout=layout), P(None, AXIS), P(None, AXIS)),
            reference=partial(attention, positions=positions_of(layout)),
            arguments=lambda: (
                normals(0, B, T, HEADS, H),
                normals(1, B, T, KV_HEADS, H),
                normals(2, B, T, KV_HEADS, H),
            ),
            expected={AXIS: expected},
            exact=False,
        )

    rows = []
    for layout in LAYOUTS:
        gathered = partial(gathered_attention, attend=_masked)
        rows += [
            case("ring_attention.ring_attention", layout, layout, ring_attention, expect("collective-permute")),
            case(
                "ulysses.ulysses_attention",
                layout,
                layout,
                partial(ulysses_attention, attend=_whole),
                expect("all-to-all"),
            ),
            case("ulysses.gathered_attention", layout, layout, gathered, expect("all-gather", "reduce-scatter")),
        ]
    blocked = partial(ring_attention, key_block=1)
    what = "zigzag, a key at a time"
    return [*rows, case("ring_attention.ring_attention", what, "zigzag", blocked, expect("collective-permute"))]
