"""What tells that a resumed run reads the very tokens that it began with."""

import hashlib

import numpy as np
from jaxtyping import Integer

from gcompute.train.corpus import TokenizedCorpus
from gcompute.train.mapped import check_mapped

BLOCK_TOKENS = 1 << 12
MOST_BLOCKS = 1 << 10


def tokens_fingerprint(corpus: TokenizedCorpus) -> str:
    """SHA-256 of both splits: their lengths, and all of up to 4M tokens, or blocks spread evenly over more.

    Raises:
      OSError: the file that a split is mapped from was cut short.
    """
    digest = hashlib.sha256()
    for split in (corpus.train, corpus.val):
        digest.update(f"{len(split)} ".encode())
        check_mapped(split)
        for start in _starts(len(split)):
            digest.update(_plain(split[start : start + BLOCK_TOKENS]))
    return digest.hexdigest()


def _starts(num_tokens: int) -> Integer[np.ndarray, "n"]:
    whole = np.arange(0, num_tokens, BLOCK_TOKENS)
    if len(whole) <= MOST_BLOCKS:
        return whole
    return np.linspace(0, num_tokens - BLOCK_TOKENS, MOST_BLOCKS).astype(np.int64)


def _plain(tokens: Integer[np.ndarray, "n"]) -> bytes:
    # One width for all: the token files are of 2 or of 4 bytes a token.
    return tokens.astype("<u4").tobytes()
