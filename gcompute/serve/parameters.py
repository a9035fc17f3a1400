"""The parameters that completions and chat share: JSON in, checked values and `Sampling` out.

Parameters that OpenAI or vLLM have and this server has not are accepted where their value asks for nothing (null, or
the neutral value listed by the caller) and refused otherwise, as are unknown ones: none is silently ignored.
"""

import json
from collections.abc import Mapping
from typing import Any

from gcompute.config.fields import nearest
from gcompute.serve.errors import HttpError
from gcompute.serve.grammar import read_schema
from gcompute.serve.request import MAX_BIASES, RequestError, Sampling

MAX_N = 16

# Labels for whoever keeps records: they change no answer.
LABELS = ("safety_identifier", "prompt_cache_key", "metadata")
# Read, or harmless: `user` names the end user and changes nothing.
SHARED = (
    *("model", "max_tokens", "min_tokens", "temperature", "top_p", "top_k", "min_p", "seed", "stop", "stop_token_ids"),
    *("presence_penalty", "frequency_penalty", "repetition_penalty", "logit_bias", "logprobs", "ignore_eos"),
    *("skip_special_tokens", "response_format", "stream", "stream_options", "n", "user", *LABELS),
)
# Handed to Sampling as they came.
PLAIN = (
    *("max_tokens", "min_tokens", "temperature", "top_k", "top_p", "min_p", "seed", "ignore_eos"),
    *("presence_penalty", "frequency_penalty", "repetition_penalty", "skip_special_tokens"),
)

Neutral = Mapping[str, tuple[Any, ...]]

# Parameters of OpenAI's and vLLM's calls that are not built, with values that ask for nothing, beside EMPTY.
NEUTRAL: dict[str, tuple[Any, ...]] = {
    "prompt_logprobs": (),
    "spaces_between_special_tokens": (True,),
    "include_stop_str_in_output": (),
    "use_beam_search": (),
    "length_penalty": (1, 1.0),
    "early_stopping": (),
    "add_special_tokens": (True,),
    "priority": (),
    "return_token_ids": (),
    "return_tokens_as_token_ids": (),
    "truncate_prompt_tokens": (-1,),
}
EMPTY = (False, 0, 0.0, "", [], {})
# Where such a value asks for something.
NEVER_EMPTY = ("add_generation_prompt", "truncate_prompt_tokens")


def read_object(body: bytes, *, known: tuple[str, ...], neutral: Neutral) -> dict[str, Any]:
    """The fields of a JSON body.

    Raises:
      RequestError: not JSON, not an object, an unknown field, or one that asks for what is not built.
    """

    def refuse(constant: str) -> None:
        raise ValueError(f"{constant} is not JSON")

    try:
        fields = json.loads(body, parse_constant=refuse)
    except (ValueError, RecursionError) as error:
        reason = "nested too deeply" if isinstance(error, RecursionError) else error
        raise RequestError(f"The body is not valid JSON: {short(reason, 120)}.", code="invalid_json") from None
    if not isinstance(fields, dict):
        raise RequestError("The body must be a JSON object.", code="invalid_json")
    for name, value in fields.items():
        if value is None:
            continue
        if name not in known and name not in neutral:
            legal = short(nearest(short(name), known), 400)
            raise RequestError(f"Unknown parameter: {short(name)!r}. {legal}", param=short(name))
        if name in neutral and not _is_neutral(name, value, neutral[name]):
            raise RequestError(f"{name} is not supported by this server: leave it out.", param=name)
    return fields


def _is_neutral(name: str, value: Any, neutral: tuple[Any, ...]) -> bool:
    # 0 == False and 1 == True in Python, and not in JSON.
    legal = neutral if name in NEVER_EMPTY else (*EMPTY, *neutral)
    return any(value == one and isinstance(value, bool) == isinstance(one, bool) for one in legal)


def read_field(fields: dict[str, Any], name: str, kind: type, default: Any) -> Any:
    """A field of the given type; null is the same as absent."""
    value = fields.get(name)
    if value is None:
        return default
    if not isinstance(value, kind) or (kind is int and isinstance(value, bool)):
        word = {str: "a string", int: "a whole number", bool: "true or false", dict: "an object", list: "a list"}[kind]
        raise RequestError(f"{name} must be {word}, got {short(value)}.", param=name)
    return value


def check_model(fields: dict[str, Any], model_name: str) -> None:
    """Raise HttpError 404 for any other model."""
    model = read_field(fields, "model", str, model_name)
    if model != model_name:
        raise unknown_model(model, model_name)


def unknown_model(asked: str, model_name: str) -> HttpError:
    message = f"The model `{short(asked)}` does not exist. This server has `{model_name}`."
    return HttpError(status=404, message=message, param="model", code="model_not_found")


def read_count(fields: dict[str, Any], name: str, default: int, low: int) -> int:
    """n or best_of."""
    count = read_field(fields, name, int, default)
    if not low <= count <= MAX_N:
        raise RequestError(f"{name} must be from {low} to {MAX_N}, got {short(count)}.", param=name)
    return count


def read_stream_options(fields: dict[str, Any], stream: bool) -> dict[str, bool]:
    options = read_field(fields, "stream_options", dict, {})
    if options and not stream:
        raise RequestError("stream_options needs stream to be true.", param="stream_options")
    for name in options:
        if name not in ("include_usage", "continuous_usage_stats"):
            raise RequestError(f"Unknown parameter: 'stream_options.{short(name)}'.", param="stream_options")
    return {name: read_field(options, name, bool, False) for name in options}


def read_sampling(
    fields: dict[str, Any], *, max_tokens: int, logprobs: int | None, prompt_logprobs: int | None = None
) -> Sampling:
    """How to sample; `max_tokens` where the call names none, and the log-probabilities as the caller has read them.

    Raises:
      RequestError: a value is wrong; `param` names it.
    """
    given = {name: fields[name] for name in PLAIN if fields.get(name) is not None}
    given.setdefault("max_tokens", max_tokens)
    # vLLM's way to say "all".
    if given.get("top_k") == -1:
        given["top_k"] = 0
    stop = fields.get("stop")
    stop = () if stop is None else (stop,) if isinstance(stop, str) else tuple(stop) if isinstance(stop, list) else stop
    stop_token_ids = tuple(read_field(fields, "stop_token_ids", list, []))
    return Sampling(
        **given,
        stop=stop,
        stop_token_ids=stop_token_ids,
        logit_bias=_read_bias(fields),
        logprobs=logprobs,
        prompt_logprobs=prompt_logprobs,
        json_schema=read_schema(fields.get("response_format") or None),
    )


def _read_bias(fields: dict[str, Any]) -> tuple[tuple[int, Any], ...]:
    """OpenAI's object of token ids, which JSON makes strings, to biases; `Sampling` checks the values."""
    bias = read_field(fields, "logit_bias", dict, {})
    if len(bias) > MAX_BIASES:
        raise RequestError(f"logit_bias takes at most {MAX_BIASES} tokens, got {len(bias)}.", param="logit_bias")
    for name in bias:
        if not (name.isascii() and name.isdecimal() and len(name) <= 10):
            raise RequestError(f"logit_bias: {short(name)!r} is not a token id.", param="logit_bias")
    return tuple((int(name), value) for name, value in bias.items())


def short(value: Any, limit: int = 60) -> str:
    """A value as a line that is safe in a message, whatever its size or its characters."""
    text = value if isinstance(value, str) else repr(value)
    text = " ".join(text[: limit + 1].encode(errors="replace").decode().split())
    return text if len(text) <= limit else text[:limit] + "..."
