"""Named model shapes, from a few thousand parameters (tests) to llama3-405b (planning).

Sources: GPT-2: Radford et al. 2019, table 2, and the released hparams. Llama 3: "The Llama 3 Herd of Models",
arXiv:2407.21783, table 3. Qwen3: the released config.json of Qwen/Qwen3-0.6B. TinyLlama: arXiv:2401.02385.
Mixtral: Jiang et al. 2024, arXiv:2401.04088, table 1, and the released config.json. Qwen3-30B-A3B: its config.json.
Baby GPT and its small CPU setting: nanoGPT, config/train_shakespeare_char.py and README.
"""

import json
import tomllib
from pathlib import Path
from typing import Any

from gcompute.config.fields import nearest
from gcompute.config.model import ModelConfig
from gcompute.config.plain import from_plain


def _gpt2(**sizes: Any) -> ModelConfig:
    shape = {"vocab": 50257, "context": 1024, **sizes}
    return ModelConfig(**shape, norm="layernorm", positions="learned", activation="gelu_tanh", bias=True, tied=True)


def _llama3(**sizes: Any) -> ModelConfig:
    return ModelConfig(**sizes, vocab=128256, kv_heads=8, context=8192, rope_theta=500000.0, tied=False)


def _nano(**sizes: Any) -> ModelConfig:
    return ModelConfig(**sizes, vocab=65, norm="layernorm", positions="learned", activation="gelu")


PRESETS: dict[str, ModelConfig] = {
    "test-tiny": ModelConfig(vocab=64, layers=1, dim=16, heads=2, ffn=64, context=32),
    "test": ModelConfig(vocab=64, layers=2, dim=32, heads=4, kv_heads=2, ffn=64, context=32),
    "test-gpt2": _gpt2(vocab=64, layers=2, dim=32, heads=4, context=32),
    "test-moe": ModelConfig(
        vocab=64, layers=2, dim=32, heads=4, kv_heads=2, ffn=48, context=32, experts=4, capacity_factor=1.25
    ),
    "demo": ModelConfig(vocab=4096, layers=4, dim=256, heads=4, ffn=704, context=256),
    "demo-mid": ModelConfig(vocab=2048, layers=4, dim=192, heads=4, ffn=512, context=128),
    "demo-small": ModelConfig(vocab=2048, layers=3, dim=128, heads=4, ffn=352, context=128),
    "nano-small": _nano(layers=4, dim=128, heads=4, context=64),
    "nano-baby": _nano(layers=6, dim=384, heads=6, context=256),
    "llama-100m": ModelConfig(
        vocab=32000, layers=12, dim=768, heads=12, kv_heads=4, ffn=2048, context=2048, tied=False
    ),
    "gpt2": _gpt2(layers=12, dim=768, heads=12),
    "gpt2-medium": _gpt2(layers=24, dim=1024, heads=16),
    "gpt2-large": _gpt2(layers=36, dim=1280, heads=20),
    "gpt2-xl": _gpt2(layers=48, dim=1600, heads=25),
    "qwen3-0.6b": ModelConfig(
        vocab=151936,
        layers=28,
        dim=1024,
        heads=16,
        kv_heads=8,
        head_dim=128,
        ffn=3072,
        context=40960,
        rope_theta=1000000.0,
        norm_eps=1e-6,
        qk_norm=True,
    ),
    "tinyllama-1.1b": ModelConfig(
        vocab=32000, layers=22, dim=2048, heads=32, kv_heads=4, ffn=5632, context=2048, tied=False
    ),
    "qwen3-30b-a3b": ModelConfig(
        vocab=151936,
        layers=48,
        dim=2048,
        heads=32,
        kv_heads=4,
        head_dim=128,
        ffn=768,
        context=40960,
        rope_theta=1000000.0,
        norm_eps=1e-6,
        qk_norm=True,
        tied=False,
        experts=128,
        experts_per_token=8,
    ),
    "mixtral-8x7b": ModelConfig(
        vocab=32000,
        layers=32,
        dim=4096,
        heads=32,
        kv_heads=8,
        ffn=14336,
        context=32768,
        rope_theta=1000000.0,
        tied=False,
        experts=8,
    ),
    "llama3-8b": _llama3(layers=32, dim=4096, heads=32, ffn=14336),
    "llama3-70b": _llama3(layers=80, dim=8192, heads=64, ffn=28672),
    "llama3-405b": _llama3(layers=126, dim=16384, heads=128, ffn=53248),
}


def model_config(name: str) -> ModelConfig:
    """The model that `name` stands for: a preset, or a path to our config.json or .toml.

    Raises:
      ValueError: no such preset or file, the file does not parse, or it holds an unknown field.
    """
    path = Path(name)
    if path.suffix not in (".json", ".toml"):
        if name not in PRESETS:
            raise ValueError(f"model {name!r} is not a preset, and not a .json or .toml file. {nearest(name, PRESETS)}")
        return PRESETS[name]
    try:
        text = path.read_text(encoding="utf-8-sig")
        values = json.loads(text) if path.suffix == ".json" else tomllib.loads(text)
    except OSError as error:
        raise ValueError(f"model file {name!r} cannot be read: {error.strerror}.") from None
    except (ValueError, RecursionError) as error:
        raise ValueError(f"model file {name!r} does not parse: {error}.") from None
    return model_from_dict(values.get("model", values) if isinstance(values, dict) else values, source=name)


def model_from_dict(values: Any, *, source: str) -> ModelConfig:
    """A ModelConfig from plain values, refusing fields that it does not have and values of the wrong type."""
    return ModelConfig(**from_plain(ModelConfig, values, source=f"{source}: model"))
