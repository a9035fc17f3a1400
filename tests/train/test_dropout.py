"""Dropout against a textbook that is given the masks, and the same masks on every mesh."""

import dataclasses
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from float64 import float64
from tiers import mostly_slow
from tiny_run import bits, make_run

from gcompute.aot.hlo import read_collectives
from gcompute.certify.collectives import tally
from gcompute.certify.recipes import BATCH, LLAMA, MIXTURE, STEPS, Recipe
from gcompute.certify.reference import attention, feed_forward, layer_of, norm
from gcompute.certify.trained import follow, lower, starting_values
from gcompute.config.mesh import MeshShape
from gcompute.model.dropout import EMBEDDING, Dropout, attention_site, dropout_of_step, feed_forward_site
from gcompute.model.transformer import Execution, init
from gcompute.train.corpus import TokenizedCorpus
from gcompute.train.gradients import loss_and_gradients
from gcompute.train.loop import train
from gcompute.train.metrics_log import read_metrics
from gcompute.train.optimizer import make_optimizer
from gcompute.train.programs import build_programs
from gcompute.train.step import make_train_steps

MODEL = make_run(model={"layers": 2}).model
FLOAT64 = jnp.dtype("float64")
RATE = 0.25


def of_step(step: int = 0, *, rate: float = RATE, seed: int = 0, rows: int = 8) -> Dropout:
    dropout = dropout_of_step(rate, seed, step, rows)
    assert dropout is not None
    return dropout


def kept(dropout: Dropout, site: int = EMBEDDING, *, length: int = 16, dim: int = 32) -> np.ndarray:
    return np.asarray(dropout.kept(jnp.arange(length)[None], site, dim))


def test_a_mask_keeps_its_share_and_the_rest_is_scaled():
    mask = kept(of_step(rows=64))
    # 32,768 draws: a standard deviation of 0.0024.
    assert mask.mean() == pytest.approx(1 - RATE, abs=0.012)
    x = jnp.asarray(np.random.default_rng(0).normal(size=mask.shape), jnp.float32)
    dropped = of_step(rows=64)(x, jnp.arange(16)[None], EMBEDDING)
    np.testing.assert_array_equal(dropped, np.where(mask, np.asarray(x) * np.float32(1 / (1 - RATE)), 0))


def test_masks_differ_by_seed_step_place_row_and_position():
    mask = kept(of_step())
    others = [kept(of_step(1)), kept(of_step(seed=1)), kept(of_step(), attention_site(0)), np.roll(mask, 1, axis=0)]
    others += [kept(of_step(), feed_forward_site(0)), kept(of_step(), attention_site(1)), np.roll(mask, 1, axis=1)]
    for other in others:
        # Two independent masks agree in 1 - 2 p (1 - p) = 0.625 of their 4,096 elements.
        assert (mask == other).mean() == pytest.approx(0.625, abs=0.04)
    assert {attention_site(0), feed_forward_site(0), attention_site(1), EMBEDDING} == {0, 1, 2, 3}


@pytest.mark.oldest
def test_an_element_has_its_draw_wherever_it_lies():
    whole = of_step()
    order = np.random.default_rng(0).permutation(16)
    some = dataclasses.replace(whole, rows_B=jnp.asarray([5, 2], jnp.int32))
    found = jax.jit(lambda dropout: dropout.kept(jnp.asarray(order)[None], 3, 32))(some)
    np.testing.assert_array_equal(found, kept(whole, 3)[[5, 2]][:, order])
    with float64(True):
        np.testing.assert_array_equal(kept(of_step(), 3), kept(whole, 3))


def textbook_loss(params, inputs_BT, targets_BT, masks_SBTD, config) -> jax.Array:
    """The certificate's textbook decoder with a factor, 0 or 1 / (1 - rate), at each place."""

    def sequence(tokens, targets, factors_STD):
        x = params["embedding_VD"][tokens] * factors_STD[0]
        for layer in range(config.layers):
            p = layer_of(params["blocks"], layer)
            mixed = attention(norm(x, p["attention_norm"], config), p["attention"], config)
            x = x + mixed * factors_STD[1 + 2 * layer]
            fed = feed_forward(norm(x, p["mlp_norm"], config), p["mlp"], config)
            x = x + fed * factors_STD[2 + 2 * layer]
        logits = norm(x, params["norm"], config) @ params["embedding_VD"].T
        return -jax.nn.log_softmax(logits)[jnp.arange(len(targets)), targets].mean()

    return jax.vmap(sequence, in_axes=(0, 0, 1))(inputs_BT, targets_BT, masks_SBTD / (1 - RATE)).mean()


def batch():
    rows = np.random.default_rng(0).integers(0, MODEL.vocab, (8, 9), dtype=np.int32)
    return jnp.asarray(rows[:, :-1]), jnp.asarray(rows[:, 1:])


def gradients_in_float64(accumulation: int = 1, **execution):
    how = Execution(compute=FLOAT64, residual=FLOAT64, **{"unroll": 2, **execution})
    params = jax.tree.map(lambda leaf: leaf.astype(FLOAT64), init(MODEL, jax.random.key(0)))
    compute = partial(loss_and_gradients, config=MODEL, execution=how, accumulation=accumulation)
    return params, *jax.jit(compute)(params, *batch(), dropout=of_step(3))


def test_it_is_the_textbook_with_these_masks():
    with float64(True):
        params, losses, gradients = gradients_in_float64()
        masks = np.stack([kept(of_step(3), site, length=8, dim=MODEL.dim) for site in range(1 + 2 * MODEL.layers)])
        expected = jax.jit(jax.value_and_grad(partial(textbook_loss, config=MODEL)))
        loss, slopes = expected(params, *batch(), masks.astype(np.float64))
        np.testing.assert_allclose(losses.loss, loss, rtol=1e-12)
        for ours, theirs in zip(jax.tree.leaves(gradients), jax.tree.leaves(slopes), strict=True):
            # Two orders of sums over 64 tokens and two layers, in float64.
            np.testing.assert_allclose(ours, theirs, rtol=1e-9, atol=1e-14)


@pytest.mark.parametrize(
    "execution",
    mostly_slow(
        [{"accumulation": 4}, {"unroll": 1}, {"remat": "full", "unroll": 1}, {"remat": "dots", "unroll": 1}],
        {"accumulation": 4},
    ),
    ids=str,
)
def test_microbatches_scans_and_recomputation_draw_the_same(execution: dict):
    with float64(True):
        _, losses, gradients = gradients_in_float64()
        _, again, others = gradients_in_float64(**execution)
        np.testing.assert_allclose(again.loss, losses.loss, rtol=1e-13)
        for ours, other in zip(jax.tree.leaves(gradients), jax.tree.leaves(others), strict=True):
            np.testing.assert_allclose(other, ours, rtol=1e-10, atol=1e-15)


MESHES = {
    "data=2,fsdp=2,tensor=2": {},
    "data=2": {"accumulation": 2, "zero": 2},
    "fsdp=2": {},
    "tensor=2": {},
    "context=2,tensor=2": {},
    "context=2": {"context_attention": "ulysses"},
    "data=2,context=2": {},
    "data=2,expert=2": {},
}


@pytest.mark.parametrize("mesh", mostly_slow(MESHES, "data=2,fsdp=2,tensor=2"))
def test_a_mesh_trains_as_one_device_does(mesh: str):
    """In float64, and with the collectives that the mesh has without dropout, no more."""
    model = MIXTURE if "expert" in mesh else LLAMA
    trajectories, counts = [], []
    for shape, settings in ((MeshShape(), {}), (MeshShape.parse(mesh), MESHES[mesh])):
        recipe = Recipe(name=mesh, mesh=shape, strategies=(), model=model, settings={**settings, "dropout": RATE})
        program = lower(recipe.run("float64"), "float64")
        compiled = program.lowered.compile()
        trajectories.append(follow(program, compiled, starting_values(model), recipe.optimizer, "float64"))
    one, many = trajectories
    without = lower(dataclasses.replace(recipe, settings=MESHES[mesh]).run("float64"), "float64")
    for each in (without, program):
        counts.append(tally(read_collectives(each.lowered.compile(), each.mesh), each.mesh).counts)
    assert counts[0] == counts[1]
    # As the certificate's limit for float64: reordered sums, two layers, four steps.
    np.testing.assert_allclose(many.losses, one.losses, rtol=1e-11)
    np.testing.assert_allclose(many.norms, one.norms, rtol=1e-11)
    for name, leaf in one.last.items():
        np.testing.assert_allclose(many.last[name], leaf, atol=1e-11 * np.abs(leaf).max(), rtol=0, err_msg=name)


def test_without_dropout_the_program_is_as_it_was():
    run = make_run()
    optimizer = make_optimizer(run.optimizer, run.train.steps)
    execution = Execution(compute=jnp.dtype("float32"))
    state = jax.eval_shape(build_programs(run).init, jax.random.key(0))
    rows, count = jax.ShapeDtypeStruct((2, 4, 16), jnp.int32), jax.ShapeDtypeStruct((), jnp.int32)

    def text(**settings) -> str:
        steps = make_train_steps(run.model, execution, optimizer, 2, **settings)
        return jax.jit(steps).lower(state, rows, rows, count).as_text()

    assert text(dropout=0.0, seed=7) == text()
    assert "xor" not in text()
    assert "xor" in text(dropout=RATE)


def test_a_resumed_run_draws_as_one_that_was_not_stopped(corpus: TokenizedCorpus, tmp_path):
    run = make_run(dropout=RATE, accumulation=2)
    train(run, corpus, out=tmp_path / "whole")
    asked = iter([False, True])
    train(run, corpus, out=tmp_path / "parts", stopped=lambda: next(asked, True))
    train(run, corpus, out=tmp_path / "parts", resume=True)
    train(make_run(accumulation=2), corpus, out=tmp_path / "without")
    whole, parts, without = (
        [row["loss"] for row in read_metrics(tmp_path / name / "metrics.jsonl") if row["kind"] == "train"]
        for name in ("whole", "parts", "without")
    )
    assert bits(whole) == bits(parts)
    assert whole[0] != without[0]


def test_evaluation_drops_nothing(corpus: TokenizedCorpus):
    values = np.zeros((4, 16), np.int32)
    weights = np.ones((4, 16), np.float32)
    sums = []
    for rate in (0.0, 0.5):
        programs = build_programs(make_run(dropout=rate))
        params = programs.init(jax.random.key(0)).params
        sums.append(float(programs.evaluate(params, values, values, weights)[0]))
    assert sums[0] == sums[1]


def test_a_pipeline_refuses_it_and_a_rate_is_a_probability():
    recipe = Recipe(name="stage=2", mesh=MeshShape(stage=2), strategies=(), settings={"dropout": 0.1})
    with pytest.raises(ValueError, match="does not run on a pipeline"):
        lower(recipe.run("float32"), "float32")
    for rate in (1.0, -0.1, float("nan")):
        with pytest.raises(ValueError, match="dropout must be at least 0 and below 1"):
            make_run(dropout=rate)


def test_steps_of_one_dispatch_have_masks_of_their_own():
    recipe = Recipe(name="one", mesh=MeshShape(), strategies=(), settings={"dropout": RATE})
    values = starting_values(LLAMA)
    same = dataclasses.replace(
        values, inputs_NBT=values.inputs_NBT[:1].repeat(STEPS, 0), targets_NBT=values.targets_NBT[:1].repeat(STEPS, 0)
    )
    frozen = dataclasses.replace(recipe.optimizer, learning_rate=1e-30, weight_decay=0.0)
    program = lower(dataclasses.replace(recipe, optimizer=frozen).run("float32"), "float32")
    found = follow(program, program.lowered.compile(), same, frozen, "float32")
    assert same.inputs_NBT.shape[:2] == (STEPS, BATCH)
    assert len(set(found.losses.tolist())) == STEPS
