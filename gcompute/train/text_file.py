"""The text of one file, a piece at a time: decompressed, decoded and taken out of JSONL as it is read.

Nothing is held but the piece at hand (one record of JSONL), so a file larger than the memory is read, and so is what a
small compressed file unpacks to.
"""

import bz2
import codecs
import gzip
import importlib
import io
import json
import lzma
import re
import tokenize
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any, BinaryIO

CHUNK_BYTES = 1 << 20
ZSTANDARD_BYTES = 1 << 10  # a block takes 4 bytes or more and unpacks to 128 KiB at most: so 32 MiB
LONGEST_RECORD_CHARACTERS = 1 << 26
JSONL_SUFFIXES = frozenset({".jsonl", ".ndjson"})
COMPRESSED_SUFFIXES = frozenset({".gz", ".bz2", ".xz", ".zst"})
TEXT_FIELD = "text"
BYTE_ORDER_MARK = "\ufeff"
UTF_16_MARKS = (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)

Pieces = Iterator[str | None]  # text, in order; None: a document ends here


class NotText(ValueError):
    """A file that holds no text that we read. `reason`: in a few words, the same for all files of its kind."""

    def __init__(self, message: str, reason: str) -> None:
        super().__init__(message)
        self.reason = reason


def read_text(path: Path, *, name: str | None = None) -> Pieces:
    """UTF-8 text without its byte order mark, from a file that may be compressed (gzip, bzip2, xz, Zstandard).

    The first bytes say how a file is compressed; its name says whether it is JSONL (.jsonl, .ndjson). Of JSONL, each
    record's "text" is a document and ends with None; empty ones are left out. `name` is what the user calls the file.

    Raises:
      NotText: the file is binary, in another encoding, damaged, or a record has no "text".
      OSError: it cannot be read.
    """
    name = name or str(path)
    texts = _decoded(_chunks(path, name), name)
    return _records(texts, name) if is_jsonl(name) else texts


def read_python(path: Path) -> Pieces:
    """Python source in the encoding that it declares, its line ends as \\n.

    Raises:
      NotText: it is in another encoding. The tests of the standard library hold such files on purpose.
    """
    try:
        with tokenize.open(path) as file:
            while text := file.read(CHUNK_BYTES):
                yield text
    except (SyntaxError, UnicodeDecodeError):
        raise NotText(f"{str(path)!r} is not in the encoding that it declares.", "wrongly encoded") from None


def is_jsonl(name: str) -> bool:
    """Whether a file of this name holds a JSON object per line.

    >>> is_jsonl("a.jsonl"), is_jsonl("a.JSONL.gz"), is_jsonl("a.json")
    (True, True, False)
    """
    path = Path(name.lower())
    return (Path(path.stem) if path.suffix in COMPRESSED_SUFFIXES else path).suffix in JSONL_SUFFIXES


def utf8_bytes(text: str) -> int:
    """How many bytes of UTF-8 a text takes."""
    return len(text) if text.isascii() else len(text.encode())


def _chunks(path: Path, name: str) -> Iterator[bytes]:
    """The bytes of a file, decompressed."""
    with path.open("rb") as file:
        compression, unpack = _compression(file.peek(10)[:10])
        try:
            content = unpack(file)
        except ImportError:
            raise NotText(
                f"data file {name!r} is {compression} data, which this Python cannot read. Install the package"
                " zstandard, or decompress the file.",
                f"{compression} (the package zstandard is not installed)",
            ) from None
        while chunk := _read(content, compression, name):
            yield chunk


def _read(content: Any, compression: str, name: str) -> bytes:
    try:
        return content.read(CHUNK_BYTES)
    except Exception as error:  # each library raises kinds of its own
        if not compression or (isinstance(error, OSError) and error.errno is not None):
            raise  # of the disk, not of what was read from it
        raise NotText(
            f"data file {name!r} is damaged {compression} data: {error}. Give a whole file.",
            f"damaged {compression}",
        ) from None


def _compression(start: bytes) -> tuple[str, Callable[[Any], Any]]:
    """The name of a file's compression ("" for none) and what reads it, by the file's first 10 bytes."""
    if start.startswith(b"\x1f\x8b"):
        return "gzip", lambda file: gzip.GzipFile(fileobj=file)
    if re.match(rb"BZh[1-9]1AY&SY", start):
        return "bzip2", bz2.BZ2File
    if start.startswith(b"\xfd7zXZ\x00"):
        return "xz", lzma.LZMAFile
    if start.startswith(b"\x28\xb5\x2f\xfd"):
        return "Zstandard", _zstandard
    return "", lambda file: file


def _zstandard(file: BinaryIO) -> Any:
    with suppress(ImportError):
        return importlib.import_module("compression.zstd").ZstdFile(file)  # Python 3.14
    return _ZstandardFile(file, importlib.import_module("zstandard").ZstdDecompressor().decompressobj)


class _ZstandardFile:
    """Reads with the package zstandard, whose own reader takes a file that is cut short for a whole one."""

    def __init__(self, file: BinaryIO, new_frame: Callable[[], Any]) -> None:
        self._file = file
        self._new_frame = new_frame
        self._frame: Any = None

    def read(self, size: int) -> bytes:
        """What the next `ZSTANDARD_BYTES` of the file, at most `size`, unpack to; nothing at its end."""
        content = b""
        while not content:
            packed = self._file.read(min(size, ZSTANDARD_BYTES))
            if not packed and self._frame:
                raise EOFError("it ends within a frame")
            if not packed:
                break
            while packed:
                self._frame = self._frame or self._new_frame()
                content += self._frame.decompress(packed)
                packed = self._frame.unused_data
                if self._frame.eof:
                    self._frame = None
        return content


def _decoded(chunks: Iterator[bytes], name: str) -> Iterator[str]:
    """UTF-8 text of `chunks`, without a byte order mark at its start."""
    decoder = codecs.getincrementaldecoder("utf-8")()
    offset, first = 0, True

    def refuse(bad: int, byte: int, reason: str) -> NotText:
        return NotText(
            f"data file {name!r} is not UTF-8 text: byte 0x{byte:02X} at offset {bad}. "
            "Convert it to UTF-8, or give another file.",
            reason,
        )

    for chunk, is_last in _with_last(chunks):
        waiting = len(decoder.getstate()[0])
        zero = chunk.find(0)
        try:
            text = decoder.decode(chunk, is_last)
        except UnicodeDecodeError as error:
            at = offset - waiting + error.start
            if 0 <= zero < at - offset:
                raise refuse(offset + zero, 0, "binary") from None
            binary = zero >= 0 and not chunk.startswith(UTF_16_MARKS)
            raise refuse(at, error.object[error.start], "binary" if binary else "not UTF-8") from None
        if zero >= 0:
            raise refuse(offset + zero, 0, "binary")
        offset += len(chunk)
        if first and text:
            text, first = text.removeprefix(BYTE_ORDER_MARK), False
        if text:
            yield text


def _with_last(chunks: Iterator[bytes]) -> Iterator[tuple[bytes, bool]]:
    """Every chunk, and after them an empty one that is the last."""
    for chunk in chunks:
        yield chunk, False
    yield b"", True


def _records(texts: Iterator[str], name: str) -> Pieces:
    """The "text" of every line of JSONL, with None after each."""
    for number, line in enumerate(_lines(texts, name), 1):
        if not line.strip():
            continue
        try:
            record = json.loads(line)
        except (ValueError, RecursionError):
            record = None
        text = record.get(TEXT_FIELD) if isinstance(record, dict) else None
        if not isinstance(text, str):
            raise NotText(
                f'data file {name!r}, line {number}, is no JSON object with text in its field "{TEXT_FIELD}".'
                " Write the text there, or rename the file to .txt to read it as it stands.",
                f'JSONL without "{TEXT_FIELD}"',
            )
        if text:
            # JSON can spell half of a surrogate pair, which stands for no character.
            yield text if text.isascii() else text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
            yield None


def _lines(texts: Iterator[str], name: str) -> Iterator[str]:
    rest = io.StringIO()
    for text in texts:
        *lines, last = text.split("\n")
        for line in lines:
            rest.write(line)
            yield rest.getvalue()
            rest = io.StringIO()
        rest.write(last)
        if rest.tell() > LONGEST_RECORD_CHARACTERS:
            raise NotText(
                f"data file {name!r} has a line of more than {LONGEST_RECORD_CHARACTERS:,} characters, too long"
                " for a record of JSONL. Split it, or rename the file to .txt to read it as it stands.",
                "JSONL with too long a line",
            )
    yield rest.getvalue()
