import dataclasses
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from float64 import float64
from tiers import mostly_slow
from tiny_run import make_run

from gcompute.model.transformer import Execution, forward, init
from gcompute.model.vocabulary import token_losses
from gcompute.train.gradients import loss_and_gradients, microbatches
from gcompute.train.step import make_eval

MODEL = make_run(model={"layers": 2}).model
FLOAT64 = jnp.dtype("float64")


def in_float64():
    """Parameters, inputs and targets, where float64 is on."""
    return jax.tree.map(lambda leaf: leaf.astype(FLOAT64), init(MODEL, jax.random.key(0))), *batch()


def batch():
    rows = np.random.default_rng(0).integers(0, MODEL.vocab, (8, 9), dtype=np.int32)
    return jnp.asarray(rows[:, :-1]), jnp.asarray(rows[:, 1:])


@pytest.mark.oldest
def test_token_losses_are_minus_the_log_of_the_softmax():
    logits = np.random.default_rng(0).normal(size=(2, 3, 5)) * 30
    targets = np.array([[0, 1, 2], [3, 4, 0]])
    exact = logits - logits.max(-1, keepdims=True)
    expected = np.log(np.exp(exact).sum(-1)) - np.take_along_axis(exact, targets[..., None], -1)[..., 0]
    # Where the target is all but certain, the difference of two numbers near 40 is rounded to 4e-6.
    found = token_losses(jnp.asarray(logits, jnp.float32), jnp.asarray(targets))
    np.testing.assert_allclose(found, expected, rtol=1e-6, atol=4e-6)


@pytest.mark.oldest("1")
@pytest.mark.parametrize("unroll", mostly_slow([1, 2], 1))
def test_accumulated_gradients_are_those_of_the_whole_batch(unroll: int):
    with float64(True):
        params, inputs, targets = in_float64()
        execution = Execution(compute=FLOAT64, residual=FLOAT64, unroll=unroll)
        compute = partial(loss_and_gradients, config=MODEL)
        in_parts = dataclasses.replace(execution, output_major=unroll > 1)
        loss, gradients = jax.jit(partial(compute, execution=execution, accumulation=1))(params, inputs, targets)
        again, accumulated = jax.jit(partial(compute, execution=in_parts, accumulation=4))(params, inputs, targets)
        np.testing.assert_allclose(again.loss, loss.loss, rtol=1e-13)
        for ours, whole in zip(jax.tree.leaves(accumulated), jax.tree.leaves(gradients), strict=True):
            assert ours.dtype == FLOAT64
            # Two orders of a sum over 64 tokens, in float64.
            np.testing.assert_allclose(ours, whole, rtol=1e-10, atol=1e-15)


def test_gradients_are_slopes_of_the_loss():
    with float64(True):
        params, inputs, targets = in_float64()
        execution = Execution(compute=FLOAT64, residual=FLOAT64, unroll=2)
        settings = {"config": MODEL, "execution": execution}
        _, gradients = jax.jit(partial(loss_and_gradients, **settings, accumulation=1))(params, inputs, targets)
        way = jax.tree.map(lambda leaf: jnp.cos(jnp.arange(leaf.size, dtype=FLOAT64)).reshape(leaf.shape), params)

        @jax.jit
        def loss_at(distance: float) -> jax.Array:
            moved = jax.tree.map(lambda leaf, d: leaf + distance * d, params, way)
            logits, _ = forward(moved, inputs, config=MODEL, execution=execution)
            return token_losses(logits, targets).mean()

        slope = float(loss_at(1e-5) - loss_at(-1e-5)) / 2e-5
        along = sum(float((g * d).sum()) for g, d in zip(jax.tree.leaves(gradients), jax.tree.leaves(way), strict=True))
        assert along == pytest.approx(slope, rel=1e-6)


def test_microbatches_hold_every_row_once():
    rows = np.arange(12 * 2).reshape(12, 2)
    pieces = np.asarray(microbatches(jnp.asarray(rows), 3))
    assert pieces.shape == (3, 4, 2)
    assert sorted(map(tuple, pieces.reshape(12, 2))) == sorted(map(tuple, rows))
    # Neighbours go to different microbatches, so each of the batch's contiguous shards has a share of every one.
    np.testing.assert_array_equal(pieces[:, 0], rows[:3])


@pytest.mark.oldest("2")
@pytest.mark.parametrize("accumulation", [1, 2])
def test_evaluation_counts_what_has_weight(accumulation: int):
    params = init(MODEL, jax.random.key(0))
    inputs, targets = batch()
    weights = np.zeros(inputs.shape, np.float32)
    weights[:3], weights[3, :5] = 1, 1
    execution = Execution(compute=jnp.float32, unroll=1)
    total, num = jax.jit(make_eval(MODEL, execution, accumulation))(params, inputs, targets, jnp.asarray(weights))
    logits, _ = jax.jit(partial(forward, config=MODEL, execution=execution))(params, inputs)
    assert num == 3 * 8 + 5
    assert float(total) == pytest.approx(float((token_losses(logits, targets) * weights).sum()), rel=1e-5)
