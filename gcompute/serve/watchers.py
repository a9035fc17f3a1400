"""Snapshots streamed to those who watch: one clock for all of them, which stands still while there is nobody.

Each watcher is sent the newest snapshot once it has taken the one before, so a slow one misses some and nothing piles
up; one that takes nothing for `STUCK_S` is dropped.
"""

import asyncio
import logging
from collections.abc import AsyncGenerator, Callable

from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from gcompute.serve.errors import RETRY_AFTER_S, HttpError
from gcompute.serve.request import NotReady
from gcompute.serve.sse import until_gone

PERIOD_S = 0.25
MAX_WATCHERS = 32
STUCK_S = 10.0

log = logging.getLogger(__name__)


class Watchers:
    """Those who watch, on one event loop. look: makes a snapshot, one line of bytes."""

    def __init__(self, look: Callable[[], bytes], *, period_s: float = PERIOD_S, most: int = MAX_WATCHERS):
        self._look = look
        self._period_s = period_s
        self._most = most
        self._ticking: asyncio.Task[None] | None = None
        self._next = asyncio.Event()
        self._newest: bytes | None = None
        self._closed = False
        self._promised = 0
        self.num = 0

    def response(self) -> Response:
        """An answer that streams snapshots until its reader leaves or `close` is called.

        Raises:
          HttpError: as many watch as may. NotReady: the server is closing.
        """
        if self._closed:
            raise NotReady("the server is closing.")
        if self._promised >= self._most:
            message = f"{self._promised} watch already, and at most {self._most} may. GET /engine gives one snapshot."
            kind, code = "rate_limit_error", "too_many_watchers"
            raise HttpError(status=429, message=message, kind=kind, code=code, retry_after_s=RETRY_AFTER_S)
        # Counted before its stream begins, which is later: many that ask at once would all be let in.
        self._promised += 1
        return _WatchResponse(self)

    def left(self) -> None:
        """A response has ended."""
        self._promised -= 1

    def close(self) -> None:
        """End all streams: a server that waits for its connections to end would wait for these for ever."""
        self._closed = True
        self._wake_all()

    async def snapshots(self) -> AsyncGenerator[bytes]:
        """The newest snapshot, then each that is the newest when the one before has been taken. Close it when done."""
        self.num += 1
        try:
            if self._ticking is None:
                self._newest = None
                self._ticking = asyncio.create_task(self._tick())
            while not self._closed:
                turn = self._next
                if self._newest is not None:
                    yield self._newest
                if not self._closed:
                    await turn.wait()
        finally:
            self.num -= 1
            if not self.num and self._ticking is not None:
                self._ticking.cancel()
                self._ticking = None

    def _wake_all(self) -> None:
        past, self._next = self._next, asyncio.Event()
        past.set()

    async def _tick(self) -> None:
        while True:
            try:
                self._newest = self._look()
            except Exception:
                log.exception("no snapshot could be made")
            self._wake_all()
            await asyncio.sleep(self._period_s)


class _WatchResponse(Response):
    media_type = "text/event-stream"

    def __init__(self, watchers: Watchers):
        self.status_code = 200
        self.background = None
        self.init_headers({"Cache-Control": "no-store", "X-Accel-Buffering": "no"})
        self._watchers = watchers

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        sending = asyncio.create_task(self._send(send))
        leaving = asyncio.create_task(until_gone(receive))
        try:
            await asyncio.wait((sending, leaving), return_when=asyncio.FIRST_COMPLETED)
        finally:
            sending.cancel()
            leaving.cancel()
            await asyncio.gather(sending, leaving, return_exceptions=True)
            self._watchers.left()

    async def _send(self, send: Send) -> None:
        await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
        snapshots = self._watchers.snapshots()
        try:
            async for data in snapshots:
                async with asyncio.timeout(STUCK_S):
                    await send({"type": "http.response.body", "body": b"data: " + data + b"\n\n", "more_body": True})
        finally:
            await snapshots.aclose()
        await send({"type": "http.response.body", "body": b"", "more_body": False})
