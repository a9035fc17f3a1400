"""The feed-forward layer of experts, as a module: against one token at a time, on one device and on meshes."""

import dataclasses
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from float64 import float64
from jax.sharding import NamedSharding, PartitionSpec
from textbook_experts import textbook_mixture

from gcompute.config.mesh import MeshShape
from gcompute.config.presets import PRESETS
from gcompute.model.matmul import MATMUL, expert_linear
from gcompute.model.moe import MoE
from gcompute.parallel.mesh import build_mesh, use_mesh
from gcompute.parallel.placement import Placement
from gcompute.parallel.rules import partition_spec

CONFIG = dataclasses.replace(PRESETS["test-moe"], dim=8, ffn=12)
BATCH, SEQ, BALANCE = 4, 8, 0.5


def parameters(config, dtype=np.float64):
    rng = np.random.default_rng(0)
    state = nnx.to_pure_dict(nnx.state(nnx.eval_shape(lambda: MoE(config, rngs=nnx.Rngs(0)))))
    return {name: rng.normal(size=leaf.shape).astype(dtype) for name, leaf in state.items()}


def inputs(config, dtype=np.float64):
    rng = np.random.default_rng(1)
    return tuple(rng.normal(size=(BATCH, SEQ, config.dim)).astype(dtype) for _ in range(2))


def apply(params, x_BTD, config, compute, placement=None):
    graphdef = nnx.split(nnx.eval_shape(lambda: MoE(config, rngs=nnx.Rngs(0))))[0]
    return nnx.merge(graphdef, params)(x_BTD, compute, placement)


def reference(config):
    x, dy = inputs(config)
    params = parameters(config)
    weights = {name.partition("_")[0]: value for name, value in params.items()}
    return textbook_mixture(
        x, weights, k=config.experts_per_token, capacity=config.capacity(SEQ), dy=dy, balance_weight=BALANCE
    )


def results(config, placement=None):
    """y, stats and gradients by name in float64."""

    def loss(params, x, dy):
        y, stats = apply(params, x, config, jnp.dtype("float64"), placement)
        return (y * dy).sum() + BALANCE * stats.balance, (y, stats)

    with float64(True):
        x, dy = map(jnp.asarray, inputs(config))
        params = jax.tree.map(jnp.asarray, parameters(config))
        (_, (y, stats)), (dparams, dx) = jax.jit(jax.value_and_grad(loss, (0, 1), has_aux=True))(params, x, dy)
        grads = {name.partition("_")[0]: np.asarray(value) for name, value in dparams.items()}
        return np.asarray(y), jax.tree.map(np.asarray, stats), {**grads, "x": np.asarray(dx)}


def check(found, wanted):
    y, stats, grads = found
    close = partial(np.testing.assert_allclose, rtol=1e-12, atol=1e-12)
    close(y, wanted.y)
    close(stats.balance, wanted.balance)
    for name, value in wanted.grads.items():
        close(grads[name], value, err_msg=name)
    assert stats.dropped == wanted.dropped
    np.testing.assert_array_equal(stats.load_E, wanted.load)


@pytest.mark.oldest
@pytest.mark.parametrize("factor", [0.75, None])
def test_one_device_is_the_textbook(factor):
    config = dataclasses.replace(CONFIG, capacity_factor=factor)
    wanted = reference(config)
    assert (wanted.dropped > 0) == (factor is not None)
    check(results(config), wanted)


@pytest.mark.parametrize(
    ("shape", "options"),
    [
        (MeshShape(data=2, expert=2, tensor=2), {"sequence_parallel": True}),
        (MeshShape(fsdp=2, expert=2, context=2), {"context_attention": "ulysses"}),
        (MeshShape(fsdp=4, tensor=2), {}),
    ],
    ids=str,
)
def test_a_mesh_is_the_textbook(shape, options):
    config = dataclasses.replace(CONFIG, capacity_factor=0.75)
    mesh = build_mesh(shape)
    with use_mesh(mesh):
        check(results(config, Placement(mesh=mesh, shape=shape, **options)), reference(config))


def test_an_outer_region_may_hold_some_axes_already():
    # As in a pipeline or an explicit data-parallel step: the layer's own region covers the axes that are left.
    config, shape = dataclasses.replace(CONFIG, capacity_factor=0.75), MeshShape(data=2, expert=2)
    mesh = build_mesh(shape)
    placement = Placement(mesh=mesh, shape=shape)

    def local(params, x):
        y, stats = apply(params, x, config, jnp.dtype("float64"), placement)
        return y, stats.dropped[None], stats.balance[None]

    rows = PartitionSpec("data")
    with float64(True), use_mesh(mesh):
        outer = jax.shard_map(
            local, mesh=mesh, in_specs=(PartitionSpec(), rows), out_specs=(rows, rows, rows), axis_names={"data"}
        )
        y, dropped, balance = jax.jit(outer)(jax.tree.map(jnp.asarray, parameters(config)), inputs(config)[0])
    wanted = reference(config)
    np.testing.assert_allclose(y, wanted.y, rtol=1e-12, atol=1e-12)
    assert dropped.shape == (2,)
    assert dropped.sum() == wanted.dropped
    np.testing.assert_allclose(np.asarray(balance).mean(), wanted.balance, rtol=1e-12)


def test_a_later_token_changes_nothing_before_it():
    config = dataclasses.replace(CONFIG, capacity_factor=0.5)
    params, (x, other) = parameters(config, np.float32), inputs(config, np.float32)
    run = jax.jit(partial(apply, config=config, compute=jnp.dtype("float32")))
    changed = np.concatenate([x[:, :5], other[:, 5:]], axis=1)
    (before, stats), (after, _) = run(params, x), run(params, changed)
    assert stats.dropped > 0
    np.testing.assert_array_equal(before[:, :5], after[:, :5])


def test_bfloat16_operands_have_float32_results_routing_and_gradients():
    params, (x, dy) = parameters(CONFIG, np.float32), inputs(CONFIG, np.float32)

    def loss(params, x):
        y, stats = apply(params, x, CONFIG, jnp.dtype("bfloat16"))
        return (y * dy).sum() + BALANCE * stats.balance, (y, stats)

    (_, (y, stats)), grads = jax.jit(jax.value_and_grad(loss, has_aux=True))(params, x)
    wanted = reference(CONFIG)
    assert {leaf.dtype for leaf in jax.tree.leaves((y, stats.balance, grads))} == {jnp.dtype("float32")}
    np.testing.assert_array_equal(stats.load_E, wanted.load)
    # Rounding of operands and results to 8 bits: about 1 % of the largest value.
    np.testing.assert_allclose(y, wanted.y, atol=0.02 * np.abs(wanted.y).max())
    for name, value in grads.items():
        expected = wanted.grads[name.partition("_")[0]]
        np.testing.assert_allclose(value, expected, atol=0.03 * np.abs(expected).max(), err_msg=name)


def test_gradient_products_of_experts_cast_the_cotangent():
    x_EBCI, w_EIO = jnp.ones((2, 3, 4, 5)), jnp.ones((2, 5, 6))

    @jax.jit
    def gradients(x, w):
        return jax.vjp(lambda x, w: expert_linear(x, w, jnp.dtype("bfloat16")), x, w)[1](pull_EBCO)

    # A bfloat16 has 8 bits: this one becomes 1.
    pull_EBCO = jnp.full((2, 3, 4, 6), 1 + 2.0**-10)
    dx_EBCI, dw_EIO = gradients(x_EBCI, w_EIO)
    np.testing.assert_array_equal(dx_EBCI, np.full(x_EBCI.shape, 6.0, np.float32))
    np.testing.assert_array_equal(dw_EIO, np.full(w_EIO.shape, 12.0, np.float32))
    assert MATMUL in str(jax.make_jaxpr(partial(expert_linear, compute=jnp.dtype("bfloat16")))(x_EBCI, w_EIO))


def test_parameters_go_where_the_rules_put_them():
    shape = MeshShape(fsdp=2, expert=2, tensor=2)
    state = nnx.to_flat_state(nnx.state(nnx.eval_shape(lambda: MoE(CONFIG, rngs=nnx.Rngs(0)))))
    dims = {path[0]: variable.get_metadata()["dims"] for path, variable in state}
    assert dims == {"router_DE": "DE", "up_EDF": "EDF", "gate_EDF": "EDF", "down_EFD": "EFD"}
    mesh = build_mesh(shape)
    local = {
        name: NamedSharding(mesh, partition_spec(dims[name], shape)).shard_shape(value.shape)
        for name, value in parameters(CONFIG).items()
    }
    assert local == {"router_DE": (4, 2), "up_EDF": (2, 4, 6), "gate_EDF": (2, 4, 6), "down_EFD": (2, 6, 4)}


def test_experts_that_the_axis_does_not_divide_are_refused():
    shape = MeshShape(expert=8)
    mesh = build_mesh(shape)
    with use_mesh(mesh), pytest.raises(ValueError, match=r"expert=8 does not divide experts=4.*Legal: expert=1, 2, 4"):
        results(CONFIG, Placement(mesh=mesh, shape=shape))
