"""llama.cpp's side: the same weights as a GGUF file, all sequences of a batch in one `llama_decode`, greedy.

Each prompt is one decode of 128 tokens, as a server would read them. The last line of output is one JSON object.
"""

import sys
import tempfile
import time
from pathlib import Path

import llama_cpp
import numpy as np
from model import (
    CONTEXT,
    DIM,
    EPS,
    FFN,
    GENERATED,
    HEAD,
    HEADS,
    KV_HEADS,
    LAYERS,
    PROMPT,
    THETA,
    VOCAB,
    arguments,
    prompts,
    report,
    weights,
)

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


def write_gguf(path: Path, precision: str) -> None:
    import gguf

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
    parser = arguments(__doc__ or "")
    parser.add_argument("--precision", choices=("f32", "f16", "bf16"), default="bf16")
    parser.add_argument("--threads", type=int, required=True)
    options = parser.parse_args()
    batch_size = options.batch
    quiet = llama_cpp.llama_log_callback(lambda *_: None)
    llama_cpp.llama_log_set(quiet, None)
    llama_cpp.llama_backend_init()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model.gguf"
        write_gguf(path, options.precision)
        settings = llama_cpp.llama_model_default_params()
        settings.use_mmap = False
        model = llama_cpp.llama_model_load_from_file(str(path).encode(), settings)
    if not model:
        sys.exit("error: llama.cpp did not load the model.")
    settings = llama_cpp.llama_context_default_params()
    settings.n_ctx = batch_size * (PROMPT + GENERATED)
    settings.n_batch = settings.n_ubatch = 512
    settings.n_seq_max = batch_size
    settings.n_threads = settings.n_threads_batch = options.threads
    # Each sequence has its own cells, as batched decoding is fastest here.
    settings.kv_unified = False
    context = llama_cpp.llama_init_from_model(model, settings)
    batch = llama_cpp.llama_batch_init(512, 0, 1)

    def put(at: int, token: int, position: int, sequence: int, wanted: bool) -> None:
        batch.token[at], batch.pos[at], batch.n_seq_id[at] = token, position, 1
        batch.seq_id[at][0], batch.logits[at] = sequence, wanted

    def decode(num: int) -> None:
        batch.n_tokens = num
        if llama_cpp.llama_decode(context, batch):
            sys.exit("error: llama_decode failed.")

    def best(at: int) -> int:
        return int(np.ctypeslib.as_array(llama_cpp.llama_get_logits_ith(context, at), (VOCAB,)).argmax())

    rows = prompts(batch_size)
    prefill_s, decode_s, chosen = [], [], []
    for _ in range(1 + options.repeats):
        llama_cpp.llama_memory_clear(llama_cpp.llama_get_memory(context), True)
        began = time.perf_counter()
        last = []
        for sequence in range(batch_size):
            for position in range(PROMPT):
                put(position, int(rows[sequence, position]), position, sequence, position == PROMPT - 1)
            decode(PROMPT)
            last.append(best(PROMPT - 1))
        prefill_s.append(time.perf_counter() - began)
        chosen = [last]
        began = time.perf_counter()
        for step in range(GENERATED - 1):
            for sequence in range(batch_size):
                put(sequence, last[sequence], PROMPT + step, sequence, True)
            decode(batch_size)
            last = [best(sequence) for sequence in range(batch_size)]
            chosen.append(last)
        decode_s.append(time.perf_counter() - began)
    version = f"llama-cpp-python {llama_cpp.__version__}"
    report(
        "llama.cpp",
        batch=batch_size,
        version=version,
        precision=options.precision,
        prefill_s=prefill_s[1:],
        decode_s=decode_s[1:],
        tokens=np.array(chosen).T,
    )


if __name__ == "__main__":
    main()
