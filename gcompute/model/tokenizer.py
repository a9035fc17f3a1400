"""Text to token ids and back: bytes, characters, byte-level BPE, or a Hugging Face tokenizer.json, behind one class."""

import codecs
import hashlib
import json
import os
import uuid
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path
from typing import Any, Self

import tokenizers
from tokenizers import AddedToken, decoders, models, pre_tokenizers, trainers

from gcompute.config.fields import nearest
from gcompute.model.byte_fallback import broken_bytes, byte_tokens, num_open

END_OF_TEXT = "<|endoftext|>"
END_OF_TEXT_NAMES = (END_OF_TEXT, "<|end_of_text|>", "</s>", "<eos>", "<|im_end|>")  # in the order they are looked for
SMALLEST_BPE = 258  # 256 byte values, END_OF_TEXT and one merge
LONGEST_UTF8_BYTES = 4
REPLACEMENT = "\N{REPLACEMENT CHARACTER}"
MOST_IDS = 1 << 24  # sixty times the largest vocabulary published


class Tokenizer:
    """An immutable tokenizer; whatever its kind, one tokenizer.json describes it fully.

    A special token spelled out in a text is encoded as the ordinary text that it is, so that no document and no prompt
    can forge an end of text. No token is added at either end. decode(encode(text)) == text for byte, char and bpe; a
    file may normalize. Encoding uses all cores; TOKENIZERS_PARALLELISM is left as it is, because only when it is unset
    does a forked process encode without a deadlock.
    """

    def __init__(self, backend: tokenizers.Tokenizer) -> None:
        backend.encode_special_tokens = True
        backend.no_truncation()
        backend.no_padding()
        self._backend = backend
        self._encode = self.encoding(backend)
        self._characters = _character_set(json.loads(backend.to_str()))

    @classmethod
    def from_spec(cls, spec: str, training_texts: Callable[[], Iterable[str]]) -> Self:
        """The tokenizer that `spec` names: byte, char, bpe:VOCAB, or a path to a tokenizer.json.

        `training_texts` is called for char (its characters, sorted, are the vocabulary) and bpe, and not otherwise.
        The same texts give the same tokenizer. A BPE on little text may end below VOCAB: see `vocab_size`.

        Raises:
          ValueError: the spec is unknown, VOCAB is too small, or the file cannot be read.
        """
        if spec == "byte":
            return cls(_byte_backend())
        if spec == "char":
            return cls(_char_backend(training_texts()))
        if spec == "bpe" or spec.startswith("bpe:"):
            return cls(_bpe_backend(_bpe_vocab(spec), training_texts()))
        if spec.endswith(".json") or Path(spec).exists():
            return cls.load(spec)
        raise ValueError(
            f"tokenizer {spec!r} is not byte, char, bpe:VOCAB or a tokenizer.json. "
            + nearest(spec, ("byte", "char", "bpe:4096", "tokenizer.json"))
        )

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Self:
        """Read a tokenizer.json, ours or any that Hugging Face `tokenizers` wrote.

        Raises:
          ValueError: the file is missing, is not a file, does not parse, or has no tokens.
        """
        try:
            text = Path(path).read_text(encoding="utf-8-sig")
        except OSError as error:
            raise ValueError(f"tokenizer file {os.fspath(path)!r} cannot be read: {error.strerror}.") from None
        except UnicodeDecodeError as error:
            raise ValueError(
                f"tokenizer file {os.fspath(path)!r} does not parse: byte {error.start} is not UTF-8."
            ) from None
        name = f"tokenizer file {os.fspath(path)!r}"
        _check_ids(text, name)
        with panics_as_errors(f"{name} does not parse"):
            backend = tokenizers.Tokenizer.from_str(text)
        if not backend.get_vocab_size():
            raise ValueError(f"{name} has no tokens: its vocabulary is empty.")
        return cls(backend)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the tokenizer.json at `path`, whole or not at all.

        Raises:
          OSError: the place cannot be written.
        """
        path = Path(path)
        temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex}.tmp")
        try:
            with temporary.open("x", encoding="utf-8") as file:
                file.write(self._backend.to_str(pretty=True))
                file.flush()
                os.fsync(file.fileno())
            os.replace(temporary, path)
        finally:
            temporary.unlink(missing_ok=True)

    def to_json(self) -> str:
        """The tokenizer.json."""
        return self._backend.to_str()

    @cached_property
    def vocab_size(self) -> int:
        """One more than the largest id: the number of rows that an embedding needs."""
        return max(self._backend.get_vocab().values()) + 1

    @cached_property
    def end_of_text(self) -> int | None:
        """The id that ends a document, or None: a character tokenizer has none."""
        ids = (self._backend.token_to_id(name) for name in END_OF_TEXT_NAMES)
        return next((token_id for token_id in ids if token_id is not None), None)

    @cached_property
    def fingerprint(self) -> str:
        """SHA-256, in hex, of the tokenizer.json with sorted keys and no spaces: equal for equal tokenizers."""
        canonical = json.dumps(json.loads(self._backend.to_str()), sort_keys=True, separators=(",", ":"))
        return hashlib.sha256(canonical.encode()).hexdigest()

    def encode(self, text: str) -> list[int]:
        """The token ids of `text`.

        Raises:
          ValueError: a character tokenizer does not know a character, `text` holds half of a surrogate pair, or a
            pattern of the tokenizer's gives up on it.
        """
        return self.encode_batch([text])[0]

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """The token ids of each text, on all cores.

        Raises:
          ValueError: as for `encode`.
        """
        for text in texts:
            self.check(text)
        return self._encode(list(texts))

    def encoding(self, backend: tokenizers.Tokenizer) -> Callable[[list[str]], list[list[int]]]:
        """How texts become ids by this tokenizer, or by another made of it; ValueError where they do not."""

        def encode(texts: list[str]) -> list[list[int]]:
            with panics_as_errors("the tokenizer cannot encode this text"):
                return [found.ids for found in backend.encode_batch_fast(texts, add_special_tokens=False)]

        return encode

    def check(self, text: str) -> None:
        """Refuse a text that cannot be encoded.

        Raises:
          ValueError: as for `encode`.
        """
        _check_is_unicode(text)
        if self._characters is not None and not self._characters.issuperset(text):
            index, char = next((i, c) for i, c in enumerate(text) if c not in self._characters)
            raise ValueError(
                f"the char tokenizer does not know {char!r} (U+{ord(char):04X}, character {index} of the text): "
                f"it has the {len(self._characters)} characters it was made from. byte and bpe:VOCAB take any text."
            )

    def least_tokens(self, text: str) -> int:
        """The fewest ids that `text` can become, without encoding it: its bytes by those of the longest token.

        0 where the kind of tokenizer allows no such bound: only a byte-level one without a normalizer loses no byte.
        """
        if self._bytes_of_token is None or self._backend.normalizer is not None:
            return 0
        return -(-len(text.encode(errors="replace")) // self._longest_token)

    @cached_property
    def _longest_token(self) -> int:
        assert self._bytes_of_token is not None
        return max(map(len, self._bytes_of_token.values()))

    def decode(self, ids: Sequence[int]) -> str:
        """The text of `ids`; bytes that are not UTF-8 become U+FFFD, and ids that stand for nothing are left out.

        Raises:
          ValueError: the tokenizer's decoder gives up on them.
        """
        known = [one for one in ids if self.has(one)] if self._byte_of_token else list(ids)
        broken = broken_bytes(known, self._byte_of_token)
        with panics_as_errors("the tokenizer cannot decode these ids"):
            if not broken:
                return self._backend.decode(known, skip_special_tokens=False)
            tokens = [self._backend.id_to_token(one) for one in known]
            return self._backend.decoder.decode([REPLACEMENT if at in broken else one for at, one in enumerate(tokens)])

    def has(self, token_id: int) -> bool:
        """Whether the id stands for a token: a padded vocabulary has ids that do not."""
        return self._backend.id_to_token(token_id) is not None

    @cached_property
    def _byte_of_token(self) -> dict[int, int]:
        return byte_tokens(self._backend)

    def description(self) -> dict[str, Any]:
        """What its tokenizer.json says."""
        return json.loads(self._backend.to_str())

    def backend(self) -> tokenizers.Tokenizer:
        """A copy of what it is made of."""
        return tokenizers.Tokenizer.from_str(self._backend.to_str())

    def id_of(self, token: str) -> int | None:
        """The id of a token, or None."""
        return self._backend.token_to_id(token)

    @cached_property
    def added_tokens(self) -> dict[str, int]:
        """The tokens that are found in a text before all others, special or not, with their ids."""
        return {token.content: token_id for token_id, token in self._backend.get_added_tokens_decoder().items()}

    @cached_property
    def special_tokens(self) -> dict[str, int]:
        """The tokens that no text is encoded as, with their ids."""
        added = self._backend.get_added_tokens_decoder()
        return {token.content: token_id for token_id, token in added.items() if token.special}

    def spell(self, token_id: int) -> bytes:
        """The bytes of one token by itself: of a byte-level one exactly, of any other those of its decoded text."""
        if self._bytes_of_token is not None:
            return self._bytes_of_token.get(token_id, b"")
        if token_id in self._byte_of_token:
            return bytes([self._byte_of_token[token_id]])
        return self.decode([token_id]).encode()

    @cached_property
    def _bytes_of_token(self) -> dict[int, bytes] | None:
        """The bytes of every token, where the decoder is byte-level; None for the other kinds."""
        if not isinstance(self._backend.decoder, decoders.ByteLevel):
            return None
        alphabet = {char: byte for byte, char in enumerate(_byte_alphabet())}
        return {
            token_id: bytes(alphabet[char] for char in token) if alphabet.keys() >= set(token) else token.encode()
            for token, token_id in self._backend.get_vocab().items()
        }


class StreamDecoder:
    """Ids in, text out, one at a time: the pieces of push and flush, joined, are decode of all the ids.

    Text comes out as soon as nothing later can change it: an unfinished UTF-8 sequence, or the end of one that a
    tokenizer of another kind may still complete, waits for the next id or for `flush`.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._bytes_of_token = tokenizer._bytes_of_token
        self._utf8 = codecs.getincrementaldecoder("utf-8")(errors="replace")
        self._context: list[int] = []  # ids whose text is out: what a decoder that looks at neighbours needs to see
        self._waiting: list[int] = []

    def push(self, token_id: int) -> str:
        """Add an id; return the text that became complete with it, often empty."""
        if self._bytes_of_token is not None:
            return self._utf8.decode(self._bytes_of_token.get(token_id, b""))
        if not self._tokenizer.has(token_id):
            return ""
        self._waiting.append(token_id)
        byte_of = self._tokenizer._byte_of_token
        certain = self._waiting[: len(self._waiting) - num_open(self._waiting, byte_of)]
        if not certain:
            return ""
        text = self._text_of(certain)
        if not byte_of and text.endswith(REPLACEMENT) and len(self._waiting) < LONGEST_UTF8_BYTES:
            # Of a decoder that is not known: perhaps the beginning of a character.
            return ""
        self._context, self._waiting = certain, self._waiting[len(certain) :]
        return text

    def flush(self) -> str:
        """The text of whatever still waits; the decoder then starts afresh."""
        text = self._utf8.decode(b"", final=True) + (self._text_of(self._waiting) if self._waiting else "")
        self._utf8.reset()
        self._context, self._waiting = [], []
        return text

    def _text_of(self, ids: list[int]) -> str:
        before = self._tokenizer.decode(self._context)
        return self._tokenizer.decode(self._context + ids)[len(before) :]


def _byte_alphabet() -> str:
    """The character that stands for each byte value in a byte-level vocabulary, GPT-2's table.

    Source: Radford et al. 2019, released encoder.py, bytes_to_unicode: printable Latin-1 characters stand for
    themselves, the 68 others take the characters from U+0100 on, in order.
    """
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    others = [byte for byte in range(256) if byte not in printable]
    return "".join(chr(byte if byte in printable else 0x100 + others.index(byte)) for byte in range(256))


def _byte_backend() -> tokenizers.Tokenizer:
    vocab = {char: byte for byte, char in enumerate(_byte_alphabet())}
    backend = tokenizers.Tokenizer(models.BPE(vocab=vocab, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens([AddedToken(END_OF_TEXT, special=True, normalized=False)])
    return backend


def _char_backend(texts: Iterable[str]) -> tokenizers.Tokenizer:
    characters: set[str] = set()
    for text in texts:
        _check_is_unicode(text)
        characters.update(text)
    if not characters:
        raise ValueError("a character tokenizer needs text to take its characters from, and there is none.")
    vocab = {char: index for index, char in enumerate(sorted(characters))}
    backend = tokenizers.Tokenizer(models.BPE(vocab=vocab, merges=[]))  # a BPE that merges nothing
    backend.decoder = decoders.Fuse()
    return backend


def _bpe_backend(vocab_size: int, texts: Iterable[str]) -> tokenizers.Tokenizer:
    backend = tokenizers.Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator(texts, trainer)
    return backend


def _bpe_vocab(spec: str) -> int:
    number = spec.removeprefix("bpe").removeprefix(":")
    if not (number.isascii() and number.isdecimal()):
        raise ValueError(f"tokenizer {spec!r} needs a vocabulary size, a whole number, as in bpe:4096.")
    if int(number) < SMALLEST_BPE:
        raise ValueError(
            f"tokenizer {spec!r} is too small: a byte-level BPE needs at least {SMALLEST_BPE} tokens "
            f"(256 byte values, {END_OF_TEXT} and a merge). Use bpe:{SMALLEST_BPE} or more, or byte."
        )
    return int(number)


def _character_set(description: dict) -> frozenset[str] | None:
    """The characters of a character tokenizer, and None for any other: only it drops what it does not know."""
    model = description["model"]
    is_char = (
        model["type"] == "BPE"
        and not model["merges"]
        and model["unk_token"] is None
        and description["pre_tokenizer"] is None
        and all(len(token) == 1 for token in model["vocab"])
    )
    return frozenset(model["vocab"]) if is_char else None


@contextmanager
def panics_as_errors(what: str) -> Iterator[None]:
    """Raise ValueError for whatever the binding raises: Exception, and panics that are not even that."""
    try:
        yield
    except (KeyboardInterrupt, SystemExit, GeneratorExit, MemoryError):
        raise
    except BaseException as error:
        reason = " ".join(str(error).split()).rstrip(".")[:200]
        raise ValueError(f"{what}: {reason}.") from None


def _check_ids(text: str, name: str) -> None:
    """Refuse a tokenizer.json with ids that no model has, before anything of that length is made of them."""
    try:
        found = json.loads(text)
        vocab = found["model"]["vocab"]
        # A list of (token, score) pairs numbers itself.
        ids = [*(vocab.values() if isinstance(vocab, dict) else ()), *(one["id"] for one in found["added_tokens"])]
        largest = max((one for one in ids if isinstance(one, int)), default=0)
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return  # `tokenizers` says what is wrong with it
    if largest >= MOST_IDS:
        raise ValueError(f"{name} has the token id {largest}: ids are below {MOST_IDS:,}.")


def _check_is_unicode(text: str) -> None:
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise ValueError(
            f"the text cannot be encoded: character {error.start} is half of a surrogate pair "
            f"(U+{ord(text[error.start]):04X}), which stands for no character."
        ) from None
