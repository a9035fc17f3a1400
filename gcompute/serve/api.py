"""The engine over HTTP: OpenAI's completions, chat, models, health and metrics, as a starlette application.

    POST /v1/completions    POST /v1/chat/completions    GET /v1/models    GET /v1/models/NAME
    GET /health             GET /metrics                 GET /              GET /engine    GET /engine/events
    POST /tokenize          POST /detokenize

A client that goes away takes its requests with it: their slots are free after the dispatch in progress. With an API key
all of /v1 needs it, as `Authorization: Bearer KEY`. So do the snapshots of /engine, once or as events while somebody
listens: they hold no text, but the lengths and the pace of each running request, which are its sender's. The page at /
holds nothing of anyone's and stays open; it asks for the key.
"""

import asyncio
import hmac
import logging
import time
from collections.abc import Awaitable, Callable, Mapping
from typing import Any

from starlette.applications import Starlette
from starlette.concurrency import run_in_threadpool
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response
from starlette.routing import Route

from gcompute.serve.chat import ChatAnswer, parse_chat
from gcompute.serve.chat_template import ChatTemplate, PlainTemplate
from gcompute.serve.engine import Engine, Status
from gcompute.serve.errors import RETRY_AFTER_S, HttpError, http_error
from gcompute.serve.metrics import CONTENT_TYPE, Metrics
from gcompute.serve.page.document import document
from gcompute.serve.parameters import unknown_model
from gcompute.serve.position import DecodeRoofline
from gcompute.serve.protocol import Answer, Ask, parse_ask
from gcompute.serve.request import NotReady, RequestError
from gcompute.serve.sse import EventStreamResponse, cancelled_with_client, check_served, dump
from gcompute.serve.stream import Completion, EventStream, completion
from gcompute.serve.tokenize import detokenized, tokenized
from gcompute.serve.watch import Watch
from gcompute.serve.watchers import Watchers

MAX_BODY_BYTES = 4 << 20
# A body that is too large is read on this far, so that the client is done sending and hears why it was refused.
DISCARDED_BODIES = 8

# To a client that went away.
UNREAD = Response(status_code=400)

log = logging.getLogger(__name__)

Handler = Callable[[Request], Awaitable[Response]]
Parse = Callable[[bytes], Ask]


def create_app(
    engine: Engine,
    *,
    model_name: str,
    template: ChatTemplate | None = None,
    api_key: str | None = None,
    max_body_bytes: int = MAX_BODY_BYTES,
    timeout_s: float | None = None,
    roofline: DecodeRoofline | None = None,
) -> Starlette:
    """The application for one engine and the one model that it answers for; `state.watchers` are those of /engine.

    template: how chats become prompts; the plain one by default. timeout_s: the longest that a call may take.
    roofline: what the page shows the decode batch on, if anything.
    """
    template = template or PlainTemplate()
    return _Api(engine, model_name, template, api_key, max_body_bytes, timeout_s, roofline).app


class _Api:
    def __init__(
        self,
        engine: Engine,
        model_name: str,
        template: ChatTemplate,
        api_key: str | None,
        max_body_bytes: int,
        timeout_s: float | None,
        roofline: DecodeRoofline | None,
    ):
        self._engine = engine
        self._model_name = model_name
        self._template = template
        self._api_key = api_key
        self._max_body_bytes = max_body_bytes
        self._timeout_s = timeout_s
        self._created = int(time.time())
        self._metrics = Metrics(engine)
        about = {
            "model": model_name,
            "max_context": engine.max_context,
            "max_choices": engine.max_choices,
            "chat": not isinstance(template, PlainTemplate),
        }
        self._watch = Watch(engine.stats, about=about, roofline=roofline)
        engine.observe(self._watch.finished)
        self._watchers = Watchers(lambda: dump(self._watch.look()))
        self.app = Starlette(
            routes=[
                Route("/v1/completions", self._completions, methods=["POST"]),
                Route("/v1/chat/completions", self._chat, methods=["POST"]),
                Route("/tokenize", self._with_key(self._tokenize), methods=["POST"]),
                Route("/detokenize", self._with_key(self._detokenize), methods=["POST"]),
                Route("/v1/models", self._with_key(self._models)),
                Route("/v1/models/{name:path}", self._with_key(self._one_model)),
                Route("/health", self._health),
                Route("/metrics", self._render_metrics),
                Route("/engine", self._with_key(self._engine_now)),
                Route("/engine/events", self._with_key(self._engine_events)),
                Route("/", self._page),
            ],
            exception_handlers={HTTPException: self._routing_error},
        )
        self.app.state.watchers = self._watchers

    async def _completions(self, request: Request) -> Response:
        return await self._complete(
            request, lambda body: parse_ask(body, engine=self._engine, model_name=self._model_name), Answer
        )

    async def _chat(self, request: Request) -> Response:
        def parse(body: bytes) -> Ask:
            return parse_chat(body, engine=self._engine, model_name=self._model_name, template=self._template)

        return await self._complete(request, parse, ChatAnswer)

    async def _tokenize(self, request: Request) -> Response:
        def answer(body: bytes) -> dict[str, Any]:
            return tokenized(body, engine=self._engine, model_name=self._model_name, template=self._template)

        return _json(await run_in_threadpool(answer, await _read_body(request, self._max_body_bytes)))

    async def _detokenize(self, request: Request) -> Response:
        def answer(body: bytes) -> dict[str, Any]:
            return detokenized(body, engine=self._engine, model_name=self._model_name)

        return _json(await run_in_threadpool(answer, await _read_body(request, self._max_body_bytes)))

    async def _complete(self, request: Request, parse: Parse, answer_type: type[Answer]) -> Response:
        # One limit for reading, rendering, tokenizing and making.
        end_s = None if self._timeout_s is None else asyncio.get_running_loop().time() + self._timeout_s
        try:
            self._check_key(request)
            async with asyncio.timeout_at(end_s):
                body = await _read_body(request, self._max_body_bytes)
                ask = await run_in_threadpool(parse, body)
                await run_in_threadpool(self._engine.prepare, ask.requests)
            answer = answer_type(ask, self._engine)
            streams = self._engine.submit_all(ask.requests)
            if ask.stream:
                return EventStreamResponse(self._engine, ask, answer, streams, end_s)
            following = cancelled_with_client(self._engine, streams, request.receive)
            async with following as gone, asyncio.timeout_at(end_s):
                done = await asyncio.gather(*map(_collect, streams))
            if gone.is_set():
                return UNREAD
            for each in done:
                check_served(each)
            return _json(answer.whole(done))
        except ClientDisconnect:
            return UNREAD
        except Exception as error:
            return self._refuse(error)

    def _check_key(self, request: Request) -> None:
        if self._api_key is None:
            return
        kind, _, rest = request.headers.get("Authorization", "").partition(" ")
        # Starlette reads headers as Latin-1, and so do browsers write them. Other clients write UTF-8.
        given, keys = rest.strip(" \t").encode("latin-1"), [self._api_key.encode()]
        if all(ord(character) < 256 for character in self._api_key):
            keys.append(self._api_key.encode("latin-1"))
        if kind.lower() != "bearer" or not any(hmac.compare_digest(given, key) for key in keys):
            message = "The API key is missing or wrong: send it as `Authorization: Bearer KEY`."
            raise HttpError(status=401, message=message, code="invalid_api_key")

    def _with_key(self, handler: Handler) -> Handler:
        """The handler behind the API key, its errors as answers."""

        async def checked(request: Request) -> Response:
            try:
                self._check_key(request)
                return await handler(request)
            except ClientDisconnect:
                return UNREAD
            except (HttpError, NotReady, RequestError) as error:
                return self._refuse(error)

        return checked

    def _refuse(self, error: Exception) -> Response:
        answer = http_error(error)
        if not isinstance(error, HttpError) and answer.status == 500:
            log.error("a call failed", exc_info=error)
        self._metrics.reject(answer.status)
        return _json(answer.body(), status=answer.status, headers=answer.headers())

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
            raise unknown_model(name, self._model_name)
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

    async def _engine_now(self, request: Request) -> Response:
        return _json(self._watch.look(), headers={"Cache-Control": "no-store"})

    async def _engine_events(self, request: Request) -> Response:
        return self._watchers.response()

    async def _page(self, request: Request) -> Response:
        page = document()
        return Response(page.body, headers=page.headers)


async def _collect(stream: EventStream) -> Completion:
    return completion([event async for event in stream])


async def _read_body(request: Request, max_bytes: int) -> bytes:
    packed = request.headers.get("Content-Encoding", "identity").strip().lower()
    if packed not in ("", "identity"):
        message = f"The body is {packed[:40]!r}-encoded: send JSON as it is."
        raise HttpError(status=415, message=message, code="unsupported_encoding")
    body = bytearray()
    discarded = 0
    async for part in request.stream():
        if discarded or len(body) + len(part) > max_bytes:
            discarded += len(part)
            body.clear()
            if discarded > DISCARDED_BODIES * max_bytes:
                break
        else:
            body += part
    if discarded:
        raise HttpError(status=413, message=f"The body is larger than {max_bytes} bytes.", code="body_too_large")
    return bytes(body)


def _json(value: Any, *, status: int = 200, headers: Mapping[str, str] | None = None) -> Response:
    return Response(dump(value), status_code=status, headers=headers, media_type="application/json")
