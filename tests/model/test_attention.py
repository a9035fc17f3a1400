"""Attention in blocks of queries against attention of the whole square."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from float64 import float64

from gcompute.model.attention import attend, attend_in_blocks


def arrays(kv_heads: int, dtype: str, seed: int = 0):
    b, t, n, h = 2, 12, 4, 6
    random = np.random.default_rng(seed)
    return tuple(jnp.asarray(random.standard_normal((b, t, heads, h)), dtype) for heads in (n, kv_heads, kv_heads))


def whole(q_BTNH, k_BTKH, v_BTKH, compute):
    slots_T = jnp.arange(q_BTNH.shape[1])
    return attend(q_BTNH, k_BTKH, v_BTKH, (slots_T <= slots_T[:, None])[None], compute)


@pytest.mark.parametrize(("kv_heads", "num_blocks"), [(4, 2), (2, 3), (1, 12)])
def test_blocks_are_the_whole_square(kv_heads, num_blocks):
    with float64(True):
        q, k, v = arrays(kv_heads, "float64")
        weights = jnp.asarray(np.random.default_rng(1).standard_normal(q.shape))

        def loss(function, q, k, v):
            return (function(q, k, v) * weights).sum()

        results = []
        for function in (
            partial(whole, compute=jnp.float64),
            partial(attend_in_blocks, num_blocks=num_blocks, compute=jnp.float64),
        ):
            value, gradients = jax.jit(jax.value_and_grad(partial(loss, function), argnums=(0, 1, 2)))(q, k, v)
            results.append((function(q, k, v), value, *gradients))
        # Sums of the same terms in another order.
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-12, atol=1e-13), *results)


def test_blocks_leave_out_what_causality_hides():
    q, k, v = (jax.ShapeDtypeStruct((2, 64, 4, 8), jnp.float32) for _ in range(3))

    def products(num_blocks):
        function = partial(attend_in_blocks, num_blocks=num_blocks, compute=jnp.float32)
        lowered = jax.jit(function).lower(q, k, v).as_text()
        return [line.rsplit("tensor<", 1)[1].split("xf32")[0] for line in lowered.splitlines() if "dot_general" in line]

    assert products(1) == ["2x4x64x64", "2x4x64x8"]
    assert products(2) == ["2x4x32x32", "2x4x32x8", "2x4x32x64", "2x4x32x8"]
