"""The key of a server: from a flag, an environment variable or a file, and never an empty one."""

import os
from pathlib import Path

VARIABLE = "GCOMPUTE_API_KEY"
FILE_HELP = "File whose one line is the key: one in the command is seen by all users of the machine."


def chosen_key(key: str | None, file: Path | None) -> str | None:
    """The key that a flag or the environment gives as `key`, or that `file` holds; None where no key is asked for.

    Raises:
      ValueError: there are two, the file cannot be read or holds no one line, or the key is empty.
    """
    if file is not None:
        if key is not None:
            raise ValueError(f"--api-key-file and --api-key (or {VARIABLE}) are two keys: give one.")
        try:
            lines = file.read_text(encoding="utf-8").splitlines()
        except OSError as error:
            raise ValueError(f"--api-key-file {file} cannot be read: {error.strerror}.") from None
        if len(lines) != 1:
            raise ValueError(f"--api-key-file {file} must hold one line, the key; it holds {len(lines)}.")
        key = lines[0].strip()
    elif key is None and os.environ.get(VARIABLE) == "":
        # A secret that was not found, more often than a wish: it would open the server to everyone.
        raise ValueError(f"{VARIABLE} is set and empty. Give it a key, or unset it to do without one.")
    if key is not None and not key.strip():
        raise ValueError("the API key is empty. Give one, or leave it out to do without.")
    return key
