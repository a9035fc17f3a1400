"""Tokens that stand for one byte each, in vocabularies of SentencePiece's kind: "<0xE4>"."""

import codecs
import json
import re
from collections.abc import Mapping, Sequence

import tokenizers

BYTE = re.compile("<0x([0-9A-Fa-f]{2})>")
# Python's mark of a byte that is no part of a character.
ESCAPED = range(0xDC80, 0xDD00)


def byte_tokens(backend: tokenizers.Tokenizer) -> dict[int, int]:
    """The byte of every such token, by its id; empty where the decoder knows none."""
    if '"ByteFallback"' not in json.dumps(json.loads(backend.to_str())["decoder"]):
        return {}
    found = ((BYTE.fullmatch(token), token_id) for token, token_id in backend.get_vocab().items())
    return {token_id: int(match[1], 16) for match, token_id in found if match}


def broken_bytes(ids: Sequence[int], byte_of: Mapping[int, int]) -> set[int]:
    """Where among `ids` bytes stand that are no part of a character.

    `tokenizers` gives up a whole run of bytes for one that does not fit; here the others keep their characters.
    """
    broken: set[int] = set()
    start = 0
    while start < len(ids):
        end = start
        while end < len(ids) and ids[end] in byte_of:
            end += 1
        at = start
        for char in bytes(byte_of[one] for one in ids[start:end]).decode(errors="surrogateescape"):
            if ord(char) in ESCAPED:
                broken.add(at)
                at += 1
            else:
                at += len(char.encode())
        start = end + 1
    return broken


def num_open(ids: Sequence[int], byte_of: Mapping[int, int]) -> int:
    """How many of the last `ids`, whose first begins a character, are a character that later bytes may complete."""
    start = len(ids)
    while start and ids[start - 1] in byte_of:
        start -= 1
    utf8 = codecs.getincrementaldecoder("utf-8")(errors="replace")
    utf8.decode(bytes(byte_of[one] for one in ids[start:]))
    return len(utf8.getstate()[0])
