"""Parameter counts against the published totals, and against the arrays that the model makes."""

import dataclasses
import subprocess
import sys

import jax
import pytest

from gcompute.config.presets import PRESETS
from gcompute.model.transformer import abstract_params, param_dims
from gcompute.plan.params import COMPONENTS, count_params, weight_arrays

# Totals of the released checkpoints (openai-community, meta-llama, Qwen, TinyLlama, mistralai).
PUBLISHED = {
    "gpt2": 124_439_808,
    "gpt2-medium": 354_823_168,
    "gpt2-large": 774_030_080,
    "gpt2-xl": 1_557_611_200,
    "qwen3-0.6b": 596_049_920,
    "tinyllama-1.1b": 1_100_048_384,
    "qwen3-30b-a3b": 30_532_122_624,
    "mixtral-8x7b": 46_702_792_704,
    "llama3-8b": 8_030_261_248,
    "llama3-70b": 70_553_706_496,
    "llama3-405b": 405_853_388_800,
}

BIASED = dataclasses.replace(
    PRESETS["test"], bias=True, tied=False, qk_norm=True, positions="learned", norm="layernorm", activation="swiglu"
)


@pytest.mark.parametrize(("name", "total"), PUBLISHED.items())
def test_total_is_the_published_one(name, total):
    assert count_params(PRESETS[name]).total == total


@pytest.mark.parametrize("config", [*PRESETS.values(), BIASED], ids=[*PRESETS, "biased"])
def test_arrays_are_those_of_the_model(config):
    shapes, dims = abstract_params(config), param_dims(config)
    made = sorted(zip(jax.tree.leaves(dims), (leaf.shape for leaf in jax.tree.leaves(shapes)), strict=True))
    assert sorted((array.dims, array.shape) for array in weight_arrays(config)) == made


def test_experts_of_mixtral():
    # "47B parameters, but only uses 13B active": Jiang et al. 2024, section 1. By hand: two of eight experts a token.
    count = count_params(PRESETS["mixtral-8x7b"])
    expert = 3 * 4096 * 14336
    assert count.mlp == 32 * 8 * expert
    assert count.router == 32 * 4096 * 8
    assert count.active == count.total - 32 * 6 * expert == 12_879_925_248
    assert count.matmul == count.active - count.norms - count.embedding
    assert count_params(PRESETS["qwen3-30b-a3b"]).active / 1e9 == pytest.approx(3.35, abs=0.01)


def test_every_parameter_of_a_dense_model_is_active():
    count = count_params(PRESETS["gpt2"])
    assert count.active == count.total
    assert count.router == 0


def test_components_of_gpt2():
    # By hand from the released shapes: wte, wpe, c_attn + c_proj, c_fc + c_proj, ln_1 + ln_2 + ln_f.
    d, layers = 768, 12
    count = count_params(PRESETS["gpt2"])
    assert count.embedding == 50257 * d
    assert count.positions == 1024 * d
    assert count.attention == layers * (d * 3 * d + 3 * d + d * d + d)
    assert count.mlp == layers * (d * 4 * d + 4 * d + 4 * d * d + d)
    assert count.norms == layers * 4 * d + 2 * d
    assert count.head == 0
    assert count.matmul == layers * 12 * d * d + 50257 * d


def test_untied_head_is_counted_once_in_matmul():
    tied = dataclasses.replace(PRESETS["llama3-8b"], tied=True)
    untied = PRESETS["llama3-8b"]
    assert count_params(untied).matmul == count_params(tied).matmul
    assert count_params(untied).total - count_params(tied).total == untied.vocab * untied.dim


@pytest.mark.oldest
def test_to_dict_adds_up():
    values = count_params(PRESETS["demo"]).to_dict()
    assert values["total"] == sum(values[component] for component in COMPONENTS)


@pytest.mark.parametrize("package", ["gcompute.plan", "gcompute.config"])
def test_planning_loads_no_jax(package):
    modules = {
        "gcompute.plan": "gcompute.plan.params, gcompute.plan.memory, gcompute.plan.train_step",
        "gcompute.config": "gcompute.config.presets, gcompute.config.train, gcompute.config.serve",
    }[package]
    code = (
        f"import sys, {modules}; found = {{'jax', 'jaxlib', 'flax', 'optax'}} & set(sys.modules);"
        " sys.exit(str(found) if found else None)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
