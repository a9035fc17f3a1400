"""Put a load on a server: send what is due when it is due, keep what came back, and lose no request on the way."""

import asyncio
import gc
import itertools
import json
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from gcompute.serve.load import Arrivals, Ask, Prompts
from gcompute.serve.load_answer import INTERRUPTED, Outcome, error_message, read_outcome
from gcompute.serve.load_client import Answer, BrokenAnswer, Client

# In a closed loop, a failure that comes at once must not become a storm of requests.
PAUSE_AFTER_FAILURE_S = 0.05
# A server that so many requests in a row could not reach is gone.
GONE_AFTER = 20
PROBE_TIMEOUT_S = 60.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Calls:
    """How a request becomes a call. more: fields of the body beside those that a benchmark needs."""

    model: str | None = None
    chat: bool = False
    ignore_eos: bool = True
    temperature: float = 0.0
    more: Mapping[str, Any] = field(default_factory=dict)

    def make(self, client: Client, ask: Ask, *, stream: bool = True) -> bytes:
        body: dict[str, Any] = {} if self.model is None else {"model": self.model}
        if self.chat:
            body["messages"] = [{"role": "user", "content": ask.prompt}]
        else:
            body["prompt"] = ask.prompt
        body |= {"max_tokens": ask.output, "temperature": self.temperature, "stream": stream}
        if stream:
            body["stream_options"] = {"include_usage": True}
        if self.ignore_eos:
            body["ignore_eos"] = True
        return client.post("/chat/completions" if self.chat else "/completions", {**body, **self.more})


@dataclass(frozen=True, slots=True, kw_only=True)
class Progress:
    """How far a run is; tokens are those of the answers that are read."""

    sent: int
    done: int
    failed: int
    tokens: int
    elapsed_s: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Run:
    """All requests of one load in the order they were sent.

    wall_s: from the start to the last end. client_cpu_s: processor time of this process meanwhile.
    stopped: why it ended before its time, empty where it did not.
    """

    arrivals: Arrivals
    outcomes: tuple[Outcome, ...]
    wall_s: float
    client_cpu_s: float
    stopped: str = ""


class Stop:
    """Asks a run to end now; safe to call more than once."""

    def __init__(self) -> None:
        self.reason = ""
        self._event = asyncio.Event()

    def __call__(self, reason: str) -> None:
        self.reason = self.reason or reason
        self._event.set()

    async def wait(self, timeout_s: float | None = None) -> bool:
        """Whether it was asked within `timeout_s`."""
        if timeout_s is not None and timeout_s <= 0:
            return self._event.is_set()
        try:
            async with asyncio.timeout(timeout_s):
                await self._event.wait()
        except TimeoutError:
            return False
        return True


async def put_load(
    client: Client,
    calls: Calls,
    prompts: Prompts,
    arrivals: Arrivals,
    *,
    num_requests: int | None,
    duration_s: float | None = None,
    timeout_s: float | None = None,
    seed: int = 0,
    first: int = 0,
    stop: Stop | None = None,
    progress: Callable[[Progress], None] = lambda now: None,
) -> Run:
    """Send requests `first`, `first` + 1 ... as `arrivals` says, until so many are sent or so long is over; then wait
    for those under way. timeout_s: the longest that one may take.

    Raises:
      ValueError: nothing says when to end.
    """
    if num_requests is None and (duration_s is None or arrivals.all_at_once):
        raise ValueError("the load has no end: give --requests, or a finite rate and --duration.")
    load = _Load(client, calls, prompts, arrivals, num_requests, duration_s, timeout_s, first, stop or Stop(), progress)
    return await load.run(seed)


class _Load:
    def __init__(
        self,
        client: Client,
        calls: Calls,
        prompts: Prompts,
        arrivals: Arrivals,
        num_requests: int | None,
        duration_s: float | None,
        timeout_s: float | None,
        first: int,
        stop: Stop,
        progress: Callable[[Progress], None],
    ):
        self._client, self._calls, self._prompts, self._arrivals = client, calls, prompts, arrivals
        self._num, self._duration_s, self._timeout_s = num_requests, duration_s, timeout_s
        self._first, self._stop, self._progress = first, stop, progress
        self._outcomes: list[Outcome] = []
        self._unread: asyncio.Queue[Callable[[], Outcome] | None] = asyncio.Queue()
        self._sent = self._failed = self._tokens = self._unreached = 0
        self._began_s = 0.0

    async def run(self, seed: int) -> Run:
        prepared: dict[int, tuple[Ask, bytes]] = {}
        if self._arrivals.all_at_once:
            prepared = {index: self._prepare(index) for index in range(self._num or 0)}
        # What is there stays: a collection that walked it all would hold up what arrives.
        gc.collect()
        gc.freeze()
        cpu_s, self._began_s = time.process_time(), time.perf_counter()
        reader = asyncio.create_task(self._read())
        sender = asyncio.create_task(self._open(seed, prepared) if self._arrivals.rate else self._closed())
        stopper = asyncio.create_task(self._cancel_when_asked(sender))
        try:
            await sender
        except asyncio.CancelledError:
            if not self._stop.reason:
                raise
        finally:
            stopper.cancel()
            self._unread.put_nowait(None)
            await reader
            gc.unfreeze()
        return Run(
            arrivals=self._arrivals,
            outcomes=tuple(sorted(self._outcomes, key=lambda one: (one.sent_s, one.index))),
            wall_s=max((one.end_s for one in self._outcomes), default=time.perf_counter() - self._began_s),
            client_cpu_s=time.process_time() - cpu_s,
            stopped=self._stop.reason,
        )

    async def _cancel_when_asked(self, sender: asyncio.Task[None]) -> None:
        await self._stop.wait()
        sender.cancel()

    def _prepare(self, index: int) -> tuple[Ask, bytes]:
        ask = self._prompts.ask(self._first + index)
        return ask, self._calls.make(self._client, ask)

    def _elapsed_s(self) -> float:
        return time.perf_counter() - self._began_s

    async def _open(self, seed: int, prepared: Mapping[int, tuple[Ask, bytes]]) -> None:
        """Open loop: requests are due whatever the server does; a limit on those under way makes the rest late."""
        limit = self._arrivals.concurrency
        gate = asyncio.Semaphore(limit) if limit else None
        async with asyncio.TaskGroup() as under_way:
            for index, due_s in enumerate(self._arrivals.offsets_s(seed)):
                if index == self._num or (self._duration_s is not None and due_s >= self._duration_s):
                    break
                ask, request = prepared.get(index) or self._prepare(index)
                if (ahead_s := due_s - self._elapsed_s()) > 0:
                    await asyncio.sleep(ahead_s)
                if gate is not None:
                    await gate.acquire()
                    if self._duration_s is not None and self._elapsed_s() >= self._duration_s:
                        break
                task = under_way.create_task(self._one(index, ask, request, due_s))
                if gate is not None:
                    task.add_done_callback(lambda _, gate=gate: gate.release())

    async def _closed(self) -> None:
        """Closed loop: each of so many senders waits for its answer before it sends again."""
        indices = itertools.count()

        async def keep_sending() -> None:
            while self._duration_s is None or self._elapsed_s() < self._duration_s:
                index = next(indices)
                if self._num is not None and index >= self._num:
                    return
                if not await self._one(index, *self._prepare(index), None):
                    await asyncio.sleep(PAUSE_AFTER_FAILURE_S)

        async with asyncio.TaskGroup() as senders:
            for _ in range(min(self._arrivals.concurrency or 1, self._num or 1 << 30)):
                senders.create_task(keep_sending())

    async def _one(self, index: int, ask: Ask, request: bytes, due_s: float | None) -> bool:
        """Send one request and leave its answer to be read; whether one came."""
        answer = Answer(sent_s=time.perf_counter())
        self._sent += 1
        failure: tuple[str, str] | None = ("lost", "the client failed")
        try:
            async with asyncio.timeout(self._timeout_s):
                await self._client.send(request, answer)
            failure = None
        except BrokenAnswer as error:
            failure = (error.kind, str(error))
        except TimeoutError:
            failure = ("timeout", f"it took longer than {self._timeout_s:g} s")
        except asyncio.CancelledError:
            failure = (INTERRUPTED, "the run was stopped before its end")
            raise
        finally:
            answer.end_s = answer.end_s or time.perf_counter()
            self._unread.put_nowait(
                lambda: read_outcome(
                    answer,
                    index=self._first + index,
                    due_s=due_s,
                    asked_tokens=ask.output,
                    began_s=self._began_s,
                    prompt_tokens=ask.prompt_tokens,
                    failure=failure,
                )
            )
        self._unreached = self._unreached + 1 if failure is not None and not answer.status else 0
        if failure is not None and failure[0] == "cannot connect" and self._unreached >= GONE_AFTER:
            self._stop(f"the server is gone: {failure[1]}")
        return failure is None and answer.status == 200

    async def _read(self) -> None:
        """Read one answer at a time, and let what arrives in between be stamped first."""
        while (read := await self._unread.get()) is not None:
            outcome = read()
            self._outcomes.append(outcome)
            self._failed += outcome.error is not None
            self._tokens += outcome.completion_tokens
            self._progress(
                Progress(
                    sent=self._sent,
                    done=len(self._outcomes),
                    failed=self._failed,
                    tokens=self._tokens,
                    elapsed_s=self._elapsed_s(),
                )
            )
            await asyncio.sleep(0)


@dataclass(frozen=True, slots=True, kw_only=True)
class Served:
    """What /v1/models says: the models, and the longest prompt plus output of the first, None where it is not said."""

    models: tuple[str, ...] = ()
    max_context: int | None = None


async def look(client: Client) -> Served:
    """Ask a server for its models.

    Raises:
      ValueError: it cannot be reached, wants another key, or is no such server.
    """
    answer = await _ask(client, client.get("/models"))
    if answer.status in (404, 405):
        # A server without the list may still complete.
        return Served()
    if answer.status in (401, 403):
        raise ValueError(
            f"{client.address} answers {answer.status}: {error_message(answer.body)} Give --api-key, or set"
            " GCOMPUTE_API_KEY."
        )
    if answer.status != 200:
        raise ValueError(f"{client.address} answers {answer.status}: {error_message(answer.body)}")
    try:
        models = json.loads(answer.body)["data"]
        names = tuple(str(model["id"]) for model in models)
        context = models[0].get("max_model_len") if models else None
    except (ValueError, KeyError, TypeError, AttributeError):
        raise ValueError(f"{client.address} is no OpenAI-compatible server: its /v1/models is no list.") from None
    return Served(models=names, max_context=context if isinstance(context, int) else None)


async def count_prompt_tokens(client: Client, calls: Calls, prompt: str) -> int | None:
    """How many tokens the server counts in a prompt; None where it does not say.

    Raises:
      ValueError: it refuses the prompt.
    """
    request = calls.make(client, Ask(prompt=prompt, prompt_tokens=None, output=1), stream=False)
    answer = await _ask(client, request)
    if answer.status != 200:
        raise ValueError(f"{client.address} answers {answer.status}: {error_message(answer.body)}")
    try:
        return int(json.loads(answer.body)["usage"]["prompt_tokens"])
    except (ValueError, KeyError, TypeError):
        return None


async def _ask(client: Client, request: bytes) -> Answer:
    answer = Answer(sent_s=time.perf_counter())
    try:
        async with asyncio.timeout(PROBE_TIMEOUT_S):
            await client.send(request, answer)
    except BrokenAnswer as error:
        raise ValueError(str(error)) from None
    except TimeoutError:
        raise ValueError(f"{client.address} did not answer within {PROBE_TIMEOUT_S:g} s.") from None
    return answer
