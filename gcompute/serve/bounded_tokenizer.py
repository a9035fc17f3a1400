r"""A tokenizer whose patterns may take for ever on some texts, in a process of its own with bounded memory and time.

A pattern such as `(a+)+$` or `\s+$` takes time that grows with the square of a text's length, or faster, and while it
does it cannot be stopped. The patterns of published tokenizers take time in proportion to the text, and stay here.
"""

from collections.abc import Callable, Iterator
from typing import Any

import tokenizers

from gcompute.model.tokenizer import Tokenizer
from gcompute.serve.bounded_process import BoundedPool, OutOfTime
from gcompute.serve.request import NotReady

WORKER = "gcompute.serve.encode_worker"
ENCODE_S = 10.0
ENCODE_BYTES = 8 << 30

LETTERS = r"[^\r\n\p{L}\p{N}]?\p{L}+"
SPACES = r"\s*[\r\n]+|\s+(?!\S)|\s+"
CONTRACTIONS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
UPPER, LOWER = r"\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}", r"\p{Ll}\p{Lm}\p{Lo}\p{M}"
O200K = (
    rf"[^\r\n\p{{L}}\p{{N}}]?[{UPPER}]*[{LOWER}]+{CONTRACTIONS}?|[^\r\n\p{{L}}\p{{N}}]?[{UPPER}]+[{LOWER}]*{CONTRACTIONS}?"
    rf"|\p{{N}}{{1,3}}| ?[^\s\p{{L}}\p{{N}}]+[\r\n/]*|{SPACES}"
)
# Source: tokenizer.json of GPT-2, Llama 3, Qwen 2 and 3, DeepSeek V3 and gpt-oss, which others took over.
LINEAR = (
    r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+",
    rf"{CONTRACTIONS}|{LETTERS}|\p{{N}}{{1,3}}| ?[^\s\p{{L}}\p{{N}}]+[\r\n]*|{SPACES}",
    rf"{CONTRACTIONS}|{LETTERS}|\p{{N}}| ?[^\s\p{{L}}\p{{N}}]+[\r\n]*|{SPACES}",
    r"\p{N}{1,3}",
    r"\p{N}",
    r"[0-9][0-9][0-9]",
    r"[\r\n]",
    r"[一-龥\u3040-ゟ゠-ヿ]+",
    r"""[!"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+| ?[\p{P}\p{S}]+[\r\n]*|"""
    + SPACES,
    O200K,
    " {2,}",
)


class BoundedTokenizer(Tokenizer):
    """Encodes in a process of its own, each call within `time_s`; all else is as in `Tokenizer`."""

    def __init__(self, backend: tokenizers.Tokenizer, *, time_s: float):
        self._time_s = time_s
        super().__init__(backend)

    def encoding(self, backend: tokenizers.Tokenizer) -> Callable[[list[str]], list[list[int]]]:
        first = {"tokenizer": backend.to_str(), "memory_bytes": ENCODE_BYTES}
        pool = BoundedPool(WORKER, first, wait_s=self._time_s)

        def encode(texts: list[str]) -> list[list[int]]:
            try:
                answer = pool.ask({"texts": texts, "time_s": self._time_s}, time_s=self._time_s)
            except OutOfTime as error:
                raise ValueError(f"the tokenizer was stopped on this text: {error}.") from None
            except (ValueError, TimeoutError) as error:
                raise NotReady(f"the tokenizer cannot be used now: {error}") from None
            if "error" in answer:
                raise ValueError(f"the tokenizer cannot encode this text: {answer['error']}.")
            return answer["ids"]

        return encode


def bounded(tokenizer: Tokenizer, *, time_s: float | None = None) -> Tokenizer:
    """The tokenizer, or one that does the same in a bounded process where it has patterns that are not known.

    Raises:
      ValueError: no process can be started.
    """
    description = tokenizer.description()
    parts = [description["normalizer"], description["pre_tokenizer"]]
    if all(one in LINEAR for one in _patterns(parts)):
        return tokenizer
    return BoundedTokenizer(tokenizer.backend(), time_s=min(ENCODE_S, time_s or ENCODE_S))


def _patterns(part: Any) -> Iterator[str]:
    """The regular expressions in a part of a tokenizer.json."""
    if isinstance(part, dict):
        if isinstance(part.get("Regex"), str):
            yield part["Regex"]
        for one in part.values():
            yield from _patterns(one)
    elif isinstance(part, list):
        for one in part:
            yield from _patterns(one)
