"""Run a benchmark: look at the server, make prompts that fit it, warm it up, put on each load, keep every result."""

import asyncio
import dataclasses
import signal
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gcompute.cli.bench_plan import Planner
from gcompute.cli.signals import stop_signals
from gcompute.config.bench import DEFAULT_OUTPUT, DEFAULT_PROMPT, LoadConfig, PromptConfig
from gcompute.config.fields import nearest
from gcompute.serve.load import Arrivals, GivenPrompts, Lengths, Prompts, RandomPrompts, fit_words, read_prompts
from gcompute.serve.load_client import Address, Client
from gcompute.serve.load_plan import Predicted
from gcompute.serve.load_report import Measured, Slo, outcome_json, summarize
from gcompute.serve.load_run import Calls, Progress, Run, Served, Stop, count_prompt_tokens, look, put_load

INTERRUPTED = "interrupted"
# Warm-up requests come from another stream of random numbers: a prefix cache must not know the counted ones.
WARMUP_SEED = 1_000_003
WARMUP_TOGETHER = 4
REFUSALS = ("HTTP 400", "HTTP 401", "HTTP 403", "HTTP 404", "HTTP 405", "HTTP 413", "HTTP 422")


@dataclass(frozen=True, slots=True, kw_only=True)
class Point:
    """One load: what was measured, what the plan says, and the price of a million output tokens by each."""

    run: Run
    measured: Measured
    predicted: Predicted | None
    usd_measured: float | None
    usd_predicted: float | None

    def to_dict(self) -> dict[str, Any]:
        arrivals = self.run.arrivals
        load = {
            "about": str(arrivals),
            "rate": None if arrivals.all_at_once else arrivals.rate,
            "all_at_once": arrivals.all_at_once,
            "burstiness": arrivals.burstiness,
            "concurrency": arrivals.concurrency,
        }
        return {
            "load": load,
            "measured": self.measured.to_dict(),
            "predicted": self.predicted.to_dict() if self.predicted else None,
            "usd_per_million_output_tokens": {"measured": self.usd_measured, "predicted": self.usd_predicted},
        }


@dataclass(frozen=True, slots=True, kw_only=True)
class Bench:
    """All that a benchmark was asked for, and all that came of it.

    prompt, output: mean tokens of the requests. stopped: why it ended before its time, empty where it did not.
    """

    url: str
    model: str | None
    prompt: float
    output: float
    planner: Planner
    slo: Slo
    points: tuple[Point, ...]
    stopped: str

    def to_dict(self, *, with_requests: bool = False) -> dict[str, Any]:
        planner = self.planner
        runs = [point.to_dict() for point in self.points]
        if with_requests:
            runs = [
                {**one, "requests": [outcome_json(outcome) for outcome in point.run.outcomes]}
                for one, point in zip(runs, self.points, strict=True)
            ]
        return {
            "url": self.url,
            "model": self.model,
            "prompt_tokens": self.prompt,
            "output_tokens": self.output,
            "slo": dataclasses.asdict(self.slo),
            "plan": {
                "model": planner.model.name if planner.model else None,
                "target": str(planner.target) if planner.target else None,
                "weights": planner.weights,
                "kv": planner.kv,
                "slots": planner.slots,
                "why_not": planner.why_not or None,
            },
            "usd_per_chip_hour": planner.price.usd_per_chip_hour if planner.price else None,
            "price_source": str(planner.price) if planner.price else None,
            "stopped": self.stopped or None,
            "runs": runs,
        }


Watch = Callable[[Arrivals, int | None], Callable[[Progress], None]]


@dataclass(frozen=True, slots=True, kw_only=True)
class Session:
    """Puts the loads on one server. watch: is told of each load as it begins, and gives what hears of its progress."""

    address: Address
    api_key: str | None
    name: str | None
    load: LoadConfig
    prompts: PromptConfig
    more: dict[str, Any]
    planner: Planner
    slo: Slo
    watch: Watch

    def arrivals(self) -> list[Arrivals]:
        return [
            Arrivals(rate=rate, concurrency=concurrency, burstiness=self.load.burstiness)
            for rate, concurrency in self.load.loads()
        ]

    async def run(self) -> Bench:
        """Raises ValueError where the server cannot be benchmarked so."""
        loads = self.arrivals()
        async with Client(self.address, api_key=self.api_key) as client:
            served = await look(client)
            name = self._name(served)
            calls = Calls(
                model=name,
                chat=self.prompts.chat,
                ignore_eos=self.prompts.ignore_eos,
                temperature=self.prompts.temperature,
                more=self.more,
            )
            prompts = await self._prompts(client, calls, served)
            prompt, output = _mean_lengths(prompts)
            for arrivals in loads:
                self.planner.predict(arrivals, prompt=prompt, output=output, num_requests=1)
            stop = Stop()
            points: list[Point] = []
            with _stopped_by_signals(stop):
                await self._warm_up(client, calls, prompts, stop)
                first = 0
                for arrivals in loads:
                    if stop.reason:
                        break
                    points.append(await self._one(client, calls, prompts, arrivals, first, stop))
                    # No load may find the prompts of the one before it in a prefix cache.
                    first += points[-1].measured.num_sent
        counted = [point.measured for point in points if point.measured.num_ok]
        num_ok = sum(one.num_ok for one in counted)
        return Bench(
            url=str(self.address),
            model=name,
            prompt=sum(one.prompt_tokens for one in counted) / num_ok if num_ok else prompt,
            output=sum(one.output_tokens for one in counted) / num_ok if num_ok else output,
            planner=self.planner,
            slo=self.slo,
            points=tuple(points),
            stopped=stop.reason,
        )

    async def _one(
        self, client: Client, calls: Calls, prompts: Prompts, arrivals: Arrivals, first: int, stop: Stop
    ) -> Point:
        num = self.load.num_requests(arrivals.rate, arrivals.concurrency)
        run = await put_load(
            client,
            calls,
            prompts,
            arrivals,
            num_requests=num,
            duration_s=self.load.duration,
            timeout_s=self.load.timeout,
            seed=self.load.seed,
            first=first,
            stop=stop,
            progress=self.watch(arrivals, num),
        )
        measured = summarize(run, self.slo)
        prompt, output = _mean_lengths(prompts)
        if measured.num_ok and measured.prompt_tokens:
            prompt = max(1, round(measured.prompt_tokens / measured.num_ok))
        predicted = self.planner.predict(arrivals, prompt=prompt, output=output, num_requests=measured.num_sent)
        usd = self.planner.usd_per_million
        return Point(
            run=run,
            measured=measured,
            predicted=predicted,
            usd_measured=usd(measured.output_tokens_per_s),
            usd_predicted=usd(predicted.output_tokens_per_s) if predicted else None,
        )

    def _name(self, served: Served) -> str | None:
        if self.name is None:
            return served.models[0] if served.models else None
        if served.models and self.name not in served.models:
            raise ValueError(f"{self.address} has no model {self.name!r}. {nearest(self.name, served.models)}")
        return self.name

    async def _prompts(self, client: Client, calls: Calls, served: Served) -> Prompts:
        config, context = self.prompts, served.max_context
        if self.planner.model is not None:
            context = min(context or self.planner.model.context, self.planner.model.context)
        output = config.output or (min(DEFAULT_OUTPUT, max(1, context // 4)) if context else DEFAULT_OUTPUT)
        if config.prompts is not None:
            given = read_prompts(Path(config.prompts), output=output)
            _check_given(given, config, context)
            return given
        prompt = config.prompt or (min(DEFAULT_PROMPT, max(1, context // 2)) if context else DEFAULT_PROMPT)
        lengths = Lengths(prompt=prompt, output=output, spread=config.spread)
        if context is not None and lengths.most > context:
            with_spread = f" with --spread {config.spread:g}" if config.spread else ""
            raise ValueError(
                f"--prompt {prompt} and --output {output}{with_spread} come to {lengths.most} tokens, and the server's"
                f" context is {context}. Use shorter ones."
            )
        vocab = config.vocab
        if vocab is None and self.planner.model is not None and not config.chat:
            vocab = self.planner.model.vocab
        prompts = RandomPrompts(
            lengths=lengths,
            seed=self.load.seed,
            vocab=vocab,
            prefix=config.shared_prefix,
            num_prefixes=config.prefixes,
        )
        return prompts if vocab is not None else await _fitted(client, calls, prompts)

    async def _warm_up(self, client: Client, calls: Calls, prompts: Prompts, stop: Stop) -> None:
        """Send some requests that are not counted; what the server will not take at all is found here."""
        num = self.load.warmup
        if not num:
            return
        if isinstance(prompts, RandomPrompts):
            prompts = dataclasses.replace(prompts, seed=prompts.seed + WARMUP_SEED)
        run = await put_load(
            client,
            calls,
            prompts,
            Arrivals(concurrency=min(num, WARMUP_TOGETHER)),
            num_requests=num,
            timeout_s=self.load.timeout,
            stop=stop,
        )
        if stop.reason == INTERRUPTED:
            return
        for one in run.outcomes:
            if one.error in REFUSALS:
                raise ValueError(f"{self.address} refuses the first requests with {one.error}: {one.message}")
        if all(one.error is not None for one in run.outcomes):
            last = run.outcomes[-1]
            raise ValueError(f"{self.address} served none of {num} warm-up requests: {last.error}: {last.message}")


def _mean_lengths(prompts: Prompts) -> tuple[int, int]:
    if isinstance(prompts, RandomPrompts):
        return prompts.lengths.prompt, prompts.lengths.output
    known = [len(one) if isinstance(one, list) else max(1, len(one) // 4) for one in prompts.prompts]
    outputs = [own or prompts.output for own in prompts.outputs]
    return max(1, round(sum(known) / len(known))), max(1, round(sum(outputs) / len(outputs)))


def _check_given(given: GivenPrompts, config: PromptConfig, context: int | None) -> None:
    for number, (prompt, own) in enumerate(zip(given.prompts, given.outputs, strict=True), 1):
        if isinstance(prompt, list) and config.chat:
            raise ValueError(f"--chat needs prompts of text, and prompt {number} of --prompts is of token ids.")
        output = own or given.output
        if context is not None and (len(prompt) if isinstance(prompt, list) else 1) + output > context:
            raise ValueError(
                f"prompt {number} of --prompts and {output} tokens of output exceed the server's context of {context}."
                " Use a smaller --output, or shorter prompts."
            )


async def _fitted(client: Client, calls: Calls, prompts: RandomPrompts) -> RandomPrompts:
    """The prompts with as many words as make the wanted number of tokens, which two short prompts tell."""
    samples: list[tuple[int, int]] = []
    for words in (max(1, prompts.lengths.prompt // 8), max(3, prompts.lengths.prompt // 4)):
        lengths = Lengths(prompt=words, output=1)
        text = RandomPrompts(lengths=lengths, seed=prompts.seed + WARMUP_SEED).ask(words).prompt
        assert isinstance(text, str)
        counted = await count_prompt_tokens(client, calls, text)
        if counted is None:
            return prompts
        samples.append((words, counted))
    words_per_token, words_more = fit_words(samples)
    return dataclasses.replace(prompts, words_per_token=words_per_token, words_more=words_more)


@contextmanager
def _stopped_by_signals(stop: Stop) -> Iterator[None]:
    """Ctrl-C, SIGTERM and SIGHUP stop the load and keep what was measured; off the main thread no signal is heard."""
    loop = asyncio.get_running_loop()
    signals: Sequence[signal.Signals] = ()
    if threading.current_thread() is threading.main_thread():
        signals = stop_signals()
    for number in signals:
        loop.add_signal_handler(number, stop, INTERRUPTED)
    try:
        yield
    finally:
        for number in signals:
            loop.remove_signal_handler(number)
