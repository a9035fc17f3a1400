"""Rows of the collectives: what each one says of global arrays, and the transpose that is its gradient."""

from collections.abc import Callable
from functools import partial
from typing import Any

import jax.numpy as jnp
from jax.sharding import PartitionSpec as P

from gcompute.certify.collectives import Expected, expect
from gcompute.certify.explicit import Case, Function, integers, spread
from gcompute.config.mesh import Axis, MeshShape
from gcompute.parallel import collectives

AXIS, N = Axis.CONTEXT, 4
SPLIT, WHOLE = P(None, AXIS), P()


def _blocks(x: Any) -> Any:
    """[R, n c] as [n, R, c]: the shard of each device."""
    return x.reshape(x.shape[0], N, -1).swapaxes(0, 1)


def _joined(blocks: Any) -> Any:
    """The inverse of `_blocks`."""
    return blocks.swapaxes(0, 1).reshape(blocks.shape[1], -1)


def _all_to_all(x: Any) -> Any:
    """Block j of each device's rows goes to device j, which joins what it gets along the columns."""
    return _joined(jnp.stack([jnp.concatenate(jnp.split(b, N, axis=0), axis=1) for b in _moved(_blocks(x))]))


def _moved(blocks: Any) -> list[Any]:
    rows = blocks.shape[1] // N
    return [jnp.concatenate([blocks[i, j * rows : (j + 1) * rows] for i in range(N)], axis=0) for j in range(N)]


def cases() -> list[Case]:
    """Every collective, each way round."""

    def case(
        name: str,
        run: Function,
        reference: Function,
        expected: Expected,
        *,
        out: P = SPLIT,
        what: str = "",
        specs: Any = SPLIT,
        arguments: Callable[[], tuple[Any, ...]] = lambda: (integers(0, 8, 16),),
    ) -> Case:
        return Case(
            name=f"{name} {what}".strip(),
            certifies=(f"collectives.{name}",),
            strategies=("collectives",),
            mesh=MeshShape(context=N),
            build=spread(run, specs, out),
            reference=reference,
            arguments=arguments,
            expected={AXIS: expected},
        )

    def everywhere(x: Any) -> Any:
        return jnp.tile(x, (1, N))

    def total(x: Any) -> Any:
        return _blocks(x).sum(axis=0)

    def scattered(x: Any) -> Any:
        # The rows of the sum, a block a device, side by side.
        return jnp.concatenate(jnp.split(total(x), N, axis=0), axis=1)

    rows = [
        case(
            "varying",
            lambda x, scale: x * collectives.varying(scale, AXIS),
            lambda x, scale: x * scale,
            expect("all-reduce"),
            specs=(SPLIT, WHOLE),
            arguments=lambda: (integers(0, 8, 16), integers(1, 8, 1)),
        ),
        case(
            "all_gather",
            partial(collectives.all_gather, axis=AXIS, dim=1),
            everywhere,
            expect("all-gather", "reduce-scatter"),
        ),
        case(
            "all_gather",
            partial(collectives.all_gather, axis=AXIS, dim=1, invariant=True),
            lambda x: x,
            expect("all-gather"),
            out=WHOLE,
            what="invariant",
        ),
        case(
            "all_reduce", partial(collectives.all_reduce, axis=AXIS), total, expect("all-reduce"), out=WHOLE, what="sum"
        ),
        case(
            "all_reduce",
            partial(collectives.all_reduce, axis=AXIS, op="mean"),
            lambda x: total(x) / N,
            expect("all-reduce"),
            out=WHOLE,
            what="mean",
        ),
        case(
            "all_reduce",
            partial(collectives.all_reduce, axis=AXIS, op="max"),
            lambda x: _blocks(x).max(axis=0),
            expect("all-reduce"),
            out=WHOLE,
            what="max",
        ),
        case(
            "reduce_scatter",
            partial(collectives.reduce_scatter, axis=AXIS),
            scattered,
            expect("reduce-scatter", "all-gather"),
        ),
        case(
            "all_to_all",
            partial(collectives.all_to_all, axis=AXIS, split_dim=0, concat_dim=1),
            _all_to_all,
            expect("all-to-all"),
        ),
        case(
            "shift",
            partial(collectives.shift, axis=AXIS, by=1),
            lambda x: _joined(jnp.roll(_blocks(x), 1, axis=0)),
            expect("collective-permute"),
        ),
    ]
    for bidirectional in (False, True):
        ways = {"axis": AXIS, "bidirectional": bidirectional}
        what = "both ways" if bidirectional else "one way"
        permutes = expect("collective-permute")
        rows += [
            case(
                "ring_all_gather", partial(collectives.ring_all_gather, dim=1, **ways), everywhere, permutes, what=what
            ),
            case(
                "ring_reduce_scatter", partial(collectives.ring_reduce_scatter, **ways), scattered, permutes, what=what
            ),
            case(
                "ring_all_reduce",
                partial(collectives.ring_all_reduce, **ways),
                lambda x: everywhere(total(x)),
                permutes,
                what=what,
            ),
        ]
    return rows
