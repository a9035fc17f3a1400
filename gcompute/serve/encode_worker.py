"""The process in which texts are encoded whose tokenizer has patterns of its own: JSON lines in and out, no JAX.

{"tokenizer", "memory_bytes"}   ->  {}
{"texts", "time_s"}             ->  {"ids"} or {"error"}
"""

import tokenizers

from gcompute.serve.line_worker import answer_lines, bound_memory


def main() -> None:
    """Answer lines until the input ends."""

    def start(first: dict) -> dict:
        backend.append(tokenizers.Tokenizer.from_str(first["tokenizer"]))
        backend[0].encode_special_tokens = True
        bound_memory(first["memory_bytes"])
        return {}

    def encode(question: dict) -> dict:
        found = backend[0].encode_batch_fast(question["texts"], add_special_tokens=False)
        return {"ids": [one.ids for one in found]}

    backend: list[tokenizers.Tokenizer] = []
    answer_lines(start, encode)


if __name__ == "__main__":
    main()
