"""HTTP/1.1 for measuring: what arrives is stamped with its time and taken apart only when the answer is whole.

On a small machine the client takes its time from the server under test, so an arrival costs one clock reading and the
frame of one chunk. `load_answer` reads the events afterwards.
"""

import asyncio
import json
import ssl
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import urlsplit

MAX_HEAD_BYTES = 64 << 10


class BrokenAnswer(Exception):
    """The answer ended early, or is not HTTP. kind: the word under which it is counted."""

    def __init__(self, kind: str, message: str):
        super().__init__(message)
        self.kind = kind


@dataclass(frozen=True, slots=True, kw_only=True)
class Address:
    """Where an OpenAI-compatible server is. path: of the API, usually /v1."""

    host: str
    port: int
    path: str
    secure: bool

    @classmethod
    def parse(cls, url: str) -> "Address":
        """Read http://host:port or https://host/v1.

        Raises:
          ValueError: it is not such a URL.
        """
        try:
            parts = urlsplit(url.strip())
            port = parts.port
        except ValueError as error:
            raise ValueError(f"{url!r} is not a URL: {error}. Give one such as http://127.0.0.1:8000.") from None
        if (
            parts.scheme not in ("http", "https")
            or not parts.hostname
            or parts.query
            or parts.fragment
            or parts.username
        ):
            raise ValueError(f"{url!r} is not the URL of a server. Give one such as http://127.0.0.1:8000.")
        if any(ord(letter) <= 32 or ord(letter) > 126 for letter in parts.path):
            raise ValueError(f"{url!r} holds a letter that a URL cannot. Give one such as http://127.0.0.1:8000.")
        secure = parts.scheme == "https"
        path = parts.path.rstrip("/")
        return cls(
            host=parts.hostname,
            port=port or (443 if secure else 80),
            path=path if path.endswith("/v1") else path + "/v1",
            secure=secure,
        )

    def __str__(self) -> str:
        host = f"[{self.host}]" if ":" in self.host else self.host
        return f"{'https' if self.secure else 'http'}://{host}:{self.port}{self.path.removesuffix('/v1')}"


@dataclass(slots=True, kw_only=True)
class Answer:
    """What came back. parts: pieces of the body with the time, on time.perf_counter's clock, at which each came."""

    sent_s: float
    status: int = 0
    headers: dict[str, str] = field(default_factory=dict)
    parts: list[tuple[float, bytes]] = field(default_factory=list)
    end_s: float = 0.0

    @property
    def body(self) -> bytes:
        return b"".join(piece for _, piece in self.parts)


class _Connection(asyncio.Protocol):
    """One connection, one request at a time."""

    def __init__(self) -> None:
        self.transport: asyncio.Transport | None = None
        self.closed = False
        self.num_answers = 0
        self._answer: Answer | None = None
        self._done: asyncio.Future[None] | None = None
        self._reset()

    def _reset(self) -> None:
        self._rest = b""
        self._in_head = True
        self._chunked = False
        # Bytes of the chunk, or of the whole body, that are still to come; None: until the connection closes.
        self._left: int | None = 0
        self._skip = 0
        self._trailer = False
        self._keep = True

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        self.transport = transport

    async def exchange(self, request: bytes, answer: Answer) -> bool:
        """Send a request and fill in its answer; return whether the connection can be used again.

        Raises:
          BrokenAnswer: it ended early, or is not HTTP.
        """
        assert self.transport is not None
        self._reset()
        self._answer = answer
        self._done = asyncio.get_running_loop().create_future()
        self.transport.write(request)
        try:
            await self._done
        finally:
            self._answer = self._done = None
        self.num_answers += 1
        return self._keep and not self.closed

    def close(self) -> None:
        self.closed = True
        if self.transport is not None:
            self.transport.abort()

    def data_received(self, data: bytes) -> None:
        if self._answer is None:
            # Nothing was asked: the server says goodbye, or is out of step.
            self.close()
            return
        try:
            self._take(data, time.perf_counter())
        except (ValueError, IndexError) as error:
            self._fail(BrokenAnswer("not HTTP", f"the answer is not HTTP/1.1: {error}"))
            self.close()

    def eof_received(self) -> bool:
        return False

    def connection_lost(self, exc: Exception | None) -> None:
        self.closed = True
        if self._answer is None:
            return
        if not self._in_head and self._left is None and exc is None:
            self._finish(time.perf_counter())
        else:
            where = "before" if self._in_head else "in the middle of"
            why = f": {exc}" if exc else ""
            self._fail(BrokenAnswer("connection lost", f"the server closed the connection {where} its answer{why}"))

    def _take(self, data: bytes, now_s: float) -> None:
        data, self._rest = (self._rest + data if self._rest else data), b""
        while self._in_head:
            head, separator, body = data.partition(b"\r\n\r\n")
            if not separator:
                if len(data) > MAX_HEAD_BYTES:
                    raise ValueError("its head has no end")
                self._rest = data
                return
            self._read_head(head)
            data = body
        assert self._answer is not None
        if self._chunked:
            self._take_chunks(data, now_s)
            return
        if data:
            self._answer.parts.append((now_s, data if self._left is None else data[: self._left]))
            if self._left is not None:
                self._left -= len(self._answer.parts[-1][1])
        if self._left == 0:
            self._finish(now_s)

    def _read_head(self, head: bytes) -> None:
        assert self._answer is not None
        first, *lines = head.decode("latin-1").split("\r\n")
        if not first.startswith("HTTP/1."):
            raise ValueError(f"it begins with {first[:40]!r}")
        status = int(first.split(" ", 2)[1])
        if 100 <= status < 200:
            return
        fields = (line.partition(":") for line in lines)
        headers = {name.strip().lower(): value.strip() for name, _, value in fields}
        self._answer.status, self._answer.headers = status, headers
        self._in_head = False
        self._chunked = headers.get("transfer-encoding", "").lower() == "chunked"
        length = headers.get("content-length")
        self._left = 0 if self._chunked or status in (204, 304) else None if length is None else int(length)
        closes = headers.get("connection", "").lower() == "close"
        self._keep = not closes and first.startswith("HTTP/1.1") and self._left is not None

    def _take_chunks(self, data: bytes, now_s: float) -> None:
        assert self._answer is not None
        at, size = 0, len(data)
        while at < size:
            if self._left:
                piece = data[at : at + self._left]
                self._answer.parts.append((now_s, piece))
                at += len(piece)
                self._left -= len(piece)
                self._skip = 2 if not self._left else 0
            elif self._skip:
                step = min(self._skip, size - at)
                at += step
                self._skip -= step
            else:
                end = data.find(b"\r\n", at)
                if end < 0:
                    if size - at > MAX_HEAD_BYTES:
                        raise ValueError("the size of a chunk has no end")
                    self._rest = data[at:]
                    return
                line, at = data[at:end], end + 2
                if not self._trailer:
                    self._left = int(line.partition(b";")[0], 16)
                    if self._left < 0:
                        raise ValueError("a chunk is of less than nothing")
                    self._trailer = self._left == 0
                elif not line:
                    self._keep = self._keep and at == size
                    self._finish(now_s)
                    return

    def _finish(self, now_s: float) -> None:
        if self._answer is not None and self._done is not None and not self._done.done():
            self._answer.end_s = now_s
            self._done.set_result(None)

    def _fail(self, error: BrokenAnswer) -> None:
        if self._done is not None and not self._done.done():
            self._done.set_exception(error)


class Client:
    """Connections to one server, kept open between requests. Use it as an asynchronous context manager."""

    def __init__(self, address: Address, *, api_key: str | None = None):
        self.address = address
        host = f"[{address.host}]" if ":" in address.host else address.host
        key = f"Authorization: Bearer {api_key}\r\n" if api_key else ""
        self._head = (
            f"Host: {host}:{address.port}\r\nUser-Agent: gcompute-bench\r\nAccept: */*\r\n"
            f"Accept-Encoding: identity\r\n{key}"
        ).encode()
        self._secure = ssl.create_default_context() if address.secure else None
        self._idle: list[_Connection] = []

    async def __aenter__(self) -> "Client":
        return self

    async def __aexit__(self, *_: object) -> None:
        for connection in self._idle:
            connection.close()
        self._idle.clear()
        # Aborted transports are closed by callbacks of the loop.
        await asyncio.sleep(0)

    def post(self, path: str, body: Mapping[str, Any]) -> bytes:
        """A whole POST request with a JSON body, to be sent later."""
        text = json.dumps(body, separators=(",", ":")).encode()
        line = f"POST {self.address.path}{path} HTTP/1.1\r\n".encode()
        size = f"Content-Type: application/json\r\nContent-Length: {len(text)}\r\n\r\n".encode()
        return line + self._head + size + text

    def get(self, path: str) -> bytes:
        return f"GET {self.address.path}{path} HTTP/1.1\r\n".encode() + self._head + b"\r\n"

    async def send(self, request: bytes, answer: Answer) -> None:
        """Send a request and fill in its answer as it comes, on an open connection or a new one.

        A connection that the server closed while it was idle is no answer: the request is sent again on a new one.

        Raises:
          BrokenAnswer: nothing listens there, or the answer ended early.
        """
        while True:
            connection = await self._connection()
            reused = connection.num_answers > 0
            keep = False
            try:
                keep = await connection.exchange(request, answer)
                return
            except BrokenAnswer as error:
                if not (reused and error.kind == "connection lost" and not answer.status):
                    raise
            finally:
                if keep:
                    self._idle.append(connection)
                else:
                    connection.close()

    async def _connection(self) -> _Connection:
        while self._idle:
            connection = self._idle.pop()
            if not connection.closed:
                return connection
        address = self.address
        try:
            _, connection = await asyncio.get_running_loop().create_connection(
                _Connection, address.host, address.port, ssl=self._secure
            )
        except (OSError, UnicodeError) as error:
            raise BrokenAnswer("cannot connect", f"{address} cannot be reached: {_reason(error)}.") from None
        return connection


def _reason(error: Exception) -> str:
    if isinstance(error, ConnectionRefusedError) or "Connect call failed" in str(error):
        return "nothing listens there"
    return str(getattr(error, "strerror", None) or error or type(error).__name__)
