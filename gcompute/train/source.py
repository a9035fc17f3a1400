"""Where training text comes from: the files that `data` names, what of them is left out and why, their split in two."""

import hashlib
import json
import os
import stat
import sys
import sysconfig
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import numpy as np

from gcompute.config.fields import nearest
from gcompute.train.folder import Skipped, by_reason, walk
from gcompute.train.text_file import CHUNK_BYTES, NotText, Pieces, is_jsonl, read_python, read_text, utf8_bytes

Progress = Callable[[str, int, int], None]  # what is being done, files or bytes done, files or bytes in all


@dataclass(frozen=True, slots=True, kw_only=True)
class Source:
    """The files that a corpus is read from. kind: what besides the files decides their text."""

    name: str
    paths: dict[str, Path]  # by name: the path relative to the root, with slashes
    read: Callable[[Path], Pieces]  # raises NotText
    kind: tuple[str | int, ...]
    skipped: Skipped = ()
    is_file: bool = False  # data names one file: if it holds no text, that is an error

    def fingerprint(self) -> str:
        """SHA-256 of the kind and of every file's content, which is read whole: size and time of a file do not tell.

        Raises:
          OSError: a file cannot be read.
        """
        return digest(*self.kind, self.skipped, [(name, content_sha256(path)) for name, path in self.paths.items()])


@dataclass(frozen=True, slots=True, kw_only=True)
class Document:
    """The text of a file or of a part of one, read piece by piece whenever it is needed."""

    name: str
    num_bytes: int  # of UTF-8
    read: Callable[[], Pieces]

    def pieces(self) -> Pieces:
        """The text in pieces; None where a document ends."""
        try:
            yield from self.read()
        except NotText:
            raise ValueError(f"data file {self.name!r} changed while it was read. Start again.") from None

    def text(self) -> str:
        """The whole text, in memory."""
        return "".join(piece for piece in self.pieces() if piece is not None)


@dataclass(frozen=True, slots=True, kw_only=True)
class Documents:
    """A corpus split in two. One text is cut near its end; several files are dealt out whole, one of JSONL by records.

    separated: documents end, each with an end of text.
    """

    train: tuple[Document, ...]
    val: tuple[Document, ...]
    separated: bool
    skipped: Skipped
    num_files: int

    @property
    def left_out(self) -> str:
        """How many files were left out, and why, in one line; "" where none was."""
        if not self.skipped:
            return ""
        return f"{len(self.skipped)} of {self.num_files} files left out: {by_reason(self.skipped)}"


def find_source(data: str, text_mb: float | None = None) -> Source:
    """The files that `data` names: stdlib, a text file, a pipe, or a directory, with the folders that it links to.

    What is hidden or installed in a directory is no part of it. A pipe is read once, to its end or as far as `limited`
    to `text_mb` needs, and kept in a temporary file for as long as the source is.

    Raises:
      ValueError: there is no such file or directory, nothing in it, or it is a device.
    """
    if data == "stdlib":
        return stdlib_source(Path(sysconfig.get_path("stdlib")))
    path = Path(data)
    try:
        mode = path.stat().st_mode
        if stat.S_ISDIR(mode):
            return _directory_source(data)
        if stat.S_ISFIFO(mode):
            return _pipe_source(path, text_mb)
        if not stat.S_ISREG(mode) and data != os.devnull:
            raise ValueError(
                f"data {data!r} is a device or a socket, which may never end. Give a text file, a pipe or a directory."
            )
        path.open("rb").close()
    except OSError as error:
        raise ValueError(
            f"data {data!r} cannot be read: {error.strerror}. Give stdlib, a text file or a directory of text files. "
            + nearest(data, ("stdlib",))
        ) from None
    return Source(name=data, paths={path.name: path}, read=read_text, kind=("file", is_jsonl(path.name)), is_file=True)


def is_pipe(data: str) -> bool:
    """Whether `data` names a pipe, which is read to its end and may be waited for."""
    return data != "stdlib" and Path(data).is_fifo()


def stdlib_source(root: Path) -> Source:
    """The Python source files under `root`, a standard library, without installed packages.

    Raises:
      ValueError: there are none, as where Python runs from a zip file.
    """
    found, _ = walk(root, follow=False)
    paths = {name: path for name, path in found.items() if name.endswith(".py")}
    if not paths:
        raise ValueError(f"this Python has no source text in {str(root)!r}. Give a text file or a directory instead.")
    return Source(name="stdlib", paths=paths, read=read_python, kind=("stdlib", sys.version))


def limited(source: Source, text_mb: float | None) -> Source:
    """About `text_mb` megabytes (10^6 bytes) of a source; all of it where that is None.

    Of several files whole ones are taken, at least one, in an order that depends on their names alone, so that they are
    of all kinds; their sizes on disk count, compressed or not. Of one file its first characters are taken.
    """
    if text_mb is None:
        return source
    left = int(text_mb * 1e6)
    kind = ("limited", left, *source.kind)
    if len(source.paths) == 1:
        return replace(source, read=lambda path: _beginning(source.read(path), left), kind=kind)
    taken = []
    # Another order than that of the split, which would take the files that validate first.
    for name in sorted(source.paths, key=lambda name: _share(f"{name} limited")):
        taken.append(name)
        left -= source.paths[name].stat().st_size
        if left <= 0:
            break
    return replace(source, paths={name: source.paths[name] for name in sorted(taken)}, kind=kind)


def split_documents(source: Source, val_fraction: float, progress: Progress) -> Documents:
    """Both splits of the text of `source`, which is read once here, and not kept.

    One text: its first int(n * (1 - val_fraction)) characters train, the rest validates; of JSONL, the records that
    begin among them. Several: a file validates where the hash of its name is below val_fraction, so that adding one
    moves no other; neither split is left empty.

    Raises:
      ValueError: no file holds text.
    """
    files, skipped = _files_of_text(source, progress)
    about = {"skipped": skipped, "num_files": len(source.paths) + len(source.skipped)}
    if len(files) == 1:
        train, val, separated = _cut(files[0], val_fraction)
        return Documents(train=(train,), val=(val,), separated=separated, **about)
    shares = {file.name: _share(file.name) for file in files}
    lowest, *_, highest = sorted(shares.values())
    threshold = min(max(val_fraction, np.nextafter(lowest, 1)), highest)
    ended = _all_ended(files)
    return Documents(
        train=tuple(file for file in ended if shares[file.name] >= threshold),
        val=tuple(file for file in ended if shares[file.name] < threshold),
        separated=True,
        **about,
    )


def two_sources(source: Source, validation: Source, progress: Progress) -> Documents:
    """All the text of `source` to train on and all of `validation` to validate on, both read once here, and not kept.

    Raises:
      ValueError: no file of one of them holds text.
    """
    (train, skipped), (val, also_skipped) = (_files_of_text(one, progress) for one in (source, validation))
    several = len(train) > 1 or len(val) > 1
    return Documents(
        train=_all_ended(train) if several else tuple(train),
        val=_all_ended(val) if several else tuple(val),
        separated=several or any(one.kind[-1] is True for one in (source, validation)),  # JSONL
        skipped=tuple(sorted(skipped + also_skipped)),
        num_files=sum(len(one.paths) + len(one.skipped) for one in (source, validation)),
    )


def _files_of_text(source: Source, progress: Progress) -> tuple[list[Document], Skipped]:
    """The files of a source that hold text, in the order of their names, and what is left out.

    Raises:
      ValueError: none does.
    """
    files, skipped = [], list(source.skipped)
    for index, (name, path) in enumerate(source.paths.items()):
        progress("reading", index, len(source.paths))
        try:
            num_bytes = sum(utf8_bytes(piece) for piece in source.read(path) if piece is not None)
        except NotText as error:
            if source.is_file:
                raise
            skipped.append((name, error.reason))
        except PermissionError:
            skipped.append((name, "no permission to read"))
        else:
            if num_bytes:
                files.append(Document(name=name, num_bytes=num_bytes, read=partial(source.read, path)))
    progress("reading", len(source.paths), len(source.paths))
    if not files:
        what = f"holds no text: {by_reason(skipped)}; the rest is empty" if skipped else "is empty"
        raise ValueError(f"data {source.name!r} {what}. Give a file with text in it, a directory of them, or stdlib.")
    return files, tuple(sorted(skipped))


def _all_ended(files: list[Document]) -> tuple[Document, ...]:
    return tuple(replace(file, read=partial(_ended, file.read)) for file in files)


def _directory_source(data: str) -> Source:
    paths, skipped = walk(Path(data), follow=True)
    if not paths:
        what = f"no files that can be read: {by_reason(skipped)}" if skipped else "no files"
        raise ValueError(f"data directory {data!r} holds {what}. Give one with text files, or stdlib.")
    return Source(name=data, paths=paths, read=read_text, kind=("directory",), skipped=skipped)


def _pipe_source(path: Path, text_mb: float | None) -> Source:
    kept = tempfile.NamedTemporaryFile(prefix="gcompute-pipe-")  # noqa: SIM115  it goes with the last reader of it
    try:
        with path.open("rb") as pipe:
            # Text is no shorter than what it is compressed to; a record of JSONL is longer than its text.
            left = sys.maxsize if text_mb is None or is_jsonl(path.name) else int(text_mb * 1e6) + CHUNK_BYTES
            while left > 0 and (chunk := pipe.read(min(left, CHUNK_BYTES))):
                kept.write(chunk)
                left -= len(chunk)
        kept.flush()
    except OSError as error:
        kept.close()
        raise ValueError(
            f"the pipe {str(path)!r} cannot be kept in {tempfile.gettempdir()!r}: {error.strerror}. Set TMPDIR to a"
            " directory with more space, or save the text in a file and give that."
        ) from None

    def read(where: Path, kept: object = kept) -> Pieces:
        return read_text(where, name=str(path))

    paths = {path.name: Path(kept.name)}
    return Source(name=str(path), paths=paths, read=read, kind=("file", is_jsonl(path.name)), is_file=True)


def _beginning(pieces: Pieces, num_bytes: int) -> Pieces:
    """The first `num_bytes` bytes of UTF-8, without a character that they end in the middle of."""
    for piece in pieces:
        if piece is None:
            yield None
            continue
        size = utf8_bytes(piece)
        yield piece if size <= num_bytes else piece.encode()[:num_bytes].decode(errors="ignore")
        num_bytes -= size
        if num_bytes <= 0:
            return


def _ended(read: Callable[[], Pieces]) -> Pieces:
    """The pieces, with None after the last in any case."""
    piece: str | None = None
    for piece in read():
        yield piece
    if piece is not None:
        yield None


def _cut(file: Document, val_fraction: float) -> tuple[Document, Document, bool]:
    """The beginning and the end of one file, and whether it holds documents that end, which are then left whole."""
    num_characters = num_documents = 0
    for piece in file.pieces():
        num_characters += len(piece or "")
        num_documents += piece is None
    end = int(num_characters * (1 - val_fraction))
    if num_documents > 1:
        end = _boundary(file.pieces(), end)
    read = partial(_part, file.read, 0, end)
    num_bytes = sum(utf8_bytes(piece) for piece in read() if piece is not None)
    train = Document(name=file.name, num_bytes=num_bytes, read=read)
    rest = partial(_part, file.read, end, None)
    val = Document(name=file.name, num_bytes=file.num_bytes - num_bytes, read=rest)
    return train, val, num_documents > 0


def _boundary(pieces: Pieces, wanted: int) -> int:
    """Characters up to the first document that begins at `wanted` or later; up to the last one where none does."""
    position = start = 0
    begins = True
    for piece in pieces:
        if piece is None:
            begins = True
            continue
        if begins and position:
            start = position
            if start >= wanted:
                break
        begins = False
        position += len(piece)
    return start


def _part(read: Callable[[], Pieces], start: int, stop: int | None) -> Pieces:
    """Characters `start` to `stop` of a text, to its end where that is None, and the ends of documents among them."""
    position = 0
    for piece in read():
        if piece is None:
            if position > start and (stop is None or position <= stop):
                yield None
            continue
        if stop is not None and position >= stop:
            return
        part = piece[max(0, start - position) : None if stop is None else stop - position]
        position += len(piece)
        if part:
            yield part


def _share(name: str) -> float:
    """A number in [0, 1) that depends on the name alone."""
    return int.from_bytes(hashlib.sha256(name.encode(errors="surrogateescape")).digest()[:6], "big") / 2**48


def digest(*parts: object) -> str:
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()


def content_sha256(path: Path) -> str:
    """SHA-256 of a file, about 0.6 s per GB where the processor has instructions for it."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
