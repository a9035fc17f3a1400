"""The engine: one thread that owns all device state, fed through a queue and answering on one stream a request.

    waiting -> prefill into a free slot -> decode with all other slots -> finished, slot free

Every program is compiled before the first request. A failure of one request ends that request; a failure of the
device ends the requests that run, and the engine goes on with empty slots.
"""

import logging
import secrets
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from typing import Self

import jax.numpy as jnp

from gcompute.config.model import ModelConfig
from gcompute.config.serve import ServeConfig
from gcompute.model.tokenizer import StreamDecoder, Tokenizer
from gcompute.model.transformer import Execution, Params
from gcompute.serve.adjustments import NO_TOKEN
from gcompute.serve.choices import read_row
from gcompute.serve.occupancy import PAGE_TOKENS, count_pages, slot_stats
from gcompute.serve.offline import complete_all, progress_bar
from gcompute.serve.programs import EngineShape, Program, list_programs
from gcompute.serve.request import NotReady, Request, RequestError, Sampling, check_fits
from gcompute.serve.runner import Runner
from gcompute.serve.scheduler import Decode, Prefill, Scheduler
from gcompute.serve.stats import EngineStats, Status
from gcompute.serve.stream import Completion, EventStream, Finished, Output, Reason, TokenLogprobs

log = logging.getLogger(__name__)


class Engine:
    """Continuous batching of one model on one device. Use it as a context manager, or call `start` and `close`.

    Raises:
      ValueError: the configuration does not fit the model or the tokenizer.
    """

    def __init__(
        self, params: Params, config: ModelConfig, tokenizer: Tokenizer | None, serve: ServeConfig | None = None
    ):
        serve = serve or ServeConfig()
        max_context = serve.max_context or config.context
        if max_context > config.context:
            raise ValueError(f"max_context={max_context} exceeds the model's context. Use at most {config.context}.")
        if max_context < 2:
            raise ValueError("max_context must be at least 2: one token of prompt and one of output.")
        if tokenizer is not None and tokenizer.vocab_size > config.vocab:
            raise ValueError(
                f"the tokenizer has {tokenizer.vocab_size} tokens and the model {config.vocab}: give the model's own."
            )
        compute = {"float32": jnp.float32, "bfloat16": jnp.bfloat16}[serve.precision]
        self.config = config
        self.tokenizer = tokenizer
        self.max_context = max_context
        shape = EngineShape(
            model=config,
            execution=Execution(compute=compute, unroll=config.layers),
            slots=serve.slots,
            max_context=max_context,
            decode_steps=serve.decode_steps,
        )
        self._runner = Runner(params, shape)
        self._scheduler = Scheduler(
            slots=serve.slots,
            max_queue=serve.max_queue,
            max_context=max_context,
            decode_steps=serve.decode_steps,
        )
        self.max_choices = serve.max_queue + serve.slots
        # Guards all below; the engine's thread holds it only to decide and to record, never while the device runs.
        self._wake = threading.Condition()
        self._status = Status.LOADING
        self._failure: Exception | None = None
        self._outputs: dict[int, Output] = {}
        self._cancelled: set[int] = set()
        self._next_id = 0
        self._observers: list[Callable[[Finished], None]] = []
        self._counts = {"decode_steps": 0, "prompt_tokens": 0, "output_tokens": 0}
        self._last_decode = (0, 0, 0.0)
        self._thread: threading.Thread | None = None

    # Life ------------------------------------------------------------------------------------------------------------

    def programs(self) -> tuple[Program, ...]:
        """Every program that the engine runs; `warmup` compiles them, and nothing compiles after it."""
        return list_programs(self.max_context)

    def warmup(self, progress: Callable[[int, int, str], None] | None = None) -> None:
        """Compile what is not compiled yet. `progress` hears (number done, number in all, name of the next)."""
        todo = self.programs()
        for done, program in enumerate(todo):
            if self._status is not Status.LOADING:
                return
            if progress is not None:
                progress(done, len(todo), str(program))
            self._runner.compile(program)
        self._runner.reset()
        if progress is not None:
            progress(len(todo), len(todo), "ready")

    def start(self, progress: Callable[[int, int, str], None] | None = None) -> None:
        """Start the engine's thread, which warms up and then serves; `wait_ready` waits for that. Twice is as once."""
        if self._thread is not None:
            return
        self._thread = threading.Thread(target=self._run, args=(progress,), name="engine", daemon=True)
        self._thread.start()

    def wait_ready(self) -> None:
        """Return once requests are taken.

        Raises:
          NotReady: the engine failed to warm up, or was closed.
        """
        with self._wake:
            self._wake.wait_for(lambda: self._status is not Status.LOADING)
            if self._status is not Status.READY:
                raise NotReady(f"the engine is {self._status}.") from self._failure

    def drain(self) -> None:
        """Take no more requests; those accepted still finish."""
        with self._wake:
            if self._status in (Status.LOADING, Status.READY):
                self._status = Status.DRAINING
            self._wake.notify_all()

    def close(self, *, finish: bool = True) -> None:
        """Drain and end the engine's thread; without `finish`, accepted requests are cancelled."""
        self.drain()
        with self._wake:
            if not finish:
                for output in list(self._outputs.values()):
                    self.cancel(output.stream)
        if self._thread is not None:
            self._thread.join()
        self._runner.compilations.stop()
        with self._wake:
            if self._status is not Status.FAILED:
                self._status = Status.CLOSED

    def __enter__(self) -> Self:
        self.start()
        self.wait_ready()
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        self.close(finish=kind is None)

    # Requests, from any thread ---------------------------------------------------------------------------------------

    def submit(self, request: Request) -> EventStream:
        """Queue a request; its events come on the stream.

        Raises:
          RequestError: it can never be served. QueueFull: too many wait. NotReady: loading, draining or closed.
        """
        return self.submit_all([request])[0]

    def submit_all(self, requests: Sequence[Request]) -> list[EventStream]:
        """Queue all of them or none. Raises as `submit` does."""
        for request in requests:
            self._check(request)
        with self._wake:
            if self._status is not Status.READY:
                raise NotReady(f"the engine is {self._status}.")
            self._scheduler.check_room(len(requests))
            streams = [self._enter(request) for request in requests]
            self._wake.notify_all()
        return streams

    def cancel(self, stream: EventStream) -> None:
        """End a request, waiting or running; one that has ended is left alone. Its slot is free after this dispatch."""
        with self._wake:
            output = self._outputs.get(stream.request_id)
            if output is None:
                return
            if stream.request_id in self._scheduler.running:
                self._cancelled.add(stream.request_id)
                self._wake.notify_all()
            else:
                self._finish(output, Reason.CANCELLED)

    def encode(self, text: str) -> tuple[int, ...]:
        """Token ids of a prompt; an empty one becomes the end-of-text token, after which documents begin.

        Raises:
          RequestError: the tokenizer cannot encode it, or there is none.
        """
        if self.tokenizer is None:
            raise RequestError("this engine has no tokenizer: give the prompt as token ids.", param="prompt")
        if not text and self.tokenizer.end_of_text is not None:
            return (self.tokenizer.end_of_text,)
        try:
            return tuple(self.tokenizer.encode(text))
        except ValueError as error:
            raise RequestError(str(error), param="prompt") from None

    def decode(self, ids: Sequence[int]) -> str:
        """Text of token ids; empty without a tokenizer."""
        return "" if self.tokenizer is None else self.tokenizer.decode(ids)

    def spell(self, token_id: int) -> bytes:
        """The bytes of one token; empty without a tokenizer."""
        return b"" if self.tokenizer is None else self.tokenizer.spell(token_id)

    def generate(
        self,
        prompts: Sequence[str | Sequence[int]],
        params: Sampling | Sequence[Sampling] | None = None,
        *,
        progress: Callable[[int, int], None] | None = None,
    ) -> list[Completion]:
        """Complete all prompts, in order, batching as many as fit; `params` are for all, or one for each.

        `progress` hears (number done, number in all); without it a bar is shown where standard error is a terminal.

        Raises:
          RequestError: a prompt can never be served; nothing is generated then. NotReady: as for `submit`.
        """
        each = [params] * len(prompts) if isinstance(params, Sampling) else params or [Sampling()] * len(prompts)
        if len(each) != len(prompts):
            raise RequestError(f"{len(prompts)} prompts came with {len(each)} samplings: give one, or one a prompt.")
        requests = [
            Request(prompt=self.encode(prompt) if isinstance(prompt, str) else tuple(prompt), sampling=own)
            for prompt, own in zip(prompts, each, strict=True)
        ]
        for request in requests:
            self._check(request)
        with nullcontext(progress) if progress is not None else progress_bar() as report:
            return complete_all(self, requests, report)

    def observe(self, observer: Callable[[Finished], None]) -> None:
        """Call `observer` with the last event of every request from now on, on whatever thread ends it."""
        with self._wake:
            self._observers.append(observer)

    def stats(self) -> EngineStats:
        with self._wake:
            running = self._scheduler.running
            pages = count_pages(running, num_cells=self._runner.shape.slots * self.max_context)
            return EngineStats(
                status=self._status,
                slots=self._runner.shape.slots,
                num_running=len(running),
                num_waiting=self._scheduler.num_waiting,
                num_cells=self._runner.shape.slots * self.max_context,
                num_cells_used=sum(entry.cached for entry in running.values()),
                num_programs=len(self._runner.compiled),
                num_late_compilations=self._runner.compilations.num,
                num_dispatches=self._runner.num_dispatches,
                num_decode_steps=self._counts["decode_steps"],
                num_prompt_tokens=self._counts["prompt_tokens"],
                num_output_tokens=self._counts["output_tokens"],
                page_tokens=PAGE_TOKENS,
                num_pages=pages.total,
                num_pages_free=pages.free,
                num_pages_used=pages.used,
                running=slot_stats(running, self._outputs),
                decode_batch=self._last_decode[0],
                decode_cells=self._last_decode[1],
                last_decode_step_s=self._last_decode[2],
            )

    def _check(self, request: Request) -> None:
        check_fits(request, vocab=self.config.vocab, max_context=self.max_context)
        if request.sampling.stop and self.tokenizer is None:
            raise RequestError("stop needs a tokenizer, and this engine has none.", param="stop")

    def _enter(self, request: Request) -> EventStream:
        request_id, self._next_id = self._next_id, self._next_id + 1
        stream = EventStream(request, request_id)
        sampling = request.sampling
        self._scheduler.add(request_id, num_prompt=len(request.prompt), max_tokens=sampling.max_tokens)
        decoder = StreamDecoder(self.tokenizer) if self.tokenizer is not None else None
        self._outputs[request_id] = Output(
            stream,
            decoder=decoder,
            ends={self._end_token(sampling), *sampling.stop_token_ids},
            arrived_s=time.perf_counter(),
        )
        return stream

    def _end_token(self, sampling: Sampling) -> int:
        end = self.tokenizer.end_of_text if self.tokenizer is not None else None
        return NO_TOKEN if end is None or sampling.ignore_eos else end

    # The engine's thread ---------------------------------------------------------------------------------------------

    def _run(self, progress: Callable[[int, int, str], None] | None) -> None:
        try:
            self.warmup(progress)
            with self._wake:
                if self._status is Status.LOADING:
                    self._status = Status.READY
                self._wake.notify_all()
            self._runner.compilations.watch()
            while (work := self._next_work()) is not None:
                try:
                    if isinstance(work, Prefill):
                        self._prefill(work)
                    else:
                        self._decode(work)
                except Exception as error:
                    log.exception("a dispatch failed: %s", work)
                    self._recover(work, error)
        except Exception as error:
            log.exception("the engine stopped")
            with self._wake:
                self._status, self._failure = Status.FAILED, error
                for output in list(self._outputs.values()):
                    self._finish(output, Reason.ERROR, f"the engine stopped: {error}")
                self._wake.notify_all()

    def _next_work(self) -> Prefill | Decode | None:
        """Sleep until there is work; None when the engine drains and nothing is left."""
        with self._wake:
            while True:
                for request_id in sorted(self._cancelled):
                    self._finish(self._outputs[request_id], Reason.CANCELLED)
                work = self._scheduler.next_work()
                if work is not None or self._status is not Status.READY:
                    return work
                self._wake.wait()

    def _prefill(self, work: Prefill) -> None:
        output = self._outputs[work.request_id]
        output.admit(time.perf_counter())
        request = output.stream.request
        seed = request.sampling.seed if request.sampling.seed is not None else secrets.randbits(64)
        choices = self._runner.prefill(
            request, slot=work.slot, bucket=work.bucket, end=self._end_token(request.sampling), seed=seed
        )
        tokens, logprobs = read_row(choices, 0, request.sampling.logprobs)
        with self._wake:
            self._counts["prompt_tokens"] += len(request.prompt)
            self._scheduler.advance(work.request_id, 1, prefill=True)
        self._deliver(work.request_id, tokens, logprobs)

    def _decode(self, work: Decode) -> None:
        slots = {request_id: entry.slot for request_id, entry in self._scheduler.running.items()}
        cells = sum(entry.cached for entry in self._scheduler.running.values()) // len(slots)
        start_s = time.perf_counter()
        choices = self._runner.decode(
            list(slots.values()), bucket=work.bucket, num_steps=work.num_steps, until_free=work.until_free
        )
        chosen = {
            request_id: read_row(choices, slot, self._outputs[request_id].stream.request.sampling.logprobs)
            for request_id, slot in slots.items()
        }
        with self._wake:
            num_steps = max(len(tokens) for tokens, _ in chosen.values())
            self._counts["decode_steps"] += num_steps
            self._last_decode = (len(slots), cells, (time.perf_counter() - start_s) / num_steps)
            for request_id, (tokens, _) in chosen.items():
                self._scheduler.advance(request_id, len(tokens))
        for request_id, (tokens, logprobs) in chosen.items():
            self._deliver(request_id, tokens, logprobs)

    def _deliver(self, request_id: int, tokens: Sequence[int], logprobs: Sequence[TokenLogprobs]) -> None:
        """Put out a request's tokens and end it where they do; text that cannot be made ends this request alone."""
        output = self._outputs[request_id]
        error = None
        before = output.num_tokens
        try:
            reason = output.push(tokens, time.perf_counter(), logprobs)
        except Exception as failure:
            log.exception("request %d: its tokens could not be put out", request_id)
            reason, error = Reason.ERROR, f"the output could not be decoded: {failure}"
        with self._wake:
            self._counts["output_tokens"] += output.num_tokens - before
            if reason is not None:
                self._finish(output, reason, error)

    def _finish(self, output: Output, reason: Reason, error: str | None = None) -> None:
        """Free the request's slot or place in the queue, then tell whoever listens. The lock is held."""
        request_id = output.stream.request_id
        self._scheduler.remove(request_id)
        self._cancelled.discard(request_id)
        del self._outputs[request_id]
        event = output.finish(reason, time.perf_counter(), error)
        for observer in self._observers:
            observer(event)

    def _recover(self, work: Prefill | Decode, error: Exception) -> None:
        """End the requests that a failed dispatch was for, and all that run when it took the donated state with it."""
        lost = self._runner.is_lost()
        with self._wake:
            alone = [work.request_id] if isinstance(work, Prefill) and not lost else None
            failed = alone or list(self._scheduler.running)
            for request_id in failed:
                if request_id in self._outputs:
                    self._finish(self._outputs[request_id], Reason.ERROR, f"the engine failed: {error}")
        if lost:
            self._runner.reset()
