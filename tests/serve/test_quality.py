import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gcompute.config.model import ModelConfig
from gcompute.model.transformer import Execution, forward_losses, init
from gcompute.serve.quality import validation_loss

CONFIG = ModelConfig(vocab=64, layers=2, dim=64, heads=4, kv_heads=2, ffn=128, context=32)


@pytest.fixture(scope="module")
def params():
    return jax.tree.map(lambda leaf: 3 * leaf if leaf.ndim > 1 else leaf, init(CONFIG, jax.random.key(0)))


@pytest.fixture(scope="module")
def tokens():
    return np.random.default_rng(0).integers(0, CONFIG.vocab, 3 * 32 + 5)


@pytest.mark.oldest
def test_it_is_the_models_own_loss_over_whole_windows(params, tokens):
    """Three windows in batches of two: the last batch overlaps, and the piece that fills no window is left out."""
    inputs, targets = (tokens[first : first + 96].reshape(3, 32) for first in (0, 1))
    wanted, _ = forward_losses(params, inputs, targets, config=CONFIG, execution=Execution(compute=jnp.float32))
    found = validation_loss(params, CONFIG, tokens, weights="float32", kv="float32", batch=2)
    # Means of the same float32 losses in another order.
    assert found == pytest.approx(float(jnp.mean(wanted)), rel=1e-5)


def test_int8_changes_the_loss_and_only_a_little(params, tokens):
    exact = validation_loss(params, CONFIG, tokens, weights="float32", kv="float32")
    for weights, kv in (("int8", "float32"), ("float32", "int8")):
        change = validation_loss(params, CONFIG, tokens, weights=weights, kv=kv) - exact
        # Logits off by a few percent of their spread, which is about 1, one way or the other.
        assert 1e-7 < abs(change) < 0.02


def test_errors_say_what_to_do(params, tokens):
    with pytest.raises(ValueError, match=r"int4.*Legal: float32, bfloat16, int8"):
        validation_loss(params, CONFIG, tokens, weights="int4")
    with pytest.raises(ValueError, match="fill no window of 32"):
        validation_loss(params, CONFIG, tokens[:20])
