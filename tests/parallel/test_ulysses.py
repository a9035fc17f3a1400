"""All-to-all and all-gather attention against the textbook, head by head in float64, with gradients and messages."""

from collections.abc import Callable
from functools import cache, partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from float64 import float64
from jax.sharding import PartitionSpec as P
from textbook_attention import causal_attention
from tiers import mostly_slow

from gcompute.aot.hlo import count_collectives, read_collectives
from gcompute.config.mesh import Axis, MeshShape
from gcompute.parallel import ulysses as module
from gcompute.parallel.collectives import HAS_PCAST
from gcompute.parallel.load_balance import LAYOUTS, sequence_order
from gcompute.parallel.mesh import build_mesh
from gcompute.parallel.ulysses import gathered_attention, ulysses_attention

BATCH, SEQ, HEADS, HEAD_SIZE = 2, 16, 8, 4
# Where this version cannot ask for a device's place along an axis, `collectives.axis_index` sends n numbers for it.
PLACE = jax.__version_info__ < HAS_PCAST
SPLIT = P(Axis.DATA, Axis.CONTEXT, Axis.TENSOR)


@cache
def problem(kv_heads: int = 2, heads: int = HEADS) -> tuple[tuple[np.ndarray, ...], tuple[np.ndarray, ...]]:
    """(q, k, v, do) and the textbook's (o, dq, dk, dv)."""
    rng = np.random.default_rng(0)
    arrays = tuple(rng.standard_normal((BATCH, SEQ, count, HEAD_SIZE)) for count in (heads, kv_heads, kv_heads, heads))
    return arrays, causal_attention(*arrays)


def attend(q, k, v, visible=None):
    """Attention over whole heads, causal where nobody says what is visible."""
    visible = jnp.tri(q.shape[1], dtype=bool)[None] if visible is None else visible
    q_BTKGH = q.reshape(*q.shape[:2], k.shape[2], -1, q.shape[3])
    s = jnp.einsum("btkgh,bskh->bkgts", q_BTKGH, k) / q.shape[-1] ** 0.5
    p = jax.nn.softmax(jnp.where(visible[:, None, None], s, -jnp.inf), axis=-1)
    return jnp.einsum("bkgts,bskh->btkgh", p, v).reshape(q.shape)


def with_gradients(attention: Callable[..., Any], shape: MeshShape, layout: str) -> Callable[..., Any]:
    """(q, k, v, do) -> (o, dq, dk, dv) over the mesh, to jit."""

    def run(q, k, v, do):
        o, pull = jax.vjp(partial(attention, axis=Axis.CONTEXT, layout=layout, attend=attend), q, k, v)
        return o, *pull(do)

    return jax.shard_map(run, mesh=build_mesh(shape), in_specs=SPLIT, out_specs=SPLIT)


def largest_error(attention, shape, layout, kv_heads=2, heads=HEADS) -> tuple[float, Any]:
    """The largest difference from the textbook, whose values are of order 1, and the compiled program."""
    arrays, expected = problem(kv_heads, heads)
    order = sequence_order(SEQ, shape.context, layout)
    with float64(True):
        placed = [x[:, order] for x in arrays]
        compiled = jax.jit(with_gradients(attention, shape, layout)).lower(*placed).compile()
        results = compiled(*placed)
    return max(np.abs(np.asarray(x) - y[:, order]).max() for x, y in zip(results, expected, strict=True)), compiled


# (mesh, layout, key/value heads, query heads): heads to spare, one each, too few (repeated), and 6 over 4 (lcm 12).
CASES = [
    ("context=1", "zigzag", 2, 8),
    ("context=2", "contiguous", 2, 8),
    ("context=2", "zigzag", 8, 8),
    ("context=4", "zigzag", 2, 8),
    ("context=4", "zigzag", 6, 12),
    ("context=8", "zigzag", 1, 8),
    ("data=2,context=4", "contiguous", 4, 8),
    ("context=2,tensor=2", "zigzag", 2, 8),
]


@pytest.mark.parametrize(("mesh", "layout", "kv_heads", "heads"), mostly_slow(CASES, *(CASES[at] for at in (0, 3, 6))))
def test_all_to_all_attention_is_the_textbook_and_costs_its_messages(mesh, layout, kv_heads, heads):
    shape = MeshShape.parse(mesh)
    n = shape.context
    error, compiled = largest_error(ulysses_attention, shape, layout, kv_heads, heads)
    # Sums of at most 16 terms of order 1, in another order.
    assert error < 1e-12
    # q, k, v and o, and their gradients on the way back.
    assert count_collectives(compiled) == ({"all-to-all": 8} if n > 1 else {})
    token = BATCH // shape.data * SEQ // n * HEAD_SIZE * 8 // shape.tensor
    sizes = sorted(message.operand_bytes // token for message in read_collectives(compiled))
    kept = np.lcm(kv_heads // shape.tensor, n) * shape.tensor
    assert sizes == (sorted([heads] * 4 + [kept] * 4) if n > 1 else [])


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("mesh", mostly_slow(["context=1", "context=4", "data=2,context=2,tensor=2"], "context=4"))
def test_all_gather_attention_is_the_textbook_and_costs_its_messages(mesh, layout):
    shape = MeshShape.parse(mesh)
    error, compiled = largest_error(gathered_attention, shape, layout)
    assert error < 1e-12
    # Of k and v; a group of one device is still a group to the compiler.
    assert count_collectives(compiled) == {"all-gather": 2, "reduce-scatter": 2 + PLACE}


def in_the_order_of_shards(x, num_shards, layout):
    return x


def test_a_mutant_that_leaves_the_layout_alone_is_seen(monkeypatch):
    """Undoing the layout neither before nor after gives a mask over the wrong positions."""
    monkeypatch.setattr(module, "to_sequence", in_the_order_of_shards)
    monkeypatch.setattr(module, "to_shards", in_the_order_of_shards)
    assert largest_error(ulysses_attention, MeshShape(context=2), "zigzag")[0] > 1e-2


def test_a_mutant_that_masks_by_place_is_seen(monkeypatch):
    monkeypatch.setattr(module, "sequence_order", lambda seq, num_shards, layout: np.arange(seq))
    assert largest_error(gathered_attention, MeshShape(context=2), "zigzag")[0] > 1e-2


def test_a_mutant_that_repeats_heads_in_turn_is_seen(monkeypatch):
    """0 1 0 1 in place of 0 0 1 1: query heads would meet another group's keys."""
    monkeypatch.setattr(module.jnp, "repeat", lambda x, repeats, axis: jnp.concatenate([x] * repeats, axis))
    assert largest_error(ulysses_attention, MeshShape(context=4), "zigzag")[0] > 1e-2


@pytest.mark.oldest
def test_one_program_serves_every_call():
    arrays = [x.astype(np.float32) for x in problem()[0]]
    run = jax.jit(with_gradients(ulysses_attention, MeshShape(context=2), "zigzag"))
    run(*arrays)
    run(*(2 * x for x in arrays))
    assert run._cache_size() == 1


@pytest.mark.parametrize(
    ("attention", "q_shape", "k_shape", "words"),
    [
        (
            ulysses_attention,
            (1, 16, 6, 4),
            (1, 16, 2, 4),
            "4 devices cannot share out 6 query heads.*'context': 1, 2, 3, 6;",
        ),
        (ulysses_attention, (1, 16, 8, 4), (1, 16, 3, 4), "3 key/value heads do not divide 8 query heads"),
        (ulysses_attention, (1, 12, 8, 4), (1, 12, 2, 4), "12 does not divide into 8 equal pieces.*multiple of 8"),
        (gathered_attention, (1, 12, 8, 4), (1, 12, 2, 4), "12 does not divide into 8 equal pieces.*multiple of 8"),
        (gathered_attention, (1, 16, 8, 4), (1, 8, 2, 4), "are not one attention"),
    ],
)
def test_bad_input_is_one_clear_line(attention, q_shape, k_shape, words):
    run = jax.shard_map(
        partial(attention, axis=Axis.CONTEXT, layout="zigzag", attend=attend),
        mesh=build_mesh(MeshShape(context=4)),
        in_specs=P(None, Axis.CONTEXT),
        out_specs=P(None, Axis.CONTEXT),
    )
    q, k = (jax.ShapeDtypeStruct(shape, jnp.float32) for shape in (q_shape, k_shape))
    with pytest.raises(ValueError, match=words) as caught:
        jax.eval_shape(run, q, k, k)
    assert "\n" not in str(caught.value)
