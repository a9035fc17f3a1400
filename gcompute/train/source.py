"""Where training text comes from: the files that `data` names, how each is read, and their split in two."""

import hashlib
import json
import os
import sys
import sysconfig
import tokenize
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import numpy as np

from gcompute.config.fields import nearest

LEFT_OUT = frozenset({"site-packages", "dist-packages", "__pycache__"})

Progress = Callable[[str, int, int], None]  # what is being done, files or bytes done, files or bytes in all


@dataclass(frozen=True, slots=True, kw_only=True)
class Source:
    """The files that a corpus is read from. kind: what besides the files decides their text."""

    name: str
    paths: dict[str, Path]  # by name: the path relative to the root, with slashes
    read: Callable[[Path], str | None]  # None: not text
    kind: tuple[str | int, ...]

    def fingerprint(self) -> str:
        """SHA-256 of the kind and of every file's content, which is read whole: size and time of a file do not tell.

        Raises:
          OSError: a file cannot be read.
        """
        return digest(*self.kind, [(name, content_sha256(path)) for name, path in self.paths.items()])


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
            if not paths:
                raise ValueError(f"data directory {data!r} holds no files. Give one with text files, or stdlib.")
            return Source(name=data, paths=paths, read=_utf8_or_none, kind=("directory",))
        path.open("rb").close()
    except OSError as error:
        raise ValueError(
            f"data {data!r} cannot be read: {error.strerror}. Give stdlib, a text file or a directory of text files. "
            + nearest(data, ("stdlib",))
        ) from None
    return Source(name=data, paths={path.name: path}, read=_utf8, kind=("file",))


def stdlib_source(root: Path) -> Source:
    """The Python source files under `root`, a standard library, without installed packages.

    Raises:
      ValueError: there are none, as where Python runs from a zip file.
    """
    paths = {name: path for name, path in _walk(root).items() if name.endswith(".py")}
    if not paths:
        raise ValueError(f"this Python has no source text in {str(root)!r}. Give a text file or a directory instead.")
    return Source(name="stdlib", paths=paths, read=_python, kind=("stdlib", sys.version))


def limited(source: Source, text_mb: float | None) -> Source:
    """About `text_mb` megabytes (10^6 bytes) of a source; all of it where that is None.

    Of several files whole ones are taken, at least one, in an order that depends on their names alone, so that they are
    of all kinds; of one file its first characters.
    """
    if text_mb is None:
        return source
    left = int(text_mb * 1e6)
    kind = ("limited", left, *source.kind)
    if len(source.paths) == 1:

        def beginning(path: Path) -> str | None:
            text = source.read(path)
            return None if text is None else text.encode()[:left].decode(errors="ignore")

        return replace(source, read=beginning, kind=kind)
    taken = []
    # Another order than that of the split, which would take the files that validate first.
    for name in sorted(source.paths, key=lambda name: _share(f"{name} limited")):
        taken.append(name)
        left -= source.paths[name].stat().st_size
        if left <= 0:
            break
    return replace(source, paths={name: source.paths[name] for name in sorted(taken)}, kind=kind)


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


def digest(*parts: object) -> str:
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()


def content_sha256(path: Path) -> str:
    """SHA-256 of a file, about 0.6 s per GB where the processor has instructions for it."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


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
