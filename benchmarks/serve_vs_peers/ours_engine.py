"""gcompute's engine with the benchmark's model in it."""

from typing import Any

from model import CONTEXT, DIM, EPS, FFN, GENERATED, HEADS, KV_HEADS, LAYERS, PROMPT, THETA, VOCAB, weights

from gcompute.config.model import ModelConfig
from gcompute.config.serve import ServeConfig
from gcompute.serve.engine import Engine

STEPS = 8
CONFIG = ModelConfig(
    vocab=VOCAB,
    layers=LAYERS,
    dim=DIM,
    heads=HEADS,
    kv_heads=KV_HEADS,
    ffn=FFN,
    context=CONTEXT,
    norm_eps=EPS,
    rope_theta=THETA,
)


def model_params() -> Any:
    """The benchmark's weights in the model's own tree, layers stacked."""
    import numpy as np

    named = weights()

    def stacked(name: str, *shape: int) -> Any:
        """[L, ...], from matrices that are [out, in]."""
        return np.stack([named[f"model.layers.{layer}.{name}.weight"].T.reshape(shape) for layer in range(LAYERS)])

    head = DIM // HEADS
    return {
        "embedding_VD": named["model.embed_tokens.weight"],
        "norm": {"scale": named["model.norm.weight"]},
        "blocks": {
            "attention_norm": {"scale": stacked("input_layernorm", DIM)},
            "mlp_norm": {"scale": stacked("post_attention_layernorm", DIM)},
            "attention": {
                "q_DNH": stacked("self_attn.q_proj", DIM, HEADS, head),
                "k_DKH": stacked("self_attn.k_proj", DIM, KV_HEADS, head),
                "v_DKH": stacked("self_attn.v_proj", DIM, KV_HEADS, head),
                "o_NHD": stacked("self_attn.o_proj", HEADS, head, DIM),
            },
            "mlp": {
                "gate_DF": stacked("mlp.gate_proj", DIM, FFN),
                "up_DF": stacked("mlp.up_proj", DIM, FFN),
                "down_FD": stacked("mlp.down_proj", FFN, DIM),
            },
        },
    }


def serve_config(slots: int, **more: Any) -> ServeConfig:
    """A slot a sequence and no prefix cache: every prompt is another. Decoding takes 8 steps a dispatch."""
    lengths: dict[str, Any] = {"max_context": PROMPT + GENERATED, "chunk": PROMPT, "decode_steps": STEPS}
    return ServeConfig(**{"slots": slots, "prefix_cache": False, **lengths, **more})


def engine(serve: ServeConfig) -> Engine:
    return Engine(model_params(), CONFIG, None, serve)
