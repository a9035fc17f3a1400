"""Tensor parallelism against one device: whole numbers, so every output and gradient is compared to the last bit."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from float64 import float64
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
from per_device import (
    assert_same_bits,
    count_sent,
    detected,
    forward_collectives,
    one_device,
    pulled_back,
    run,
    sent,
    small_integers,
    tensor_mesh,
)
from tiers import mostly_slow

from gcompute.config.mesh import Axis
from gcompute.parallel.collectives import varying
from gcompute.parallel.product import product
from gcompute.parallel.tensor import (
    attention,
    attention_specs,
    check_divides,
    column_parallel,
    feed_forward,
    feed_forward_specs,
    row_parallel,
)

T, D, F, N, H = 3, 4, 16, 8, 2
COLUMN = ((P(Axis.DATA), P(None, Axis.TENSOR)), P(Axis.DATA, None, Axis.TENSOR))
ROW = ((P(Axis.DATA, None, Axis.TENSOR), P(Axis.TENSOR)), P(Axis.DATA))
column, row = partial(column_parallel, axis=Axis.TENSOR), partial(row_parallel, axis=Axis.TENSOR)
x_BTD, w_DF = small_integers(0, 2, T, D), small_integers(1, D, F)
x_BTF, w_FD = small_integers(2, 2, T, F), small_integers(3, F, D)


def assert_product(ran, x, w):
    """By the textbook, in numpy: y = x w, dx = dy w^T, dw = x^T dy."""
    np.testing.assert_array_equal(ran.y, x @ w)
    np.testing.assert_array_equal(ran.gradients[0], ran.dy @ w.T)
    np.testing.assert_array_equal(ran.gradients[1], np.einsum("bti,bto->io", x, ran.dy))


@pytest.mark.oldest("4-True")
@pytest.mark.parametrize(
    ("tensor", "check_vma"),
    mostly_slow([(1, True), (2, True), (4, True), (4, False), (8, True)], (1, True), (4, True), (4, False)),
)
def test_products_equal_one_device(tensor, check_vma):
    mesh = tensor_mesh(tensor)
    assert_product(run(column, mesh, *COLUMN, x_BTD, w_DF, check_vma=check_vma), x_BTD, w_DF)
    assert_product(run(row, mesh, *ROW, x_BTF, w_FD, check_vma=check_vma), x_BTF, w_FD)


def test_a_column_product_sends_nothing_forward_and_one_all_reduce_backward():
    mesh = tensor_mesh(4, data=2)
    assert forward_collectives(column, mesh, *COLUMN, x_BTD, w_DF) == {}
    ran = run(column, mesh, *COLUMN, x_BTD, w_DF)
    assert_product(ran, x_BTD, w_DF)
    # dx over tensor, dw over data.
    kinds = {one.axes: one.kind for one in sent(ran.compiled, mesh)}
    assert kinds == {(Axis.TENSOR,): "all-reduce", (Axis.DATA,): "all-reduce"}
    assert ran.collectives == {"all-reduce": 2}


def test_a_row_product_sends_one_all_reduce_forward_and_nothing_backward():
    mesh = tensor_mesh(4, data=2)
    assert forward_collectives(row, mesh, *ROW, x_BTF, w_FD) == {"all-reduce": 1}
    ran = run(row, mesh, *ROW, x_BTF, w_FD)
    assert_product(ran, x_BTF, w_FD)
    kinds = {one.axes: one.kind for one in sent(ran.compiled, mesh)}
    assert kinds == {(Axis.TENSOR,): "all-reduce", (Axis.DATA,): "all-reduce"}
    assert ran.collectives == {"all-reduce": 2}


def test_matrices_that_share_an_input_share_its_all_reduce():
    weights = {"q": w_DF, "k": small_integers(4, D, 8)}
    specs = ((P(), {"q": P(None, Axis.TENSOR), "k": P(None, Axis.TENSOR)}), P(None, None, Axis.TENSOR))
    ran = run(column, tensor_mesh(4), *specs, x_BTD, weights)
    assert_same_bits(ran, lambda x, w: {name: x @ w[name] for name in w}, x_BTD, weights)
    assert ran.collectives == {"all-reduce": 1}


WEIGHTS = {
    "up_Df": small_integers(5, D, F),
    "down_fD": small_integers(6, F, D),
    "gate_Df": small_integers(7, D, F),
    "up_bias_f": small_integers(8, F),
    "gate_bias_f": small_integers(9, F),
    "down_bias_D": small_integers(10, D),
}
FORMS = {
    "plain": ("up_Df", "down_fD"),
    "plain with biases": ("up_Df", "down_fD", "up_bias_f", "down_bias_D"),
    "gated": ("up_Df", "down_fD", "gate_Df"),
    "gated with biases": tuple(WEIGHTS),
}


def one_device_feed_forward(x, w):
    up = x @ w["up_Df"] + w.get("up_bias_f", 0)
    hidden = jnp.maximum(up, 0)
    if "gate_Df" in w:
        hidden = jnp.maximum(x @ w["gate_Df"] + w.get("gate_bias_f", 0), 0) * up
    return hidden @ w["down_fD"] + w.get("down_bias_D", 0)


def split_feed_forward(x, w, **options):
    return feed_forward(x, axis=Axis.TENSOR, act=lambda h: jnp.maximum(h, 0), **w, **options)


def feed_forward_layout(mesh, names):
    specs = feed_forward_specs(mesh, ffn=F)
    return (P(Axis.DATA), {name: specs[name] for name in names}), P(Axis.DATA)


@pytest.mark.oldest("plain")
@pytest.mark.parametrize("form", mostly_slow(FORMS, "gated", "plain with biases"))
def test_feed_forward_equals_one_device(form):
    mesh, weights = tensor_mesh(4, data=2), {name: WEIGHTS[name] for name in FORMS[form]}
    layout = feed_forward_layout(mesh, weights)
    ran = run(split_feed_forward, mesh, *layout, x_BTD, weights)
    assert_same_bits(ran, one_device_feed_forward, x_BTD, weights)
    assert forward_collectives(split_feed_forward, mesh, *layout, x_BTD, weights) == {"all-reduce": 1}
    over_tensor = [one for one in sent(ran.compiled, mesh) if one.axes == (Axis.TENSOR,)]
    assert [one.kind for one in over_tensor] == ["all-reduce", "all-reduce"]


HEADS = {
    "q_DnH": small_integers(11, D, N, H, most=1),
    "k_DkH": small_integers(12, D, N // 2, H, most=1),
    "v_DkH": small_integers(13, D, N // 2, H, most=1),
    "o_nHD": small_integers(14, N, H, D, most=1),
}


def linear_attention(q_BTNH, k_BTKH, v_BTKH):
    """Causal attention without its softmax, so that whole numbers stay whole; neighbours share a key/value head."""
    k_BTNH, v_BTNH = (jnp.repeat(x, q_BTNH.shape[2] // x.shape[2], axis=2) for x in (k_BTKH, v_BTKH))
    scores_BNTS = jnp.tril(jnp.einsum("btnh,bsnh->bnts", q_BTNH, k_BTNH))
    return jnp.einsum("bnts,bsnh->btnh", scores_BNTS, v_BTNH)


def softmax_attention(q_BTNH, k_BTNH, v_BTNH):
    p_BNTS = jax.nn.softmax(jnp.einsum("btnh,bsnh->bnts", q_BTNH, k_BTNH), axis=-1)
    return jnp.einsum("bnts,bsnh->btnh", p_BNTS, v_BTNH)


def one_device_attention(x, w, attend=linear_attention):
    q, k, v = (jnp.einsum("btd,dnh->btnh", x, w[name]) for name in ("q_DnH", "k_DkH", "v_DkH"))
    return jnp.einsum("btnh,nhd->btd", attend(q, k, v), w["o_nHD"])


def split_attention(x, w, attend=linear_attention, **options):
    return attention(x, axis=Axis.TENSOR, attend=attend, **w, **options)


def attention_layout(mesh, kv_heads=N // 2):
    specs = attention_specs(mesh, heads=N, kv_heads=kv_heads)
    return (P(Axis.DATA), {name: specs[name] for name in HEADS}), P(Axis.DATA)


@pytest.mark.oldest("2-1")
@pytest.mark.parametrize(("tensor", "data"), mostly_slow([(1, 1), (2, 1), (4, 2)], (4, 2)))
def test_attention_equals_one_device(tensor, data):
    mesh = tensor_mesh(tensor, data)
    ran = run(split_attention, mesh, *attention_layout(mesh), x_BTD, HEADS)
    assert_same_bits(ran, one_device_attention, x_BTD, HEADS)
    over_tensor = [one for one in sent(ran.compiled, mesh) if Axis.TENSOR in (one.axes or ())]
    assert [one.kind for one in over_tensor] == ["all-reduce"] * (2 if tensor > 1 else 0)


def test_attention_with_softmax_in_double_precision():
    mesh = tensor_mesh(8)
    x, weights = (jax.tree.map(lambda a: a.astype(np.float64) / 4, tree) for tree in (x_BTD, HEADS))
    weights |= {name: np.repeat(weights[name], 2, axis=1) for name in ("k_DkH", "v_DkH")}
    with float64(True):
        ran = run(partial(split_attention, attend=softmax_attention), mesh, *attention_layout(mesh, N), x, weights)
        expected = one_device(partial(one_device_attention, attend=softmax_attention), ran.dy, x, weights)
        jax.tree.map(partial(np.testing.assert_allclose, rtol=0, atol=1e-13), (ran.y, ran.gradients), expected)


def test_half_a_group_of_heads_is_refused():
    wrong = {**HEADS, "q_DnH": HEADS["q_DnH"][:, :6]}
    mesh = tensor_mesh(2)
    with pytest.raises(ValueError, match="3 query heads and 2 key/value heads: each device needs whole groups"):
        run(split_attention, mesh, *attention_layout(mesh), x_BTD, wrong)


def test_feed_forward_halves_of_different_width_are_refused():
    mesh = tensor_mesh(2)
    wrong = {"up_Df": WEIGHTS["up_Df"], "down_fD": WEIGHTS["down_fD"][:8]}
    with pytest.raises(ValueError, match="8 hidden units on this device and down 4: split up"):
        run(split_feed_forward, mesh, *feed_forward_layout(mesh, wrong), x_BTD, wrong)


@pytest.mark.parametrize(
    ("reference", "explicit", "layout", "weights"),
    [
        (one_device_feed_forward, split_feed_forward, feed_forward_layout, WEIGHTS),
        (one_device_attention, split_attention, lambda mesh, _: attention_layout(mesh), HEADS),
    ],
    ids=["feed_forward", "attention"],
)
def test_jit_with_these_shardings_does_the_same(reference, explicit, layout, weights):
    mesh = tensor_mesh(4)
    (x_spec, specs), out_spec = layout(mesh, weights)
    ran = run(explicit, mesh, (x_spec, specs), out_spec, x_BTD, weights)
    placed = jax.tree.map(lambda array, spec: jax.device_put(array, NamedSharding(mesh, spec)), weights, specs)
    whole = NamedSharding(mesh, P())
    out_shardings = (whole, (whole, jax.tree.map(lambda spec: NamedSharding(mesh, spec), specs)))
    automatic = jax.jit(lambda dy, x, w: pulled_back(reference, dy, (x, w)), out_shardings=out_shardings)
    arguments = (*jax.device_put((ran.dy, x_BTD), whole), placed)
    compiled = automatic.lower(*arguments).compile()
    jax.tree.map(np.testing.assert_array_equal, compiled(*arguments), (ran.y, ran.gradients))
    assert count_sent(compiled) == ran.collectives == {"all-reduce": 2}


def test_bfloat16_products_have_wide_sums_between_devices_too():
    # 257 needs nine bits: a bfloat16 result or partial result could not hold it.
    ones, mesh = partial(np.ones, dtype=np.float32), tensor_mesh(2)
    bfloat16 = {"compute": jnp.dtype("bfloat16")}
    ran = run(partial(row, **bfloat16), mesh, *ROW, ones((1, 1, 514)), ones((514, 2)))
    np.testing.assert_array_equal(ran.y, [[[514, 514]]])
    dy = ones((1, 1, 514))
    sharded = jax.shard_map(partial(column, **bfloat16), mesh=mesh, in_specs=COLUMN[0], out_specs=COLUMN[1])
    _, (dx, dw) = jax.jit(lambda *a: pulled_back(sharded, dy, a))(ones((1, 1, 2)), ones((2, 514)))
    np.testing.assert_array_equal(dx, [[[514, 514]]])
    assert dx.dtype == dw.dtype == jnp.float32
    narrow = run(row, mesh, *ROW, jnp.ones((1, 1, 4), jnp.bfloat16), jnp.ones((4, 2), jnp.bfloat16))
    assert {narrow.y.dtype, narrow.gradients[0].dtype, narrow.gradients[1].dtype} == {jnp.dtype("bfloat16")}


def test_inside_an_automatic_axis():
    mesh = tensor_mesh(4, data=2)
    specs = ((P(None, None, Axis.TENSOR), P(Axis.TENSOR)), P())
    placed = jax.device_put(x_BTF, NamedSharding(mesh, P(Axis.DATA)))
    ran = run(row, mesh, *specs, placed, w_FD, axis_names={Axis.TENSOR})
    assert_product(ran, x_BTF, w_FD)


def test_one_compilation():
    mesh = tensor_mesh(4)
    sharded = jax.jit(jax.shard_map(row, mesh=mesh, in_specs=ROW[0], out_specs=ROW[1]))
    sharded(x_BTF, w_FD)
    sharded(x_BTF + 1, w_FD)
    assert sharded._cache_size() == 1


# Each is wrong in one place. `checked` is whether shard_map's types must refuse it before it runs.
def no_all_reduce(x, w):
    return product("btf,fd->btd", x, w)


def over_the_wrong_axis(x, w):
    return jax.lax.psum(varying(product("btf,fd->btd", x, w), (Axis.DATA, Axis.TENSOR)), Axis.DATA)


def bias_before_the_sum(x, w):
    return jax.lax.psum(product("btf,fd->btd", x, w) + 1, Axis.TENSOR)


def mean_for_sum(x, w):
    return jax.lax.pmean(product("btf,fd->btd", x, w), Axis.TENSOR)


@pytest.mark.parametrize("check_vma", [True, False])
@pytest.mark.parametrize("mutant", [no_all_reduce, over_the_wrong_axis, bias_before_the_sum, mean_for_sum])
def test_mutants_are_detected(mutant, check_vma):
    mesh = tensor_mesh(2, data=2)
    bias = 1 if mutant is bias_before_the_sum else 0
    assert detected(
        lambda: run(mutant, mesh, *ROW, x_BTF, w_FD, check_vma=check_vma), lambda x, w: x @ w + bias, x_BTF, w_FD
    )


def test_a_gradient_that_is_not_summed_is_detected():
    """Megatron's f left out: taken in per-device code, the gradient of x is one device's part of it."""

    def gradient(column):
        def per_device(x, w, dy):
            return jax.grad(lambda x: (column(x, w) * dy).sum())(x)

        dy = small_integers(20, 2, T, F)
        specs = (*COLUMN[0], COLUMN[1])
        sharded = jax.shard_map(per_device, mesh=tensor_mesh(4), in_specs=specs, out_specs=P(), check_vma=False)
        return np.array_equal(sharded(x_BTD, w_DF, dy), dy @ w_DF.T)

    assert not gradient(lambda x, w: x @ w)


def test_sizes_that_do_not_divide_are_refused():
    mesh = tensor_mesh(4)
    with pytest.raises(ValueError, match=r"mesh tensor=4 does not divide ffn=10: .* Legal: tensor=1, 2, 5, 10\."):
        feed_forward_specs(mesh, ffn=10)
    with pytest.raises(ValueError, match=r"mesh tensor=4 does not divide kv_heads=2: .* Legal: tensor=1, 2\."):
        attention_specs(mesh, heads=8, kv_heads=2)
    with pytest.raises(ValueError, match=r"the mesh has no axis 'expert': it has data, tensor\."):
        check_divides(mesh, Axis.EXPERT, heads=8)
