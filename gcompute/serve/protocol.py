"""The OpenAI completions protocol as plain values: JSON in, requests out; events in, JSON out; errors in its shape.

Parameters that OpenAI or vLLM have and this server has not are accepted where their value asks for nothing (null, or
the neutral value listed in NEUTRAL) and refused otherwise, as are unknown ones: none is silently ignored.
"""

import json
import time
import uuid
from dataclasses import dataclass, replace
from typing import Any

from gcompute.config.fields import nearest
from gcompute.serve.engine import Engine
from gcompute.serve.request import NotReady, QueueFull, Request, RequestError, Sampling, check_fits
from gcompute.serve.stream import Reason, Usage

DEFAULT_MAX_TOKENS = 16
MAX_N = 16
RETRY_AFTER_S = 1

# Read, or harmless: `user` names the end user and changes nothing.
KNOWN = (
    *("model", "prompt", "max_tokens", "temperature", "top_p", "top_k", "min_p", "seed", "stop", "stream"),
    *("stream_options", "n", "echo", "ignore_eos", "user"),
)
# Parameters of OpenAI's and vLLM's completions that are not built, with the values that ask for nothing.
NEUTRAL: dict[str, tuple[Any, ...]] = {
    "best_of": (1,),
    "frequency_penalty": (0,),
    "presence_penalty": (0,),
    "repetition_penalty": (1,),
    "logit_bias": ({},),
    "logprobs": (),
    "prompt_logprobs": (),
    "suffix": ("",),
    "min_tokens": (0,),
    "stop_token_ids": ([],),
    "skip_special_tokens": (False,),
}


@dataclass(kw_only=True, eq=False)
class HttpError(Exception):
    """An answer that is not 200, in OpenAI's shape."""

    status: int
    message: str
    kind: str = "invalid_request_error"
    param: str | None = None
    code: str | None = None
    retry_after_s: int | None = None

    def body(self) -> dict[str, Any]:
        return {"error": {"message": self.message, "type": self.kind, "param": self.param, "code": self.code}}


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
        case _:
            return HttpError(status=500, message="the server failed on this request.", kind="server_error")


@dataclass(frozen=True, slots=True, kw_only=True)
class Ask:
    """One completions call: a request for each choice, and how to answer. echoes: prompt text before each choice."""

    model: str
    requests: tuple[Request, ...]
    echoes: tuple[str, ...]
    num_prompts: int
    stream: bool
    include_usage: bool
    continuous_usage: bool


def parse_ask(body: bytes, *, engine: Engine, model_name: str) -> Ask:
    """Read a completions call.

    Raises:
      HttpError: unknown model. RequestError: anything else that is wrong with it; `param` names what.
    """
    fields = _object(body)
    model = _field(fields, "model", str, model_name)
    if model != model_name:
        message = f"The model `{_short(model)}` does not exist. This server has `{model_name}`."
        raise HttpError(status=404, message=message, param="model", code="model_not_found")
    n = _field(fields, "n", int, 1)
    if not 1 <= n <= MAX_N:
        raise RequestError(f"n must be from 1 to {MAX_N}, got {_short(n)}.", param="n")
    prompts = _prompts(fields.get("prompt"), engine)
    num_choices = len(prompts) * n
    if num_choices > engine.max_choices:
        message = f"prompt asks for {num_choices} choices at once; this server takes at most {engine.max_choices}."
        raise RequestError(message, param="prompt")
    stream = _field(fields, "stream", bool, False)
    options = _stream_options(fields, stream)
    _field(fields, "user", str, "")
    requests, echoes = [], []
    echo = _field(fields, "echo", bool, False)
    for text, ids in prompts:
        sampling = _sampling(fields, room=engine.max_context - len(ids))
        # Checked before an echo decodes the ids.
        check_fits(Request(prompt=ids, sampling=sampling), vocab=engine.config.vocab, max_context=engine.max_context)
        shown = "" if not echo else text if text is not None else engine.decode(ids)
        for choice in range(n):
            # One seed for all choices would make them equal.
            seed = None if sampling.seed is None else (sampling.seed + choice) % 2**64
            requests.append(Request(prompt=ids, sampling=replace(sampling, seed=seed)))
            echoes.append(shown)
    return Ask(
        model=model,
        requests=tuple(requests),
        echoes=tuple(echoes),
        num_prompts=len(prompts),
        stream=stream,
        include_usage=options.get("include_usage", False),
        continuous_usage=options.get("continuous_usage_stats", False),
    )


def _object(body: bytes) -> dict[str, Any]:
    def refuse(constant: str) -> None:
        raise ValueError(f"{constant} is not JSON")

    try:
        fields = json.loads(body, parse_constant=refuse)
    except (ValueError, RecursionError) as error:
        reason = "nested too deeply" if isinstance(error, RecursionError) else error
        raise RequestError(f"The body is not valid JSON: {_short(reason, 120)}.", code="invalid_json") from None
    if not isinstance(fields, dict):
        raise RequestError("The body must be a JSON object.", code="invalid_json")
    legal = (*KNOWN, *NEUTRAL)
    for name, value in fields.items():
        if name not in legal:
            raise RequestError(
                f"Unknown parameter: {_short(name)!r}. {nearest(_short(name), legal)}", param=_short(name)
            )
        if name in NEUTRAL and value is not None and not _is_neutral(value, NEUTRAL[name]):
            raise RequestError(f"{name} is not supported by this server: leave it out.", param=name)
    return fields


def _is_neutral(value: Any, neutral: tuple[Any, ...]) -> bool:
    # 0 == False and 1 == True in Python, and not in JSON.
    return any(value == legal and isinstance(value, bool) == isinstance(legal, bool) for legal in neutral)


def _field(fields: dict[str, Any], name: str, kind: type, default: Any) -> Any:
    """A field of the given type; null is the same as absent."""
    value = fields.get(name)
    if value is None:
        return default
    if not isinstance(value, kind) or (kind is int and isinstance(value, bool)):
        word = {str: "a string", int: "a whole number", bool: "true or false", dict: "an object"}[kind]
        raise RequestError(f"{name} must be {word}, got {_short(value)}.", param=name)
    return value


def _stream_options(fields: dict[str, Any], stream: bool) -> dict[str, bool]:
    options = _field(fields, "stream_options", dict, {})
    if options and not stream:
        raise RequestError("stream_options needs stream to be true.", param="stream_options")
    for name in options:
        if name not in ("include_usage", "continuous_usage_stats"):
            raise RequestError(f"Unknown parameter: 'stream_options.{_short(name)}'.", param="stream_options")
    return {name: _field(options, name, bool, False) for name in options}


def _prompts(prompt: Any, engine: Engine) -> list[tuple[str | None, tuple[int, ...]]]:
    """Each prompt's text, None where ids were given, and its ids. All four OpenAI forms are read."""
    if prompt is None:
        raise RequestError("prompt is required: a string, a list of strings, or token ids.", param="prompt")
    if isinstance(prompt, str) or (isinstance(prompt, list) and prompt and _is_id(prompt[0])):
        prompt = [prompt]
    if not isinstance(prompt, list) or not prompt:
        raise RequestError(
            f"prompt must be a string, strings, or token ids, and not empty; got {_short(prompt)}.", param="prompt"
        )
    if len(prompt) > engine.max_choices:
        raise RequestError(f"prompt holds {len(prompt)} prompts; the most is {engine.max_choices}.", param="prompt")
    read: list[tuple[str | None, tuple[int, ...]]] = []
    for item in prompt:
        if isinstance(item, str):
            read.append((item, engine.encode(item)))
        elif isinstance(item, list) and all(map(_is_id, item)):
            read.append((None, tuple(item)))
        else:
            raise RequestError(f"prompt holds {_short(item)}: neither a string nor token ids.", param="prompt")
    return read


def _is_id(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _sampling(fields: dict[str, Any], *, room: int) -> Sampling:
    names = ("max_tokens", "temperature", "top_k", "top_p", "min_p", "seed", "ignore_eos")
    given = {name: fields[name] for name in names if fields.get(name) is not None}
    # Without max_tokens OpenAI makes 16, and we no more than fit.
    given.setdefault("max_tokens", max(1, min(DEFAULT_MAX_TOKENS, room)))
    # vLLM's way to say "all".
    if given.get("top_k") == -1:
        given["top_k"] = 0
    stop = fields.get("stop")
    stop = () if stop is None else (stop,) if isinstance(stop, str) else tuple(stop) if isinstance(stop, list) else stop
    return Sampling(**given, stop=stop)


def _short(value: Any, limit: int = 60) -> str:
    """A value as a line that is safe in a message, whatever its size or its characters."""
    text = value if isinstance(value, str) else repr(value)
    text = " ".join(text[: limit + 1].encode(errors="replace").decode().split())
    return text if len(text) <= limit else text[:limit] + "..."


class Answer:
    """Builds the JSON of one call, whole or in chunks."""

    def __init__(self, ask: Ask):
        self._ask = ask
        self._head = {
            "id": f"cmpl-{uuid.uuid4().hex}",
            "object": "text_completion",
            "created": int(time.time()),
            "model": ask.model,
        }

    def whole(self, texts: list[str], reasons: list[Reason], usages: list[Usage]) -> dict[str, Any]:
        choices = [choice(index, text, reasons[index]) for index, text in enumerate(texts)]
        return {**self._head, "choices": choices, "usage": self.usage(usages)}

    def chunk(self, index: int, text: str, reason: Reason | None, usage: Usage | None) -> dict[str, Any]:
        body = {**self._head, "choices": [choice(index, text, reason)]}
        if self._ask.include_usage or self._ask.continuous_usage:
            body["usage"] = usage_json(usage) if usage is not None and self._ask.continuous_usage else None
        return body

    def last_chunk(self, usages: list[Usage]) -> dict[str, Any]:
        return {**self._head, "choices": [], "usage": self.usage(usages)}

    def usage(self, usages: list[Usage]) -> dict[str, int]:
        """The sum over choices, where a prompt that has several choices counts once."""
        per_prompt = len(usages) // self._ask.num_prompts
        prompt_tokens = sum(usage.prompt_tokens for usage in usages[::per_prompt])
        completion_tokens = sum(usage.completion_tokens for usage in usages)
        return usage_json(Usage(prompt_tokens=prompt_tokens, completion_tokens=completion_tokens))


def choice(index: int, text: str, reason: Reason | None) -> dict[str, Any]:
    return {"index": index, "text": text, "logprobs": None, "finish_reason": reason}


def usage_json(usage: Usage) -> dict[str, int]:
    return {
        "prompt_tokens": usage.prompt_tokens,
        "completion_tokens": usage.completion_tokens,
        "total_tokens": usage.total_tokens,
    }
