"""Pictures at the end of long work: the work stands whether or not it can be drawn."""

from collections.abc import Callable
from pathlib import Path


def try_to_draw(draw: Callable[[], None], path: Path, notice: Callable[[str], None]) -> bool:
    """Whether `draw` drew `path`; `notice` takes the one line that says why it did not."""
    try:
        draw()
    # matplotlib raises many kinds: for a backend, a font, a matplotlibrc, a disk.
    except Exception as error:
        reason = " ".join(str(error).split())[:200].rstrip(".") or type(error).__name__
        notice(f"{path} could not be drawn ({reason}); all else is kept.")
        return False
    return True
