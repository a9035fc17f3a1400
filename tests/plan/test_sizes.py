"""Sizes of any decoder: equal to the trainer's own arrays, and to published counts."""

import dataclasses

import pytest

from gcompute.config.architecture import Architecture, Attention, FeedForward, Layers, architecture
from gcompute.config.presets import PRESETS
from gcompute.plan.params import count_params
from gcompute.plan.sizes import cache_bytes, sizes

LATENT = Attention(heads=128, kv_heads=128, head_dim=192, value_dim=128, q_rank=1536, kv_rank=512, rope_dim=64)
DEEPSEEK_V3 = Architecture(
    name="deepseek-v3",
    vocab=129280,
    dim=7168,
    layers=(
        Layers(num=3, attention=LATENT, feed_forward=FeedForward(width=18432, gated=True)),
        Layers(
            num=58,
            attention=LATENT,
            feed_forward=FeedForward(width=2048, gated=True, experts=256, experts_per_token=8, shared_width=2048),
        ),
    ),
    context=163840,
    tied=False,
)


@pytest.mark.parametrize("name", PRESETS)
def test_as_many_as_the_trainer_makes(name: str):
    counted, made = sizes(architecture(PRESETS[name])), count_params(PRESETS[name])
    assert (counted.total, counted.active, counted.matmul) == (made.total, made.active, made.matmul)


def test_deepseek_v3_as_published():
    """671e9 parameters, 37e9 of them active: arXiv:2412.19437, abstract. Its active count leaves the embedding out."""
    counted = sizes(DEEPSEEK_V3)
    assert counted.total == pytest.approx(671e9, rel=0.001)
    assert counted.active == pytest.approx(37.5e9, rel=0.01)
    # 70 KB a token, in bfloat16: the latent vector and the rotated key alone.
    assert cache_bytes(DEEPSEEK_V3, 1, value_bytes=2) == 2 * 61 * (512 + 64)


def test_multi_head_model_of_16e9():
    """The scaling-book's problem, chapter "transformers": 16B parameters and 512 kB of int8 cache a token, which it
    counts by powers of two."""
    attention = Attention(heads=32, kv_heads=32, head_dim=128)
    model = Architecture(
        name="16b",
        vocab=32000,
        dim=4096,
        layers=(Layers(num=64, attention=attention, feed_forward=FeedForward(width=16384, gated=True)),),
        context=8192,
        tied=True,
    )
    assert sizes(model).total == pytest.approx(16 * 2**30, rel=0.01)
    assert cache_bytes(model, 1, value_bytes=1) == 512 * 2**10


def test_a_window_bounds_the_cache():
    model = architecture(PRESETS["llama3-8b"])
    (group,) = model.layers
    seen = dataclasses.replace(
        model, layers=(dataclasses.replace(group, attention=dataclasses.replace(group.attention, window=1024)),)
    )
    assert cache_bytes(seen, 8192, value_bytes=2) == cache_bytes(model, 1024, value_bytes=2)
    assert cache_bytes(seen, 100, value_bytes=2) == cache_bytes(model, 100, value_bytes=2)
    with pytest.raises(ValueError, match="at least 0"):
        cache_bytes(model, -1, value_bytes=2)
