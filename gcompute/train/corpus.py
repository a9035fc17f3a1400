"""Text to tokens: where the training text comes from, its split, and the memory-mapped token files it becomes.

A directory of token files holds train.bin and val.bin (little-endian uint16, or uint32 above 65,536 tokens),
tokenizer.json, and meta.json, which says what they were made from and has their checksums. meta.json is written last
and removed first, and every file appears under its name only when it is whole, so a directory without a true meta.json
is simply made again.
"""

import itertools
import json
import os
import re
import time
import uuid
import zlib
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from gcompute.config.train import DataConfig
from gcompute.model.tokenizer import Tokenizer
from gcompute.train.mapped import map_tokens
from gcompute.train.source import (
    Document,
    Documents,
    Progress,
    Source,
    find_source,
    limited,
    split_documents,
    two_sources,
)
from gcompute.train.text_file import Pieces, utf8_bytes

FORMAT = 2
PIECE_CHARACTERS = 1 << 17  # a long text is encoded in pieces, so that all cores have one
BATCH_CHARACTERS = 1 << 20  # encoded at a time: an encoding takes about 100 bytes a token while it lives
BPE_SAMPLE_BYTES = 1 << 26  # a BPE learns from at most about this much text, taken evenly
STALE_S = 3600
CUT = re.compile(r"(?<=\S)\s(?=\S)")


@dataclass(frozen=True, slots=True, kw_only=True)
class TokenizedCorpus:
    """Both splits as memory-mapped token ids; bytes are of UTF-8 text, for bits per byte."""

    tokenizer: Tokenizer
    train: np.memmap
    val: np.memmap
    num_train_bytes: int
    num_val_bytes: int
    left_out: str  # how many files were not read, and why, in one line; "" where all were
    reused: bool


def prepare(
    data: DataConfig, directory: Path, *, progress: Progress | None = None, source: Source | None = None
) -> TokenizedCorpus:
    """The tokens of `data`, from the token files in `directory` where they are whole and of these very files.

    To be sure of that, the text and the tokens are read whole each time: about 0.6 and 0.3 s per GB.
    `source` stands for `find_source(data.data)`, where that is already at hand.

    Raises:
      ValueError: the data is missing, empty, binary or too short, the tokenizer spec is wrong, or `directory` cannot
        be written.
    """
    validation = _validation_source(data)
    source = limited(source or find_source(data.data, data.text_mb), data.text_mb)
    progress = progress or (lambda stage, done, total: None)
    try:
        made_from = {
            "format": FORMAT,
            "source": source.fingerprint(),
            "tokenizer": _tokenizer_key(data.tokenizer),
            "val_fraction": data.val_fraction if validation is None else None,
            **({} if validation is None else {"validation": validation.fingerprint()}),
        }
        # Absent, cut short, damaged, or of something else: all are mended by making it again.
        with suppress(OSError, ValueError, KeyError, TypeError, RecursionError):
            return _open(directory, made_from)
        if validation is None:
            documents = split_documents(source, data.val_fraction, progress)
        else:
            documents = two_sources(source, validation, progress)
        tokenizer = _make_tokenizer(data.tokenizer, documents, progress)
        directory.mkdir(parents=True, exist_ok=True)
        names = {"train": source.name, "val": (validation or source).name}
        return _build(directory, made_from, names, documents, tokenizer, progress)
    except OSError as error:
        raise ValueError(
            f"{str(error.filename or directory)!r} cannot be read or written: {error.strerror}. "
            f"The token files need space in {str(directory)!r} and the right to write there."
        ) from None


def _validation_source(data: DataConfig) -> Source | None:
    """The files of a validation text of its own.

    Raises:
      ValueError: it is not there, or nothing in it.
    """
    if data.validation is None:
        return None
    try:
        return find_source(data.validation)
    except ValueError as error:
        raise ValueError(f"the validation text: {error}") from None


def pieces(texts: Iterable[str | None], length: int = PIECE_CHARACTERS) -> Pieces:
    """Cut documents into pieces of about `length` characters that a byte-level BPE encodes as it would the whole.

    A cut falls before a single white-space character between two others: no word of GPT-2's pattern spans that place,
    and none looks past it. Text with no such place for another `length` characters is cut where it stands. None ends a
    document, and stays. How `texts` is cut moves no cut: only 2 `length` characters are looked at, and held.
    """
    rest = ""
    for text in texts:
        if text is None:
            if rest:
                yield rest
            rest = ""
            yield None
            continue
        text, start = rest + text if rest else text, 0
        while len(text) - start > 2 * length:
            place = CUT.search(text, start + length, start + 2 * length)
            end = place.start() if place else start + 2 * length
            yield text[start:end]
            start = end
        rest = text[start:]
    if rest:
        yield rest


def _tokenizer_key(spec: str) -> str:
    """What of a tokenizer decides the tokens: the spec, or, where that is a file, what the file holds."""
    if spec in ("byte", "char") or spec == "bpe" or spec.startswith("bpe:"):
        return spec
    return Tokenizer.from_spec(spec, tuple).fingerprint


def _make_tokenizer(spec: str, documents: Documents, progress: Progress) -> Tokenizer:
    def texts() -> Iterator[str]:
        # A character tokenizer refuses what it has not seen, so it sees both splits; a BPE learns from train alone.
        sources = documents.train + documents.val if spec == "char" else documents.train
        num_bytes = sum(document.num_bytes for document in sources)
        stride = 1 if spec == "char" else max(1, -(-num_bytes // BPE_SAMPLE_BYTES))
        done = 0
        cut = (piece for document in sources for piece in pieces(document.pieces()) if piece is not None)
        for index, piece in enumerate(cut):
            progress("training the tokenizer", min(done, num_bytes), num_bytes)
            done += utf8_bytes(piece)
            if index % stride == 0:
                yield piece
        progress("training the tokenizer", num_bytes, num_bytes)

    return Tokenizer.from_spec(spec, texts)


def _build(
    directory: Path,
    made_from: dict[str, object],
    names: dict[str, str],
    documents: Documents,
    tokenizer: Tokenizer,
    progress: Progress,
) -> TokenizedCorpus:
    _remove_stale(directory)
    dtype = np.dtype("<u2" if tokenizer.vocab_size <= 1 << 16 else "<u4")
    total = sum(document.num_bytes for document in documents.train + documents.val)
    with (
        _replacing(directory / "meta.json") as meta_path,  # the outermost takes its name last
        _replacing(directory / "train.bin") as train_path,
        _replacing(directory / "val.bin") as val_path,
    ):
        done, splits = 0, {}
        for split, path in (("train", train_path), ("val", val_path)):
            texts = getattr(documents, split)
            num_bytes = crc32 = 0
            with path.open("wb") as file:
                for ids, batch_bytes in _encoded(texts, tokenizer):
                    content = np.array(ids, dtype).tobytes()
                    file.write(content)
                    crc32 = zlib.crc32(content, crc32)
                    num_bytes += batch_bytes
                    progress("tokenizing", done + num_bytes, total)
                file.flush()
                os.fsync(file.fileno())
            done += num_bytes
            num_tokens = path.stat().st_size // dtype.itemsize
            if num_tokens < 2:
                raise ValueError(
                    f"data {names[split]!r} is too short: its {split} split has {num_tokens} tokens, and needs at least"
                    " 2. Give more text, or another val_fraction."
                )
            splits[split] = {"num_tokens": num_tokens, "num_bytes": num_bytes, "crc32": crc32}
        meta = {
            "made_from": made_from,
            "tokenizer_fingerprint": tokenizer.fingerprint,
            "dtype": dtype.str,
            "left_out": documents.left_out,
            "largest_bpe_sample_bytes": BPE_SAMPLE_BYTES,
            **splits,
        }
        with meta_path.open("w", encoding="utf-8") as file:
            json.dump(meta, file, indent=1)
            file.flush()
            os.fsync(file.fileno())
        # Mapped before the files take their names: another process that makes other tokens here cannot change these.
        built = _mapped(train_path, val_path, meta, tokenizer, reused=False)
        (directory / "meta.json").unlink(missing_ok=True)
        tokenizer.save(directory / "tokenizer.json")
    return built


def _encoded(documents: Iterable[Document], tokenizer: Tokenizer) -> Iterator[tuple[list[int], int]]:
    """Token ids of one batch of pieces after another, each with its UTF-8 bytes of text."""
    end = [] if tokenizer.end_of_text is None else [tokenizer.end_of_text]
    batch: list[str] = []
    ends: list[list[int]] = []

    def encode() -> tuple[list[int], int]:
        encoded = tokenizer.encode_batch(batch)
        ids = list(itertools.chain.from_iterable(ids + after for ids, after in zip(encoded, ends, strict=True)))
        return ids, sum(utf8_bytes(piece) for piece in batch)

    num_characters = 0
    for document in documents:
        for piece in pieces(document.pieces()):
            batch.append(piece or "")
            ends.append(end if piece is None else [])
            num_characters += len(piece or "")
            if num_characters >= BATCH_CHARACTERS:
                yield encode()
                batch, ends, num_characters = [], [], 0
    if batch:
        yield encode()


def _open(directory: Path, made_from: dict[str, object]) -> TokenizedCorpus:
    """The token files in `directory`; any of several exceptions where they are not whole or of something else."""
    meta = json.loads((directory / "meta.json").read_text(encoding="utf-8"))
    if meta["made_from"] != made_from:
        raise ValueError("made from something else")
    tokenizer = Tokenizer.load(directory / "tokenizer.json")
    if tokenizer.fingerprint != meta["tokenizer_fingerprint"]:
        raise ValueError("another tokenizer")
    return _mapped(directory / "train.bin", directory / "val.bin", meta, tokenizer, reused=True)


def _mapped(train_path: Path, val_path: Path, meta: dict, tokenizer: Tokenizer, *, reused: bool) -> TokenizedCorpus:
    train, val = (
        map_tokens(path, meta["dtype"], num_tokens=meta[split]["num_tokens"], crc32=meta[split]["crc32"])
        for split, path in (("train", train_path), ("val", val_path))
    )
    return TokenizedCorpus(
        tokenizer=tokenizer,
        train=train,
        val=val,
        num_train_bytes=meta["train"]["num_bytes"],
        num_val_bytes=meta["val"]["num_bytes"],
        left_out=meta["left_out"],
        reused=reused,
    )


@contextmanager
def _replacing(path: Path) -> Iterator[Path]:
    """A name of its own to write to, which replaces `path` at the end, or goes when the block fails."""
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex}.tmp")
    try:
        yield temporary
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def _remove_stale(directory: Path) -> None:
    """Remove what killed processes left: a temporary file that nothing has written to for an hour."""
    for path in directory.glob(".*.tmp"):
        with suppress(FileNotFoundError):
            if time.time() - path.stat().st_mtime > STALE_S:
                path.unlink()
