"""Files of tokens, mapped into memory: opened with their checksum, and asked before each use whether they are whole."""

import mmap
from io import FileIO
from pathlib import Path
from typing import Any

import numpy as np

from gcompute.model.checksums import crc32_of


def map_tokens(path: Path, dtype: str, *, num_tokens: int, crc32: int) -> np.memmap:
    """The tokens of a file, which is read once and whole for its checksum, about 0.3 s per GB.

    Raises:
      ValueError: the file is not of that many tokens, or not of that checksum.
      OSError: it cannot be read.
    """
    with FileIO(str(path)) as file:
        # Mapped first and checked then, by one open file: by name, another process could put other files in its place.
        tokens = np.memmap(file, dtype=dtype, mode="r")
        if tokens.size != num_tokens:
            raise ValueError(f"{path} has {tokens.size:,} tokens of {num_tokens:,}")
        file.seek(0)
        if crc32_of(file) != crc32:
            raise ValueError(f"{path} is damaged: its checksum is not the one that it was saved with")
    return tokens


def check_mapped(tokens: np.ndarray) -> None:
    """Refuse mapped tokens whose file has been cut short since, where reading them would end the process by SIGBUS.

    The system is asked for the file's size, about a microsecond; arrays that are in memory are always whole.

    Raises:
      OSError: it has been cut short.
    """
    base: Any = tokens
    while isinstance(base, np.ndarray):
        base = base.base
    if isinstance(base, mmap.mmap) and (size := base.size()) < len(base):
        # Its directory is named and not the file, which may have been mapped under the name that it was written by.
        name = getattr(tokens, "filename", None)
        where = f" in {Path(name).parent}" if name else ""
        raise OSError(
            f"a token file{where} was cut short while it was in use, from {len(base):,} to {size:,} bytes. Go on with"
            " --resume: the tokens are made anew."
        )
