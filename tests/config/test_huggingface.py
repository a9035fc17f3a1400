"""Hugging Face configs: sizes of real models, cache bytes, what is not known, and every bad file in one line."""

import dataclasses
import json
import re
from pathlib import Path
from typing import Any

import pytest

from gcompute.config.architecture import architecture
from gcompute.config.huggingface import HuggingFaceModel, from_huggingface, is_huggingface, read_huggingface
from gcompute.config.presets import PRESETS
from gcompute.plan.sizes import cache_bytes, sizes

# The sizes and switches of released config.json files, with the fields that usually stand beside them.
LLAMA = {
    "architectures": ["LlamaForCausalLM"],
    "attention_bias": False,
    "hidden_act": "silu",
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "max_position_embeddings": 131072,
    "mlp_bias": False,
    "model_type": "llama",
    "num_attention_heads": 32,
    "num_hidden_layers": 32,
    "num_key_value_heads": 8,
    "pretraining_tp": 1,
    "rms_norm_eps": 1e-05,
    "rope_scaling": {"factor": 8.0, "rope_type": "llama3", "original_max_position_embeddings": 8192},
    "rope_theta": 500000.0,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
    "use_cache": True,
    "vocab_size": 128256,
}
MISTRAL = {
    "model_type": "mistral",
    "hidden_act": "silu",
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "max_position_embeddings": 32768,
    "num_attention_heads": 32,
    "num_hidden_layers": 32,
    "num_key_value_heads": 8,
    "rms_norm_eps": 1e-05,
    "rope_theta": 10000.0,
    "sliding_window": 4096,
    "tie_word_embeddings": False,
    "vocab_size": 32000,
}
MIXTRAL = {
    **MISTRAL,
    "model_type": "mixtral",
    "num_experts_per_tok": 2,
    "num_local_experts": 8,
    "output_router_logits": False,
    "router_aux_loss_coef": 0.02,
    "rope_theta": 1000000.0,
    "sliding_window": None,
}
QWEN2 = {
    "model_type": "qwen2",
    "attention_dropout": 0.0,
    "hidden_act": "silu",
    "hidden_size": 3584,
    "intermediate_size": 18944,
    "max_position_embeddings": 131072,
    "max_window_layers": 28,
    "num_attention_heads": 28,
    "num_hidden_layers": 28,
    "num_key_value_heads": 4,
    "rms_norm_eps": 1e-06,
    "rope_theta": 1000000.0,
    "sliding_window": 131072,
    "tie_word_embeddings": False,
    "use_sliding_window": False,
    "vocab_size": 152064,
}
QWEN3_MOE = {
    "model_type": "qwen3_moe",
    "attention_bias": False,
    "decoder_sparse_step": 1,
    "head_dim": 128,
    "hidden_act": "silu",
    "hidden_size": 2048,
    "intermediate_size": 6144,
    "max_position_embeddings": 40960,
    "max_window_layers": 48,
    "mlp_only_layers": [],
    "moe_intermediate_size": 768,
    "norm_topk_prob": True,
    "num_attention_heads": 32,
    "num_experts": 128,
    "num_experts_per_tok": 8,
    "num_hidden_layers": 48,
    "num_key_value_heads": 4,
    "rms_norm_eps": 1e-06,
    "rope_scaling": None,
    "rope_theta": 1000000.0,
    "sliding_window": None,
    "tie_word_embeddings": False,
    "use_sliding_window": False,
    "vocab_size": 151936,
}
GEMMA2 = {
    "model_type": "gemma2",
    "attention_bias": False,
    "attn_logit_softcapping": 50.0,
    "cache_implementation": "hybrid",
    "final_logit_softcapping": 30.0,
    "head_dim": 256,
    "hidden_act": "gelu_pytorch_tanh",
    "hidden_activation": "gelu_pytorch_tanh",
    "hidden_size": 3584,
    "intermediate_size": 14336,
    "max_position_embeddings": 8192,
    "num_attention_heads": 16,
    "num_hidden_layers": 42,
    "num_key_value_heads": 8,
    "query_pre_attn_scalar": 256,
    "rms_norm_eps": 1e-06,
    "rope_theta": 10000.0,
    "sliding_window": 4096,
    "sliding_window_size": 4096,
    "vocab_size": 256000,
}
# The released file leaves vocab_size and tie_word_embeddings to the class.
GEMMA3 = {
    "architectures": ["Gemma3ForConditionalGeneration"],
    "model_type": "gemma3",
    "boi_token_index": 255999,
    "mm_tokens_per_image": 256,
    "text_config": {
        "head_dim": 128,
        "hidden_size": 5376,
        "intermediate_size": 21504,
        "model_type": "gemma3_text",
        "num_attention_heads": 32,
        "num_hidden_layers": 62,
        "num_key_value_heads": 16,
        "query_pre_attn_scalar": 168,
        "rope_scaling": {"factor": 8.0, "rope_type": "linear"},
        "sliding_window": 1024,
    },
    "vision_config": {"hidden_size": 1152, "model_type": "siglip_vision_model"},
}
GPT2 = {
    "activation_function": "gelu_new",
    "architectures": ["GPT2LMHeadModel"],
    "attn_pdrop": 0.1,
    "layer_norm_epsilon": 1e-05,
    "model_type": "gpt2",
    "n_ctx": 1024,
    "n_embd": 768,
    "n_head": 12,
    "n_layer": 12,
    "n_positions": 1024,
    "summary_type": "cls_index",
    "vocab_size": 50257,
}
DEEPSEEK_V3 = {
    "model_type": "deepseek_v3",
    "attention_bias": False,
    "aux_loss_alpha": 0.001,
    "ep_size": 1,
    "first_k_dense_replace": 3,
    "hidden_act": "silu",
    "hidden_size": 7168,
    "intermediate_size": 18432,
    "kv_lora_rank": 512,
    "max_position_embeddings": 163840,
    "moe_intermediate_size": 2048,
    "moe_layer_freq": 1,
    "n_group": 8,
    "n_routed_experts": 256,
    "n_shared_experts": 1,
    "num_attention_heads": 128,
    "num_experts_per_tok": 8,
    "num_hidden_layers": 61,
    "num_key_value_heads": 128,
    "num_nextn_predict_layers": 1,
    "q_lora_rank": 1536,
    "qk_nope_head_dim": 128,
    "qk_rope_head_dim": 64,
    "quantization_config": {"fmt": "e4m3", "quant_method": "fp8"},
    "rope_theta": 10000,
    "scoring_func": "sigmoid",
    "tie_word_embeddings": False,
    "topk_group": 4,
    "topk_method": "noaux_tc",
    "v_head_dim": 128,
    "vocab_size": 129280,
}
DEEPSEEK_V2_LITE = {
    **DEEPSEEK_V3,
    "model_type": "deepseek_v2",
    "first_k_dense_replace": 1,
    "hidden_size": 2048,
    "intermediate_size": 10944,
    "moe_intermediate_size": 1408,
    "n_routed_experts": 64,
    "n_shared_experts": 2,
    "num_attention_heads": 16,
    "num_experts_per_tok": 6,
    "num_hidden_layers": 27,
    "num_key_value_heads": 16,
    "q_lora_rank": None,
    "vocab_size": 102400,
}
QWEN2_MOE = {
    "model_type": "qwen2_moe",
    "hidden_size": 2048,
    "intermediate_size": 5632,
    "moe_intermediate_size": 1408,
    "num_attention_heads": 16,
    "num_experts": 60,
    "num_experts_per_tok": 4,
    "num_hidden_layers": 24,
    "num_key_value_heads": 16,
    "shared_expert_intermediate_size": 5632,
    "vocab_size": 151936,
}
GEMMA_7B = {
    "model_type": "gemma",
    "hidden_act": "gelu",
    "hidden_size": 3072,
    "intermediate_size": 24576,
    "num_attention_heads": 16,
    "num_hidden_layers": 28,
    "vocab_size": 256000,
}
QWEN3_8B = {
    "model_type": "qwen3",
    "hidden_size": 4096,
    "intermediate_size": 12288,
    "num_attention_heads": 32,
    "num_hidden_layers": 36,
    "num_key_value_heads": 8,
    "tie_word_embeddings": False,
    "use_sliding_window": False,
    "vocab_size": 151936,
}


def read(config: Any, **changes: Any) -> HuggingFaceModel:
    """The model of a config with some fields changed; one that becomes ... goes away."""
    changed = {name: value for name, value in {**config, **changes}.items() if value is not ...}
    return from_huggingface(changed, source="some/config.json")


@pytest.mark.parametrize(
    ("config", "total"),
    [
        pytest.param(LLAMA, 8.030e9, id="llama3.1-8b"),
        pytest.param(MISTRAL, 7.242e9, id="mistral-7b-v0.1"),
        pytest.param(MIXTRAL, 46.703e9, id="mixtral-8x7b"),
        pytest.param(QWEN2, 7.616e9, id="qwen2-7b"),
        pytest.param(QWEN3_8B, 8.191e9, id="qwen3-8b"),
        pytest.param(QWEN3_MOE, 30.53e9, id="qwen3-30b-a3b"),
        pytest.param(QWEN2_MOE, 14.316e9, id="qwen1.5-moe-a2.7b"),
        pytest.param(GEMMA_7B, 8.538e9, id="gemma-7b"),
        pytest.param(GEMMA2, 9.242e9, id="gemma2-9b"),
        pytest.param(GEMMA3, 27.009e9, id="gemma3-27b text"),
        pytest.param(GPT2, 124.44e6, id="gpt2"),
        pytest.param(DEEPSEEK_V3, 671.026e9, id="deepseek-v3"),
        pytest.param(DEEPSEEK_V2_LITE, 15.706e9, id="deepseek-v2-lite"),
    ],
)
def test_published_totals(config: dict[str, Any], total: float):
    assert sizes(read(config).architecture).total == pytest.approx(total, rel=1e-4)


def test_a_token_uses_a_part_of_a_mixture():
    assert sizes(read(DEEPSEEK_V3).architecture).active == pytest.approx(37.55e9, rel=1e-3)
    assert sizes(read(MIXTRAL).architecture).active == pytest.approx(12.88e9, rel=1e-3)
    assert sizes(read(QWEN3_MOE).architecture).active == pytest.approx(3.35e9, rel=1e-2)
    assert sizes(read(LLAMA).architecture).active == sizes(read(LLAMA).architecture).total


@pytest.mark.parametrize(
    ("config", "values_per_token"),
    [
        (LLAMA, 32 * 2 * 8 * 128),
        (QWEN2, 28 * 2 * 4 * 128),
        (GPT2, 12 * 2 * 768),
        (DEEPSEEK_V3, 61 * 576),
        (DEEPSEEK_V2_LITE, 27 * 576),
        (GEMMA2, 42 * 2 * 8 * 256),
        (GEMMA3, 62 * 2 * 16 * 128),
    ],
    ids=lambda value: value["model_type"] if isinstance(value, dict) else None,
)
def test_cache_of_a_token(config: dict[str, Any], values_per_token: int):
    assert cache_bytes(read(config).architecture, 1, value_bytes=2) == 2 * values_per_token


@pytest.mark.parametrize(
    ("config", "window", "local", "num"),
    [(MISTRAL, 4096, 32, 32), (GEMMA2, 4096, 21, 42), (GEMMA3, 1024, 52, 62)],
    ids=["mistral", "gemma2", "gemma3"],
)
def test_windows_cap_the_cache(config: dict[str, Any], window: int, local: int, num: int):
    model = read(config).architecture
    of_token = cache_bytes(model, 1, value_bytes=1)
    grown = cache_bytes(model, 2 * window, value_bytes=1) - cache_bytes(model, window, value_bytes=1)
    assert grown == of_token * window * (num - local) / num


def windows(config: Any, **changes: Any) -> dict[int | None, int]:
    """How many layers have which window."""
    return {group.attention.window: group.num for group in read(config, **changes).architecture.layers}


def test_which_layers_see_a_window():
    assert windows(LLAMA, sliding_window=4096) == {None: 32}
    assert windows(MISTRAL, sliding_window=None) == {None: 32}
    assert windows(MISTRAL, sliding_window=...) == {4096: 32}
    assert windows(QWEN2) == windows(QWEN2, use_sliding_window=True) == {None: 28}
    assert windows(QWEN2, use_sliding_window=True, max_window_layers=20) == {None: 20, 131072: 8}
    assert windows(QWEN2, use_sliding_window=True, max_window_layers=20, sliding_window=None) == {None: 28}
    assert windows(QWEN2_MOE, use_sliding_window=True, sliding_window=512, max_window_layers=21) == {None: 13, 512: 11}
    assert windows(QWEN3_MOE, use_sliding_window=True, sliding_window=512) == {512: 48}
    assert windows(MIXTRAL, sliding_window=4096) == {4096: 32}
    assert windows(GEMMA2, num_hidden_layers=3, sliding_window=...) == {None: 1, 4096: 2}
    text = GEMMA3["text_config"]
    assert windows(text, sliding_window_pattern=2) == {None: 31, 1024: 31}
    types = ["sliding_attention"] * 60 + ["full_attention"] * 2
    assert windows(text, layer_types=types, sliding_window_pattern=2) == {None: 2, 1024: 60}
    assert windows(text, layer_types=["full_attention"] * 62) == {None: 62}


def test_what_a_class_takes_where_its_file_says_nothing():
    assert read(GEMMA2, tie_word_embeddings=False).architecture.tied is False
    assert read(GEMMA2).architecture.tied
    assert read(GPT2).architecture.tied
    assert not read(LLAMA, tie_word_embeddings=...).architecture.tied
    assert read(GEMMA_7B).architecture.layers[0].attention.head_dim == 256
    assert read(QWEN3_8B).architecture.layers[0].attention.head_dim == 128
    assert read(LLAMA, num_key_value_heads=None).architecture.layers[0].attention.kv_heads == 32
    assert read(MISTRAL, num_key_value_heads=...).architecture.layers[0].attention.kv_heads == 8
    assert read(GPT2, n_inner=None).architecture.layers[0].feed_forward.width == 4 * 768
    assert read(LLAMA, max_position_embeddings=...).architecture.context == 2048


def test_biases():
    def biases(config: Any, **changes: Any) -> tuple[bool, bool]:
        attention = read(config, **changes).architecture.layers[0].attention
        return attention.bias, attention.output_bias

    assert biases(LLAMA) == (False, False)
    assert biases(LLAMA, attention_bias=True) == (True, True)
    assert biases(QWEN2) == biases(QWEN2_MOE) == (True, False)
    assert biases(QWEN2_MOE, qkv_bias=False) == (False, False)
    assert read(MISTRAL, attention_bias=True).unused == ("attention_bias",)


def test_models_that_this_library_trains_are_its_own_presets():
    gpt2 = dataclasses.replace(PRESETS["gpt2"], kv_heads=12, head_dim=64, ffn=3072)
    assert read(GPT2).trainable == gpt2
    for config, name in ((QWEN3_MOE, "qwen3-30b-a3b"), (MIXTRAL, "mixtral-8x7b")):
        model, preset = read(config).trainable, PRESETS[name]
        assert model is not None
        assert (model.rope_theta, model.norm_eps, model.tied) == (preset.rope_theta, preset.norm_eps, preset.tied)
        assert sizes(architecture(model)) == sizes(architecture(preset))
    llama = read(LLAMA, rope_theta=..., rope_parameters={"rope_theta": 5e5, "rope_type": "default"}).trainable
    assert llama is not None
    assert (llama.rope_theta, llama.norm_eps, llama.context) == (5e5, 1e-5, 131072)
    biased = read(LLAMA, attention_bias=True, mlp_bias=True).trainable
    assert biased is not None
    assert biased.bias
    assert sizes(architecture(biased)) == sizes(read(LLAMA, attention_bias=True, mlp_bias=True).architecture)


@pytest.mark.parametrize(
    ("config", "changes", "why_not"),
    [
        (DEEPSEEK_V3, {}, "layers are of several kinds"),
        (DEEPSEEK_V3, {"first_k_dense_replace": 0}, "latent attention"),
        (MISTRAL, {}, "attention in a window"),
        (QWEN2, {}, "biases in some of its layers alone"),
        (LLAMA, {"attention_bias": True}, "biases in some of its layers alone"),
        (LLAMA, {"mlp_bias": True}, "biases in some of its layers alone"),
        (LLAMA, {"hidden_act": "gelu"}, "gelu as its nonlinearity"),
        (GPT2, {"activation_function": "relu"}, "relu as its nonlinearity"),
        (QWEN2_MOE, {"qkv_bias": False}, "shared experts"),
        (GEMMA_7B, {}, "Gemma's scaled embedding"),
        (GEMMA3, {}, "reads pictures too"),
    ],
)
def test_others_say_why_they_are_not_trained(config: dict[str, Any], changes: dict[str, Any], why_not: str):
    found = read(config, **changes)
    assert found.trainable is None
    assert why_not in found.why_not


def test_unknown_fields_are_named():
    assert read(LLAMA).unused == read(GPT2).unused == read(DEEPSEEK_V3).unused == read(QWEN3_MOE).unused == ()
    assert read(GEMMA2).unused == ("sliding_window_size",)
    assert read(LLAMA, partial_rotary_factor=0.5, clip_qkv=8).unused == ("clip_qkv", "partial_rotary_factor")
    assert read(LLAMA, sliding_window=4096).unused == ("sliding_window",)
    assert read(GEMMA3).unused == ("mm_tokens_per_image", "vision_config")


def test_which_form_a_file_has():
    assert is_huggingface(LLAMA)
    assert is_huggingface({"architectures": ["X"]})
    assert not is_huggingface({"vocab": 10})
    assert not is_huggingface([])


TEXT = GEMMA3["text_config"]
SIZES_OF_LLAMA = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "vocab_size")
SIZES_OF_DEEPSEEK = ("kv_lora_rank", "qk_rope_head_dim", "v_head_dim", "n_routed_experts", "moe_intermediate_size")


@pytest.mark.oldest
@pytest.mark.parametrize(
    ("config", "changes", "said"),
    [
        *((LLAMA, {name: ...}, f"{name} is absent") for name in SIZES_OF_LLAMA),
        *((LLAMA, {"hidden_size": bad}, "hidden_size must be a whole number") for bad in (-1, 0, 4096.0, True, "4096")),
        *((GPT2, {name: ...}, f"{name} is absent") for name in ("n_embd", "n_head", "n_layer", "vocab_size")),
        *((DEEPSEEK_V3, {name: ...}, f"{name} is absent") for name in (*SIZES_OF_DEEPSEEK, "q_lora_rank")),
        (LLAMA, {"hidden_size": 10**12}, "hidden_size must be a whole number of 1 to 1000000000"),
        (LLAMA, {"num_key_value_heads": 5}, "num_key_value_heads=5"),
        (LLAMA, {"num_key_value_heads": 0}, "num_key_value_heads must be"),
        (LLAMA, {"num_attention_heads": 24, "num_key_value_heads": 8}, "num_attention_heads=24"),
        (LLAMA, {"head_dim": 127}, "head_dim must be even, got 127"),
        (LLAMA, {"num_experts": 8}, "num_experts contradicts model_type 'llama'"),
        (MISTRAL, {"num_local_experts": 8}, "num_local_experts contradicts model_type 'mistral'"),
        (MISTRAL, {"sliding_window": 0}, "sliding_window must be"),
        (LLAMA, {"tie_word_embeddings": "yes"}, "tie_word_embeddings must be true or false"),
        (LLAMA, {"attention_bias": 1}, "attention_bias must be true or false"),
        (LLAMA, {"hidden_act": "sillu"}, "hidden_act='sillu' is not known. Did you mean 'silu'?"),
        (LLAMA, {"hidden_act": ["silu"]}, "hidden_act=['silu'] is not known"),
        (LLAMA, {"rope_theta": "big"}, "rope_theta must be a number above 0"),
        (LLAMA, {"rope_theta": float("nan")}, "rope_theta must be a number above 0"),
        (LLAMA, {"rope_parameters": {"rope_theta": -1}}, "rope_parameters.rope_theta must be a number above 0"),
        (LLAMA, {"rms_norm_eps": 0}, "rms_norm_eps must be a number above 0"),
        (GPT2, {"n_head": 7}, "n_embd=768 does not divide into n_head=7"),
        (QWEN2, {"layer_types": ["full_attention"]}, "layer_types must list num_hidden_layers=28 layers, got 1"),
        (QWEN2, {"layer_types": "full_attention"}, "layer_types must list num_hidden_layers=28"),
        (QWEN2, {"layer_types": ["half_attention"] * 28}, "layer_types holds 'half_attention'. Legal: full_attention"),
        (QWEN2, {"layer_types": ["sliding_attention"] * 28}, "use_sliding_window=false contradicts it"),
        (TEXT, {"sliding_window": None}, "sliding_window is null"),
        (TEXT, {"sliding_window_pattern": 0}, "sliding_window_pattern must be"),
        (GEMMA3, {"text_config": {**TEXT, "num_attention_heads": 30}}, "num_attention_heads=30"),
        (GEMMA3, {"text_config": {"hidden_size": 8, "model_type": "gemma5"}}, "Did you mean 'gemma"),
        (MIXTRAL, {"num_local_experts": ...}, "num_local_experts is absent"),
        (MIXTRAL, {"num_experts_per_tok": 9}, "num_experts_per_tok=9 is more than num_local_experts=8"),
        (QWEN3_MOE, {"mlp_only_layers": [0]}, "mlp_only_layers"),
        (QWEN3_MOE, {"decoder_sparse_step": 2}, "decoder_sparse_step"),
        (QWEN2_MOE, {"shared_expert_intermediate_size": ...}, "shared_expert_intermediate_size is absent"),
        (DEEPSEEK_V3, {"num_key_value_heads": 8}, "num_key_value_heads=8 contradicts latent attention"),
        (DEEPSEEK_V3, {"first_k_dense_replace": 62}, "first_k_dense_replace=62 is more than num_hidden_layers=61"),
        (DEEPSEEK_V3, {"num_experts_per_tok": 257}, "num_experts_per_tok=257 is more than n_routed_experts=256"),
        (DEEPSEEK_V3, {"moe_layer_freq": 2}, "moe_layer_freq=2 is not known here"),
        (DEEPSEEK_V3, {"attention_bias": True}, "attention_bias=true is not known here"),
        (LLAMA, {"model_type": ...}, "model_type is absent. Legal: llama"),
        (LLAMA, {"model_type": "lama"}, "model_type 'lama' is not known. Did you mean 'llama'?"),
        (LLAMA, {"model_type": ["llama"]}, "model_type ['llama'] is not known"),
    ],
)
def test_refused_with_one_line(config: dict[str, Any], changes: dict[str, Any], said: str, tmp_path: Path):
    path = tmp_path / "config.json"
    path.write_text(json.dumps({name: value for name, value in {**config, **changes}.items() if value is not ...}))
    with pytest.raises(ValueError, match=re.escape(said)) as refused:
        read_huggingface(path)
    message = str(refused.value)
    assert message.startswith(str(path)), message
    assert "\n" not in message


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"", "does not parse"),
        (b"{", "does not parse"),
        (b"\xff\xfe\x00", "does not parse"),
        (b"[" * 100_000, "does not parse"),
        (b"[1, 2]", "fields and their values are wanted, got [1, 2]"),
        (b"null", "fields and their values are wanted, got None"),
        (b"{}", "model_type is absent"),
    ],
)
def test_files_that_are_no_config(content: bytes, said: str, tmp_path: Path):
    path = tmp_path / "config.json"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=re.escape(said)) as refused:
        read_huggingface(path)
    assert str(path) in str(refused.value)
    assert "\n" not in str(refused.value)


def test_no_file_and_a_directory(tmp_path: Path):
    with pytest.raises(ValueError, match="cannot be read: Is a directory"):
        read_huggingface(tmp_path)
    with pytest.raises(ValueError, match="cannot be read: No such file"):
        read_huggingface(tmp_path / "config.json")
