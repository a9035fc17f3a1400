"""Where gcompute keeps what it need not make twice."""

import os
from pathlib import Path


def cache_directory() -> Path:
    """Where corpora, measured rooflines and compiled programs are kept: $GCOMPUTE_CACHE or ~/.cache/gcompute."""
    root = (
        os.environ.get("GCOMPUTE_CACHE")
        or Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "gcompute"
    )
    return Path(root)
