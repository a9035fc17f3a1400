import dataclasses
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from float64 import float64
from tiers import mostly_slow

from gcompute.certify.reference import reference_logits
from gcompute.config.model import ModelConfig
from gcompute.config.presets import PRESETS
from gcompute.model.kv_cache import init_cache, write
from gcompute.model.transformer import (
    Execution,
    abstract_params,
    forward,
    init,
    param_dims,
    stack,
    unstack,
)

CONFIGS = {
    "llama": PRESETS["test"],
    "gpt2": PRESETS["test-gpt2"],
    "qwen3": dataclasses.replace(PRESETS["test"], qk_norm=True, head_dim=12, tied=False),
    "nano": dataclasses.replace(PRESETS["nano-small"], layers=2, dim=32, vocab=64, context=32),
    "biased-llama": dataclasses.replace(PRESETS["test"], bias=True),
}
FLOAT64 = Execution(compute=jnp.float64, residual=jnp.float64)


def perturbed(config: ModelConfig, seed: int = 0, dtype=jnp.float64):
    """Parameters with every value moved, so that a bias or scale that is ignored shows."""

    @jax.jit
    def moved():
        leaves, structure = jax.tree.flatten(init(config, jax.random.key(seed)))
        keys = jax.random.split(jax.random.key(seed + 1), len(leaves))
        moved = [leaf + 0.1 * jax.random.normal(key, leaf.shape) for leaf, key in zip(leaves, keys, strict=True)]
        return jax.tree.map(lambda leaf: leaf.astype(dtype), structure.unflatten(moved))

    return moved()


@pytest.fixture(params=mostly_slow(CONFIGS, "llama"), scope="module")
def config(request):
    return CONFIGS[request.param]


def test_forward_and_gradient_equal_the_textbook_in_float64(config):
    with float64(True):
        params = perturbed(config)
        tokens = jax.random.randint(jax.random.key(5), (2, 6), 0, config.vocab)
        pull = jax.random.normal(jax.random.key(6), (2, 6, config.vocab))

        def ours(params, execution):
            return (forward(params, tokens, config=config, execution=execution)[0] * pull).sum()

        def textbook(params):
            return (jax.vmap(lambda row: reference_logits(params, row, config))(tokens) * pull).sum()

        expected, expected_grad = jax.jit(jax.value_and_grad(textbook))(params)
        as_on_cpu = dataclasses.replace(FLOAT64, unroll=2, query_blocks=3, one_projection=True)
        for execution in (FLOAT64, as_on_cpu):
            value, grad = jax.jit(jax.value_and_grad(partial(ours, execution=execution)))(params)
            np.testing.assert_allclose(value, expected, rtol=1e-9)
            jax.tree.map(
                # The absolute part is for a key bias without RoPE: softmax ignores it, so its gradient is rounding.
                lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-7, atol=1e-8 * float(jnp.abs(b).max()) + 1e-13),
                grad,
                expected_grad,
            )


@pytest.mark.slow
@pytest.mark.parametrize("remat", ["dots", "full"])
def test_remat_changes_no_gradient(remat):
    config = CONFIGS["llama"]
    with float64(True):
        params = perturbed(config)
        tokens = jax.random.randint(jax.random.key(5), (2, 6), 0, config.vocab)

        def gradient(execution):
            def loss(params):
                return jnp.square(forward(params, tokens, config=config, execution=execution)[0]).sum()

            return jax.jit(jax.grad(loss))(params)

        for unroll in (1, 2):
            plain = gradient(dataclasses.replace(FLOAT64, unroll=unroll))
            again = gradient(dataclasses.replace(FLOAT64, unroll=unroll, remat=remat))
            jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-9, atol=1e-12), plain, again)


@pytest.mark.oldest("gpt2")
def test_cached_decoding_equals_one_pass(config):
    with float64(True):
        params = unstack(perturbed(config), config)
        tokens = jax.random.randint(jax.random.key(5), (3, 9), 0, config.vocab)
        whole, _ = jax.jit(partial(forward, config=config, execution=FLOAT64))(params, tokens)
        cache = init_cache(config, batch=3, length=16, dtype=jnp.float64)
        step = jax.jit(partial(forward, config=config, execution=FLOAT64))
        positions = jnp.tile(jnp.arange(5), (3, 1))
        logits, cache = step(params, tokens[:, :5], positions_BT=positions, cache=cache)
        np.testing.assert_allclose(logits, whole[:, :5], rtol=1e-9, atol=1e-10)
        for t in range(5, 9):
            logits, cache = step(params, tokens[:, t : t + 1], positions_BT=jnp.full((3, 1), t), cache=cache)
            np.testing.assert_allclose(logits[:, 0], whole[:, t], rtol=1e-9, atol=1e-10)


def test_logits_at_picks_one_position_a_row():
    config = CONFIGS["llama"]
    params = unstack(init(config, jax.random.key(0)), config)
    tokens = jax.random.randint(jax.random.key(5), (3, 7), 0, config.vocab)
    step = jax.jit(partial(forward, config=config, execution=Execution(compute=jnp.float32)))
    whole, _ = step(params, tokens)
    at = jnp.array([0, 6, 3])
    picked, _ = step(params, tokens, logits_at_B=at)
    np.testing.assert_allclose(picked, whole[jnp.arange(3), at], rtol=1e-5, atol=1e-6)


def test_cache_write_drops_what_lies_past_its_end():
    cache = jnp.zeros((1, 4, 1, 1))
    new = jnp.array([[[[1.0]], [[2.0]]]])
    written = write(cache, new, jnp.array([[3, 4]]))
    np.testing.assert_array_equal(written.ravel(), [0, 0, 0, 1.0])


def test_bfloat16_operands_give_float32_logits_near_float32(config):
    params = init(config, jax.random.key(0))
    tokens = jax.random.randint(jax.random.key(5), (2, 16), 0, config.vocab)

    def loss(params, execution):
        logits, _ = forward(params, tokens, config=config, execution=execution)
        assert logits.dtype == jnp.float32
        return jnp.square(logits).mean()

    exact = jax.jit(jax.grad(partial(loss, execution=Execution(compute=jnp.float32, unroll=2))))(params)
    for unroll in (1, 2):
        rough = jax.jit(jax.grad(partial(loss, execution=Execution(compute=jnp.bfloat16, unroll=unroll))))(params)
        for a, b in zip(jax.tree.leaves(rough), jax.tree.leaves(exact), strict=True):
            assert a.dtype == jnp.float32
            # bfloat16 keeps 8 bits: relative error 2^-8 an operand, grown by a few layers.
            assert float(jnp.linalg.norm(a - b)) <= 0.05 * float(jnp.linalg.norm(b)) + 1e-7


@pytest.mark.oldest("llama")
def test_abstract_params_and_dims_describe_init(config):
    params = init(config, jax.random.key(0))
    assert jax.tree.map(lambda x: (x.shape, x.dtype), params) == jax.tree.map(
        lambda x: (x.shape, x.dtype), abstract_params(config)
    )
    sizes = {
        "L": config.layers,
        "D": config.dim,
        "N": config.heads,
        "K": config.num_kv_heads,
        "H": config.head_size,
        "F": config.ffn_size,
        "V": config.vocab,
        "T": config.context,
    }
    shapes = jax.tree.map(lambda dims: tuple(sizes[dim] for dim in dims), param_dims(config))
    jax.tree.map(lambda x, shape: np.testing.assert_equal(x.shape, shape), params, shapes)


@pytest.mark.oldest("gpt2")
def test_stack_inverts_unstack(config):
    params = init(config, jax.random.key(0))
    jax.tree.map(np.testing.assert_array_equal, stack(unstack(params, config), config), params)


def test_a_cache_refuses_stacked_blocks():
    config = CONFIGS["llama"]
    cache = init_cache(config, batch=1, length=4, dtype=jnp.float32)
    with pytest.raises(ValueError, match="unstack"):
        forward(
            init(config, jax.random.key(0)),
            jnp.zeros((1, 1), jnp.int32),
            config=config,
            execution=Execution(),
            positions_BT=jnp.zeros((1, 1), jnp.int32),
            cache=cache,
        )
