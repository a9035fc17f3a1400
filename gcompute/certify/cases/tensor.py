"""Rows of tensor parallelism: products, blocks, sequence parallelism, collective matmuls and the vocabulary's ends."""

from functools import partial
from typing import Any

import jax.numpy as jnp
from jax.sharding import PartitionSpec as P

from gcompute.certify.collectives import Expected, expect
from gcompute.certify.explicit import Case, Function, integers, normals, spread
from gcompute.certify.reference import softmax
from gcompute.config.mesh import Axis, MeshShape
from gcompute.parallel import collective_matmul, sequence, tensor, vocabulary

AXIS = Axis.TENSOR
MESH = MeshShape(tensor=4)
WHOLE, PIECE, HIDDEN = P(), P(None, AXIS), P(None, None, AXIS)
COLUMNS, ROWS = P(None, AXIS), P(AXIS)
B, T, D, F, N, H, V = 2, 8, 6, 16, 8, 2, 16


def _relu(x: Any) -> Any:
    return jnp.maximum(x, 0)


def _feed_forward(x: Any, up: Any, gate: Any, down: Any, *biases: Any) -> Any:
    up_bias, gate_bias, down_bias = biases or (0, 0, 0)
    return (_relu(x @ gate + gate_bias) * (x @ up + up_bias)) @ down + down_bias


def _heads_product(q: Any, k: Any, v: Any) -> Any:
    """Something that stays within each head and is exact: q times the running sum of k v."""
    return q * jnp.cumsum(k * v, axis=1)


def _attention(x: Any, q: Any, k: Any, v: Any, o: Any) -> Any:
    mixed = _heads_product(*(jnp.stack([x @ w[:, n] for n in range(N)], axis=2) for w in (q, k, v)))
    return sum(mixed[:, :, n] @ o[n] for n in range(N))


def _case(
    name: str,
    module: str,
    run: Function,
    reference: Function,
    arguments: tuple[Any, ...],
    specs: tuple[Any, ...],
    out: Any,
    expected: Expected,
    *,
    strategy: str = "tensor",
    what: str = "",
    exact: bool = True,
) -> Case:
    return Case(
        name=f"{module}.{name} {what}".strip(),
        certifies=(f"{module}.{name}",),
        strategies=tuple(dict.fromkeys((strategy, "tensor"))),
        mesh=MESH,
        build=spread(run, specs, out),
        reference=reference,
        arguments=lambda: arguments,
        expected={AXIS: expected},
        exact=exact,
    )


def _matmul(x: Any, w: Any) -> Any:
    return x @ w


def _blocks() -> list[Case]:
    x, up, gate, down = integers(0, B, T, D), integers(1, D, F), integers(2, D, F), integers(3, F, D)
    biases = integers(4, F), integers(5, F), integers(6, D)
    hidden = integers(7, B, T, F)
    heads = tuple(integers(10 + n, D, N, H, most=1) for n in range(3))
    o = integers(13, N, H, D, most=1)
    split_heads = P(None, AXIS, None)

    def with_biases(x: Any, up: Any, gate: Any, down: Any, up_bias: Any, gate_bias: Any, down_bias: Any) -> Any:
        named = {"up_bias_f": up_bias, "gate_bias_f": gate_bias, "down_bias_D": down_bias}
        return tensor.feed_forward(x, up, down, AXIS, gate_Df=gate, act=_relu, **named)

    def project(x: Any, w: Any) -> Any:
        return tensor.project_heads(x, w, AXIS)

    def attend(x: Any, q: Any, k: Any, v: Any, o: Any) -> Any:
        return tensor.attention(x, q, k, v, o, AXIS, attend=_heads_product)

    one = expect("all-reduce")
    return [
        _case(
            *("column_parallel", "tensor", partial(tensor.column_parallel, axis=AXIS), _matmul),
            *((x, up), (WHOLE, COLUMNS), HIDDEN, one),
        ),
        _case(
            *("row_parallel", "tensor", partial(tensor.row_parallel, axis=AXIS), _matmul),
            *((hidden, down), (HIDDEN, ROWS), WHOLE, one),
        ),
        _case(
            *("feed_forward", "tensor", with_biases, _feed_forward, (x, up, gate, down, *biases)),
            *((WHOLE, COLUMNS, COLUMNS, ROWS, P(AXIS), P(AXIS), WHOLE), WHOLE, one),
        ),
        _case(
            *("project_heads", "tensor", project, lambda x, w: jnp.einsum("btd,dnh->btnh", x, w)),
            *((x, heads[0]), (WHOLE, split_heads), P(None, None, AXIS), one),
        ),
        _case(
            *("merge_heads", "tensor", partial(tensor.merge_heads, axis=AXIS)),
            *(lambda o, w: jnp.einsum("btnh,nhd->btd", o, w), (integers(14, B, T, N, H), o)),
            *((P(None, None, AXIS), ROWS), WHOLE, one),
        ),
        _case(
            *("attention", "tensor", attend, _attention, (integers(0, B, T, D, most=1), *heads, o)),
            *((WHOLE, split_heads, split_heads, split_heads, ROWS), WHOLE, one),
        ),
    ]


def _sequences() -> list[Case]:
    x, up, down, hidden = integers(0, B, T, D), integers(1, D, F), integers(3, F, D), integers(7, B, T, F)
    scale, bias = normals(4, D), normals(5, D)

    def rms(x: Any, scale: Any) -> Any:
        return x / jnp.sqrt((x**2).mean(-1, keepdims=True) + 0.5) * scale

    def layer(x: Any, scale: Any, bias: Any) -> Any:
        return (x - x.mean(-1, keepdims=True)) / jnp.sqrt(x.var(-1, keepdims=True) + 0.5) * scale + bias

    both, norms = expect("all-gather", "reduce-scatter"), expect("all-reduce")
    rows = [
        _case(
            *("gather_column_parallel", "sequence", partial(sequence.gather_column_parallel, axis=AXIS), _matmul),
            *((x, up), (PIECE, COLUMNS), HIDDEN, both),
            strategy="sequence",
        ),
        _case(
            *("row_parallel_scatter", "sequence", partial(sequence.row_parallel_scatter, axis=AXIS), _matmul),
            *((hidden, down), (HIDDEN, ROWS), PIECE, both),
            strategy="sequence",
        ),
        _case(
            *("rms_norm", "sequence", partial(sequence.rms_norm, eps=0.5), rms, (normals(0, B, T, D), scale)),
            *((PIECE, WHOLE), PIECE, norms),
            strategy="sequence",
            exact=False,
        ),
        _case(
            *(
                "layer_norm",
                "sequence",
                partial(sequence.layer_norm, eps=0.5),
                layer,
                (normals(0, B, T, D), scale, bias),
            ),
            *((PIECE, WHOLE, WHOLE), PIECE, norms),
            strategy="sequence",
            exact=False,
        ),
    ]
    for both_ways in (False, True):
        options = {"axis": AXIS, "bidirectional": both_ways}
        what = "both ways" if both_ways else "one way"

        def feed_forward(x: Any, up: Any, gate: Any, down: Any, options: Any = options) -> Any:
            return collective_matmul.feed_forward(x, up, down, gate_Df=gate, act=_relu, **options)

        permutes = expect("collective-permute")
        rows += [
            _case(
                *("all_gather_matmul", "collective_matmul", partial(collective_matmul.all_gather_matmul, **options)),
                *(_matmul, (x, up), (PIECE, COLUMNS), HIDDEN, permutes),
                strategy="sequence",
                what=what,
            ),
            _case(
                *("matmul_reduce_scatter", "collective_matmul"),
                *(partial(collective_matmul.matmul_reduce_scatter, **options), _matmul),
                *((hidden, down), (HIDDEN, ROWS), PIECE, permutes),
                strategy="sequence",
                what=what,
            ),
            _case(
                *("feed_forward", "collective_matmul", feed_forward, _feed_forward),
                *((x, up, integers(2, D, F), down), (PIECE, COLUMNS, COLUMNS, ROWS), PIECE, permutes),
                strategy="sequence",
                what=what,
            ),
        ]
    return rows


def _vocabulary() -> list[Case]:
    tokens = abs(integers(0, B, T, most=V - 1)).astype("int32")
    table, logits = integers(1, V, D), normals(2, B, T, V)

    def lookup(tokens: Any, table: Any) -> Any:
        return table[tokens]

    def cross_entropy(logits: Any, tokens: Any) -> Any:
        return -jnp.log(jnp.take_along_axis(softmax(logits), tokens[..., None], axis=-1)[..., 0])

    embed = vocabulary.vocab_parallel_embedding
    return [
        _case(
            *("vocab_parallel_embedding", "vocabulary", partial(embed, axis=AXIS), lookup),
            *((tokens, table), (WHOLE, ROWS), WHOLE, expect("all-reduce")),
            strategy="vocabulary",
        ),
        _case(
            *("vocab_parallel_embedding", "vocabulary", partial(embed, axis=AXIS, scatter_sequence=True), lookup),
            *((tokens, table), (WHOLE, ROWS), PIECE, expect("reduce-scatter", "all-gather")),
            strategy="vocabulary",
            what="scattered",
        ),
        _case(
            *("vocab_parallel_cross_entropy", "vocabulary"),
            *(partial(vocabulary.vocab_parallel_cross_entropy, axis=AXIS), cross_entropy),
            *((logits, tokens), (HIDDEN, WHOLE), WHOLE, expect("all-reduce")),
            strategy="vocabulary",
            exact=False,
        ),
    ]


def cases() -> list[Case]:
    """Every function of tensor, sequence, collective_matmul and vocabulary."""
    return [*_blocks(), *_sequences(), *_vocabulary()]
