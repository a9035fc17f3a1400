"""Operation counts against the traced programs, and the step time against sums by hand."""

import dataclasses
import math
from functools import partial

import jax
import jax.numpy as jnp
import pytest

from gcompute.config.presets import PRESETS
from gcompute.config.train import OptimizerConfig
from gcompute.model.transformer import Execution, abstract_params, forward
from gcompute.plan.params import count_params
from gcompute.plan.train_step import (
    Matmul,
    block_matmuls,
    newton_schulz_flops,
    optimizer_traffic_bytes,
    predict_train_step,
    train_flops,
)
from gcompute.train.optimizer import make_optimizer

CONFIGS = {
    "llama": PRESETS["test"],
    "gpt2": PRESETS["test-gpt2"],
    "untied": dataclasses.replace(PRESETS["test"], tied=False, head_dim=16, qk_norm=True),
    # As many places as choices, so that what is computed is what is used.
    "experts": dataclasses.replace(PRESETS["test-moe"], capacity_factor=1.0),
}
CEILINGS = {"roofline_flops_per_s": 1e12, "memory_bytes_per_s": 5e10}


def dot_flops(jaxpr):
    """Operations of every dot_general of a jaxpr, those in a loop times its length."""
    flops = 0
    for equation in jaxpr.eqns:
        if equation.primitive.name == "dot_general":
            (contracted, _), _ = equation.params["dimension_numbers"]
            left = equation.invars[0].aval.shape
            flops += 2 * math.prod(equation.outvars[0].aval.shape) * math.prod(left[dim] for dim in contracted)
        assert equation.primitive.name != "while", "a loop of unknown length hides operations"
        times = equation.params["length"] if equation.primitive.name == "scan" else 1
        for value in equation.params.values():
            inner = getattr(value, "jaxpr", value)
            if hasattr(inner, "eqns"):
                flops += times * dot_flops(inner)
    return flops


@pytest.mark.oldest("experts")
@pytest.mark.parametrize("name", CONFIGS)
def test_flops_are_those_of_the_traced_program(name):
    config, batch, seq = CONFIGS[name], 3, 16
    tokens_BT = jnp.zeros((batch, seq), jnp.int32)
    run = partial(forward, config=config, execution=Execution(compute=jnp.float32, unroll=config.layers))

    def loss(params):
        return jax.nn.logsumexp(run(params, tokens_BT)[0], axis=-1).sum()

    params = abstract_params(config)
    flops = train_flops(config, batch=batch, seq=seq)
    assert dot_flops(jax.make_jaxpr(loss)(params).jaxpr) == flops.forward_flops
    assert dot_flops(jax.make_jaxpr(jax.grad(loss))(params).jaxpr) == flops.step_flops


@pytest.mark.parametrize("name", CONFIGS)
def test_matmuls_add_up_to_the_flops(name):
    config, batch, seq = CONFIGS[name], 3, 16
    forward_flops = sum(matmul.flops for matmul in block_matmuls(config, batch=batch, seq=seq))
    forward_flops += 2 * batch * seq * config.dim * config.vocab
    assert forward_flops == train_flops(config, batch=batch, seq=seq).forward_flops


def test_experts_multiply_their_empty_places_too():
    config, batch, seq = PRESETS["test-moe"], 3, 16
    roomy = dataclasses.replace(config, capacity_factor=None)
    ten, all_places = (
        {matmul.name: matmul for matmul in block_matmuls(model, batch=batch, seq=seq)} for model in (config, roomy)
    )
    assert (ten["up"].batch, ten["up"].m) == (4, 3 * 10)
    assert (all_places["down"].batch, all_places["down"].m) == (4, 3 * 16)
    assert train_flops(config, batch=batch, seq=seq) == train_flops(roomy, batch=batch, seq=seq)
    slow, fast = (
        predict_train_step(model, batch=batch, seq=seq, precision="float32", **CEILINGS) for model in (roomy, config)
    )
    assert slow.compute_s > fast.compute_s
    assert slow.memory_s > fast.memory_s


def test_backward_products_have_the_shapes_of_the_gradients():
    left, right = Matmul(name="x", m=3, k=5, n=7).backward()
    assert (left.m, left.k, left.n) == (3, 7, 5)
    assert (right.m, right.k, right.n) == (5, 3, 7)
    assert left.flops == right.flops == 2 * 3 * 5 * 7


def test_gpt2_flops_by_hand():
    config, batch, seq = PRESETS["gpt2"], 2, 1024
    flops = train_flops(config, batch=batch, seq=seq)
    assert flops.num_tokens == 2048
    assert flops.attention_flops == 12 * 12 * 768 * 1024 * 2048
    assert flops.step_flops == 6 * (12 * 12 * 768**2 + 50257 * 768) * 2048 + flops.attention_flops
    assert flops.forward_flops * 3 == flops.step_flops
    pairs = sum(query + 1 for query in range(seq)) * batch
    assert flops.causal_step_flops == flops.step_flops - flops.attention_flops + 12 * 12 * 768 * pairs


@pytest.mark.oldest("experts")
@pytest.mark.parametrize("preset", ["demo", "nano-small", "untied", "experts"])
def test_newton_schulz_is_what_optax_computes(preset):
    config = CONFIGS.get(preset) or PRESETS[preset]
    transform = make_optimizer(OptimizerConfig(optimizer="muon"), 10)
    params = abstract_params(config)
    state = jax.eval_shape(transform.init, params)
    assert dot_flops(jax.make_jaxpr(transform.update)(params, state, params).jaxpr) == newton_schulz_flops(config)


def test_optimizer_traffic_of_adamw_is_32_bytes_a_parameter():
    config = PRESETS["gpt2"]
    assert optimizer_traffic_bytes(config, "adamw") == 32 * count_params(config).total
    assert optimizer_traffic_bytes(config, "lion") == 24 * count_params(config).total


@pytest.mark.oldest
def test_prediction_with_endless_bandwidth_is_flops_over_the_ceiling():
    config = PRESETS["nano-baby"]
    step = predict_train_step(
        config, batch=64, seq=256, precision="float32", roofline_flops_per_s=5e11, memory_bytes_per_s=1e30
    )
    assert step.step_s == pytest.approx(train_flops(config, batch=64, seq=256).step_flops / 5e11)
    assert step.bound == "compute"


def test_prediction_with_endless_compute_is_bytes_over_bandwidth():
    shared = {"batch": 8, "seq": 64, "precision": "float32", "roofline_flops_per_s": 1e30}
    config = PRESETS["nano-small"]
    slow = predict_train_step(config, **shared, memory_bytes_per_s=1e10)
    fast = predict_train_step(config, **shared, memory_bytes_per_s=2e10)
    assert slow.bound == "memory"
    assert slow.step_s == pytest.approx(2 * fast.step_s)
    # Every input and result of the output layer's three products, by hand: 4 (m k + k n + m n) bytes each.
    m, k, n = 8 * 64, config.dim, config.vocab
    without = dataclasses.replace(config, vocab=1)
    moved = 3 * 4 * (m * k + k * n + m * n) - 3 * 4 * (m * k + k + m)
    other = predict_train_step(without, **shared, memory_bytes_per_s=1e10)
    assert slow.compute_s - other.compute_s == pytest.approx(moved / 1e10)


def test_parts_add_up_and_devices_divide():
    config = PRESETS["demo"]
    one = predict_train_step(config, batch=32, seq=256, precision="bfloat16", **CEILINGS)
    assert one.step_s == pytest.approx(one.compute_s + one.memory_s + one.optimizer_s)
    assert one.tokens_per_s == pytest.approx(32 * 256 / one.step_s)
    four = predict_train_step(config, batch=32, seq=256, precision="bfloat16", num_devices=4, **CEILINGS)
    assert four.step_s * 4 == pytest.approx(one.step_s)
    assert four.to_dict()["bound"] == one.bound


def test_remat_costs_a_forward_pass_of_the_blocks():
    config = PRESETS["demo"]
    steps = {
        remat: predict_train_step(
            config,
            batch=32,
            seq=256,
            precision="float32",
            remat=remat,
            roofline_flops_per_s=1e12,
            memory_bytes_per_s=1e30,
        ).compute_s
        for remat in ("none", "dots", "full")
    }
    blocks = sum(matmul.flops for matmul in block_matmuls(config, batch=32, seq=256))
    assert steps["dots"] == steps["none"]
    assert steps["full"] - steps["none"] == pytest.approx(blocks / 1e12)


def test_accumulation_adds_only_the_accumulator_where_matmuls_are_bound_by_operations():
    config = PRESETS["nano-baby"]
    shared = {"batch": 64, "seq": 256, "precision": "float32", "roofline_flops_per_s": 1e9, "memory_bytes_per_s": 1e11}
    one, four = (predict_train_step(config, **shared, accumulation=number) for number in (1, 4))
    assert four.compute_s == pytest.approx(one.compute_s)
    assert four.memory_s - one.memory_s == pytest.approx(4 * 12 * count_params(config).total / 1e11)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"precision": "fp8"}, "precision='fp8'"),
        ({"optimizer": "muom"}, "Did you mean 'muon'"),
        ({"memory_bytes_per_s": 0.0}, "above 0"),
        ({"accumulation": 5}, "divide the batch"),
        ({"num_devices": 0}, "at least 1"),
    ],
)
def test_refuses_what_cannot_be(changes, words):
    with pytest.raises(ValueError, match=words):
        predict_train_step(PRESETS["test"], **{"batch": 8, "seq": 32, "precision": "float32", **CEILINGS, **changes})
