"""The benchmark's model as a GGUF file, for llama.cpp: python gguf_file.py FILE [--precision bf16]"""

import argparse
from pathlib import Path

import gguf
import numpy as np
from model import CONTEXT, DIM, EPS, FFN, HEAD, HEADS, KV_HEADS, LAYERS, THETA, VOCAB, weights

NAMES = {
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}


def interleaved(w: np.ndarray, heads: int) -> np.ndarray:
    """GGUF's Llama rotates neighbouring pairs, the released weights the two halves of a head."""
    return w.reshape(heads, 2, -1, w.shape[1]).swapaxes(1, 2).reshape(w.shape)


def write_gguf(path: Path, precision: str, *, tokenizer: bool = False) -> None:
    """The model with its weights as f32, f16 or bf16; `tokenizer`: with made-up tokens, for servers that want some."""
    writer = gguf.GGUFWriter(str(path), "llama")
    writer.add_context_length(CONTEXT)
    writer.add_embedding_length(DIM)
    writer.add_block_count(LAYERS)
    writer.add_feed_forward_length(FFN)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(KV_HEADS)
    writer.add_layer_norm_rms_eps(EPS)
    writer.add_rope_freq_base(THETA)
    writer.add_rope_dimension_count(HEAD)
    writer.add_vocab_size(VOCAB)
    if tokenizer:
        names = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
        names += [f"t{token}" for token in range(len(names), VOCAB)]
        kinds = gguf.TokenType
        types = [kinds.UNKNOWN, kinds.CONTROL, kinds.CONTROL, *[kinds.BYTE] * 256]
        types += [kinds.NORMAL] * (VOCAB - len(types))
        writer.add_tokenizer_model("llama")
        writer.add_token_list(names)
        writer.add_token_scores([-float(token) for token in range(VOCAB)])
        writer.add_token_types(types)
        writer.add_add_bos_token(False)
    else:
        writer.add_tokenizer_model("none")
    kind = {"f32": "ALL_F32", "f16": "MOSTLY_F16", "bf16": "MOSTLY_BF16"}[precision]
    writer.add_file_type(gguf.LlamaFileType[kind])

    def add(name: str, w: np.ndarray) -> None:
        if w.ndim == 1 or precision == "f32":
            writer.add_tensor(name, np.ascontiguousarray(w, np.float32))
        elif precision == "f16":
            writer.add_tensor(name, np.ascontiguousarray(w, np.float16))
        else:
            kind = gguf.GGMLQuantizationType.BF16
            writer.add_tensor(name, gguf.quants.quantize(np.ascontiguousarray(w, np.float32), kind), raw_dtype=kind)

    for name, w in weights().items():
        if name == "model.embed_tokens.weight":
            add("token_embd.weight", w)
        elif name == "model.norm.weight":
            add("output_norm.weight", w)
        else:
            _, _, layer, rest = name.split(".", 3)
            rest = rest.removesuffix(".weight")
            heads = {"self_attn.q_proj": HEADS, "self_attn.k_proj": KV_HEADS}.get(rest)
            add(f"blk.{layer}.{NAMES[rest]}.weight", w if heads is None else interleaved(w, heads))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("file", type=Path)
    parser.add_argument("--precision", choices=("f32", "f16", "bf16"), default="bf16")
    options = parser.parse_args()
    write_gguf(options.file, options.precision, tokenizer=True)


if __name__ == "__main__":
    main()
