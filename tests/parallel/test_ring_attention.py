"""Ring attention against the textbook, head by head in float64, with its gradients, messages, work and memory."""

import json
import os
import re
import subprocess
import sys
from collections.abc import Callable
from functools import cache, partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from float64 import float64
from jax.sharding import PartitionSpec as P
from textbook_attention import causal_attention
from tiers import mostly_slow

from gcompute.aot.hlo import count_collectives, program_text, read_collectives
from gcompute.aot.program_text import parse_programs
from gcompute.aot.target import check_installed, target_environment
from gcompute.config.mesh import Axis, MeshShape
from gcompute.hardware.target import Target
from gcompute.parallel import ring_attention as module
from gcompute.parallel.collectives import HAS_PCAST
from gcompute.parallel.load_balance import LAYOUTS, inverse_order, sequence_order
from gcompute.parallel.mesh import build_mesh
from gcompute.parallel.ring_attention import RING_ATTENTION, ring_attention

BATCH, SEQ, HEADS, HEAD_SIZE = 2, 32, 4, 8
BY_TOKENS = P(None, Axis.CONTEXT)


@cache
def problem(kv_heads: int = 2) -> tuple[tuple[np.ndarray, ...], tuple[np.ndarray, ...]]:
    """(q, k, v, do) and the textbook's (o, dq, dk, dv)."""
    rng = np.random.default_rng(0)
    arrays = tuple(rng.standard_normal((BATCH, SEQ, heads, HEAD_SIZE)) for heads in (HEADS, kv_heads, kv_heads, HEADS))
    return arrays, causal_attention(*arrays)


class Programs(NamedTuple):
    """The forward pass (q, k, v) -> (o, saved) and the backward pass (saved, do) -> (dq, dk, dv), in float64.

    Apart, as a loop over layers has them: in one program XLA:CPU up to jaxlib 0.11.0 would share work (`jax_versions`).
    """

    forward: Any
    backward: Any
    saved: list[jax.ShapeDtypeStruct]


def compile_programs(num_shards: int, layout: str, kv_heads: int = 2, key_block: int | None = None) -> Programs:
    mesh, structure = build_mesh(MeshShape(context=num_shards)), []
    attention = partial(ring_attention, axis=Axis.CONTEXT, layout=layout, key_block=key_block)

    def forward(q, k, v):
        o, pull = jax.vjp(attention, q, k, v)
        leaves, tree = jax.tree.flatten(pull)
        structure.append(tree)
        return o, leaves

    def backward(saved, do):
        return jax.tree.unflatten(structure[0], saved)(do)

    split = partial(jax.shard_map, mesh=mesh, in_specs=BY_TOKENS, out_specs=BY_TOKENS)
    with float64(True):
        q, k, v, do = problem(kv_heads)[0]
        _, saved = jax.eval_shape(split(forward), q, k, v)
        return Programs(
            jax.jit(split(forward)).lower(q, k, v).compile(), jax.jit(split(backward)).lower(saved, do).compile(), saved
        )


programs = cache(compile_programs)


def largest_error(found: Programs, num_shards: int, layout: str, kv_heads: int = 2) -> float:
    """The largest difference from the textbook in o, dq, dk, dv, whose values are of order 1."""
    (q, k, v, do), expected = problem(kv_heads)
    order = sequence_order(SEQ, num_shards, layout)
    with float64(True):
        o, saved = found.forward(q[:, order], k[:, order], v[:, order])
        results = (o, *found.backward(saved, do[:, order]))
    return max(np.abs(np.asarray(x) - y[:, order]).max() for x, y in zip(results, expected, strict=True))


SIZES = mostly_slow((1, 2, 4, 8), 1, 4)


# Of at most 32 terms of order 1, sums in another order differ by some 1e-16: thousands of those are allowed.
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("num_shards", SIZES)
def test_the_ring_is_the_textbook(num_shards, layout):
    assert largest_error(programs(num_shards, layout), num_shards, layout) < 1e-12


def test_as_many_key_heads_as_query_heads():
    assert largest_error(programs(2, "zigzag", HEADS), 2, "zigzag", HEADS) < 1e-12


def test_keys_may_be_scored_in_blocks():
    assert largest_error(programs(2, "zigzag", key_block=4), 2, "zigzag") < 1e-12


@pytest.mark.oldest("2-contiguous")
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("num_shards", SIZES)
def test_messages(num_shards, layout):
    """(k, v) goes round once a pass, in n - 1 hops; (dk, dv) too, and is then at home."""
    found, hops = programs(num_shards, layout), num_shards - 1
    assert count_collectives(found.forward) == ({"collective-permute": hops, **PLACE} if hops else {})
    assert count_collectives(found.backward) == ({"collective-permute": 2 * hops, **PLACE} if hops else {})
    shard = 2 * BATCH * SEQ // num_shards * 2 * HEAD_SIZE * 8
    for message in read_collectives(found.forward) + read_collectives(found.backward):
        if message.kind == "collective-permute":
            assert (message.operand_bytes, message.trips) == (shard, 1)


# Where this version cannot ask for a device's place along an axis, `collectives.axis_index` sends n numbers for it.
PLACE = {"reduce-scatter": 1} if jax.__version_info__ < HAS_PCAST else {}


def dot_flops(compiled) -> float:
    """Operations of the matrix products in a compiled program; of a conditional, those of all branches."""
    total = 0.0
    for program in parse_programs(program_text(compiled)):
        for computation, instruction, loops in program.reached:
            if instruction.opcode == "dot":
                ((_, out),) = instruction.shape.arrays
                ((_, left),) = computation.operand_shape(instruction.operands[0]).arrays
                dims = instruction.attribute(r"lhs_contracting_dims=\{([\d,]+)\}")
                total += 2 * np.prod(out) * np.prod([left[int(dim)] for dim in dims.split(",")]) * np.prod(loops or 1)
    return total


@pytest.mark.parametrize("num_shards", SIZES)
def test_zigzag_does_half_of_the_work(num_shards):
    """(2 n + 1) / 4 n of scoring every pair: half, and the upper triangles of the first step."""
    square = 2 * BATCH * HEADS * SEQ * (SEQ // num_shards) * HEAD_SIZE
    share = (2 * num_shards + 1) / (4 * num_shards)
    found = programs(num_shards, "zigzag")
    # q k^T and p v; again q k^T, then p^T do, do v^T, ds k, ds^T q.
    assert dot_flops(found.forward) == pytest.approx(2 * share * square, rel=1e-12)
    assert dot_flops(found.backward) == pytest.approx(5 * share * square, rel=1e-12)
    # Contiguous, the last device scores every pair, and the program holds what any device may do.
    assert dot_flops(programs(num_shards, "contiguous").forward) == pytest.approx(2 * square, rel=1e-12)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_saved_for_the_backward_pass_are_q_k_v_o_and_a_number_a_query(layout):
    (q, k, v, _), _ = problem()
    sizes = sorted(leaf.size for leaf in programs(4, layout).saved)
    assert sizes == sorted([q.size, k.size, v.size, q.size, q.size // HEAD_SIZE])


def skip(x, axis):
    return x


def no_rescale(queries, kv, causal, compute, key_block):
    q, o, m, z = queries
    new_o, new_m, new_z = ABSORB((q, jnp.zeros_like(o), m, jnp.zeros_like(z)), kv, causal, compute, key_block)
    return o + new_o, new_m, z + new_z


def sees_the_next_key(num_rows, num_keys, first, size):
    return VISIBLE(num_rows, num_keys, first - 1, size)


def misses_itself(num_rows, num_keys, first, size):
    return VISIBLE(num_rows, num_keys, first + 1, size)


def masks_one_head_of_a_group(num_rows, num_keys, first, size):
    return VISIBLE(num_rows, num_keys, first, num_rows)


def one_step_late(visit, carry, step, place, layout):
    return VISIT(visit, carry, step + (step > 0), place, layout)


ABSORB, VISIBLE, TO_NEXT, VISIT = module._absorb, module._visible, module._to_next, module._visit_blocks
FORWARD_MUTANTS = {
    "no rotation": ("_to_next", skip),
    "sums not rescaled": ("_absorb", no_rescale),
    "mask one key late": ("_visible", sees_the_next_key),
    "mask one key early": ("_visible", misses_itself),
    "mask of one head in a group": ("_visible", masks_one_head_of_a_group),
    "blocks of another step": ("_visit_blocks", one_step_late),
}


@pytest.mark.parametrize("name", mostly_slow(FORWARD_MUTANTS, "mask one key early"))
def test_a_mutant_of_the_forward_pass_is_seen(name, monkeypatch):
    monkeypatch.setattr(module, *FORWARD_MUTANTS[name])
    (q, k, v, _), (expected, *_) = problem()
    order = sequence_order(SEQ, 2, "zigzag")
    run = jax.shard_map(
        partial(ring_attention, axis=Axis.CONTEXT),
        mesh=build_mesh(MeshShape(context=2)),
        in_specs=BY_TOKENS,
        out_specs=BY_TOKENS,
    )
    with float64(True):
        o = jax.jit(run)(q[:, order], k[:, order], v[:, order])
    assert np.abs(np.asarray(o) - expected[:, order]).max() > 1e-2


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_sequence_in_another_layout_is_seen(layout):
    (other,) = set(LAYOUTS) - {layout}
    assert largest_error(programs(4, layout), 4, other) > 1e-2


def joint(shape: MeshShape, in_specs, out_specs, **options) -> Callable[..., Any]:
    """(q, k, v, do) -> (o, dq, dk, dv) over a mesh of several axes, to jit."""

    def with_gradients(q, k, v, do):
        o, pull = jax.vjp(partial(ring_attention, axis=Axis.CONTEXT, **options), q, k, v)
        return o, *pull(do)

    return jax.shard_map(with_gradients, mesh=build_mesh(shape), in_specs=in_specs, out_specs=out_specs)


def test_a_mutant_that_leaves_gradients_abroad_is_seen(monkeypatch):
    sent = []

    def to_next(x, axis):
        sent.append(x)
        return x if len(sent) == 3 else TO_NEXT(x, axis)

    monkeypatch.setattr(module, "_to_next", to_next)
    arrays, expected = problem()
    order = sequence_order(SEQ, 2, "zigzag")
    with float64(True):
        results = jax.jit(joint(MeshShape(context=2), BY_TOKENS, BY_TOKENS))(*(x[:, order] for x in arrays))
    # Keys forward, keys backward, gradients home.
    assert len(sent) == 3
    errors = [np.abs(np.asarray(x) - y[:, order]).max() for x, y in zip(results, expected, strict=True)]
    assert max(errors[:2]) < 1e-12
    assert min(errors[2:]) > 1e-2


# Where k and v are alike along the tensor axis, `check_vma` holds that their gradients are its sum.
SPLIT, SHARED = P(Axis.DATA, Axis.CONTEXT, Axis.TENSOR), P(Axis.DATA, Axis.CONTEXT)
TWO_AXES = {
    "data=2,context=2": (2, (SPLIT, SPLIT, SPLIT, SPLIT)),
    "context=2,tensor=2": (2, (SPLIT, SPLIT, SPLIT, SPLIT)),
    "context=2,tensor=4": (1, (SPLIT, SHARED, SHARED, SPLIT)),
}


@pytest.mark.oldest("context=2,tensor=2")
@pytest.mark.parametrize("text", mostly_slow(TWO_AXES, "context=2,tensor=4"))
def test_two_axes(text):
    shape, (kv_heads, specs) = MeshShape.parse(text), TWO_AXES[text]
    arrays, expected = problem(kv_heads)
    order = sequence_order(SEQ, shape.context, "zigzag")
    with float64(True):
        run = jax.jit(joint(shape, specs, (specs[0], *specs[:3])))
        for _ in range(2):
            results = run(*(x[:, order] for x in arrays))
        assert run._cache_size() == 1
    for result, wanted in zip(results, expected, strict=True):
        np.testing.assert_allclose(
            np.asarray(result)[:, inverse_order(SEQ, shape.context, "zigzag")], wanted, atol=1e-12
        )


def plain(q, k, v, compute=None):
    """One-device attention by autodiff, operands rounded to `compute`, sums in the dtype of q."""

    def rounded(x):
        return x.astype(compute or x.dtype).astype(x.dtype)

    k, v = (jnp.repeat(x, q.shape[2] // k.shape[2], axis=2) for x in (k, v))
    s = jnp.einsum("btnh,bsnh->bnts", rounded(q / q.shape[-1] ** 0.5), rounded(k), precision="highest")
    p = jax.nn.softmax(jnp.where(jnp.tri(q.shape[1], dtype=bool), s, -jnp.inf), axis=-1)
    return jnp.einsum("bnts,bsnh->btnh", rounded(p), rounded(v), precision="highest")


@pytest.mark.parametrize("compute", mostly_slow([jnp.float32, jnp.bfloat16], jnp.bfloat16))
def test_narrow_operands_cost_what_they_cost_on_one_device(compute):
    """Both round the same operands once, so errors have one size; p is rounded before the division by its sum, and sums
    are in another order, hence a factor of 4. Below a quarter, operands would not be rounded at all.
    """
    arrays, expected = problem()
    order, inverse = sequence_order(SEQ, 2, "zigzag"), inverse_order(SEQ, 2, "zigzag")
    narrow = tuple(x.astype(np.float32) for x in arrays)
    results = jax.jit(joint(MeshShape(context=2), BY_TOKENS, BY_TOKENS, compute=compute))(
        *(x[:, order] for x in narrow)
    )

    @jax.jit
    def one_device(q, k, v, do):
        o, pull = jax.vjp(partial(plain, compute=compute), q, k, v)
        return o, *pull(do)

    def rms(x):
        return np.sqrt(np.square(x).mean())

    for result, usual, exact in zip(results, one_device(*narrow), expected, strict=True):
        assert result.dtype == jnp.float32
        ratio = rms(np.asarray(result)[:, inverse] - exact) / rms(np.asarray(usual) - exact)
        assert 1 / 4 < ratio < 4


def test_bfloat16_inputs_have_bfloat16_gradients_and_a_wide_result():
    arrays = [jax.ShapeDtypeStruct(x.shape, jnp.bfloat16) for x in problem()[0][:3]]
    wide = jax.ShapeDtypeStruct(arrays[0].shape, jnp.float32)
    o, *gradients = jax.eval_shape(joint(MeshShape(context=4), BY_TOKENS, BY_TOKENS), *arrays, wide)
    assert o.dtype == jnp.float32
    assert [g.dtype for g in gradients] == [jnp.bfloat16] * 3


def layers(attention, remat, x, w_LI):
    """Two layers under a scan, each `x + attention(x w, x w', x w'')`."""

    def layer(x, w):
        return x + attention(x * w[0], x * w[1], x * w[2]), None

    return jax.lax.scan(remat(layer), x, w_LI)[0]


def ring_layers(remat, x, w_LI):
    run = jax.shard_map(
        partial(layers, partial(ring_attention, axis=Axis.CONTEXT), remat),
        mesh=build_mesh(MeshShape(context=2)),
        in_specs=(BY_TOKENS, P()),
        out_specs=BY_TOKENS,
    )
    return (run(x, w_LI) ** 2).sum()


W_LI = 1 + np.arange(6.0).reshape(2, 3) / 10


@pytest.mark.slow
def test_layers_in_a_loop_that_are_computed_again_for_the_backward_pass():
    x = problem()[0][0]
    order, inverse = sequence_order(SEQ, 2, "zigzag"), inverse_order(SEQ, 2, "zigzag")

    def on_one_device(x, w_LI):
        return (layers(plain, lambda f: f, x, w_LI) ** 2).sum()

    with float64(True):
        loss, (dx, dw) = jax.jit(jax.value_and_grad(partial(ring_layers, jax.checkpoint), (0, 1)))(x[:, order], W_LI)
        wanted, (wanted_dx, wanted_dw) = jax.jit(jax.value_and_grad(on_one_device, (0, 1)))(x, W_LI)
    # Gradients are of order 10 and more, each through two layers.
    np.testing.assert_allclose(loss, wanted, rtol=1e-12)
    np.testing.assert_allclose(np.asarray(dx)[:, inverse], wanted_dx, rtol=1e-11, atol=1e-11)
    np.testing.assert_allclose(dw, wanted_dw, rtol=1e-11)


KEEP = jax.checkpoint_policies.save_only_these_names(RING_ATTENTION)


@pytest.mark.parametrize(
    ("remat", "messages"),
    # Over two devices one message each: keys forward, keys and gradients backward, and keys for the forward pass again.
    [(lambda f: f, 3), (jax.checkpoint, 4), (partial(jax.checkpoint, policy=KEEP), 3)],
    ids=["nothing again", "all again", "results kept"],
)
def test_kept_results_save_the_second_forward_pass(remat, messages):
    # The compiler for CPU drops what keeps the passes apart, so the count is that of the program it is given.
    traced = jax.jit(jax.grad(partial(ring_layers, remat))).lower(
        jnp.zeros((1, 8, 2, 4)), jnp.asarray(W_LI, jnp.float32)
    )
    assert len(re.findall(r"\bstablehlo\.collective_permute\b", traced.as_text())) == messages


@pytest.mark.slow
def test_inside_a_map_that_leaves_other_axes_to_the_compiler():
    """Manual over data outside, over context inside; the tensor axis splits the heads by itself."""
    shape = MeshShape(data=2, context=2, tensor=2)
    mesh = build_mesh(shape)
    arrays, expected = problem()
    order, inverse = (of(SEQ, shape.context, "zigzag") for of in (sequence_order, inverse_order))

    def inner(q, k, v, do):
        o, pull = jax.vjp(partial(ring_attention, axis=Axis.CONTEXT), q, k, v)
        return o, *pull(do)

    def outer(*arrays):
        return jax.shard_map(inner, in_specs=BY_TOKENS, out_specs=BY_TOKENS, axis_names={Axis.CONTEXT})(*arrays)

    nested = jax.shard_map(outer, mesh=mesh, in_specs=P(Axis.DATA), out_specs=P(Axis.DATA), axis_names={Axis.DATA})
    with float64(True), jax.set_mesh(mesh) if hasattr(jax, "set_mesh") else mesh:
        placed = [jax.device_put(x[:, order], jax.sharding.NamedSharding(mesh, SPLIT)) for x in arrays]
        compiled = jax.jit(nested).lower(*placed).compile()
        for result, wanted in zip(compiled(*placed), expected, strict=True):
            np.testing.assert_allclose(np.asarray(result)[:, inverse], wanted, atol=1e-12)
    assert set(count_collectives(compiled)) == {"collective-permute", *PLACE}


def call(q_shape, k_shape, **options):
    specs = (BY_TOKENS,) * 3
    run = jax.shard_map(
        partial(ring_attention, axis=Axis.CONTEXT, **options),
        mesh=build_mesh(MeshShape(context=4)),
        in_specs=specs,
        out_specs=BY_TOKENS,
    )
    q, k = (jax.ShapeDtypeStruct(shape, jnp.float32) for shape in (q_shape, k_shape))
    return jax.eval_shape(run, q, k, k)


@pytest.mark.parametrize(
    ("q_shape", "k_shape", "options", "words"),
    [
        ((1, 16, 4, 8), (1, 16, 3, 8), {}, "3 key/value heads do not divide 4 query heads"),
        ((1, 16, 4, 8), (1, 32, 4, 8), {}, r"q \(1, 4, 4, 8\), k \(1, 8, 4, 8\).*are not one attention"),
        ((1, 16, 4, 8), (1, 16, 4, 4), {}, "are not one attention"),
        ((1, 12, 4, 8), (1, 12, 4, 8), {}, "12 does not divide into 8 equal pieces, zigzag over 4.*multiple of 8"),
        ((1, 16, 4, 8), (1, 16, 4, 8), {"layout": "striped"}, "'striped' is not known. Use one of contiguous, zigzag"),
        ((1, 32, 4, 8), (1, 32, 4, 8), {"key_block": 3}, "key_block=3 does not divide the 4 keys.*divisor of 4"),
    ],
)
def test_bad_input_is_one_clear_line(q_shape, k_shape, options, words):
    with pytest.raises(ValueError, match=words) as caught:
        call(q_shape, k_shape, **options)
    assert "\n" not in str(caught.value)


TARGET = Target.parse("v5e:2x4")
COMPILE_FOR_TPU = """
import json, sys
from functools import partial
import jax, jax.numpy as jnp
from jax.sharding import NamedSharding, PartitionSpec as P
from gcompute.aot.hlo import count_collectives
from gcompute.aot.target import target_devices
from gcompute.hardware.target import Target
from gcompute.config.mesh import Axis, MeshShape
from gcompute.parallel.mesh import build_mesh
from gcompute.parallel.ring_attention import ring_attention

for n in (2, 8):
    mesh = build_mesh(MeshShape(data=8 // n, context=n), target_devices(Target.parse(sys.argv[1])))
    split = P(Axis.DATA, Axis.CONTEXT)

    def run(q, k, v, do):
        o, pull = jax.vjp(partial(ring_attention, axis=Axis.CONTEXT, compute=jnp.bfloat16), q, k, v)
        return o, *pull(do)

    def array(heads):
        return jax.ShapeDtypeStruct((8 // n, 2048 * n, heads, 128), jnp.float32, sharding=NamedSharding(mesh, split))

    compiled = jax.jit(jax.shard_map(run, mesh=mesh, in_specs=split, out_specs=split)).lower(
        array(8), array(2), array(2), array(8)
    ).compile()
    print(json.dumps([count_collectives(compiled), compiled.memory_analysis().temp_size_in_bytes]))
"""


@pytest.mark.slow
def test_compiled_for_a_tpu_it_needs_no_more_memory_on_a_longer_ring():
    try:
        check_installed(TARGET)
    except ValueError as error:
        pytest.skip(str(error))
    environment = {**os.environ, **target_environment(TARGET)}
    done = subprocess.run(
        [sys.executable, "-c", COMPILE_FOR_TPU, str(TARGET)],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    (short, short_bytes), (long, long_bytes) = (json.loads(line) for line in done.stdout.splitlines())
    assert short == {"collective-permute": 3 * 1}
    assert long == {"collective-permute": 3 * 7}
    # 2048 tokens a device in both: the second message in flight is all that a ring of two does not have.
    assert long_bytes < 1.5 * short_bytes
