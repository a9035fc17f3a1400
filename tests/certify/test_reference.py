"""The reference stands alone: what it imports, and its optimizers against the papers' first steps by hand."""

import ast
import math
from functools import partial
from pathlib import Path

import jax
import numpy as np
import optax
import pytest
from float64 import float64

from gcompute.certify import reference
from gcompute.certify.reference import experts, flat, learning_rate, nested, reference_training
from gcompute.config.model import ModelConfig
from gcompute.config.train import OptimizerConfig
from gcompute.train.optimizer import make_optimizer

TINY = ModelConfig(vocab=5, layers=1, dim=4, heads=1, ffn=4, context=4, activation="gelu", tied=False)


def test_it_shares_no_code_with_what_it_judges():
    tree = ast.parse(Path(reference.__file__).read_text(encoding="utf-8"))
    modules = {node.module for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}
    modules |= {alias.name for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names}
    ours = {module for module in modules if module.split(".")[0] == "gcompute"}
    assert ours == {"gcompute.config.model", "gcompute.config.train"}
    assert modules - ours == {
        *(
            "math",
            "dataclasses",
            "fractions",
            "functools",
            "typing",
            "numpy",
            "jax",
            "jax.numpy",
            "jax.scipy.special",
            "jaxtyping",
        ),
    }
    # Of the configurations it takes fields; what they compute, it computes itself.
    used = {
        node.attr
        for node in ast.walk(tree)
        if isinstance(node, ast.Attribute) and getattr(node.value, "id", "") == "config"
    }
    assert not used & {"capacity", "ffn_size", "gated", "num_experts"}


def starting(seed=0):
    draw = np.random.default_rng(seed)
    blocks = {
        "attention_norm": {"scale": draw.normal(size=(1, 4))},
        "attention": {
            "q_DNH": draw.normal(size=(1, 4, 1, 4)),
            "k_DKH": draw.normal(size=(1, 4, 1, 4)),
            "v_DKH": draw.normal(size=(1, 4, 1, 4)),
            "o_NHD": draw.normal(size=(1, 1, 4, 4)),
        },
        "mlp_norm": {"scale": draw.normal(size=(1, 4))},
        "mlp": {"up_DF": draw.normal(size=(1, 4, 4)), "down_FD": draw.normal(size=(1, 4, 4))},
    }
    ends = {
        "embedding_VD": draw.normal(size=(5, 4)),
        "norm": {"scale": draw.normal(size=4)},
        "head_DV": draw.normal(size=(4, 5)),
    }
    rows = draw.integers(0, 5, (2, 3, 5), dtype=np.int32)
    return {"blocks": blocks, **ends}, rows[..., :-1], rows[..., 1:]


@pytest.fixture(scope="module")
def trained():
    """Two steps of AdamW, clipped, with decay."""
    config = OptimizerConfig(learning_rate=0.25, warmup_steps=0, schedule="constant", clip=0.5, b1=0.5, b2=0.75)
    with float64(True):
        params, inputs, targets = starting()
        return config, flat(params), reference_training(params, inputs, targets, TINY, config)


@pytest.mark.oldest
def test_the_first_step_of_adamw_is_that_of_the_paper(trained):
    config, params, seen = trained
    # After one step both bias corrections cancel: m / (1 - b1) = g and v / (1 - b2) = g^2.
    clipped = {path: leaf * min(1, config.clip / seen.norms[0]) for path, leaf in seen.gradients.items()}
    for path, leaf in params.items():
        g = clipped[path]
        decay = 0.0 if path.endswith("scale") else config.weight_decay
        expected = leaf - config.learning_rate * (g / (abs(g) + config.eps) + decay * leaf)
        np.testing.assert_allclose(seen.first[path], expected, rtol=1e-14, atol=1e-15)
    assert seen.norms[0] > config.clip


def test_a_gradient_is_the_slope_of_the_loss(trained):
    _, params, seen = trained
    with float64(True):
        _, inputs, targets = starting()
        loss = jax.jit(partial(reference.reference_objective, config=TINY))
        for path in ("blocks/mlp/up_DF", "blocks/attention/k_DKH", "head_DV"):
            step = np.zeros_like(params[path])
            step.flat[1] = 1e-5
            losses = [
                float(loss(nested({**params, path: leaf}), inputs[0], targets[0])[0])
                for leaf in (params[path] + step, params[path] - step)
            ]
            # Central differences: an error of h^2 and of u / h, 1e-10 both.
            np.testing.assert_allclose(
                (losses[0] - losses[1]) / 2e-5, seen.gradients[path].flat[1], rtol=1e-6, atol=1e-9
            )


@pytest.mark.oldest
def test_schedules_begin_and_end_where_they_say():
    for schedule, last in (("cosine", 0.55), ("linear", 0.55), ("constant", 1.0), ("wsd", 1.0)):
        config = OptimizerConfig(learning_rate=1.0, schedule=schedule, warmup_steps=4, final_fraction=0.1)
        assert [learning_rate(config, step, 12) for step in range(4)] == [0.25, 0.5, 0.75, 1.0]
        assert math.isclose(learning_rate(config, 8, 12), last)
        assert math.isclose(learning_rate(config, 12, 12), 1.0 if schedule == "constant" else 0.1)


@pytest.mark.parametrize("name", ["adamw", "sgd"])
def test_its_steps_are_those_that_training_takes(name):
    """Two steps, for the first cannot tell decay that goes through the momentum from decay that does not."""
    config = OptimizerConfig(
        optimizer=name, learning_rate=0.25, warmup_steps=0, schedule="constant", clip=0.5, b1=0.5, b2=0.75
    )
    with float64(True):
        params, inputs, targets = starting()
        seen = reference_training(params, inputs, targets, TINY, config)
        gradient = jax.jit(jax.grad(lambda *given: reference.reference_objective(*given, config=TINY)[0]))
        optimizer = make_optimizer(config, 2)
        state = optimizer.init(params)
        for step in range(2):
            updates, state = optimizer.update(gradient(params, inputs[step], targets[step]), state, params)
            params = optax.apply_updates(params, updates)
    for path, leaf in flat(params).items():
        np.testing.assert_allclose(seen.last[path], leaf, rtol=1e-12, atol=1e-13)


def test_only_two_optimizers_are_written_out():
    with pytest.raises(ValueError, match="adamw and sgd, not 'lion'"):
        reference_training({}, np.zeros((0, 1, 1)), np.zeros((0, 1, 1)), TINY, OptimizerConfig(optimizer="lion"))


@pytest.mark.oldest
def test_a_full_expert_drops_who_comes_later():
    config = ModelConfig(
        vocab=5, layers=1, dim=2, heads=1, ffn=2, experts=2, experts_per_token=1, capacity_factor=0.5, activation="gelu"
    )
    # All four tokens want expert 0, which has ceil(4 / 2 * 0.5) = 1 place.
    x = np.tile([1.0, 0.0], (4, 1))
    weights = {
        "router_DE": np.array([[9.0, 0.0], [0.0, 0.0]]),
        "up_EDF": np.ones((2, 2, 2)),
        "down_EFD": np.ones((2, 2, 2)),
    }
    with float64(True):
        y, balance, dropped = jax.tree.map(np.asarray, experts(jax.numpy.asarray(x), weights, config))
    assert int(dropped) == 3
    assert (y[0] > 1).all()
    np.testing.assert_array_equal(y[1:], 0)
    np.testing.assert_allclose(balance, 2 / (1 + math.exp(-9.0)), rtol=1e-12)
