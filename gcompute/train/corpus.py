"""Text to tokens: where the training text comes from, its split, and the memory-mapped token files it becomes.

A directory of token files holds train.bin and val.bin (little-endian uint16, or uint32 above 65,536 tokens),
tokenizer.json, and meta.json, which says what they were made from. meta.json is written last and removed first, and
every file appears under its name only when it is whole, so a directory without a true meta.json is simply made again.
"""

import hashlib
import itertools
import json
import os
import re
import sys
import sysconfig
import time
import tokenize
import uuid
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np

from gcompute.config.fields import nearest
from gcompute.config.train import DataConfig
from gcompute.model.tokenizer import Tokenizer

FORMAT = 1
PIECE_CHARACTERS = 1 << 17  # a long text is encoded in pieces, so that all cores have one
BATCH_CHARACTERS = 1 << 20  # encoded at a time: an encoding takes about 100 bytes a token while it lives
BPE_SAMPLE_BYTES = 1 << 26  # a BPE learns from at most about this much text, taken evenly
EDGE_BYTES = 1 << 16
STALE_S = 3600
LEFT_OUT = frozenset({"site-packages", "dist-packages", "__pycache__"})

Progress = Callable[[str, int, int], None]  # what is being done, files or bytes done, files or bytes in all


@dataclass(frozen=True, slots=True, kw_only=True)
class Source:
    """The files that a corpus is read from, and a fingerprint that changes when they do."""

    name: str
    paths: dict[str, Path]  # by name: the path relative to the root, with slashes
    read: Callable[[Path], str | None]  # None: not text
    fingerprint: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Document:
    """One text, read when it is needed."""

    name: str
    num_bytes: int
    read: Callable[[], str | None]

    def text(self) -> str:
        text = self.read()
        if text is None:
            raise ValueError(f"data file {self.name!r} changed while it was read. Start again.")
        return text


@dataclass(frozen=True, slots=True, kw_only=True)
class Documents:
    """A corpus split in two. One file is cut near its end; several are dealt out whole and get an end of text each."""

    train: tuple[Document, ...]
    val: tuple[Document, ...]
    separated: bool
    num_skipped: int


@dataclass(frozen=True, slots=True, kw_only=True)
class TokenizedCorpus:
    """Both splits as memory-mapped token ids; bytes are of UTF-8 text, for bits per byte."""

    tokenizer: Tokenizer
    train: np.memmap
    val: np.memmap
    num_train_bytes: int
    num_val_bytes: int
    num_skipped: int  # files that are not text
    reused: bool


def prepare(
    data: DataConfig, directory: Path, *, progress: Progress | None = None, source: Source | None = None
) -> TokenizedCorpus:
    """The tokens of `data`, from the token files in `directory` where they are whole and of these very files.

    `source` stands for `find_source(data.data)`, where that is already at hand.

    Raises:
      ValueError: the data is missing, empty, binary or too short, the tokenizer spec is wrong, or `directory` cannot
        be written.
    """
    source = source or find_source(data.data)
    progress = progress or (lambda stage, done, total: None)
    made_from = {
        "format": FORMAT,
        "source": source.fingerprint,
        "tokenizer": _tokenizer_key(data.tokenizer),
        "val_fraction": data.val_fraction,
    }
    try:
        return _open(directory, made_from)
    except (OSError, ValueError, KeyError, TypeError):
        pass  # absent, cut short, damaged, or of something else: all are mended by making it again
    try:
        documents = split_documents(source, data.val_fraction, progress)
        tokenizer = _make_tokenizer(data.tokenizer, documents, progress)
        directory.mkdir(parents=True, exist_ok=True)
        return _build(directory, made_from, source.name, documents, tokenizer, progress)
    except OSError as error:
        raise ValueError(
            f"{str(error.filename or directory)!r} cannot be read or written: {error.strerror}. "
            f"The token files need space in {str(directory)!r} and the right to write there."
        ) from None


def find_source(data: str) -> Source:
    """The files that `data` names: stdlib, a text file, or a directory, without what is hidden or installed in it.

    Raises:
      ValueError: there is no such file or directory, or nothing in it.
    """
    if data == "stdlib":
        return stdlib_source(Path(sysconfig.get_path("stdlib")))
    path = Path(data)
    try:
        if path.is_dir():
            paths = _walk(path)
            stats = {name: file.stat() for name, file in paths.items()}
            listing = [(name, stat.st_size, stat.st_mtime_ns) for name, stat in stats.items()]
            if not paths:
                raise ValueError(f"data directory {data!r} holds no files. Give one with text files, or stdlib.")
            return Source(name=data, paths=paths, read=_utf8_or_none, fingerprint=_digest("directory", listing))
        with path.open("rb") as file:
            content = hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise ValueError(
            f"data {data!r} cannot be read: {error.strerror}. Give stdlib, a text file or a directory of text files. "
            + nearest(data, ("stdlib",))
        ) from None
    return Source(name=data, paths={path.name: path}, read=_utf8, fingerprint=_digest("file", content))


def stdlib_source(root: Path) -> Source:
    """The Python source files under `root`, a standard library, without installed packages.

    Raises:
      ValueError: there are none, as where Python runs from a zip file.
    """
    paths = {name: path for name, path in _walk(root).items() if name.endswith(".py")}
    if not paths:
        raise ValueError(f"this Python has no source text in {str(root)!r}. Give a text file or a directory instead.")
    sizes = [(name, path.stat().st_size) for name, path in paths.items()]
    return Source(name="stdlib", paths=paths, read=_python, fingerprint=_digest("stdlib", sys.version, sizes))


def split_documents(source: Source, val_fraction: float, progress: Progress) -> Documents:
    """Both splits of the text of `source`.

    One text: its first int(n * (1 - val_fraction)) characters train, the rest validates. Several: a file validates
    where the hash of its name is below val_fraction, so that adding one moves no other; neither split is left empty.

    Raises:
      ValueError: no file holds text.
    """
    files = []
    num_skipped = 0
    for index, (name, path) in enumerate(source.paths.items()):
        progress("reading", index, len(source.paths))
        text = source.read(path)
        if text is None:
            num_skipped += 1
        elif text:
            files.append(Document(name=name, num_bytes=len(text.encode()), read=partial(source.read, path)))
    progress("reading", len(source.paths), len(source.paths))
    if not files:
        what = f"holds no text: {num_skipped} files are binary, the rest empty" if num_skipped else "is empty"
        raise ValueError(f"data {source.name!r} {what}. Give a file with text in it, a directory of them, or stdlib.")
    if len(files) == 1:
        text = files[0].text()
        end = int(len(text) * (1 - val_fraction))
        halves = [
            Document(name=files[0].name, num_bytes=len(half.encode()), read=partial(str, half))
            for half in (text[:end], text[end:])
        ]
        return Documents(train=(halves[0],), val=(halves[1],), separated=False, num_skipped=num_skipped)
    shares = {file.name: _share(file.name) for file in files}
    lowest, *_, highest = sorted(shares.values())
    threshold = min(max(val_fraction, np.nextafter(lowest, 1)), highest)
    return Documents(
        train=tuple(file for file in files if shares[file.name] >= threshold),
        val=tuple(file for file in files if shares[file.name] < threshold),
        separated=True,
        num_skipped=num_skipped,
    )


def pieces(text: str, length: int = PIECE_CHARACTERS) -> Iterator[str]:
    """Cut a text into pieces of about `length` characters that a byte-level BPE encodes as it would the whole.

    A cut falls before a single white-space character between two others: no word of GPT-2's pattern spans that place,
    and none looks past it. Text with no such place for another `length` characters is cut where it stands.
    """
    start = 0
    while len(text) - start > 2 * length:
        place = re.compile(r"(?<=\S)\s(?=\S)").search(text, start + length, start + 2 * length)
        end = place.start() if place else start + 2 * length
        yield text[start:end]
        start = end
    yield text[start:]


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
        for index, piece in enumerate(piece for document in sources for piece in pieces(document.text())):
            progress("training the tokenizer", min(done, num_bytes), num_bytes)
            done += len(piece.encode())
            if index % stride == 0:
                yield piece
        progress("training the tokenizer", num_bytes, num_bytes)

    return Tokenizer.from_spec(spec, texts)


def _build(
    directory: Path,
    made_from: dict[str, object],
    name: str,
    documents: Documents,
    tokenizer: Tokenizer,
    progress: Progress,
) -> TokenizedCorpus:
    _remove_stale(directory)
    dtype = np.dtype("<u2" if tokenizer.vocab_size <= 1 << 16 else "<u4")
    total = sum(document.num_bytes for document in documents.train + documents.val)
    end_of_text = tokenizer.end_of_text if documents.separated else None
    with (
        _replacing(directory / "meta.json") as meta_path,  # the outermost takes its name last
        _replacing(directory / "train.bin") as train_path,
        _replacing(directory / "val.bin") as val_path,
    ):
        done, splits = 0, {}
        for split, path in (("train", train_path), ("val", val_path)):
            texts = getattr(documents, split)
            num_bytes = 0
            with path.open("wb") as file:
                for ids, batch_bytes in _encoded(texts, tokenizer, end_of_text):
                    file.write(np.array(ids, dtype).tobytes())
                    num_bytes += batch_bytes
                    progress("tokenizing", done + num_bytes, total)
                file.flush()
                os.fsync(file.fileno())
            done += num_bytes
            num_tokens = path.stat().st_size // dtype.itemsize
            if num_tokens < 2:
                raise ValueError(
                    f"data {name!r} is too short: its {split} split has {num_tokens} tokens, and needs at least 2. "
                    "Give more text, or another val_fraction."
                )
            splits[split] = {"num_tokens": num_tokens, "num_bytes": num_bytes, "edges_sha256": _edges(path)}
        meta = {
            "made_from": made_from,
            "tokenizer_fingerprint": tokenizer.fingerprint,
            "dtype": dtype.str,
            "num_skipped": documents.num_skipped,
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


def _encoded(
    documents: Iterable[Document], tokenizer: Tokenizer, end_of_text: int | None
) -> Iterator[tuple[list[int], int]]:
    """Token ids of one batch of pieces after another, each with its UTF-8 bytes of text."""
    batch: list[str] = []
    ends: list[list[int]] = []

    def encode() -> tuple[list[int], int]:
        encoded = tokenizer.encode_batch(batch)
        ids = list(itertools.chain.from_iterable(ids + end for ids, end in zip(encoded, ends, strict=True)))
        return ids, sum(len(piece.encode()) for piece in batch)

    num_characters = 0
    for document in documents:
        for piece in pieces(document.text()):
            batch.append(piece)
            ends.append([])
            num_characters += len(piece)
            if num_characters >= BATCH_CHARACTERS:
                yield encode()
                batch, ends, num_characters = [], [], 0
        if end_of_text is not None:
            batch.append("")
            ends.append([end_of_text])
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
    for split in ("train", "val"):
        path = directory / f"{split}.bin"
        if path.stat().st_size != meta[split]["num_tokens"] * np.dtype(meta["dtype"]).itemsize:
            raise ValueError(f"{path} has been cut short")
        if _edges(path) != meta[split]["edges_sha256"]:
            raise ValueError(f"{path} is of something else")
    return _mapped(directory / "train.bin", directory / "val.bin", meta, tokenizer, reused=True)


def _mapped(train_path: Path, val_path: Path, meta: dict, tokenizer: Tokenizer, *, reused: bool) -> TokenizedCorpus:
    return TokenizedCorpus(
        tokenizer=tokenizer,
        train=np.memmap(train_path, dtype=meta["dtype"], mode="r"),
        val=np.memmap(val_path, dtype=meta["dtype"], mode="r"),
        num_train_bytes=meta["train"]["num_bytes"],
        num_val_bytes=meta["val"]["num_bytes"],
        num_skipped=meta["num_skipped"],
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


def _edges(path: Path) -> str:
    """SHA-256 of a file's first and last 64 KiB: enough to tell other tokens, at no cost for large files."""
    with path.open("rb") as file:
        start = file.read(EDGE_BYTES)
        file.seek(max(0, path.stat().st_size - EDGE_BYTES))
        return hashlib.sha256(start + file.read(EDGE_BYTES)).hexdigest()


def _walk(root: Path) -> dict[str, Path]:
    """Every file under `root` by its relative name, in sorted order."""
    found = {}
    for folder, folders, names in os.walk(root):
        folders[:] = [name for name in folders if name not in LEFT_OUT and not name.startswith(".")]
        for name in names:
            path = Path(folder, name)
            if not name.startswith(".") and path.is_file():
                found[path.relative_to(root).as_posix()] = path
    return dict(sorted(found.items()))


def _share(name: str) -> float:
    """A number in [0, 1) that depends on the name alone."""
    return int.from_bytes(hashlib.sha256(name.encode(errors="surrogateescape")).digest()[:6], "big") / 2**48


def _digest(*parts: object) -> str:
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()


def _python(path: Path) -> str | None:
    try:
        with tokenize.open(path) as file:
            return file.read()
    except (SyntaxError, UnicodeDecodeError):
        return None  # the tests of the standard library hold files that are wrong on purpose


def _utf8(path: Path) -> str:
    content = path.read_bytes()
    bad = content.find(0)
    try:
        text = content.decode()
    except UnicodeDecodeError as error:
        bad = error.start if bad < 0 else min(bad, error.start)
        text = ""
    if bad >= 0:
        raise ValueError(
            f"data file {str(path)!r} is not UTF-8 text: byte 0x{content[bad]:02X} at offset {bad}. "
            "Convert it to UTF-8, or give another file."
        )
    return text


def _utf8_or_none(path: Path) -> str | None:
    try:
        return _utf8(path)
    except ValueError:
        return None
