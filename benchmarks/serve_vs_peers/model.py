"""The model, the prompts and the sizes that every engine of this benchmark gets, from the same seed."""

import argparse
import json
import statistics
from typing import Any

import numpy as np

LAYERS, DIM, HEADS, KV_HEADS, FFN, VOCAB, CONTEXT = 12, 768, 12, 4, 2048, 32000, 1024
HEAD = DIM // HEADS
EPS, THETA = 1e-5, 10000.0
PROMPT, GENERATED = 128, 64


def weights() -> dict[str, np.ndarray]:
    """Every matrix as [out, in], float32, named as in Hugging Face's Llama; norms are ones, and the output is tied."""
    random = np.random.default_rng(0)

    def matrix(rows: int, columns: int) -> np.ndarray:
        return 0.02 * random.standard_normal((rows, columns), dtype=np.float32)

    named = {"model.embed_tokens.weight": matrix(VOCAB, DIM), "model.norm.weight": np.ones(DIM, np.float32)}
    for layer in range(LAYERS):
        at = f"model.layers.{layer}"
        named |= {
            f"{at}.input_layernorm.weight": np.ones(DIM, np.float32),
            f"{at}.post_attention_layernorm.weight": np.ones(DIM, np.float32),
            f"{at}.self_attn.q_proj.weight": matrix(HEADS * HEAD, DIM),
            f"{at}.self_attn.k_proj.weight": matrix(KV_HEADS * HEAD, DIM),
            f"{at}.self_attn.v_proj.weight": matrix(KV_HEADS * HEAD, DIM),
            f"{at}.self_attn.o_proj.weight": matrix(DIM, HEADS * HEAD),
            f"{at}.mlp.gate_proj.weight": matrix(FFN, DIM),
            f"{at}.mlp.up_proj.weight": matrix(FFN, DIM),
            f"{at}.mlp.down_proj.weight": matrix(DIM, FFN),
        }
    return named


def prompts(batch: int) -> np.ndarray:
    return np.random.default_rng(1).integers(1, VOCAB, (batch, PROMPT))


def arguments(description: str) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--batch", type=int, required=True)
    parser.add_argument("--repeats", type=int, default=3, help="generations that count, after one that does not")
    return parser


def report(
    engine: str,
    *,
    batch: int,
    version: str,
    precision: str,
    prefill_s: list[float],
    decode_s: list[float],
    tokens: np.ndarray,
    **more: Any,
) -> None:
    """Print the medians as one JSON object. decode_s: of all generated tokens but the first."""
    found = {
        "engine": engine,
        "batch": batch,
        "version": version,
        "precision": precision,
        "prefill_tokens_per_s": batch * PROMPT / statistics.median(prefill_s),
        "decode_tokens_per_s": batch * (GENERATED - 1) / statistics.median(decode_s),
        "first_tokens": tokens[0, :8].tolist(),
        **more,
    }
    print(json.dumps(found), flush=True)
