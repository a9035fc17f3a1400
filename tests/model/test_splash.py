"""The TPU's attention kernel, its steps run without a TPU, against the textbook."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from textbook_attention import causal_attention

from gcompute.model.splash import fits_splash, splash_attention


@pytest.mark.oldest
@pytest.mark.parametrize("kv_heads", [1, 2], ids=["grouped", "each its own"])
def test_the_kernel_is_causal_attention_with_its_gradients(kv_heads: int):
    rng = np.random.default_rng(0)
    q, do = (rng.normal(size=(1, 256, 2, 128)) for _ in range(2))
    k, v = (rng.normal(size=(1, 256, kv_heads, 128)) for _ in range(2))
    expected = causal_attention(q, k, v, do)
    arrays = [jnp.asarray(x, jnp.float32) for x in (q, k, v)]
    o, pull = jax.vjp(lambda *x: splash_attention(*x, jnp.float32, interpret=True), *arrays)
    for found, exact in zip((o, *pull(jnp.asarray(do, jnp.float32))), expected, strict=True):
        # float32 sums over 256 keys or queries of terms of order 10.
        np.testing.assert_allclose(found, exact, atol=2e-4)


def test_sequences_are_whole_tiles():
    assert fits_splash(128)
    assert not fits_splash(64)
