"""Answers that are not 200, in OpenAI's shape: {"error": {"message", "type", "param", "code"}}."""

from dataclasses import dataclass
from typing import Any

from gcompute.serve.request import NotReady, QueueFull, RequestError

RETRY_AFTER_S = 1


@dataclass(kw_only=True, eq=False)
class HttpError(Exception):
    """An answer that is not 200."""

    status: int
    message: str
    kind: str = "invalid_request_error"
    param: str | None = None
    code: str | None = None
    retry_after_s: int | None = None

    def body(self) -> dict[str, Any]:
        # What a client sent may be quoted in it: one line, and no half of a surrogate pair, which UTF-8 cannot hold.
        message = " ".join(self.message.encode(errors="replace").decode().split())
        return {"error": {"message": message, "type": self.kind, "param": self.param, "code": self.code}}

    def headers(self) -> dict[str, str]:
        retry = {} if self.retry_after_s is None else {"Retry-After": str(self.retry_after_s)}
        return {**retry, **({"WWW-Authenticate": "Bearer"} if self.status == 401 else {})}


def http_error(error: Exception) -> HttpError:
    """The answer that an exception of the engine or of parsing stands for."""
    match error:
        case HttpError():
            return error
        case RequestError():
            return HttpError(status=400, message=str(error), param=error.param, code=error.code)
        case QueueFull():
            message, kind, code = str(error), "rate_limit_error", "queue_full"
            return HttpError(status=429, message=message, kind=kind, code=code, retry_after_s=RETRY_AFTER_S)
        case NotReady():
            message, kind, code = str(error), "service_unavailable", "not_ready"
            return HttpError(status=503, message=message, kind=kind, code=code, retry_after_s=RETRY_AFTER_S)
        case TimeoutError():
            message = "the request took longer than this server allows; ask for fewer tokens."
            return HttpError(status=408, message=message, kind="timeout_error", code="timeout")
        case _:
            return HttpError(status=500, message="the server failed on this request.", kind="server_error")
