"""Files that are whole or absent, written beside what they replace and never through a link that lies there."""

import os
from contextlib import suppress
from pathlib import Path


def write_whole(path: Path, content: str | bytes) -> None:
    """Write `path`, text as UTF-8, so that a reader finds the old content or the new and nothing between.

    A symbolic link at `path` is replaced; what it points to is left as it is.

    Raises:
      OSError: the directory cannot be written.
    """
    temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    try:
        # What a dead process of this number left goes; a link that waits there is not followed.
        temporary.unlink(missing_ok=True)
        with temporary.open("xb") as file:
            file.write(content.encode() if isinstance(content, str) else content)
        os.replace(temporary, path)
    finally:
        with suppress(OSError):
            temporary.unlink(missing_ok=True)
