"""Standard streams that cannot end a run: closed from the start, a reader that left, a terminal that is gone."""

import errno
import io
import os
import sys
from typing import Any

NOBODY_READS = {errno.EPIPE, errno.EIO, errno.EBADF, errno.ECONNRESET}


class Enduring(io.FileIO):
    """A descriptor that becomes /dev/null once nobody can read what is written to it.

    any_error: also where it cannot be written for another reason, such as a full disk.
    """

    def __init__(self, descriptor: int, *, any_error: bool):
        super().__init__(descriptor, "w", closefd=False)
        self._any_error = any_error

    def write(self, data: Any, /) -> int | None:
        try:
            return super().write(data)
        except BlockingIOError:
            raise
        except OSError as error:
            if not self._any_error and error.errno not in NOBODY_READS:
                raise
        _open_nothing(self.fileno())
        return memoryview(data).nbytes


def endure() -> None:
    """Make standard output and error such streams; what was replaced before, as in a notebook, is left alone.

    Messages survive any error. What a command was asked to print survives only that nobody reads it: a file on a full
    disk must not pass for a whole answer. Characters that the locale cannot show are written as escapes.
    """
    for descriptor in (0, 1, 2):
        # A closed descriptor would go to the next file that is opened, and what is printed into it.
        try:
            os.fstat(descriptor)
        except OSError:
            _open_nothing(descriptor)
    if sys.stdin is None:
        sys.stdin = open(os.devnull, encoding="utf-8")  # noqa: SIM115
    sys.stdout = _enduring(sys.stdout, sys.__stdout__, 1, any_error=False)
    sys.stderr = _enduring(sys.stderr, sys.__stderr__, 2, any_error=True)


def _enduring(stream: Any, original: Any, descriptor: int, *, any_error: bool) -> Any:
    if stream is None:
        kept: dict[str, Any] = {"encoding": "utf-8"}
    elif stream is original and isinstance(stream, io.TextIOWrapper):
        stream.flush()
        kept = {"encoding": stream.encoding, "line_buffering": stream.line_buffering}
        kept["write_through"] = stream.write_through
    else:
        return stream
    errors = "surrogateescape" if getattr(stream, "errors", None) == "surrogateescape" else "backslashreplace"
    return io.TextIOWrapper(io.BufferedWriter(Enduring(descriptor, any_error=any_error)), errors=errors, **kept)


def _open_nothing(descriptor: int) -> None:
    """Put /dev/null at a descriptor, for the processes that are started from here too."""
    nothing = os.open(os.devnull, os.O_RDWR)
    if nothing != descriptor:
        os.dup2(nothing, descriptor)
        os.close(nothing)
    os.set_inheritable(descriptor, True)
