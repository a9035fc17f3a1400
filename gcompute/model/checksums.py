"""Checksums of files: what a checkpoint was saved with, and whether it still holds that.

CRC-32 finds every flipped bit, every error within 32 bits, and all but one in 2^32 of any others. It finds damage, not
forgery. A checkpoint of step s keeps the size and the CRC-32 of each file of its items in s/checksums.json.
"""

import json
import os
import zlib
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from io import FileIO
from pathlib import Path
from typing import Any

MANIFEST = "checksums.json"
FORMAT = 1
CHUNK_BYTES = 1 << 20


def crc32_of(file: FileIO) -> int:
    """CRC-32 of a file that is open unbuffered, from where it stands to its end; read, so that none maps it."""
    crc, chunk = 0, memoryview(bytearray(CHUNK_BYTES))
    while size := file.readinto(chunk):
        crc = zlib.crc32(chunk[:size], crc)
    return crc


def write_manifest(directory: Path, items: Iterable[str]) -> None:
    """Write the manifest of `directory`: the size and CRC-32 of every file below the folders `items` in it.

    Raises:
      OSError: a file cannot be read, or the manifest cannot be written.
    """
    paths = [path for item in items for path in sorted((directory / item).rglob("*")) if path.is_file()]
    files = dict(zip((path.relative_to(directory).as_posix() for path in paths), _describe(paths), strict=True))
    temporary = directory / f".{MANIFEST}.{os.getpid()}.tmp"
    with temporary.open("wb") as file:
        file.write(_rendered(files))
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, directory / MANIFEST)


def verify(directory: Path, items: Iterable[str]) -> bool:
    """Compare every file below the folders `items` of `directory` with its manifest; False where there is none.

    Raises:
      ValueError: a file is absent, of another size or of another content, or the manifest itself is damaged.
      OSError: a file cannot be read.
    """
    try:
        manifest = (directory / MANIFEST).read_bytes()
    except FileNotFoundError:
        return False
    wanted = {name: kept for name, kept in _files(manifest).items() if name.partition("/")[0] in set(items)}
    for name, kept in wanted.items():
        path = directory / name
        if not path.is_file():
            raise ValueError(f"{name} is missing")
        if (size := path.stat().st_size) != kept["bytes"]:
            raise ValueError(f"{name} has {size:,} bytes of {kept['bytes']:,}")
    for (name, kept), found in zip(wanted.items(), _describe([directory / name for name in wanted]), strict=True):
        if found != kept:
            raise ValueError(f"{name} is damaged: its checksum is not the one that it was saved with")
    return True


def _rendered(files: dict[str, Any]) -> bytes:
    own = zlib.crc32(json.dumps(files, sort_keys=True).encode())
    return (json.dumps({"format": FORMAT, "crc32": own, "files": files}, indent=1) + "\n").encode()


def _files(manifest: bytes) -> dict[str, Any]:
    with suppress(ValueError, KeyError, TypeError):
        files = json.loads(manifest)["files"]
        if _rendered(files) == manifest:  # so that a change of any byte shows
            return files
    raise ValueError(f"{MANIFEST} is damaged")


def _describe(paths: list[Path]) -> list[dict[str, int]]:
    """Size and CRC-32 of each file. zlib leaves the interpreter to others meanwhile, so threads share the work."""

    def describe(path: Path) -> dict[str, int]:
        with FileIO(path) as file:
            crc = crc32_of(file)
            return {"bytes": file.tell(), "crc32": crc}

    with ThreadPoolExecutor() as pool:
        return list(pool.map(describe, paths))
