"""Run the application on a socket: in the foreground until a signal, or in the background for a while."""

import asyncio
import contextlib
import errno
import signal
import socket
import threading
import time
from collections.abc import Callable, Iterator, Sequence

import uvicorn

from gcompute.config.serve import ServeConfig
from gcompute.serve.api import create_app
from gcompute.serve.chat_template import ChatTemplate
from gcompute.serve.connections import Bounds, most_connections
from gcompute.serve.engine import Engine
from gcompute.serve.front import guarded
from gcompute.serve.position import DecodeRoofline
from gcompute.serve.request import NotReady
from gcompute.serve.watchers import Watchers

BACKLOG = 1024
# So long a server that closes waits for clients to take answers that are ready.
STALLED_S = 10.0
ANY_ADDRESS = {"0.0.0.0": "127.0.0.1", "::": "::1"}


def bind(host: str, port: int) -> socket.socket:
    """A listening socket; port 0 takes a free one.

    Raises:
      ValueError: the port is in use or reserved, or the host is not this machine's.
    """
    where = f"port {port} of {host!r}"
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        sock = socket.socket(family, kind, protocol)
    except (OSError, UnicodeError) as error:
        raise ValueError(f"host {host!r} cannot be used: {error}. 127.0.0.1 is this machine alone.") from None
    try:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        sock.bind(address)
        sock.listen(BACKLOG)
    except OSError as error:
        sock.close()
        if error.errno == errno.EADDRINUSE:
            raise ValueError(f"{where} is in use. Choose another, or 0 for a free one.") from None
        raise ValueError(f"{where} cannot be listened on: {error.strerror}. Choose another, or 0.") from None
    return sock


def url_of(sock: socket.socket) -> str:
    """The address that a client on this machine uses."""
    host, port = sock.getsockname()[:2]
    host = ANY_ADDRESS.get(str(host), str(host))
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


class _Server(uvicorn.Server):
    """uvicorn with its signal handling left out: it would end the process before the engine is closed.

    Nor does it wait for those who watch the engine: they would stay for ever.
    """

    def __init__(self, config: uvicorn.Config, engine: Engine, watchers: Watchers):
        super().__init__(config)
        self._engine = engine
        self._watchers = watchers

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        self._watchers.close()
        waiting = asyncio.create_task(self._give_up())
        try:
            await super().shutdown(sockets)
        finally:
            waiting.cancel()

    async def _give_up(self) -> None:
        """Once all requests have ended, their clients have so long to take what is left for them."""
        idle_since_s = time.monotonic()
        while time.monotonic() - idle_since_s < STALLED_S:
            await asyncio.sleep(0.1)
            stats = self._engine.stats()
            if stats.num_running or stats.num_waiting:
                idle_since_s = time.monotonic()
        for connection in self.server_state.connections:
            connection.transport.abort()

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield


def _make_server(
    engine: Engine,
    config: ServeConfig,
    model_name: str,
    template: ChatTemplate | None,
    api_key: str | None,
    roofline: DecodeRoofline | None,
) -> _Server:
    app = create_app(
        engine,
        model_name=model_name,
        template=template,
        api_key=api_key,
        max_body_bytes=config.max_body_bytes,
        timeout_s=config.timeout_s,
        roofline=roofline,
    )
    front = guarded(app, host=config.host, has_key=api_key is not None, origins=config.origins)
    return _Server(
        uvicorn.Config(
            front,
            http=Bounds(most_connections(config.max_connections), config.read_timeout_s).protocol(),
            ws="none",
            lifespan="off",
            log_config=None,
            access_log=False,
            backlog=BACKLOG,
            timeout_keep_alive=config.keep_alive_s,
        ),
        engine,
        app.state.watchers,
    )


def serve(
    engine: Engine,
    config: ServeConfig,
    *,
    model_name: str,
    announce: Callable[[str], None],
    template: ChatTemplate | None = None,
    api_key: str | None = None,
    roofline: DecodeRoofline | None = None,
    signals: Sequence[signal.Signals] = (signal.SIGTERM, signal.SIGINT),
) -> None:
    """Serve until one of `signals`; then refuse new requests, finish those accepted, and close the engine.

    The engine is started if it was not. `announce` hears the URL once requests are taken; until then, calls are
    answered 503. A second signal but SIGHUP gives up on what still runs. Off the main
    thread no signal is heard.

    Raises:
      ValueError: the address cannot be listened on.
      NotReady: the engine failed to start.
    """
    with contextlib.closing(bind(config.host, config.port)) as sock:
        server = _make_server(engine, config, model_name, template, api_key, roofline)
        finish = False
        try:
            engine.start()
            asyncio.run(_serve(server, sock, engine, announce, signals))
            finish = not server.force_exit
        finally:
            engine.close(finish=finish)


async def _serve(
    server: _Server,
    sock: socket.socket,
    engine: Engine,
    announce: Callable[[str], None],
    signals: Sequence[signal.Signals],
) -> None:
    def stop(number: signal.Signals) -> None:
        # A closed terminal may send SIGHUP twice.
        server.force_exit = server.force_exit or (server.should_exit and number != signal.SIGHUP)
        server.should_exit = True
        engine.drain()

    loop = asyncio.get_running_loop()
    heard = signals if threading.current_thread() is threading.main_thread() else ()
    for number in heard:
        loop.add_signal_handler(number, stop, number)
    try:
        serving = asyncio.create_task(server.serve(sockets=[sock]))
        try:
            await asyncio.to_thread(engine.wait_ready)
            announce(url_of(sock))
        except BaseException as error:
            stopped_while_loading = server.should_exit and isinstance(error, NotReady)
            server.should_exit = True
            await serving
            if not stopped_while_loading:
                raise
        await serving
    finally:
        for number in heard:
            loop.remove_signal_handler(number)


@contextlib.contextmanager
def background(
    engine: Engine,
    config: ServeConfig,
    *,
    model_name: str,
    template: ChatTemplate | None = None,
    api_key: str | None = None,
    roofline: DecodeRoofline | None = None,
) -> Iterator[str]:
    """Serve from another thread while the block runs, and yield the URL. The engine stays the caller's.

    Raises:
      ValueError: the address cannot be listened on.
    """
    with contextlib.closing(bind(config.host, config.port)) as sock:
        server = _make_server(engine, config, model_name, template, api_key, roofline)
        thread = threading.Thread(target=lambda: asyncio.run(server.serve(sockets=[sock])), name="http", daemon=True)
        thread.start()
        try:
            yield url_of(sock)
        finally:
            server.should_exit = True
            thread.join()
