"""The engine over HTTP: OpenAI's completions, models, health and metrics, as a starlette application.

    POST /v1/completions    GET /v1/models    GET /v1/models/NAME    GET /health    GET /metrics

A client that goes away takes its requests with it: their slots are free after the dispatch in progress.
"""

import asyncio
import json
import logging
import time
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager
from typing import Any

from starlette.applications import Starlette
from starlette.concurrency import run_in_threadpool
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route
from starlette.types import Receive, Scope, Send

from gcompute.serve.engine import Engine, Status
from gcompute.serve.metrics import CONTENT_TYPE, Metrics
from gcompute.serve.protocol import RETRY_AFTER_S, Answer, Ask, HttpError, http_error, parse_ask
from gcompute.serve.request import NotReady
from gcompute.serve.stream import Completion, Event, EventStream, Finished, Reason, Tokens, Usage, completion

MAX_BODY_BYTES = 4 << 20
# A body that is too large is read on this far, so that the client is done sending and hears why it was refused.
MAX_DISCARDED_BYTES = 8 * MAX_BODY_BYTES

log = logging.getLogger(__name__)


def create_app(engine: Engine, *, model_name: str) -> Starlette:
    """The application for one engine and the one model that it answers for."""
    return _Api(engine, model_name).app


class _Api:
    def __init__(self, engine: Engine, model_name: str):
        self._engine = engine
        self._model_name = model_name
        self._created = int(time.time())
        self._metrics = Metrics(engine)
        self.app = Starlette(
            routes=[
                Route("/v1/completions", self._completions, methods=["POST"]),
                Route("/v1/models", self._models),
                Route("/v1/models/{name:path}", self._one_model),
                Route("/health", self._health),
                Route("/metrics", self._render_metrics),
            ],
            exception_handlers={HTTPException: self._routing_error},
        )

    async def _completions(self, request: Request) -> Response:
        try:
            body = await _read_body(request)
            ask = await run_in_threadpool(parse_ask, body, engine=self._engine, model_name=self._model_name)
            streams = self._engine.submit_all(ask.requests)
            if ask.stream:
                return _EventStreamResponse(self._engine, ask, streams)
            async with _cancelled_with_client(self._engine, streams, request.receive):
                done = await asyncio.gather(*map(_collect, streams))
            for each in done:
                _check_served(each)
            texts = [echo + each.text for echo, each in zip(ask.echoes, done, strict=True)]
            return _json(Answer(ask).whole(texts, [each.reason for each in done], [each.usage for each in done]))
        except ClientDisconnect:
            return Response(status_code=400)  # nobody reads it
        except Exception as error:
            return self._refuse(error)

    def _refuse(self, error: Exception) -> Response:
        answer = http_error(error)
        if not isinstance(error, HttpError) and answer.status == 500:
            log.error("a call failed", exc_info=error)
        self._metrics.reject(answer.status)
        retry = {} if answer.retry_after_s is None else {"Retry-After": str(answer.retry_after_s)}
        return _json(answer.body(), status=answer.status, headers=retry)

    async def _routing_error(self, request: Request, error: Exception) -> Response:
        assert isinstance(error, HTTPException)
        message = f"{request.method} {request.url.path}: {error.detail}."
        return _json(
            HttpError(status=error.status_code, message=message).body(),
            status=error.status_code,
            headers=error.headers or {},
        )

    async def _models(self, request: Request) -> Response:
        return _json({"object": "list", "data": [self._model()]})

    async def _one_model(self, request: Request) -> Response:
        name = request.path_params["name"]
        if name != self._model_name:
            message = f"The model `{name}` does not exist. This server has `{self._model_name}`."
            return self._refuse(HttpError(status=404, message=message, param="model", code="model_not_found"))
        return _json(self._model())

    def _model(self) -> dict[str, Any]:
        return {
            "id": self._model_name,
            "object": "model",
            "created": self._created,
            "owned_by": "gcompute",
            "max_model_len": self._engine.max_context,
        }

    async def _health(self, request: Request) -> Response:
        status = self._engine.stats().status
        if status is Status.READY:
            return _json({"status": status})
        return _json({"status": status}, status=503, headers={"Retry-After": str(RETRY_AFTER_S)})

    async def _render_metrics(self, request: Request) -> Response:
        return Response(self._metrics.render(), headers={"Content-Type": CONTENT_TYPE})


class _EventStreamResponse(Response):
    """Server-sent events: one chunk for each block of tokens, then [DONE]; after a failure one error event instead."""

    media_type = "text/event-stream"

    def __init__(self, engine: Engine, ask: Ask, streams: Sequence[EventStream]):
        self.status_code = 200
        self.background = None
        self.init_headers({"Cache-Control": "no-cache", "X-Accel-Buffering": "no"})
        self._engine = engine
        self._ask = ask
        self._streams = streams

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async with _cancelled_with_client(self._engine, self._streams, receive):
            await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
            async for data in self._events():
                body = b"data: " + data + b"\n\n"
                await send({"type": "http.response.body", "body": body, "more_body": True})
            await send({"type": "http.response.body", "body": b"", "more_body": False})

    async def _events(self) -> AsyncIterator[bytes]:
        answer = Answer(self._ask)
        before = list(self._ask.echoes)
        made = [0] * len(self._streams)
        usages: dict[int, Usage] = {}
        async for index, event in _merge(self._streams):
            if isinstance(event, Tokens):
                reason, made[index] = None, made[index] + len(event.ids)
                num_prompt = len(self._streams[index].request.prompt)
                usage = Usage(prompt_tokens=num_prompt, completion_tokens=made[index])
            else:
                reason, usage = event.reason, event.usage
                usages[index] = usage
                try:
                    _check_served(event)
                except (HttpError, NotReady) as error:
                    yield _dump(http_error(error).body())
                    return
            text, before[index] = before[index] + event.text, ""
            yield _dump(answer.chunk(index, text, reason, usage))
        if self._ask.include_usage:
            yield _dump(answer.last_chunk([usages[index] for index in range(len(self._streams))]))
        yield b"[DONE]"


@asynccontextmanager
async def _cancelled_with_client(
    engine: Engine, streams: Sequence[EventStream], receive: Receive
) -> AsyncIterator[None]:
    """Cancel what still runs when the client disconnects, or when the block is left for any reason."""

    def cancel() -> None:
        for stream in streams:
            engine.cancel(stream)

    async def watch() -> None:
        while (await receive())["type"] != "http.disconnect":
            pass
        cancel()

    watcher = asyncio.create_task(watch())
    try:
        yield
    finally:
        cancel()
        watcher.cancel()
        await asyncio.gather(watcher, return_exceptions=True)


async def _collect(stream: EventStream) -> Completion:
    return completion([event async for event in stream])


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


def _check_served(last: Finished | Completion) -> None:
    """Raise what the client should hear of a request that did not run to its end."""
    if last.reason is Reason.ERROR:
        raise HttpError(status=500, message=last.error or "the request failed.", kind="server_error")
    if last.reason is Reason.CANCELLED:
        raise NotReady("the request was cancelled: the server is closing.")


async def _read_body(request: Request) -> bytes:
    body = bytearray()
    discarded = 0
    async for part in request.stream():
        if discarded or len(body) + len(part) > MAX_BODY_BYTES:
            discarded += len(part)
            body.clear()
            if discarded > MAX_DISCARDED_BYTES:
                break
        else:
            body += part
    if discarded:
        raise HttpError(status=413, message=f"The body is larger than {MAX_BODY_BYTES} bytes.", code="body_too_large")
    return bytes(body)


def _dump(value: Any) -> bytes:
    return json.dumps(value, separators=(",", ":")).encode()


def _json(value: Any, *, status: int = 200, headers: Mapping[str, str] | None = None) -> Response:
    return JSONResponse(value, status_code=status, headers=headers)
