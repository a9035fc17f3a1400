"""Connections within bounds: how many are open, and how long a client may take over what it sends and reads.

A client that holds its connection and says nothing costs a file; without a bound a few hundred of them stop a server.
A request has to be whole, headers and body, within `read_s` of its first byte, a new connection's of its first moment.
Where as many connections are open as may be, the one that has kept the server waiting longest for a request makes room
for the next; where all of them have sent theirs, the next is answered 503.
"""

import asyncio
import functools
import logging
import socket
import time
from typing import Any, cast

import h11
from uvicorn.protocols.http.h11_impl import H11Protocol

from gcompute.serve.errors import RETRY_AFTER_S, HttpError
from gcompute.serve.sse import dump

# What the server opens besides connections, or has open already.
OTHER_FILES = 64
MOST = 4096
TOLD_EVERY_S = 60.0

log = logging.getLogger(__name__)


def most_connections(asked: int | None) -> int:
    """How many connections may be open: as asked, else as many as this process may open files, less what it needs.

    Raises:
      ValueError: `asked` exceeds the limit on open files (RLIMIT_NOFILE).
    """
    try:
        import resource
    except ImportError:  # Windows has no such limit.
        return asked or MOST
    files, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    if files == resource.RLIM_INFINITY:
        return asked or MOST
    room = files - OTHER_FILES
    if asked is not None and asked > room:
        raise ValueError(
            f"max_connections={asked} needs {asked + OTHER_FILES} open files, and this process may have {files}: raise"
            " it with `ulimit -n`, or ask for fewer."
        )
    return asked or max(min(room, MOST), 1)


class Bounds:
    """The connections of one server. waiting: those whose request is not whole yet, the longest first."""

    def __init__(self, most: int, read_s: float):
        self.most = most
        self.read_s = read_s
        self.waiting: dict[Connection, None] = {}
        self._told_s = -TOLD_EVERY_S

    def protocol(self) -> type[asyncio.Protocol]:
        """What uvicorn calls for each connection."""
        return cast(type[asyncio.Protocol], functools.partial(Connection, bounds=self))

    def admit(self, new: "Connection", num_open: int) -> bool:
        """Whether there is room for one that is open already; makes room where it can."""
        if num_open <= self.most:
            return True
        now_s = time.monotonic()
        if now_s - self._told_s >= TOLD_EVERY_S:
            self._told_s = now_s
            log.warning("%d connections are open, as many as may be: those that say nothing are closed", self.most)
        longest = next(iter(self.waiting), None)
        if longest is None:
            return False
        longest.drop()
        return True


class Connection(H11Protocol):
    """uvicorn's connection, with a clock that runs while a request is awaited or an answer is not taken."""

    def __init__(self, *args: Any, bounds: Bounds, **kwargs: Any):
        super().__init__(*args, **kwargs)
        self._bounds = bounds
        self._reading: asyncio.TimerHandle | None = None
        self._writing: asyncio.TimerHandle | None = None

    # What uvicorn and asyncio call -----------------------------------------------------------------------------------

    def connection_made(self, transport: asyncio.Transport) -> None:  # pyright: ignore[reportIncompatibleMethodOverride]
        super().connection_made(transport)
        if (sock := transport.get_extra_info("socket")) is not None and hasattr(socket, "TCP_USER_TIMEOUT"):
            # The kernel gives up on a peer that takes nothing, whether or not anything waits here to be written.
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, int(1000 * self._bounds.read_s))
        if not self._bounds.admit(self, len(self.connections)):
            message = f"{self._bounds.most} connections are open, and this server takes no more."
            self._answer(503, message, "server_error", "too_many_connections", retry_after_s=RETRY_AFTER_S)
            return
        self._look(new=True)

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        self._look(new=True)

    def on_response_complete(self) -> None:
        super().on_response_complete()
        self._look(new=False)

    def connection_lost(self, exc: Exception | None) -> None:
        self._bounds.waiting.pop(self, None)
        self._reading, self._writing = _stopped(self._reading), _stopped(self._writing)
        super().connection_lost(exc)

    def pause_writing(self) -> None:
        super().pause_writing()
        self._writing = self._writing or self.loop.call_later(self._bounds.read_s, self.transport.abort)

    def resume_writing(self) -> None:
        self._writing = _stopped(self._writing)
        super().resume_writing()

    # The clock -------------------------------------------------------------------------------------------------------

    def _look(self, *, new: bool) -> None:
        """Start or stop the clock. new: bytes have come, and a request has begun; until then uvicorn keeps the time."""
        if self._is_whole() or self.transport.is_closing():
            self._bounds.waiting.pop(self, None)
            self._reading = _stopped(self._reading)
            return
        self._bounds.waiting.setdefault(self)
        if new and self._reading is None:
            self._reading = self.loop.call_later(self._bounds.read_s, self._too_slow)

    def _is_whole(self) -> bool:
        """Whether a request is here from its first to its last byte, and is not answered."""
        return self.cycle is not None and not self.cycle.response_complete and not self.cycle.more_body

    def _too_slow(self) -> None:
        self._reading = None
        if self.cycle is None or self.cycle.response_complete:
            self.drop()
        else:
            seconds = f"{self._bounds.read_s:g} s"
            self._answer(408, f"The body was not here after {seconds}.", "timeout_error", "timeout")

    def drop(self) -> None:
        """Close it as it is."""
        self._bounds.waiting.pop(self, None)
        self._leave()
        self.transport.abort()

    def _answer(self, status: int, message: str, kind: str, code: str, *, retry_after_s: int | None = None) -> None:
        """Answer in the application's place, and close; where it has begun to answer, close."""
        if self.conn.our_state in (h11.IDLE, h11.SEND_RESPONSE):
            error = HttpError(status=status, message=message, kind=kind, code=code, retry_after_s=retry_after_s)
            body = dump(error.body())
            headers = {
                "content-type": "application/json",
                "content-length": str(len(body)),
                "connection": "close",
                **error.headers(),
            }
            self._leave()
            for event in (
                h11.Response(status_code=status, headers=list(headers.items())),
                h11.Data(data=body),
                h11.EndOfMessage(),
            ):
                self.transport.write(self.conn.send(event) or b"")
        self._leave()
        self.transport.close()

    def _leave(self) -> None:
        """Tell the application that its client is gone: it says nothing more, and cancels what it began."""
        if self.cycle is not None and not self.cycle.response_complete:
            self.cycle.disconnected = True
            self.cycle.message_event.set()


def _stopped(timer: asyncio.TimerHandle | None) -> None:
    if timer is not None:
        timer.cancel()
