"""Requests followed for a client: cancelled when it goes away, and streamed to it as server-sent events."""

import asyncio
import contextlib
import json
from collections.abc import AsyncIterator, Coroutine, Sequence
from contextlib import asynccontextmanager
from typing import Any

from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from gcompute.serve.engine import Engine
from gcompute.serve.errors import HttpError, http_error
from gcompute.serve.protocol import Answer, Ask
from gcompute.serve.request import NotReady
from gcompute.serve.stream import Completion, Event, EventStream, Finished, Reason, Tokens, Usage

# A client that was too slow for its answer is given so long to take the error.
LAST_WORDS_S = 1.0
# Proxies close streams that are silent for longer: a comment, which clients skip, says that this one is alive.
SILENCE_S = 15.0
COMMENT = b": waiting\n\n"


class EventStreamResponse(Response):
    """One chunk for each block of tokens, then [DONE]; after a failure, or past `end_s`, one error event instead.

    end_s: on the event loop's clock; None: no limit.
    """

    media_type = "text/event-stream"

    def __init__(self, engine: Engine, ask: Ask, answer: Answer, streams: Sequence[EventStream], end_s: float | None):
        self.status_code = 200
        self.background = None
        self.init_headers({"Cache-Control": "no-cache", "X-Accel-Buffering": "no"})
        self._engine = engine
        self._ask = ask
        self._answer = answer
        self._streams = streams
        self._end_s = end_s

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        spoken = asyncio.Event()

        async def put(data: bytes) -> None:
            spoken.set()
            await send({"type": "http.response.body", "body": b"data: " + data + b"\n\n", "more_body": True})

        async def break_silence() -> None:
            while True:
                spoken.clear()
                await asyncio.sleep(SILENCE_S)
                if not spoken.is_set():
                    await send({"type": "http.response.body", "body": COMMENT, "more_body": True})

        async with cancelled_with_client(self._engine, self._streams, receive):
            end = {"type": "http.response.body", "body": b"", "more_body": False}
            try:
                async with asyncio.timeout_at(self._end_s):
                    await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
                    async with _beside(break_silence()):
                        async for data in self._events():
                            await put(data)
                    await send(end)
            except TimeoutError as error:
                for stream in self._streams:
                    self._engine.cancel(stream)
                with contextlib.suppress(TimeoutError):
                    async with asyncio.timeout(LAST_WORDS_S):
                        await put(dump(http_error(error).body()))
                        await send(end)

    async def _events(self) -> AsyncIterator[bytes]:
        for chunk in self._answer.opening():
            yield dump(chunk)
        before = list(self._ask.echoes)
        made = [0] * len(self._streams)
        usages: dict[int, Usage] = {}
        async for index, event in _merge(self._streams):
            if isinstance(event, Tokens):
                made[index] += len(event.ids)
                num_prompt = len(self._streams[index].request.prompt)
                usage = Usage(prompt_tokens=num_prompt, completion_tokens=made[index])
            else:
                usages[index] = usage = event.usage
                try:
                    check_served(event)
                except (HttpError, NotReady) as error:
                    yield dump(http_error(error).body())
                    return
            echo, before[index] = before[index], ""
            yield dump(self._answer.chunk(index, event, usage, echo))
        if self._ask.include_usage:
            yield dump(self._answer.last_chunk([usages[index] for index in range(len(self._streams))]))
        yield b"[DONE]"


@asynccontextmanager
async def cancelled_with_client(
    engine: Engine, streams: Sequence[EventStream], receive: Receive
) -> AsyncIterator[asyncio.Event]:
    """Cancel what still runs when the client disconnects, which sets the event, or when the block is left."""
    gone = asyncio.Event()

    def cancel() -> None:
        for stream in streams:
            engine.cancel(stream)

    async def watch() -> None:
        await until_gone(receive)
        gone.set()
        cancel()

    watcher = asyncio.create_task(watch())
    try:
        yield gone
    finally:
        cancel()
        watcher.cancel()
        await asyncio.gather(watcher, return_exceptions=True)


@asynccontextmanager
async def _beside(work: Coroutine[Any, Any, None]) -> AsyncIterator[None]:
    """`work` while the block runs."""
    task = asyncio.create_task(work)
    try:
        yield
    finally:
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)


async def until_gone(receive: Receive) -> None:
    """Return when the client has disconnected."""
    while (await receive())["type"] != "http.disconnect":
        pass


async def _merge(streams: Sequence[EventStream]) -> AsyncIterator[tuple[int, Event]]:
    """The events of all streams as they come, each with its stream's index."""
    events: asyncio.Queue[tuple[int, Event]] = asyncio.Queue()

    async def pump(index: int, stream: EventStream) -> None:
        async for event in stream:
            events.put_nowait((index, event))

    pumps = [asyncio.create_task(pump(index, stream)) for index, stream in enumerate(streams)]
    try:
        left = len(streams)
        while left:
            index, event = await events.get()
            left -= isinstance(event, Finished)
            yield index, event
    finally:
        for task in pumps:
            task.cancel()
        await asyncio.gather(*pumps, return_exceptions=True)


def check_served(last: Finished | Completion) -> None:
    """Raise what the client should hear of a request that did not run to its end."""
    if last.reason is Reason.ERROR:
        raise HttpError(status=500, message=last.error or "the request failed.", kind="server_error")
    if last.reason is Reason.CANCELLED:
        raise NotReady("the request was cancelled: the server is closing.")


def dump(value: Any) -> bytes:
    """One line of JSON."""
    return json.dumps(value, separators=(",", ":")).encode()
