"""Where gcompute keeps what it need not make twice."""

import os
import tempfile
from pathlib import Path

CORPORA = "corpora"


def cache_directory() -> Path:
    """Where corpora, measured rooflines and compiled programs are kept: $GCOMPUTE_CACHE or ~/.cache/gcompute.

    Raises:
      ValueError: no variable names it, and there is no home directory.
    """
    given, shared = os.environ.get("GCOMPUTE_CACHE"), os.environ.get("XDG_CACHE_HOME")
    try:
        if given:
            return Path(given).expanduser()
        if not shared and os.environ.get("HOME") == "":
            raise RuntimeError
        return (Path(shared).expanduser() if shared else Path.home() / ".cache") / "gcompute"
    except RuntimeError:
        raise ValueError(
            "there is no home directory to keep a cache in. Set GCOMPUTE_CACHE to a directory that can be written."
        ) from None


def writable_cache() -> Path:
    """That directory, made and seen to be writable.

    Raises:
      ValueError: it cannot be made or written.
    """
    cache = cache_directory()
    try:
        for directory in (cache, cache / CORPORA):
            directory.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryFile(dir=directory):
                pass
    except OSError as error:
        raise ValueError(
            f"the cache {cache} cannot be written: {error.strerror}. Set GCOMPUTE_CACHE to a directory that can be."
        ) from None
    return cache
