"""What every HTTP call passes before the API: an id of its own, and whether a web page may make it.

A page in a user's browser can send requests to a server on the user's machine: from its own site, which the browser
names in `Origin`, or after its name was made to point here (DNS rebinding), which shows in `Host`. Where no API key
stands in the way, calls from other pages are refused; those of --allow-origin may call, and read the answers (CORS).
"""

import ipaddress
import re
import uuid
from collections.abc import Sequence
from typing import Any
from urllib.parse import urlsplit

from starlette.datastructures import Headers, MutableHeaders
from starlette.middleware.cors import CORSMiddleware
from starlette.responses import Response
from starlette.types import ASGIApp, Receive, Scope, Send

from gcompute.serve.errors import HttpError
from gcompute.serve.sse import dump

REQUEST_ID = "x-request-id"
SAFE_ID = re.compile(r"[\x21-\x7e]{1,128}")
ANY = "*"


def guarded(app: ASGIApp, *, host: str | None, has_key: bool, origins: Sequence[str]) -> ASGIApp:
    """`app` behind these checks.

    Args:
      host: the address that the server listens on; None: not known, and `Host` is not judged.
      origins: web origins, as in "https://a.example", whose pages may call; "*" for all.
    """
    front: ASGIApp = _Front(app, None if host is None or not is_loopback(host) else host, has_key, tuple(origins))
    if origins:
        front = CORSMiddleware(
            front, allow_origins=list(origins), allow_methods=[ANY], allow_headers=[ANY], expose_headers=[REQUEST_ID]
        )
    return front


def is_loopback(name: str) -> bool:
    """Whether a host name or address, without port, can only mean this machine."""
    if name == "localhost" or name.endswith(".localhost"):
        return True
    try:
        return ipaddress.ip_address(name.strip("[]")).is_loopback
    except ValueError:
        return False


class _Front:
    def __init__(self, app: ASGIApp, local_host: str | None, has_key: bool, origins: tuple[str, ...]):
        self._app = app
        self._local_host = local_host
        self._has_key = has_key
        self._origins = origins

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        headers = Headers(scope=scope)
        given = headers.get(REQUEST_ID, "")
        name = given if SAFE_ID.fullmatch(given) else uuid.uuid4().hex

        async def named(message: Any) -> None:
            if message["type"] == "http.response.start":
                MutableHeaders(scope=message)[REQUEST_ID] = name
            await send(message)

        refusal = "" if self._has_key or ANY in self._origins else self._refusal(headers)
        if refusal:
            error = HttpError(status=403, message=refusal, code="forbidden")
            answer = Response(dump(error.body()), status_code=error.status, media_type="application/json")
            await answer(scope, receive, named)
        else:
            await self._app(scope, receive, named)

    def _refusal(self, headers: Headers) -> str:
        origin, host = headers.get("origin"), headers.get("host", "")
        allowed_hosts = {urlsplit(one).netloc for one in self._origins}
        if self._local_host is not None and host and host not in allowed_hosts:
            name = urlsplit(f"//{host}").hostname or ""
            if name != self._local_host and not is_loopback(name):
                return (
                    f"This server answers on this machine alone, and Host names {name[:60]!r}. Name its address with"
                    " --allow-origin, or set an API key."
                )
        if origin is not None and origin not in self._origins and urlsplit(origin).netloc != host:
            return (
                f"Web pages of {origin[:60]!r} may not call this server. Allow them with --allow-origin, or set an API"
                " key."
            )
        return ""
