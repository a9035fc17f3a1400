"""Clients that say nothing, too little or too slowly stop no server, and neither do those that read nothing."""

import asyncio
import contextlib
import logging
import socket
import threading
import time
from collections.abc import Callable, Iterator

import httpx
import pytest
import uvicorn
from starlette.applications import Starlette
from starlette.requests import ClientDisconnect, Request
from starlette.responses import PlainTextResponse, StreamingResponse
from starlette.routing import Route

from gcompute.serve import connections
from gcompute.serve.connections import OTHER_FILES, Bounds, most_connections
from gcompute.serve.server import bind

READ_S = 0.4
POST = b"POST /read HTTP/1.1\r\nHost: localhost\r\nContent-Length: 9\r\n\r\n"


class Server:
    """A small application behind `Bounds`; `gone` counts clients that went away while it read."""

    def __init__(self, most: int = 8, read_s: float = READ_S):
        self.bounds = Bounds(most, read_s)
        self.gone = 0
        self.released = threading.Event()
        self.clients: list[socket.socket] = []
        app = Starlette(
            routes=[
                Route("/hello", lambda _: PlainTextResponse("hello")),
                Route("/read", self._read, methods=["POST"]),
                Route("/held", self._held),
                Route("/much", lambda _: StreamingResponse(self._much())),
            ]
        )
        self.server = uvicorn.Server(
            uvicorn.Config(app, http=self.bounds.protocol(), lifespan="off", log_config=None, timeout_keep_alive=60)
        )
        self.socket = bind("127.0.0.1", 0)
        self.address = self.socket.getsockname()[:2]
        self.url = "http://{}:{}".format(*self.address)

    async def _read(self, request: Request) -> PlainTextResponse:
        try:
            return PlainTextResponse((await request.body()).decode())
        except ClientDisconnect:
            self.gone += 1
            raise

    async def _held(self, request: Request) -> PlainTextResponse:
        while not self.released.is_set():
            await asyncio.sleep(0.01)
        return PlainTextResponse("held")

    async def _much(self):
        for _ in range(2000):
            yield b"x" * 10_000

    @property
    def open(self) -> int:
        return len(self.server.server_state.connections)

    def connect(self, say: bytes = b"") -> socket.socket:
        client = socket.create_connection(self.address, timeout=10)
        self.clients.append(client)
        client.sendall(say)
        return client


@pytest.fixture
def served() -> Iterator[Callable[..., Server]]:
    with contextlib.ExitStack() as stack:

        def start(**sizes) -> Server:
            one = Server(**sizes)
            stack.callback(one.socket.close)
            thread = threading.Thread(target=lambda: asyncio.run(one.server.serve(sockets=[one.socket])), daemon=True)
            thread.start()

            def stop() -> None:
                one.released.set()
                # From Python 3.12 on a server that closes waits for every connection.
                for client in one.clients:
                    client.close()
                one.server.should_exit = one.server.force_exit = True
                thread.join()

            stack.callback(stop)
            return one

        yield start


def until(condition: Callable[[], bool]) -> None:
    end = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.005)


def rest(client: socket.socket) -> bytes:
    """All that comes until the connection is closed or reset."""
    received = bytearray()
    with contextlib.suppress(ConnectionResetError):
        while part := client.recv(1 << 16):
            received += part
    return bytes(received)


@pytest.mark.parametrize("said", [b"", b"GET /hello HTTP/1.1\r\nHost: loc"], ids=["nothing", "half of the headers"])
def test_a_connection_without_a_request_is_closed(served, said):
    server = served()
    client = server.connect(said)
    until(lambda: server.open == 1)
    assert rest(client) == b""
    until(lambda: server.open == 0)
    assert not server.bounds.waiting


def test_a_client_that_sends_a_byte_at_a_time_has_no_more_time(served):
    server = served()
    client = server.connect()
    with contextlib.suppress(OSError):
        for byte in b"GET /hello HTTP/1.1\r\nHost: " + b"a" * 10_000:
            client.sendall(bytes([byte]))
            time.sleep(0.02)
            if not server.open:
                break
    until(lambda: server.open == 0)
    assert rest(client) == b""


def test_half_a_body_is_a_408_and_the_application_hears_that_its_client_is_gone(served):
    server = served()
    client = server.connect(POST + b"half")
    answer = rest(client)
    assert answer.startswith(b"HTTP/1.1 408 ")
    assert b'"code":"timeout"' in answer
    until(lambda: server.gone == 1)
    until(lambda: server.open == 0)


def test_a_body_that_nobody_reads_keeps_no_connection(served):
    server = served()
    client = server.connect(b"GET /hello HTTP/1.1\r\nHost: localhost\r\nContent-Length: 9\r\n\r\nhalf")
    client.sendall(b"a")
    assert rest(client).startswith(b"HTTP/1.1 200 ")
    until(lambda: server.open == 0)


def test_a_whole_request_has_all_the_time_that_it_needs_and_so_has_the_next(served):
    server = served()
    with httpx.Client(base_url=server.url) as http:
        assert http.get("/hello").text == "hello"
        time.sleep(2 * READ_S)  # idle, which the keep-alive time bounds
        threading.Timer(2 * READ_S, server.released.set).start()
        assert http.get("/held").text == "held"
        assert http.post("/read", content=b"body").text == "body"
        assert server.open == 1


def test_silent_connections_make_room(served, caplog):
    server = served(most=8, read_s=60)
    with caplog.at_level(logging.WARNING):
        silent = [server.connect() for _ in range(40)]
        server.connect(POST + b"half")
        for _ in range(3):
            assert httpx.get(f"{server.url}/hello").text == "hello"
    until(lambda: server.open <= 8)
    # The longest silent went first, and it was said once.
    assert rest(silent[0]) == b""
    silent[-1].sendall(b"GET /hello HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n")
    assert rest(silent[-1]).endswith(b"hello")
    assert [record.getMessage() for record in caplog.records if "connections are open" in record.getMessage()] == [
        "8 connections are open, as many as may be: those that say nothing are closed"
    ]


def test_where_all_are_served_the_next_is_told_to_come_again(served):
    server = served(most=2)
    held = [server.connect(b"GET /held HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n") for _ in range(2)]
    until(lambda: server.open == 2 and not server.bounds.waiting)
    refused = rest(server.connect())
    assert refused.startswith(b"HTTP/1.1 503 ")
    assert b"retry-after: 1" in refused.lower()
    assert b'"code":"too_many_connections"' in refused
    server.released.set()
    assert all(rest(one).endswith(b"held") for one in held)
    assert httpx.get(f"{server.url}/hello").text == "hello"


def test_a_client_that_reads_nothing_is_let_go(served):
    server = served()
    with socket.socket() as client:
        client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1024)
        client.connect(server.address)
        client.sendall(b"GET /much HTTP/1.1\r\nHost: localhost\r\n\r\n")
        until(lambda: server.open == 1)
        until(lambda: server.open == 0)


def test_what_the_limit_on_open_files_leaves(monkeypatch):
    resource = pytest.importorskip("resource")
    for files, most in ((1024, 1024 - OTHER_FILES), (10, 1), (10**6, connections.MOST)):
        monkeypatch.setattr(resource, "getrlimit", lambda _, files=files: (files, files))
        assert most_connections(None) == most
    monkeypatch.setattr(resource, "getrlimit", lambda _: (300, 300))
    assert most_connections(300 - OTHER_FILES) == 300 - OTHER_FILES
    with pytest.raises(ValueError, match="this process may have 300: raise it with `ulimit -n`"):
        most_connections(300)
    monkeypatch.setattr(resource, "getrlimit", lambda _: (resource.RLIM_INFINITY,) * 2)
    assert most_connections(None) == connections.MOST
    assert most_connections(10**5) == 10**5
