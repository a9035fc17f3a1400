"""Sequence parallelism against one device: to the last bit on whole numbers, in float64 where there are norms."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from float64 import float64
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
from jax_versions import GATHERS_OF_X
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
from gcompute.parallel import sequence, tensor
from gcompute.parallel.collectives import varying
from gcompute.parallel.sequence import gather_column_parallel, row_parallel_scatter, sequence_specs

T, D, F = 8, 4, 16
PIECES = P(Axis.DATA, Axis.TENSOR, None)
COLUMN = ((PIECES, P(None, Axis.TENSOR)), P(Axis.DATA, None, Axis.TENSOR))
ROW = ((P(Axis.DATA, None, Axis.TENSOR), P(Axis.TENSOR)), PIECES)
column, row = partial(gather_column_parallel, axis=Axis.TENSOR), partial(row_parallel_scatter, axis=Axis.TENSOR)
x_BTD, w_DF = small_integers(0, 2, T, D), small_integers(1, D, F)
x_BTF, w_FD = small_integers(2, 2, T, F), small_integers(3, F, D)


def assert_product(ran, x, w):
    """By the textbook, in numpy: y = x w, dx = dy w^T, dw = x^T dy."""
    np.testing.assert_array_equal(ran.y, x @ w)
    np.testing.assert_array_equal(ran.gradients[0], ran.dy @ w.T)
    np.testing.assert_array_equal(ran.gradients[1], np.einsum("bti,bto->io", x, ran.dy))


@pytest.mark.parametrize(("size", "check_vma"), [(1, True), (2, True), (4, True), (4, False), (8, True)])
def test_products_equal_one_device(size, check_vma):
    mesh = tensor_mesh(size)
    assert_product(run(column, mesh, *COLUMN, x_BTD, w_DF, check_vma=check_vma), x_BTD, w_DF)
    assert_product(run(row, mesh, *ROW, x_BTF, w_FD, check_vma=check_vma), x_BTF, w_FD)


@pytest.mark.parametrize(
    ("function", "layout", "x", "w", "forward"),
    [(column, COLUMN, x_BTD, w_DF, "all-gather"), (row, ROW, x_BTF, w_FD, "reduce-scatter")],
    ids=["column", "row"],
)
def test_one_collective_each_way(function, layout, x, w, forward):
    mesh = tensor_mesh(4, data=2)
    assert forward_collectives(function, mesh, *layout, x, w) == {forward: 1}
    ran = run(function, mesh, *layout, x, w)
    assert_product(ran, x, w)
    kinds = {(one.kind, one.axes) for one in sent(ran.compiled, mesh)}
    over_tensor = {("all-gather", (Axis.TENSOR,)), ("reduce-scatter", (Axis.TENSOR,))}
    assert kinds == {*over_tensor, ("all-reduce", (Axis.DATA,))}


def test_x_is_gathered_again_and_not_kept():
    sharded = jax.shard_map(column, mesh=tensor_mesh(4), in_specs=COLUMN[0], out_specs=COLUMN[1])
    kept = jax.tree.leaves(jax.eval_shape(lambda *a: jax.vjp(sharded, *a)[1], x_BTD, w_DF))
    assert max(leaf.size for leaf in kept) == max(x_BTD.size, w_DF.size)  # summed over devices: no [T, D] on each
    # What is asked for, whatever a compiler makes of it.
    program = jax.jit(lambda dy, *a: pulled_back(sharded, dy, a)).lower(np.ones((2, T, F), np.float32), x_BTD, w_DF)
    assert program.as_text().count("stablehlo.all_gather") == 2
    assert program.as_text().count("stablehlo.optimization_barrier") == 1


def test_matrices_that_share_an_input_share_its_gather():
    weights = {"q": w_DF, "k": small_integers(4, D, 8)}
    specs = ((PIECES, {"q": P(None, Axis.TENSOR), "k": P(None, Axis.TENSOR)}), P(Axis.DATA, None, Axis.TENSOR))
    mesh = tensor_mesh(4)
    assert forward_collectives(column, mesh, *specs, x_BTD, weights) == {"all-gather": 1}
    ran = run(column, mesh, *specs, x_BTD, weights)
    assert_same_bits(ran, lambda x, w: {name: x @ w[name] for name in w}, x_BTD, weights)


# One pre-norm block, with biases: everything between the products runs on pieces of the sequence.
def block_params():
    draw = np.random.default_rng(7).normal
    shapes = {"scale_D": (D,), "bias_D": (D,), "up_Df": (D, F), "gate_Df": (D, F), "down_fD": (F, D)}
    return {name: draw(size=shape) for name, shape in {**shapes, "down_bias_D": (D,)}.items()}


def textbook_block(x, p, norm):
    if norm == "rms":
        h = p["scale_D"] * x / jnp.sqrt((x**2).mean(-1, keepdims=True) + 1e-5)
    else:
        centred = x - x.mean(-1, keepdims=True)
        h = p["scale_D"] * centred / jnp.sqrt((centred**2).mean(-1, keepdims=True) + 1e-5) + p["bias_D"]
    gate = h @ p["gate_Df"]
    return x + (gate / (1 + jnp.exp(-gate)) * (h @ p["up_Df"])) @ p["down_fD"] + p["down_bias_D"]


def split_block(x_BtD, p, norm):
    p = dict(p)
    scale_D, bias_D = p.pop("scale_D"), p.pop("bias_D")
    if norm == "rms":
        h_BtD = sequence.rms_norm(x_BtD, scale_D, eps=1e-5)
    else:
        h_BtD = sequence.layer_norm(x_BtD, scale_D, bias_D, eps=1e-5)
    return x_BtD + tensor.feed_forward(
        h_BtD, axis=Axis.TENSOR, column=gather_column_parallel, row=row_parallel_scatter, **p
    )


def block_layout(mesh):
    specs = tensor.feed_forward_specs(mesh, ffn=F) | {"scale_D": P(), "bias_D": P()}
    return {name: specs[name] for name in block_params()}


def close(got, expected):
    jax.tree.map(partial(np.testing.assert_allclose, rtol=1e-12, atol=1e-12), got, expected)


BLOCKS = [("rms", 2, 1), ("layer", 8, 1), ("rms", 4, 2)]


@pytest.mark.oldest("layer-8-1", "rms-2-1")
@pytest.mark.parametrize(("norm", "size", "data"), mostly_slow(BLOCKS, BLOCKS[2]))
def test_a_block_with_norms_and_residual_equals_one_device(norm, size, data):
    mesh, params = tensor_mesh(size, data), block_params()
    with float64(True):
        x = np.random.default_rng(8).normal(size=(2, T, D))
        ran = run(partial(split_block, norm=norm), mesh, (PIECES, block_layout(mesh)), PIECES, x, params)
        expected = one_device(partial(textbook_block, norm=norm), ran.dy, x, params)
        close((ran.y, ran.gradients), expected)


def gradients_inside(mesh, params, x, block, **options):
    """Gradients taken in per-device code, as a train step written in shard_map takes them."""

    def per_device(x_BtD, p):
        return jax.grad(lambda p: block(x_BtD, p).sum())(p)

    specs = block_layout(mesh)
    sharded = jax.shard_map(per_device, mesh=mesh, in_specs=(P(None, Axis.TENSOR), specs), out_specs=specs, **options)
    return jax.jit(sharded)(x, params)


def test_the_gradient_of_a_replicated_scale_is_summed_over_the_pieces():
    mesh, params = tensor_mesh(4), block_params()
    with float64(True):
        x = np.random.default_rng(8).normal(size=(2, T, D))
        block = partial(split_block, norm="layer")
        expected = jax.jit(jax.grad(lambda p: textbook_block(x, p, "layer").sum()))(params)
        close(gradients_inside(mesh, params, x, block), expected)

        # Without types that say what varies nobody adds the parts up: scale, bias and the bias of the output are wrong,
        # the split matrices right.
        wrong = gradients_inside(mesh, params, x, block, check_vma=False)
        differs = {name for name in params if not np.allclose(wrong[name], expected[name])}
        assert differs == {"scale_D", "bias_D", "down_bias_D"}

        # A scale that was made to vary is a scale of each device's own: the types refuse to call its gradient one.
        def own_scales(x_BtD, p):
            return block(x_BtD, {**p, "scale_D": varying(p["scale_D"], Axis.TENSOR)})

        def own_gradient(x_BtD, p):
            own = varying(p["scale_D"], Axis.TENSOR)
            return jax.grad(lambda scale: block(x_BtD, {**p, "scale_D": scale}).sum())(own)

        close(gradients_inside(mesh, params, x, own_scales), expected)
        specs = (P(None, Axis.TENSOR), block_layout(mesh))
        with pytest.raises(ValueError, match=r"replicated|vary"):
            jax.shard_map(own_gradient, mesh=mesh, in_specs=specs, out_specs=P())(x, params)


@pytest.mark.oldest
def test_jit_with_these_constraints_does_the_same():
    mesh = tensor_mesh(4)
    weights = {"up_Df": small_integers(5, D, F), "gate_Df": small_integers(6, D, F), "down_fD": small_integers(7, F, D)}
    specs = {name: tensor.feed_forward_specs(mesh, ffn=F)[name] for name in weights}
    lies = {name: NamedSharding(mesh, spec) for name, spec in sequence_specs(mesh, sequence=T).items()}
    constrain = jax.lax.with_sharding_constraint

    def automatic(x, w):
        hidden = constrain(jnp.maximum(x @ w["gate_Df"], 0) * (x @ w["up_Df"]), lies["hidden_BTf"])
        return constrain(hidden @ w["down_fD"], lies["x_BtD"])

    def explicit(x, w):
        relu = {"act": lambda h: jnp.maximum(h, 0)}
        return tensor.feed_forward(
            x, axis=Axis.TENSOR, column=gather_column_parallel, row=row_parallel_scatter, **relu, **w
        )

    ran = run(explicit, mesh, (PIECES, specs), PIECES, x_BTD, weights)
    placed = jax.tree.map(lambda array, spec: jax.device_put(array, NamedSharding(mesh, spec)), weights, specs)
    arguments = (*jax.device_put((ran.dy, x_BTD), lies["x_BtD"]), placed)
    out = (lies["x_BtD"], jax.tree.map(lambda spec: NamedSharding(mesh, spec), specs))
    compiled = (
        jax.jit(lambda dy, x, w: pulled_back(automatic, dy, (x, w)), out_shardings=(lies["x_BtD"], out))
        .lower(*arguments)
        .compile()
    )
    jax.tree.map(np.testing.assert_array_equal, compiled(*arguments), (ran.y, ran.gradients))
    # XLA:CPU leaves an all-reduce and a slice where the compilers of accelerators make a reduce-scatter.
    assert ran.collectives == {"all-gather": GATHERS_OF_X + 1, "reduce-scatter": 2}  # x and dy; y and dx
    assert count_sent(compiled) == {"all-gather": 2, "all-reduce": 2}


def test_what_is_copied_is_narrow_and_what_is_summed_is_wide():
    # 257 needs nine bits: a bfloat16 result or partial result could not hold it.
    ones, mesh = partial(np.ones, dtype=np.float32), tensor_mesh(2)
    bfloat16 = {"compute": jnp.dtype("bfloat16")}
    ran = run(partial(row, **bfloat16), mesh, *ROW, ones((1, 2, 514)), ones((514, 2)))
    np.testing.assert_array_equal(ran.y, np.full((1, 2, 2), 514))
    x, w = ones((1, 2, 2)), ones((2, 514))
    sharded = jax.shard_map(partial(column, **bfloat16), mesh=mesh, in_specs=COLUMN[0], out_specs=COLUMN[1])
    program = jax.jit(lambda *a: pulled_back(sharded, ones((1, 2, 514)), a)).lower(x, w)
    dx, dw = program.compile()(x, w)[1]
    np.testing.assert_array_equal(dx, np.full((1, 2, 2), 514))
    assert dx.dtype == dw.dtype == jnp.float32
    assert "(tensor<1x1x2xbf16>) -> tensor<1x2x2xbf16>" in program.as_text()  # the gather


def test_one_compilation():
    mesh = tensor_mesh(4)
    sharded = jax.jit(jax.shard_map(column, mesh=mesh, in_specs=COLUMN[0], out_specs=COLUMN[1]))
    sharded(x_BTD, w_DF)
    sharded(x_BTD + 1, w_DF)
    assert sharded._cache_size() == 1


# Each is wrong in one place.
def scattered_elsewhere(x, w):
    """Each device keeps the piece of its neighbour."""
    n = jax.lax.axis_size(Axis.TENSOR)
    return jax.lax.ppermute(row(x, w), Axis.TENSOR, [(i, (i + 1) % n) for i in range(n)])


def not_summed(x, w):
    y_BTD = jnp.einsum("btf,fd->btd", x, w)
    t = T // jax.lax.axis_size(Axis.TENSOR)
    return jax.lax.dynamic_slice_in_dim(y_BTD, jax.lax.axis_index(Axis.TENSOR) * t, t, axis=1)


def over_the_wrong_axis(x, w):
    y_BTD = jnp.einsum("btf,fd->btd", x, w)
    return jax.lax.psum_scatter(y_BTD, Axis.DATA, scatter_dimension=1, tiled=True)


@pytest.mark.parametrize("mutant", [scattered_elsewhere, not_summed, over_the_wrong_axis])
def test_mutants_are_detected(mutant):
    mesh = tensor_mesh(2, data=2)
    assert detected(lambda: run(mutant, mesh, *ROW, x_BTF, w_FD), lambda x, w: x @ w, x_BTF, w_FD)


def test_a_gradient_that_is_not_summed_is_detected():
    """The transpose of an all-gather is a reduce-scatter: a device's own rows of dy w^T are one part of its sum."""

    @jax.custom_vjp
    def gathered(x):
        return jax.lax.all_gather(x, Axis.TENSOR, axis=1, tiled=True)

    def own_rows(_, dy):
        t = T // jax.lax.axis_size(Axis.TENSOR)
        return (jax.lax.dynamic_slice_in_dim(dy, jax.lax.axis_index(Axis.TENSOR) * t, t, axis=1),)

    gathered.defvjp(lambda x: (gathered(x), None), own_rows)
    mutant = lambda x, w: gathered(x) @ w  # noqa: E731
    assert detected(lambda: run(mutant, tensor_mesh(4), *COLUMN, x_BTD, w_DF), lambda x, w: x @ w, x_BTD, w_DF)


def test_sequences_that_do_not_divide_are_refused():
    mesh = tensor_mesh(4)
    with pytest.raises(ValueError, match=r"mesh tensor=4 does not divide sequence=6: .* Legal: tensor=1, 2, 3, 6\."):
        sequence_specs(mesh, sequence=6)
    with pytest.raises(ValueError, match=r"tensor=4 does not divide a sequence of 6: .* Pad it to 8\."):
        run(row, mesh, *ROW, x_BTF[:, :6], w_FD)
