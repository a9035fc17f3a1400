"""The OpenAI completions protocol as plain values: JSON in, requests out; completions and events in, JSON out."""

import time
import uuid
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from gcompute.serve.engine import Engine
from gcompute.serve.parameters import NEUTRAL as SHARED_NEUTRAL
from gcompute.serve.parameters import (
    SHARED,
    check_model,
    read_count,
    read_field,
    read_object,
    read_sampling,
    read_stream_options,
    short,
)
from gcompute.serve.reports import TextOffsets, completions_logprobs
from gcompute.serve.request import MAX_STOP_TOKENS, Request, RequestError, Sampling, check_fits
from gcompute.serve.stream import SERVED, Completion, Finished, Reason, TokenLogprobs, Tokens, Usage

DEFAULT_MAX_TOKENS = 16

KNOWN = (*SHARED, "prompt", "echo", "best_of")
NEUTRAL = {**SHARED_NEUTRAL, "suffix": ()}


@dataclass(frozen=True, slots=True, kw_only=True)
class Ask:
    """One call: its requests, and how to answer.

    echoes: prompt text before each request's output. num_shown: choices shown for a prompt, the best of its requests.
    logprobs: whether choices report them, and with an echo those of the prompt too. silent: max_tokens is 0, to score
    the echoed prompt: the one token that the engine makes all the same is not shown. first_offsets: where in prompt and
    output the first token begins that is reported.
    """

    model: str
    requests: tuple[Request, ...]
    echoes: tuple[str, ...]
    num_prompts: int
    num_shown: int
    stream: bool
    include_usage: bool
    continuous_usage: bool
    logprobs: bool
    silent: bool = False
    first_offsets: tuple[int, ...] = ()

    @property
    def num_per_prompt(self) -> int:
        return len(self.requests) // self.num_prompts


def parse_ask(body: bytes, *, engine: Engine, model_name: str) -> Ask:
    """Read a completions call.

    Raises:
      HttpError: unknown model. RequestError: anything else that is wrong with it; `param` names what.
    """
    fields = read_object(body, known=KNOWN, neutral=NEUTRAL)
    check_model(fields, model_name)
    n = read_count(fields, "n", 1, 1)
    best_of = read_count(fields, "best_of", n, n)
    prompts = _prompts(fields.get("prompt"), engine)
    logprobs = read_field(fields, "logprobs", int, None)
    echo = read_field(fields, "echo", bool, False)
    silent = echo and fields.get("max_tokens") == 0 and fields["max_tokens"] is not False
    ask = make_ask(
        {**fields, "max_tokens": 1} if silent else fields,
        engine=engine,
        model_name=model_name,
        prompts=[ids for _, ids in prompts],
        each=best_of,
        shown=n,
        logprobs=logprobs,
        prompt_logprobs=logprobs if echo else None,
        default_max_tokens=DEFAULT_MAX_TOKENS,
    )
    if not echo and logprobs is None:
        return ask
    # The ids are known to be the model's by now.
    texts = tuple(text if text is not None else engine.decode(ids) for text, ids in prompts for _ in range(best_of))
    if echo:
        return replace(ask, echoes=texts, silent=silent)
    return replace(ask, first_offsets=tuple(map(len, texts)))


def make_ask(
    fields: dict[str, Any],
    *,
    engine: Engine,
    model_name: str,
    prompts: Sequence[tuple[int, ...]],
    each: int,
    shown: int,
    logprobs: int | None,
    default_max_tokens: int,
    prompt_logprobs: int | None = None,
    more_stop: str | None = None,
    more_ends: Sequence[int] = (),
) -> Ask:
    """The call that `fields` and the prompts read from them make; `each` requests a prompt, of which `shown` are shown.

    more_stop: the stop string of calls that have none. more_ends: tokens that end the output as end of text does.

    Raises:
      RequestError: it can never be served.
    """
    num_choices = len(prompts) * each
    if num_choices > engine.max_choices:
        message = f"prompt asks for {num_choices} choices at once; this server takes at most {engine.max_choices}."
        raise RequestError(message, param="prompt")
    stream = read_field(fields, "stream", bool, False)
    if stream and each > shown:
        raise RequestError("best_of needs all its choices before the first can be shown: not streamed.", param="stream")
    options = read_stream_options(fields, stream)
    read_field(fields, "user", str, "")
    requests = []
    for ids in prompts:
        # Without max_tokens no more is made than fits.
        room = max(1, min(default_max_tokens, engine.max_context - len(ids)))
        # Choosing the best needs the log-probabilities too.
        reported = 0 if logprobs is None and each > shown else logprobs
        sampling = read_sampling(fields, max_tokens=room, logprobs=reported, prompt_logprobs=prompt_logprobs)
        if more_stop is not None and not sampling.stop:
            sampling = replace(sampling, stop=(more_stop,))
        ends = [] if sampling.ignore_eos else [one for one in more_ends if one not in sampling.stop_token_ids]
        if ends:
            num_given, room = len(sampling.stop_token_ids), MAX_STOP_TOKENS - len(ends)
            if num_given > room:
                message = f"stop_token_ids holds {num_given}; the most is {room}, as the template's own end it too."
                raise RequestError(message, param="stop_token_ids")
            sampling = replace(sampling, stop_token_ids=(*sampling.stop_token_ids, *ends))
        check_fits(Request(prompt=ids, sampling=sampling), vocab=engine.config.vocab, max_context=engine.max_context)
        requests += [Request(prompt=ids, sampling=_reseeded(sampling, choice)) for choice in range(each)]
    return Ask(
        model=model_name,
        requests=tuple(requests),
        echoes=("",) * len(requests),
        first_offsets=(0,) * len(requests),
        num_prompts=len(prompts),
        num_shown=shown,
        stream=stream,
        include_usage=options.get("include_usage", False),
        continuous_usage=options.get("continuous_usage_stats", False),
        logprobs=logprobs is not None,
    )


def _reseeded(sampling: Sampling, choice: int) -> Sampling:
    """One seed for all choices would make them equal."""
    return sampling if sampling.seed is None else replace(sampling, seed=(sampling.seed + choice) % 2**64)


def _prompts(prompt: Any, engine: Engine) -> list[tuple[str | None, tuple[int, ...]]]:
    """Each prompt's text, None where ids were given, and its ids. Reads OpenAI's four forms; null is an empty text."""
    prompt = "" if prompt is None else prompt
    if isinstance(prompt, str) or (isinstance(prompt, list) and prompt and _is_id(prompt[0])):
        prompt = [prompt]
    if not isinstance(prompt, list) or not prompt:
        raise RequestError(
            f"prompt must be a string, strings, or token ids, and not empty; got {short(prompt)}.", param="prompt"
        )
    if len(prompt) > engine.max_choices:
        raise RequestError(f"prompt holds {len(prompt)} prompts; the most is {engine.max_choices}.", param="prompt")
    read: list[tuple[str | None, tuple[int, ...]]] = []
    for item in prompt:
        if isinstance(item, str):
            check_can_fit(item, engine, param="prompt")
            read.append((item, engine.encode(item)))
        elif isinstance(item, list) and all(map(_is_id, item)):
            read.append((None, tuple(item)))
        else:
            raise RequestError(f"prompt holds {short(item)}: neither a string nor token ids.", param="prompt")
    return read


def check_can_fit(text: str, engine: Engine, *, param: str) -> None:
    """Refuse a text that is too long whatever its tokens are, before it is tokenized: a body may hold megabytes.

    Raises:
      RequestError: it is.
    """
    least = 0 if engine.tokenizer is None else engine.tokenizer.least_tokens(text)
    if least >= engine.max_context:
        message = (
            f"This model's maximum context length is {engine.max_context} tokens, and {param} has {least} at least."
        )
        raise RequestError(message, param=param, code="context_length_exceeded")


def _is_id(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


class Answer:
    """Builds the JSON of one completions call, whole or in chunks."""

    kind, chunk_kind, prefix = "text_completion", "text_completion", "cmpl"

    def __init__(self, ask: Ask, engine: Engine):
        self._ask = ask
        self._engine = engine
        self._head = {"id": f"{self.prefix}-{uuid.uuid4().hex}", "created": int(time.time()), "model": ask.model}
        # As OpenAI does, from the prompt's beginning, whether or not it is shown.
        self._offsets = [TextOffsets(first) for first in ask.first_offsets]

    def whole(self, done: Sequence[Completion]) -> dict[str, Any]:
        """The answer that the completions of all requests make."""
        size, choices = self._ask.num_per_prompt, []
        for first in range(0, len(done), size):
            group = list(range(first, first + size))
            if size > self._ask.num_shown:
                group.sort(key=lambda index: -_mean_logprob(done[index]))
            choices += [self.choice(index, done[index]) for index in group[: self._ask.num_shown]]
        numbered = [{**choice, "index": index} for index, choice in enumerate(choices)]
        usage = self.usage([one.usage for one in done])
        return {**self._head, "object": self.kind, "choices": numbered, "usage": usage}

    def opening(self) -> list[dict[str, Any]]:
        """Chunks that come before any token."""
        return []

    def chunk(self, index: int, event: Tokens | Finished, usage: Usage, echo: str) -> dict[str, Any]:
        """One event of a request as a chunk, with the prompt's text before it where that is still to come."""
        body = {**self._head, "object": self.chunk_kind, "choices": [self.delta(index, event, echo)]}
        return {**body, **self.usage_field(self._shown(usage) if self._ask.continuous_usage else None)}

    def last_chunk(self, usages: list[Usage]) -> dict[str, Any]:
        return {**self._head, "object": self.chunk_kind, "choices": [], "usage": self.usage(usages)}

    def usage_field(self, usage: Usage | None) -> dict[str, Any]:
        """The usage of a chunk: absent where not asked for, null where it comes with the last."""
        if not (self._ask.include_usage or self._ask.continuous_usage):
            return {}
        return {"usage": None if usage is None else usage_json(usage)}

    def usage(self, usages: list[Usage]) -> dict[str, Any]:
        """The sum over requests, where a prompt that has several counts once."""
        prompts = usages[:: self._ask.num_per_prompt]
        whole = Usage(
            prompt_tokens=sum(usage.prompt_tokens for usage in prompts),
            completion_tokens=sum(self._shown(usage).completion_tokens for usage in usages),
            cached_tokens=sum(usage.cached_tokens or 0 for usage in prompts),
        )
        return usage_json(whole)

    def choice(self, index: int, done: Completion) -> dict[str, Any]:
        text = self._ask.echoes[index] + ("" if self._ask.silent else done.text)
        logprobs = self._logprobs(index, done.logprobs, done.prompt_logprobs, first=True)
        return {"index": index, "text": text, "logprobs": logprobs, "finish_reason": self._reason(done)}

    def delta(self, index: int, event: Tokens | Finished, echo: str) -> dict[str, Any]:
        text = echo + ("" if self._ask.silent else event.text)
        if isinstance(event, Finished):
            logprobs = self._logprobs(index, event.logprobs, (), first=False) if event.logprobs else None
            return {"index": index, "text": text, "logprobs": logprobs, "finish_reason": self._reason(event)}
        logprobs = self._logprobs(index, event.logprobs, event.prompt_logprobs, first=not event.ids)
        return {"index": index, "text": text, "logprobs": logprobs, "finish_reason": None}

    def _logprobs(
        self, index: int, made: Sequence[TokenLogprobs], read: Sequence[TokenLogprobs], *, first: bool
    ) -> dict[str, Any] | None:
        """Of tokens `read` of an echoed prompt, its `first` before them, and `made` after it."""
        if not self._ask.logprobs:
            return None
        # Nothing comes before a prompt's first token that it could be likely after.
        request = self._ask.requests[index]
        begins = request.prompt[:1] if first and request.sampling.prompt_logprobs is not None else ()
        reports = (*begins, *read, *(() if self._ask.silent else made))
        return completions_logprobs(
            reports,
            self._engine.spell,
            self._offsets[index],
            num_read=len(begins) + len(read),
            hidden=self._engine.hidden(request.sampling),
        )

    def _reason(self, ended: Finished | Completion) -> Reason:
        return Reason.LENGTH if self._ask.silent and ended.reason in SERVED else ended.reason

    def _shown(self, usage: Usage) -> Usage:
        return replace(usage, completion_tokens=0) if self._ask.silent else usage


def _mean_logprob(done: Completion) -> float:
    return sum(one.logprob for one in done.logprobs) / max(1, len(done.logprobs))


def usage_json(usage: Usage) -> dict[str, Any]:
    counts = {
        "prompt_tokens": usage.prompt_tokens,
        "completion_tokens": usage.completion_tokens,
        "total_tokens": usage.total_tokens,
    }
    if usage.cached_tokens is None:
        return counts
    return {**counts, "prompt_tokens_details": {"cached_tokens": usage.cached_tokens}}
