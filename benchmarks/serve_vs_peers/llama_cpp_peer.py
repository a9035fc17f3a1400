"""llama.cpp's side: the same weights as a GGUF file, all sequences of a batch in one `llama_decode`, greedy.

Each prompt is one decode of 128 tokens, as a server would read them. The last line of output is one JSON object.
"""

import sys
import tempfile
import time
from pathlib import Path

import llama_cpp
import numpy as np
from gguf_file import write_gguf
from model import GENERATED, PROMPT, VOCAB, arguments, prompts, report


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
        system=llama_cpp.llama_print_system_info().decode(),
    )


if __name__ == "__main__":
    main()
