"""transformers' side: LlamaForCausalLM with the same weights, its own cache, greedy, as `generate` runs it.

The last line of output is one JSON object.
"""

import time

import numpy as np
import torch
import transformers
from model import (
    CONTEXT,
    DIM,
    EPS,
    FFN,
    GENERATED,
    HEADS,
    KV_HEADS,
    LAYERS,
    THETA,
    VOCAB,
    arguments,
    prompts,
    report,
    weights,
)
from transformers import LlamaConfig, LlamaForCausalLM


def main() -> None:
    parser = arguments(__doc__ or "")
    parser.add_argument("--precision", choices=("float32", "bfloat16"), default="bfloat16")
    options = parser.parse_args()
    config = LlamaConfig(
        vocab_size=VOCAB,
        hidden_size=DIM,
        intermediate_size=FFN,
        num_hidden_layers=LAYERS,
        num_attention_heads=HEADS,
        num_key_value_heads=KV_HEADS,
        max_position_embeddings=CONTEXT,
        rms_norm_eps=EPS,
        rope_theta=THETA,
        tie_word_embeddings=True,
        eos_token_id=None,
        pad_token_id=0,
        bos_token_id=None,
    )
    model = LlamaForCausalLM(config).eval()
    state = {name: torch.from_numpy(w) for name, w in weights().items()}
    # The output layer is the embedding.
    model.load_state_dict({**state, "lm_head.weight": state["model.embed_tokens.weight"]})
    model.tie_weights()
    model = model.to(getattr(torch, options.precision))
    rows = torch.from_numpy(prompts(options.batch))

    def generate(num: int) -> tuple[torch.Tensor, float]:
        began = time.perf_counter()
        out = model.generate(
            rows, attention_mask=torch.ones_like(rows), max_new_tokens=num, min_new_tokens=num, do_sample=False
        )
        return out, time.perf_counter() - began

    prefill_s, decode_s, tokens = [], [], np.zeros((1, 0))
    with torch.inference_mode():
        generate(2)
        for _ in range(options.repeats):
            # One token is the prefill; what more tokens take beyond it is the decode.
            _, first_s = generate(1)
            out, whole_s = generate(GENERATED)
            prefill_s.append(first_s)
            decode_s.append(whole_s - first_s)
            tokens = out[:, rows.shape[1] :].numpy()
    version = f"transformers {transformers.__version__}, torch {torch.__version__}"
    report(
        "transformers",
        batch=options.batch,
        version=version,
        precision=options.precision,
        prefill_s=prefill_s,
        decode_s=decode_s,
        tokens=tokens,
    )


if __name__ == "__main__":
    main()
