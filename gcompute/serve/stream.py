"""What the engine answers: the events of one request, the stream that carries them, and the text in them."""

import asyncio
import logging
import threading
from collections import deque
from collections.abc import AsyncIterator, Collection, Iterator, Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import Protocol

from gcompute.serve.grammar import Grammar
from gcompute.serve.request import Request

log = logging.getLogger(__name__)


class Reason(StrEnum):
    """Why a request ended: STOP is the end-of-text token or a stop string, LENGTH its max_tokens."""

    STOP = "stop"
    LENGTH = "length"
    CANCELLED = "cancelled"
    ERROR = "error"


# Why requests end that ran to their end.
SERVED = (Reason.STOP, Reason.LENGTH)


@dataclass(frozen=True, slots=True, kw_only=True)
class Usage:
    """Tokens read and tokens made; an end-of-text token that ended the output is counted, though not shown.

    cached_tokens: those of the prompt whose keys and values the prefix cache had; None while the request runs.
    """

    prompt_tokens: int
    completion_tokens: int
    cached_tokens: int | None = None

    @property
    def total_tokens(self) -> int:
        return self.prompt_tokens + self.completion_tokens


@dataclass(frozen=True, slots=True, kw_only=True)
class Timing:
    """Seconds from the request's arrival to its slot, to its first token and to its end; None: it got no further."""

    queued_s: float | None
    first_token_s: float | None
    total_s: float

    def per_token_s(self, num_tokens: int) -> float | None:
        """Mean seconds between output tokens after the first (TPOT)."""
        if self.first_token_s is None or num_tokens < 2:
            return None
        return (self.total_s - self.first_token_s) / (num_tokens - 1)


@dataclass(frozen=True, slots=True, kw_only=True)
class TokenLogprobs:
    """A token, its log-probability, and the likeliest (token id, log-probability) pairs, likeliest first."""

    token: int
    logprob: float
    top: tuple[tuple[int, float], ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Tokens:
    """New token ids, and the text that is certain with them: a character or a stop string may still go on.

    logprobs: one for each id where the request asks for them, and none otherwise; with stop strings, of the tokens
    whose text has begun to come out, so that in the end none is of a stop string. prompt_logprobs: of all tokens of the
    prompt but the first, in an event that comes before any id.
    """

    ids: tuple[int, ...]
    text: str
    logprobs: tuple[TokenLogprobs, ...] = ()
    prompt_logprobs: tuple[TokenLogprobs, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Finished:
    """The last event of every request. `text` and `logprobs` were still held back; `error` says what went wrong."""

    reason: Reason
    text: str
    usage: Usage
    timing: Timing
    error: str | None = None
    logprobs: tuple[TokenLogprobs, ...] = ()


Event = Tokens | Finished


@dataclass(frozen=True, slots=True, kw_only=True)
class Completion:
    """A whole answer."""

    ids: tuple[int, ...]
    text: str
    reason: Reason
    usage: Usage
    timing: Timing
    error: str | None = None
    logprobs: tuple[TokenLogprobs, ...] = ()
    prompt_logprobs: tuple[TokenLogprobs, ...] = ()


class EventStream:
    """The events of one request: put by the engine's thread, taken by one thread or by one coroutine.

    Both ways of taking sleep until an event is there. An iteration ends after `Finished`.
    """

    def __init__(self, request: Request, request_id: int):
        self.request = request
        self.request_id = request_id
        self._events: deque[Event] = deque()
        self._changed = threading.Condition()
        self._sleeper: tuple[asyncio.AbstractEventLoop, asyncio.Future[None]] | None = None

    def put(self, event: Event) -> None:
        with self._changed:
            self._events.append(event)
            self._changed.notify_all()
            sleeper, self._sleeper = self._sleeper, None
            if sleeper is not None and not sleeper[0].is_closed():
                sleeper[0].call_soon_threadsafe(_wake, sleeper[1])

    def get(self, timeout_s: float | None = None) -> Event:
        """The next event, for a thread.

        Raises:
          TimeoutError: none came within `timeout_s`.
        """
        with self._changed:
            if not self._changed.wait_for(lambda: self._events, timeout_s):
                raise TimeoutError(f"request {self.request_id} gave no event within {timeout_s} s.")
            return self._events.popleft()

    async def next(self) -> Event:
        """The next event, for a coroutine."""
        while True:
            with self._changed:
                if self._events:
                    return self._events.popleft()
                loop = asyncio.get_running_loop()
                arrived: asyncio.Future[None] = loop.create_future()
                self._sleeper = (loop, arrived)
            await arrived

    def __iter__(self) -> Iterator[Event]:
        while True:
            event = self.get()
            yield event
            if isinstance(event, Finished):
                return

    async def __aiter__(self) -> AsyncIterator[Event]:
        while True:
            event = await self.next()
            yield event
            if isinstance(event, Finished):
                return

    def result(self) -> Completion:
        """Wait for the end, for a thread."""
        return completion(list(self))


def completion(events: list[Event]) -> Completion:
    """The whole answer that a finished stream's events make."""
    *tokens, last = events
    assert isinstance(last, Finished)
    ids = tuple(token for event in tokens if isinstance(event, Tokens) for token in event.ids)
    return Completion(
        ids=ids,
        text="".join(event.text for event in events),
        reason=last.reason,
        usage=last.usage,
        timing=last.timing,
        error=last.error,
        logprobs=tuple(one for event in events for one in event.logprobs),
        prompt_logprobs=tuple(one for event in tokens if isinstance(event, Tokens) for one in event.prompt_logprobs),
    )


def _wake(arrived: asyncio.Future[None]) -> None:
    if not arrived.done():
        arrived.set_result(None)


class StopFinder:
    """Lets text through up to the first stop string, holding back an end that may be the beginning of one.

    >>> finder = StopFinder(("END",))
    >>> finder.push("one E"), finder.push("asy EN"), finder.push("D two"), finder.found
    ('one ', 'Easy ', '', True)
    """

    def __init__(self, stop: tuple[str, ...]):
        self._stop = stop
        self._held = ""
        self.found = False

    def push(self, text: str) -> str:
        """What can be shown now that `text` has come."""
        if self.found:
            return ""
        text = self._held + text
        ends = [at for stop in self._stop if (at := text.find(stop)) >= 0]
        if ends:
            self.found, self._held = True, ""
            return text[: min(ends)]
        keep = max((_overlap(text, stop) for stop in self._stop), default=0)
        self._held = text[len(text) - keep :]
        return text[: len(text) - keep]

    def flush(self) -> str:
        """What was held back, once no more text will come."""
        held, self._held = self._held, ""
        return held


def _overlap(text: str, stop: str) -> int:
    """Length of the longest end of `text` that begins `stop` and is not all of it."""
    longest = min(len(text), len(stop) - 1)
    return next((size for size in range(longest, 0, -1) if text.endswith(stop[:size])), 0)


class Decoder(Protocol):
    """Token ids in, text out as soon as it is certain."""

    def push(self, token_id: int) -> str: ...

    def flush(self) -> str: ...


class Output:
    """Turns the tokens chosen for one request into its events, and knows when they end it.

    ends: the ids that end the output. hidden: those that have no text. grammar: what allows each. Times are seconds on
    one monotonic clock.
    """

    def __init__(
        self,
        stream: EventStream,
        *,
        decoder: Decoder | None,
        ends: Collection[int],
        arrived_s: float,
        hidden: Collection[int] = (),
        grammar: Grammar | None = None,
    ):
        self.stream = stream
        self.num_tokens = 0
        self._decoder = decoder
        self._ends = ends
        self._hidden = hidden
        self.grammar = grammar
        self._finder = StopFinder(stream.request.sampling.stop)
        self._arrived_s = arrived_s
        self._admitted_s: float | None = None
        self._num_cached = 0
        self._first_token_s: float | None = None
        self._of_prompt: list[TokenLogprobs] = []
        # Reports of tokens whose text is held back, each with where in the output its text begins.
        self._held: list[tuple[int, TokenLogprobs]] = []
        self._num_decoded = self._num_out = 0

    def admit(self, now_s: float, *, num_cached: int) -> None:
        """Note that the request has its slot, and how many of its tokens were cached; the first time alone counts."""
        if self._admitted_s is None:
            self._admitted_s, self._num_cached = now_s, num_cached

    def read(self, logprobs: Sequence[TokenLogprobs], *, first: bool, last: bool) -> None:
        """Take what the model held of a chunk of the prompt; put it out with the last."""
        if first:
            # It may have given way while it was read, and begins anew.
            self._of_prompt.clear()
        self._of_prompt += logprobs
        if last:
            self.stream.put(Tokens(ids=(), text="", prompt_logprobs=tuple(self._of_prompt)))

    def push(self, tokens: Sequence[int], now_s: float, logprobs: Sequence[TokenLogprobs] = ()) -> Reason | None:
        """Put out `tokens` up to the one that ends the request; return why it ended, or None."""
        sampling = self.stream.request.sampling
        if self._first_token_s is None:
            self._first_token_s = now_s
        shown: list[int] = []
        text: list[str] = []
        reason = None
        for at, token in enumerate(tokens):
            self.num_tokens += 1
            if token in self._ends:
                reason = Reason.STOP
                break
            shown.append(token)
            if logprobs:
                self._held.append((self._num_decoded, logprobs[at]))
            if self._decoder is not None and token not in self._hidden:
                piece = self._decoder.push(token)
                # Text of the first min_tokens ends nothing.
                text.append(self._finder.push(piece) if self.num_tokens >= sampling.min_tokens else piece)
                self._num_decoded += len(piece)
                self._num_out += len(text[-1])
                if self._finder.found:
                    reason = Reason.STOP
                    break
            if self.grammar is not None:
                self.grammar.accept(token)
                if self.grammar.is_complete:
                    reason = Reason.STOP
                    break
            if self.num_tokens == sampling.max_tokens:
                reason = Reason.LENGTH
                break
        if shown:
            self.stream.put(Tokens(ids=tuple(shown), text="".join(text), logprobs=self._reports()))
        return reason

    def _reports(self, *, last: bool = False) -> tuple[TokenLogprobs, ...]:
        """Of the tokens whose text has begun to come out; of all that are left, where no text can be held back."""
        everything = not self.stream.request.sampling.stop or (last and not self._finder.found)
        ready = [report for start, report in self._held if everything or start < self._num_out]
        self._held = [] if everything else [one for one in self._held if one[0] >= self._num_out]
        return tuple(ready)

    def finish(self, reason: Reason, now_s: float, error: str | None = None) -> Finished:
        """Put out the last event, with the text that was held back unless a stop string or an error cut it off.

        A stop string in it is the reason; text that cannot be made makes it an error.
        """
        tail = ""
        if self._decoder is not None and reason in SERVED:
            try:
                tail = self._finder.push(self._decoder.flush()) + self._finder.flush()
                self._num_out += len(tail)
                reason = Reason.STOP if self._finder.found else reason
            except Exception as failure:
                log.exception("request %d: its last text could not be made", self.stream.request_id)
                reason, error = Reason.ERROR, f"the output could not be decoded: {failure}"
        event = Finished(
            reason=reason,
            text=tail,
            usage=Usage(
                prompt_tokens=len(self.stream.request.prompt),
                completion_tokens=self.num_tokens,
                cached_tokens=self._num_cached,
            ),
            timing=Timing(
                queued_s=self._since_arrival(self._admitted_s),
                first_token_s=self._since_arrival(self._first_token_s),
                total_s=now_s - self._arrived_s,
            ),
            error=error,
            logprobs=self._reports(last=True),
        )
        self.stream.put(event)
        return event

    def _since_arrival(self, at_s: float | None) -> float | None:
        return None if at_s is None else at_s - self._arrived_s
