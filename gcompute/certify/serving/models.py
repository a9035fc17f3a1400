"""Small models whose choices are varied: the three forms that the engine serves, with weights from a seed."""

import jax

from gcompute.config.model import ModelConfig
from gcompute.model.transformer import Params, init

# Larger than the usual initial values, which give nearly the same logits after any text.
LARGER = 4.0
FORMS = {
    "Llama form": ModelConfig(vocab=257, layers=2, dim=32, heads=4, kv_heads=2, ffn=64, context=64),
    "GPT-2 form": ModelConfig(
        vocab=67,
        layers=2,
        dim=48,
        heads=4,
        context=48,
        bias=True,
        norm="layernorm",
        positions="learned",
        activation="gelu_tanh",
    ),
    "mixture of experts": ModelConfig(
        vocab=64, layers=2, dim=32, heads=4, kv_heads=2, ffn=48, context=48, experts=4, tied=False
    ),
}


def small_params(config: ModelConfig, seed: int = 0) -> Params:
    return jax.tree.map(lambda leaf: LARGER * leaf if leaf.ndim > 1 else leaf, init(config, jax.random.key(seed)))
