import dataclasses
import math
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from tiers import mostly_slow
from tiny_run import make_run

from gcompute.config.train import OPTIMIZERS, OptimizerConfig
from gcompute.config.unused import OPTIMIZER_FIELDS
from gcompute.model.transformer import Execution, abstract_params, init
from gcompute.train.objective import mean_loss
from gcompute.train.optimizer import decays, make_optimizer, make_schedule

MODEL = make_run().model
STEPS = 100


def params_and_gradients(scale: float = 1.0):
    """Parameters, and as gradients other numbers of their shapes."""

    def other(leaf):
        return scale * jnp.cos(jnp.arange(leaf.size, dtype=leaf.dtype)).reshape(leaf.shape)

    params = init(MODEL, jax.random.key(0))
    return params, jax.tree.map(other, params)


def flat(tree) -> dict[str, np.ndarray]:
    leaves = jax.tree_util.tree_flatten_with_path(tree)[0]
    return {jax.tree_util.keystr(path): np.asarray(leaf) for path, leaf in leaves}


@pytest.mark.oldest("lion")
@pytest.mark.parametrize("name", mostly_slow(OPTIMIZERS, "adamw", "muon", "adafactor"))
def test_every_optimizer_learns_a_batch_by_heart(name: str):
    rates = {"sgd": 0.3, "lion": 1e-3, "muon": 2e-2, "lamb": 3e-2, "adafactor": 3e-2}
    config = OptimizerConfig(optimizer=name, learning_rate=rates.get(name, 1e-2), warmup_steps=2, weight_decay=0.01)
    optimizer = make_optimizer(config, 30)
    loss = partial(mean_loss, config=MODEL, execution=Execution(compute=jnp.float32, unroll=1))
    rows = np.random.default_rng(0).integers(0, MODEL.vocab, (4, 9), dtype=np.int32)

    @jax.jit
    def step(params, state):
        value, gradients = jax.value_and_grad(loss)(params, rows[:, :-1], rows[:, 1:])
        updates, state = optimizer.update(gradients, state, params)
        return optax.apply_updates(params, updates), state, value

    params = init(MODEL, jax.random.key(0))
    state = optimizer.init(params)
    values = []
    for _ in range(30):
        params, state, value = step(params, state)
        values.append(float(value))
    assert values[0] == pytest.approx(math.log(MODEL.vocab), abs=0.3)
    assert values[-1] < values[0] - 0.5
    assert step._cache_size() == 1
    # A state that a checkpoint can hold: arrays alone, whose shapes and dtypes the first step leaves as they were.
    before = jax.tree.map(lambda leaf: (leaf.shape, leaf.dtype), jax.eval_shape(optimizer.init, params))
    assert jax.tree.map(lambda leaf: (leaf.shape, leaf.dtype), state) == before


@pytest.mark.parametrize(
    "name", mostly_slow(sorted(set(OPTIMIZERS) - {"adam"}), "adamw", "sgd", "nadamw", "lion", "muon")
)
def test_weight_decay_shrinks_matrices_and_embeddings_alone(name: str):
    params, gradients = params_and_gradients()
    if name == "adafactor":
        params = jax.tree.map(lambda leaf: leaf + 1, params)
    shifts = {}
    for decay in (0.0, 0.1):
        config = OptimizerConfig(optimizer=name, weight_decay=decay, warmup_steps=0, schedule="constant", clip=0)
        optimizer = make_optimizer(config, STEPS)
        update = jax.jit(lambda params: optimizer.update(gradients, optimizer.init(params), params)[0])  # noqa: B023
        shifts[decay] = flat(update(params))
    for path, values in flat(params).items():
        moved = np.abs(shifts[0.1][path] - shifts[0.0][path]).max()
        if "scale" in path:
            assert moved == 0, path
        else:
            assert moved > 0, path
            if name != "lamb":
                rate = 1e-3
                np.testing.assert_allclose(
                    shifts[0.1][path] - shifts[0.0][path], -rate * 0.1 * values, atol=3e-7, err_msg=path
                )


@pytest.mark.parametrize("name", sorted(set(OPTIMIZERS) - {"adam", "lamb"}))
def test_without_gradients_each_step_shrinks_by_rate_times_decay(name: str):
    params = {"blocks": {"up_DF": jnp.full((1, 8, 8), 2.0)}}
    config = OptimizerConfig(
        optimizer=name, learning_rate=1e-2, weight_decay=0.1, warmup_steps=0, schedule="constant", clip=0
    )
    optimizer = make_optimizer(config, STEPS)
    state = optimizer.init(params)
    for step in range(1, 5):
        updates, state = optimizer.update(jax.tree.map(jnp.zeros_like, params), state, params)
        params = optax.apply_updates(params, updates)
        # Several steps: decay that went through a momentum would gather speed.
        np.testing.assert_allclose(params["blocks"]["up_DF"], 2 * (1 - 1e-2 * 0.1) ** step, rtol=1e-6)


def test_biases_and_norms_have_no_decay():
    gpt2 = dataclasses.replace(MODEL, norm="layernorm", bias=True, activation="gelu", positions="learned", tied=False)
    decayed = {
        jax.tree_util.keystr(path[-1:]): decays(path)
        for path, _ in jax.tree_util.tree_flatten_with_path(abstract_params(gpt2))[0]
    }
    free = {name for name, applies in decayed.items() if not applies}
    assert {"['embedding_VD']", "['positions_TD']", "['head_DV']"} <= decayed.keys() - free
    assert free
    assert all("bias" in name or "scale" in name for name in free)
    assert not any("bias" in name or "scale" in name for name in decayed.keys() - free)


@pytest.mark.oldest
def test_schedules_at_their_turning_points():
    def rates(schedule: str, warmup_steps: int = 10) -> list[float]:
        config = OptimizerConfig(learning_rate=2.0, final_fraction=0.25, schedule=schedule, warmup_steps=warmup_steps)
        return [float(value) for value in jax.vmap(make_schedule(config, STEPS))(jnp.arange(STEPS + 1))]

    for schedule in ("cosine", "linear", "constant", "wsd"):
        values = rates(schedule)
        # The ramp reaches the peak with its tenth step and starts above nothing.
        np.testing.assert_allclose(values[:10], [0.2 * n for n in range(1, 11)], rtol=1e-6)
        assert values[10] == pytest.approx(2.0)
        assert max(values) == pytest.approx(2.0)
        assert values[STEPS] == pytest.approx(2.0 if schedule == "constant" else 0.5)
    half = 10 + 45
    assert rates("cosine")[half] == pytest.approx(0.5 + 1.5 * 0.5)
    assert rates("linear")[half] == pytest.approx(0.5 + 1.5 * 0.5)
    quarter = 10 + 45 / 2
    assert rates("cosine")[int(quarter)] == pytest.approx(0.5 + 1.5 * (1 + math.cos(math.pi * 22 / 90)) / 2)
    # Stable until the last fifth of the 90 steps after the warm-up, then straight down.
    wsd = rates("wsd")
    assert wsd[82] == pytest.approx(2.0)
    assert wsd[91] == pytest.approx(0.5 + 1.5 / 2)
    for schedule in ("cosine", "linear", "constant", "wsd"):
        assert rates(schedule, warmup_steps=0)[0] == pytest.approx(2.0)
        assert rates(schedule, warmup_steps=1)[:2] == pytest.approx([2.0, 2.0])
        # A warm-up longer than the run ends with it.
        assert rates(schedule, warmup_steps=500)[STEPS - 1] == pytest.approx(2.0)


@pytest.mark.parametrize("schedule", ["cosine", "linear", "constant", "wsd"])
def test_a_schedule_ends_at_decay_steps_and_stays_there(schedule: str):
    config = OptimizerConfig(schedule=schedule, warmup_steps=10)
    at = jnp.arange(3 * STEPS)
    kept = dataclasses.replace(config, decay_steps=STEPS)
    short, long = (np.asarray(jax.vmap(make_schedule(kept, steps))(at)) for steps in (STEPS // 2, 3 * STEPS))
    np.testing.assert_array_equal(short, long)
    np.testing.assert_array_equal(short, jax.vmap(make_schedule(config, STEPS))(at))
    np.testing.assert_allclose(short[STEPS:], 1e-3 if schedule == "constant" else 1e-4, rtol=1e-6)


def test_a_warm_up_as_a_share_of_the_schedule():
    config = OptimizerConfig(warmup_steps=7)
    at = jnp.arange(STEPS)
    for share, steps, same in ((0.1, STEPS, 10), (0.0, STEPS, 0), (1.0, STEPS, STEPS), (0.25, 30, 8)):
        rates = jax.vmap(make_schedule(dataclasses.replace(config, warmup_fraction=share), steps))(at)
        expected = jax.vmap(make_schedule(dataclasses.replace(config, warmup_steps=same), steps))(at)
        np.testing.assert_array_equal(rates, expected)
    with pytest.raises(ValueError, match="warmup_fraction must be at most 1, got 2"):
        OptimizerConfig(warmup_fraction=2.0)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_an_optimizer_reads_the_fields_that_it_is_said_to_read(name: str):
    """The rest of them may not be given: `config.unused`."""
    params = {"blocks": {"up_DF": jnp.full((1, 8, 8), 2.0)}, "embedding_VD": jnp.full((8, 8), 2.0)}
    draw = np.random.default_rng(0)
    gradients = [jax.tree.map(lambda leaf: 1e-2 * draw.normal(size=leaf.shape), params) for _ in range(4)]

    def after_steps(**fields: float) -> np.ndarray:
        config = OptimizerConfig(optimizer=name, warmup_steps=0, schedule="constant", clip=0, **fields)
        optimizer = make_optimizer(config, STEPS)
        state, now = optimizer.init(params), params
        for gradient in gradients:
            updates, state = optimizer.update(gradient, state, now)
            now = optax.apply_updates(now, updates)
        return np.concatenate([np.ravel(leaf) for leaf in jax.tree.leaves(now)])

    usual = after_steps()
    other = {"weight_decay": 0.5, "b1": 0.2, "b2": 0.3, "eps": 0.1}
    read = tuple(field for field, value in other.items() if (after_steps(**{field: value}) != usual).any())
    assert read == OPTIMIZER_FIELDS[name]


def test_gradients_are_clipped_by_their_global_norm():
    params, gradients = params_and_gradients(scale=100.0)
    norm = math.sqrt(sum(float(np.sum(leaf.astype(np.float64) ** 2)) for leaf in flat(gradients).values()))
    for clip, factor in ((1.0, 1 / norm), (0, 1.0), (2 * norm, 1.0)):
        config = OptimizerConfig(
            optimizer="sgd", learning_rate=1.0, b1=0, weight_decay=0, clip=clip, warmup_steps=0, schedule="constant"
        )
        optimizer = make_optimizer(config, STEPS)
        updates = flat(optimizer.update(gradients, optimizer.init(params), params)[0])
        for path, leaf in flat(gradients).items():
            np.testing.assert_allclose(updates[path], -factor * leaf, rtol=1e-5, err_msg=path)


def newton_schulz(matrix: np.ndarray) -> np.ndarray:
    """Muon's iteration on one matrix, from the paper: five rounds of X -> aX + (bA + cA^2)X with A = X X^T."""
    a, b, c = 3.4445, -4.7750, 2.0315
    x = matrix.T if matrix.shape[0] > matrix.shape[1] else matrix
    x = x / (np.linalg.norm(x) + 1e-8)
    for _ in range(5):
        gram = x @ x.T
        x = a * x + (b * gram + c * gram @ gram) @ x
    return x.T if matrix.shape[0] > matrix.shape[1] else x


@pytest.mark.oldest
def test_muon_orthogonalises_each_layers_matrix_as_a_matrix():
    model = dataclasses.replace(MODEL, layers=2)
    params = init(model, jax.random.key(0))
    gradients = jax.tree.map(
        lambda leaf: jnp.asarray(np.random.default_rng(leaf.size).normal(size=leaf.shape), jnp.float32), params
    )
    config = OptimizerConfig(
        optimizer="muon", learning_rate=1.0, weight_decay=0, clip=0, warmup_steps=0, schedule="constant", b1=0.9
    )
    optimizer = make_optimizer(config, STEPS)
    updates = flat(optimizer.update(gradients, optimizer.init(params), params)[0])
    num_inputs = {"q_DNH": 1, "k_DKH": 1, "v_DKH": 1, "o_NHD": 2, "gate_DF": 1, "up_DF": 1, "down_FD": 1}
    seen = set()
    for path, gradient in flat(gradients).items():
        name = next((name for name in num_inputs if name in path), None)
        if name is None:
            # Adam's first step is the sign of the gradient; with Nesterov momentum it looks a step ahead:
            # (b1 * m + (1 - b1) * g) with each term corrected for its start, m = (1 - b1) g.
            ahead = 0.9 * 0.1 / (1 - 0.9**2) + 0.1 / (1 - 0.9)
            np.testing.assert_allclose(updates[path], -ahead * np.sign(gradient), atol=1e-3, err_msg=path)
            continue
        seen.add(name)
        for layer in range(model.layers):
            split = num_inputs[name]
            shape = gradient[layer].shape
            matrix = gradient[layer].reshape(math.prod(shape[:split]), -1).astype(np.float64)
            expected = newton_schulz(matrix) * 0.2 * math.sqrt(max(matrix.shape))
            np.testing.assert_allclose(
                updates[path][layer].reshape(matrix.shape), -expected, atol=2e-4, err_msg=f"{path} {layer}"
            )
    assert seen == set(num_inputs)
