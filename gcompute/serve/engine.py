"""The engine: one thread that owns all device state, fed through a queue and answering on one stream a request.

    waiting -> prefill, a chunk a dispatch -> decode with all others -> finished, slot and pages free

Every program is compiled before the first request. A failure of one request ends that request; a failure of the
device ends the requests that run, and the engine goes on with empty slots.
"""

import logging
import secrets
import threading
import time
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import replace
from typing import Self

from gcompute.config.model import ModelConfig
from gcompute.config.serve import ServeConfig
from gcompute.model.tokenizer import StreamDecoder, Tokenizer
from gcompute.model.transformer import Params
from gcompute.serve.assembly import engine_shape
from gcompute.serve.choices import read_row
from gcompute.serve.compilation import Program, list_programs, scoring_programs
from gcompute.serve.grammar import mask_words
from gcompute.serve.observation import observe
from gcompute.serve.offline import complete_all, make_requests, progress_bar
from gcompute.serve.request import NotReady, Request, Sampling, check_fits
from gcompute.serve.runner import Runner
from gcompute.serve.scheduler import Scheduler
from gcompute.serve.state import new_row
from gcompute.serve.stats import EngineStats, LastDecode, Status
from gcompute.serve.stream import Completion, EventStream, Finished, Output, Reason, TokenLogprobs
from gcompute.serve.vocabulary import Vocabulary
from gcompute.serve.work import Decode, Prefill, SwapIn, SwapOut, Work

log = logging.getLogger(__name__)


class Engine(Vocabulary):
    """Continuous batching of one model on one device. Use it as a context manager, or call `start` and `close`.

    draft: parameters and configuration of a smaller model of the same vocabulary, for `speculate="draft"`.

    Raises:
      ValueError: the configuration does not fit the model or the tokenizer.
    """

    def __init__(
        self,
        params: Params,
        config: ModelConfig,
        tokenizer: Tokenizer | None,
        serve: ServeConfig | None = None,
        *,
        draft: tuple[Params, ModelConfig] | None = None,
    ):
        serve = serve or ServeConfig()
        super().__init__(tokenizer, config.vocab)
        shape = replace(engine_shape(config, serve, draft[1] if draft else None), unused=self.unused)
        self.config = config
        self.max_context = shape.limits.max_context
        self._runner = Runner(params, shape, draft[0] if draft else None)
        self._scheduler = Scheduler(shape.limits)
        self.max_choices = serve.max_queue + serve.slots
        # Guards all below; the engine's thread holds it only to decide and to record, never while the device runs.
        self._wake = threading.Condition()
        self._status = Status.LOADING
        self._failure: Exception | None = None
        self._outputs: dict[int, Output] = {}
        self._cancelled: set[int] = set()
        self._next_id = 0
        self._observers: list[Callable[[Finished], None]] = []
        self._last = LastDecode()
        self._counts: Counter[str] = Counter()
        self._thread: threading.Thread | None = None

    # Life ------------------------------------------------------------------------------------------------------------

    def programs(self) -> tuple[Program, ...]:
        """Every program that `warmup` compiles. Only prompts to be scored need more, which `prepare` compiles."""
        return list_programs(self._runner.shape.limits)

    def warmup(self, progress: Callable[[int, int, str], None] | None = None) -> None:
        """Compile what is not compiled yet. `progress` hears (number done, number in all, name of the next)."""
        todo, tell = self.programs(), progress or (lambda *_: None)
        for done, program in enumerate(todo):
            if self._status is not Status.LOADING:
                return
            tell(done, len(todo), str(program))
            self._runner.compile(program)
        self._runner.reset()
        tell(len(todo), len(todo), "ready")

    def start(self, progress: Callable[[int, int, str], None] | None = None) -> None:
        """Start the engine's thread, which warms up and then serves; `wait_ready` waits for that. Twice is as once."""
        if self._thread is None:
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
        self.prepare(requests)
        with self._wake:
            if self._status is not Status.READY:
                raise NotReady(f"the engine is {self._status}.")
            self._scheduler.check_room(len(requests))
            streams = [self._enter(request) for request in requests]
            self._wake.notify_all()
        return streams

    def prepare(self, requests: Sequence[Request]) -> None:
        """Compile what these are the first to need, on the caller's thread: schemas, and programs that score prompts.

        Raises:
          RequestError: one can never be served.
        """
        for request in requests:
            self._check(request)
            if request.sampling.prompt_logprobs is not None:
                for program in scoring_programs(self._runner.shape.limits, len(request.prompt)):
                    self._runner.compile(program)

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
        requests = make_requests(prompts, params, self.encode)
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
            return observe(self._runner, self._scheduler, self._status, self._counts, self._last)

    def _check(self, request: Request) -> None:
        check_fits(request, vocab=self.config.vocab, max_context=self.max_context)
        self.check_text(request.sampling, speculates=bool(self._runner.shape.limits.drafts))

    def _enter(self, request: Request) -> EventStream:
        request_id, self._next_id = self._next_id, self._next_id + 1
        if request.sampling.seed is None:
            request = replace(request, sampling=replace(request.sampling, seed=secrets.randbits(64)))
        stream = EventStream(request, request_id)
        sampling = request.sampling
        reuse = sampling.prompt_logprobs is None
        grammar = self.grammar(sampling)
        self._scheduler.add(
            request_id, prompt=request.prompt, max_tokens=sampling.max_tokens, reuse=reuse, single=grammar is not None
        )
        decoder = StreamDecoder(self.tokenizer) if self.tokenizer is not None else None
        self._outputs[request_id] = Output(
            stream,
            decoder=decoder,
            ends={self.end_token(sampling), *sampling.stop_token_ids},
            arrived_s=time.perf_counter(),
            hidden=self.hidden(sampling),
            grammar=grammar,
        )
        return stream

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
                    self._do(work)
                except Exception as error:
                    log.exception("a dispatch failed: %s", work)
                    self._recover(work, error)
        except Exception as error:
            if self._status is not Status.LOADING:  # Or whoever waits for it is told.
                log.exception("the engine stopped")
            with self._wake:
                self._status, self._failure = Status.FAILED, error
                for output in list(self._outputs.values()):
                    self._finish(output, Reason.ERROR, f"the engine stopped: {error}")
                self._wake.notify_all()

    def _next_work(self) -> Work | None:
        """Sleep until there is work; None when the engine drains and nothing is left."""
        with self._wake:
            while True:
                for request_id in sorted(self._cancelled):
                    self._finish(self._outputs[request_id], Reason.CANCELLED)
                work = self._scheduler.next_work()
                if work is not None or self._status is not Status.READY:
                    return work
                self._wake.wait()

    def _do(self, work: Work) -> None:
        match work:
            case Prefill():
                self._prefill(work)
            case Decode():
                self._decode(work)
            case SwapOut():
                self._runner.swap_out(work)
                with self._wake:
                    # It waits again, so whoever cancelled it in the meantime ended it at once.
                    if work.request_id not in self._outputs:
                        self._runner.forget(work.request_id)
            case SwapIn():
                self._runner.swap_in(work)
                self._admit(work.request_id, work.slot)

    def _admit(self, request_id: int, slot: int) -> None:
        """Tell the device what stands in a slot from now on."""
        output, seq = self._outputs[request_id], self._scheduler.running[request_id]
        output.admit(time.perf_counter(), num_cached=seq.cached)
        sampling = output.stream.request.sampling
        assert sampling.seed is not None
        row = new_row(
            sampling,
            seq.tokens,
            num_prompt=seq.num_prompt,
            num_cells=self._runner.shape.num_cells,
            num_words=mask_words(self.config.vocab),
            length=seq.cached,
            end=self.end_token(sampling),
            seed=sampling.seed,
            allowed=None if output.grammar is None else output.grammar.mask(),
        )
        self._runner.admit(slot, row)

    def _prefill(self, work: Prefill) -> None:
        if work.first:
            self._admit(work.request_id, work.slot)
        output = self._outputs[work.request_id]
        sampling = output.stream.request.sampling
        if sampling.prompt_logprobs is None or output.num_tokens:
            choices = self._runner.prefill(work)
        else:
            choices, scored = self._runner.score(work)
            output.read(read_row(scored, 0, sampling.prompt_logprobs)[1], first=work.first, last=work.last)
        tokens, logprobs = read_row(choices, 0, sampling.logprobs) if work.last else ((), ())
        with self._wake:
            if work.last and not output.num_tokens:
                self._counts["prompt_tokens"] += work.start + work.num_tokens
            self._scheduler.record_prefill(work, tokens[0] if tokens else None)
        if tokens:
            self._deliver(work.request_id, tokens, logprobs)

    def _decode(self, work: Decode) -> None:
        masks = {
            row.slot: grammar.mask()
            for row in work.rows
            if row is not None and (grammar := self._outputs[row.request_id].grammar) is not None
        }
        self._runner.bind(masks)
        began_s = time.perf_counter()
        choices = self._runner.decode(work)
        took_s = time.perf_counter() - began_s
        chosen = {
            row.request_id: read_row(choices, at, self._outputs[row.request_id].stream.request.sampling.logprobs)
            for at, row in enumerate(work.rows)
            if row is not None
        }
        num_steps, num_tokens = int(choices.steps), sum(len(tokens) for tokens, _ in chosen.values())
        with self._wake:
            self._counts.update(decode_steps=num_steps, drafted=int(choices.drafted), accepted=int(choices.accepted))
            for request_id, (tokens, _) in chosen.items():
                self._scheduler.record_decode(request_id, tokens)
            cells = sum(self._scheduler.running[request_id].cached for request_id in chosen) // len(chosen)
            rates = {"step_s": took_s / num_steps, "tokens_per_s": num_tokens / took_s}
            self._last = LastDecode(rows=len(chosen), cells=cells, speculated=work.speculate, **rates)
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
        self._runner.forget(request_id)
        self._cancelled.discard(request_id)
        del self._outputs[request_id]
        event = output.finish(reason, time.perf_counter(), error)
        for observer in self._observers:
            observer(event)

    def _recover(self, work: Work, error: Exception) -> None:
        """End the requests that a failed dispatch was for, and all that it took keys and values from."""
        lost = self._runner.is_lost()
        with self._wake:
            if lost:
                failed = [*self._scheduler.running, *self._scheduler.saved]
            elif isinstance(work, Decode):
                failed = [row.request_id for row in work.rows if row is not None]
            else:
                failed = [work.request_id]
            for request_id in failed:
                if request_id in self._outputs:
                    self._finish(self._outputs[request_id], Reason.ERROR, f"the engine failed: {error}")
            if lost:
                self._scheduler.forget_contents()
        if lost:
            self._runner.reset()
