"""A pipeline of residual layers with tied embeddings beside other mesh axes, in float64, against one device."""

from functools import cache

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from float64 import float64
from jax.sharding import NamedSharding, PartitionSpec

from gcompute.aot.hlo import count_collectives
from gcompute.config.mesh import Axis, MeshShape
from gcompute.parallel.mesh import build_mesh
from gcompute.parallel.pipeline.executor import run_pipeline
from gcompute.parallel.pipeline.forward import pipeline_forward
from gcompute.parallel.pipeline.layout import join_chunks, layer_order, split_chunks
from gcompute.parallel.pipeline.nested import nested_shard_map
from gcompute.parallel.pipeline.schedule import interleaved, one_f_one_b, zero_bubble

LAYERS, WIDTH, INNER, VOCAB, TIME, ROWS, MICROBATCHES = 4, 4, 8, 7, 3, 4, 4
REPLICATED, STAGES = PartitionSpec(), PartitionSpec(Axis.STAGE)


def first(extra, tokens):
    return extra["embedding"][tokens]


def last(extra, x, targets):
    logits = x * extra["scale"] @ extra["embedding"].T
    return -jnp.take_along_axis(jax.nn.log_softmax(logits), targets[..., None], axis=-1).mean()


def layer(weights, x, total=lambda x: x):
    """One residual layer; `total` sums what devices that split INNER have each found. Returns x and a penalty."""
    normal = x / jnp.sqrt((x**2).mean(-1, keepdims=True) + 1e-5) * weights["norm"]
    inner = jnp.tanh(normal @ weights["up"])
    return x + total(inner @ weights["down"]), 0.1 * total((inner**2).sum(-1)).mean()


def stage(chunk, x, **options):
    x, penalties = jax.lax.scan(lambda x, weights: layer(weights, x, **options), x, chunk)
    return x, penalties.sum()


def values():
    draw = np.random.default_rng(0)
    layers = {
        "norm": draw.normal(1, 0.1, (LAYERS, WIDTH)),
        "up": draw.normal(0, 1, (LAYERS, WIDTH, INNER)),
        "down": draw.normal(0, 1, (LAYERS, INNER, WIDTH)),
    }
    extra = {"embedding": draw.normal(0, 1, (VOCAB, WIDTH)), "scale": draw.normal(1, 0.1, WIDTH)}
    tokens = draw.integers(0, VOCAB, (2, MICROBATCHES, ROWS, TIME))
    return layers, extra, tokens[0], tokens[1]


def reference_loss(layers, extra, tokens, targets):
    """The mean over microbatches, one after the other: loss with penalties, penalties alone."""

    def one(batch):
        tokens_i, targets_i = batch
        x, penalty = stage(layers, first(extra, tokens_i))
        return last(extra, x, targets_i) + penalty, penalty

    losses, penalties = jax.lax.map(one, (tokens, targets))
    return losses.mean(), penalties.mean()


def reference_gradients(layers, extra, tokens, targets):
    (loss, penalty), grads = jax.value_and_grad(reference_loss, argnums=(0, 1), has_aux=True)(
        layers, extra, tokens, targets
    )
    return loss, penalty, *grads


@cache
def expected_gradients():
    return jax.jit(reference_gradients)(*values())


def assert_same(found, expected):
    """Sums in another order: 1e-12 is some thousand roundings of float64."""
    jax.tree.map(lambda one, other: np.testing.assert_allclose(one, other, rtol=1e-12, atol=1e-13), found, expected)


def pipeline(schedule, mesh, *, axes, stage_fn=stage, batch_axes=(), specs=STAGES, batch=REPLICATED, **options):
    """(layers in storage order, extra, tokens, targets) -> (loss, penalty, gradients), manual over `axes`."""

    def device_code(layers, extra, tokens, targets):
        chunks = split_chunks(layers, schedule.num_chunks)
        ends = {"first": first, "last": last, "batch_axes": batch_axes, "has_aux": True, **options}
        result = run_pipeline(stage_fn, chunks, extra, tokens, targets, schedule, **ends)
        return result.loss, result.aux, join_chunks(result.stage_grads), result.extra_grads

    return jax.shard_map(
        device_code,
        mesh=mesh,
        axis_names=set(axes),
        in_specs=(specs, REPLICATED, batch, batch),
        out_specs=(REPLICATED, REPLICATED, specs, REPLICATED),
    )


@pytest.mark.slow
def test_several_optimizer_steps_beside_a_data_axis():
    with float64():
        schedule, mesh = interleaved(2, MICROBATCHES, 2), build_mesh(MeshShape(stage=2, data=2))
        layers, extra, tokens, targets = values()
        order = layer_order(LAYERS, 2, 2)
        run = pipeline(
            schedule,
            mesh,
            axes=(Axis.STAGE, Axis.DATA),
            batch_axes=(Axis.DATA,),
            batch=PartitionSpec(None, Axis.DATA),
            uniform_ends=False,
        )

        def train(gradients, layers, extra):
            """Three steps of momentum."""

            def step(state, _):
                params, velocity = state
                loss, _, *grads = gradients(*params, tokens, targets)
                velocity = jax.tree.map(lambda v, g: 0.9 * v + g, velocity, tuple(grads))
                return (jax.tree.map(lambda p, v: p - 0.1 * v, params, velocity), velocity), loss

            params = jax.tree.map(jnp.asarray, (layers, extra))
            (params, _), losses = jax.lax.scan(step, (params, jax.tree.map(jnp.zeros_like, params)), length=3)
            return losses, *params

        stored = jax.tree.map(lambda leaf: leaf[order], layers)
        program = jax.jit(lambda layers, extra: train(run, layers, extra)).lower(stored, extra).compile()
        losses, found_layers, found_extra = program(stored, extra)
        expected = jax.jit(lambda layers, extra: train(reference_gradients, layers, extra))(layers, extra)
        found_layers = jax.tree.map(lambda leaf: np.asarray(leaf)[np.argsort(order)], found_layers)
        assert_same((losses, found_layers, found_extra), expected)
        assert losses[2] < losses[0]
        # A step reduces once over stages and data, what stages share, and once over data alone, what they do not.
        assert count_collectives(program)["all-reduce"] == 2


def mesh_context(mesh):
    return jax.set_mesh(mesh) if hasattr(jax, "set_mesh") else mesh


COLUMNS_AND_ROWS = {
    "norm": PartitionSpec(Axis.STAGE),
    "up": PartitionSpec(Axis.STAGE, None, Axis.TENSOR),
    "down": PartitionSpec(Axis.STAGE, Axis.TENSOR),
}


def test_automatic_tensor_and_data_axes_inside_a_stage():
    with float64():
        mesh = build_mesh(MeshShape(stage=2, data=2, tensor=2))
        layers, extra, tokens, targets = values()
        place = lambda tree, specs: jax.device_put(  # noqa: E731
            tree,
            jax.tree.map(lambda spec: NamedSharding(mesh, spec), specs, is_leaf=lambda s: isinstance(s, PartitionSpec)),
        )
        stored = place(layers, COLUMNS_AND_ROWS)
        tokens, targets = (place(array, PartitionSpec(None, Axis.DATA)) for array in (tokens, targets))
        run = jax.jit(pipeline(one_f_one_b(2, MICROBATCHES), mesh, axes=(Axis.STAGE,)))
        program = run.lower(stored, extra, tokens, targets).compile()
        assert_same(program(stored, extra, tokens, targets), expected_gradients())
        # XLA splits the products over the tensor axis and sums them inside the ticks.
        assert count_collectives(program)["all-reduce"] > 2


def sum_over_tensor(x):
    return jax.lax.psum(x, Axis.TENSOR)


def test_collectives_over_a_manual_tensor_axis_inside_a_stage():
    with float64():
        mesh = build_mesh(MeshShape(stage=2, tensor=2))
        layers, extra, tokens, targets = values()
        run = pipeline(
            zero_bubble(2, MICROBATCHES),
            mesh,
            axes=(Axis.STAGE, Axis.TENSOR),
            stage_fn=lambda chunk, x: stage(chunk, x, total=sum_over_tensor),
            specs=COLUMNS_AND_ROWS,
        )
        assert_same(jax.jit(run)(layers, extra, tokens, targets), expected_gradients())


@pytest.mark.oldest
@pytest.mark.slow
def test_a_shard_map_inside_a_stage():
    with float64():
        mesh = build_mesh(MeshShape(stage=2, tensor=2))
        layers, extra, tokens, targets = values()
        inner_specs = {name: PartitionSpec(None, *spec[1:]) for name, spec in COLUMNS_AND_ROWS.items()}

        nested = nested_shard_map(
            lambda chunk, x: stage(chunk, x, total=sum_over_tensor),
            axis_names={Axis.TENSOR},
            in_specs=(inner_specs, REPLICATED),
            out_specs=(REPLICATED, REPLICATED),
        )
        run = pipeline(one_f_one_b(2, MICROBATCHES), mesh, axes=(Axis.STAGE,), stage_fn=nested)
        with mesh_context(mesh):
            found = jax.jit(run)(layers, extra, tokens, targets)
        assert_same(found, expected_gradients())


@pytest.mark.slow
def test_activations_that_differ_along_another_axis():
    """x split over the context axis all along the pipeline; the loss is the mean over its pieces."""
    with float64():
        mesh = build_mesh(MeshShape(stage=2, context=3))
        layers, extra, tokens, targets = values()
        run = pipeline(
            one_f_one_b(2, MICROBATCHES),
            mesh,
            axes=(Axis.STAGE, Axis.CONTEXT),
            batch_axes=(Axis.CONTEXT,),
            batch=PartitionSpec(None, None, Axis.CONTEXT),
        )
        assert_same(jax.jit(run)(layers, extra, tokens, targets), expected_gradients())


@pytest.mark.slow
def test_without_check_vma_where_stages_hold_no_collectives():
    with float64():
        mesh = build_mesh(MeshShape(stage=2))
        layers, extra, tokens, targets = values()

        def device_code(layers, extra, tokens, targets):
            ends = {"first": first, "last": last, "has_aux": True}
            chunks, schedule = split_chunks(layers, 1), one_f_one_b(2, MICROBATCHES)
            result = run_pipeline(stage, chunks, extra, tokens, targets, schedule, **ends)
            losses = pipeline_forward(stage, chunks, extra, tokens, targets, schedule, **ends)
            return (result.loss, result.aux, join_chunks(result.stage_grads), result.extra_grads), losses

        run = jax.shard_map(
            device_code,
            mesh=mesh,
            in_specs=(STAGES, REPLICATED, REPLICATED, REPLICATED),
            out_specs=((REPLICATED, REPLICATED, STAGES, REPLICATED), REPLICATED),
            check_vma=False,
        )
        found, losses = jax.jit(run)(layers, extra, tokens, targets)
        assert_same(found, expected_gradients())
        assert_same(losses.mean() + found[1], found[0])
