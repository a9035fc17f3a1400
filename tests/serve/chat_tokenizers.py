"""Small tokenizers built as those of published families are: what their added tokens, normalizers and decoders do."""

import tokenizers
from tokenizers import AddedToken, Regex, decoders, models, normalizers, pre_tokenizers

SPACE = "\u2581"
# Pieces that merge, so that text which is cut elsewhere has other ids.
WORDS = ("the", "user", "assistant", "system", "hello", "Hello", "in", "er", "you", "are", "is", "ing", "tool", "name")
# Of Llama 3 and Qwen 2, shortened.
SPLIT = r"(?i:'s|'t|'re)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"


def merged(vocab: dict[str, int], words: tuple[str, ...]) -> list[tuple[str, str]]:
    """Merges that make each word from its left, with their results added to the vocabulary."""
    merges: list[tuple[str, str]] = []
    for word in words:
        for size in range(2, len(word) + 1):
            pair = (word[: size - 1], word[size - 1])
            if pair not in merges:
                merges.append(pair)
                vocab.setdefault(word[:size], len(vocab))
    return merges


def byte_level(added: list[AddedToken], *, regex: bool = True) -> tokenizers.Tokenizer:
    """Byte-level BPE: GPT-2, Llama 3, Qwen, DeepSeek."""
    vocab = {char: at for at, char in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    merges = merged(vocab, tuple(one for word in WORDS for one in (word, "\u0120" + word)))
    backend = tokenizers.Tokenizer(models.BPE(vocab=vocab, merges=merges))
    level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=not regex)
    split = [pre_tokenizers.Split(Regex(SPLIT), "isolated")] if regex else []
    backend.pre_tokenizer = pre_tokenizers.Sequence([*split, level])
    backend.decoder = decoders.ByteLevel()
    _add(backend, added)
    return backend


def sentencepiece(added: list[AddedToken], *, kind: str) -> tokenizers.Tokenizer:
    """BPE with byte fallback. kind: legacy (Llama 2: a space before every piece), first (before the text alone) or
    none (Gemma)."""
    vocab = {"<unk>": 0, **{f"<0x{byte:02X}>": byte + 1 for byte in range(256)}}
    for char in (SPACE, *map(chr, range(33, 127)), "\n", "\ufffd", "\u4f60"):
        vocab.setdefault(char, len(vocab))
    merges = merged(vocab, tuple(one for word in WORDS for one in (SPACE + word, word)))
    backend = tokenizers.Tokenizer(
        models.BPE(vocab=vocab, merges=merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True)
    )
    strip = [] if kind == "none" else [decoders.Strip(" ", 1, 0)]
    if kind == "legacy":
        backend.normalizer = normalizers.Sequence([normalizers.Prepend(SPACE), normalizers.Replace(" ", SPACE)])
    elif kind == "first":
        backend.pre_tokenizer = pre_tokenizers.Metaspace(replacement=SPACE, prepend_scheme="first", split=False)
    else:
        backend.normalizer = normalizers.Replace(" ", SPACE)
        backend.pre_tokenizer = pre_tokenizers.Split(" ", "merged_with_previous")
    backend.decoder = decoders.Sequence(
        [decoders.Replace(SPACE, " "), decoders.ByteFallback(), decoders.Fuse(), *strip]
    )
    _add(backend, added)
    return backend


KINDS = {
    "byte-level": lambda added: byte_level(added),
    "gpt2": lambda added: byte_level(added, regex=False),
    "legacy": lambda added: sentencepiece(added, kind="legacy"),
    "first": lambda added: sentencepiece(added, kind="first"),
    "none": lambda added: sentencepiece(added, kind="none"),
}


def _add(backend: tokenizers.Tokenizer, added: list[AddedToken]) -> None:
    for token in added:
        (backend.add_special_tokens if token.special else backend.add_tokens)([token])


def added(names: list[str], *, plain: list[str] | None = None, **flags: bool) -> list[AddedToken]:
    """Special tokens, all with the flags, and added ones that are not special."""
    special = [AddedToken(name, special=True, **{"normalized": False, **flags}) for name in names]
    return special + [AddedToken(name, special=False, normalized=False) for name in plain or []]
