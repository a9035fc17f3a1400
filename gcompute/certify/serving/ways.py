"""The deterministic mode: the same requests served in several ways, and every id and log-probability bit for bit.

In this mode the shapes of the programs that a request meets depend on the request alone, so it must not matter who else
is served, whether the prompt's beginning is cached, whether the request had to make room and began again, how many
steps a dispatch takes, or how the answer is read.
"""

import statistics
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from gcompute.certify.serving.drive import Progress, drive
from gcompute.certify.serving.traffic import Arrival, Wave, in_waves
from gcompute.config.model import ModelConfig
from gcompute.config.serve import ServeConfig
from gcompute.model.tokenizer import Tokenizer
from gcompute.model.transformer import Params
from gcompute.serve.engine import Engine
from gcompute.serve.stream import Completion, Reason

ROUNDS = 3
# The shortest pool of pages that holds any one request, and so never all of them.
PAGES = "kv_tokens"


@dataclass(frozen=True, slots=True, kw_only=True)
class Way:
    """How to serve. changes: to the configuration. alone: one request at a time. shows: a count of the engine's that
    must have risen, or the way has shown nothing.
    """

    name: str
    changes: Mapping[str, Any] = field(default_factory=dict)
    alone: bool = False
    shows: str | None = None


def deterministic_ways(max_context: int) -> tuple[Way, ...]:
    """All of them; neighbouring ways with the same changes share one engine, and so its prefix cache."""
    return (
        Way(name="alone, no prefix cache", changes={"prefix_cache": False}, alone=True),
        Way(name="in a crowd, no prefix cache", changes={"prefix_cache": False}),
        Way(name="in a crowd, prefixes cached", changes={"prefix_cache": True}),
        Way(name="again, all prefixes cached", changes={"prefix_cache": True}, shows="num_hit_tokens"),
        Way(name="alone, all prefixes cached", changes={"prefix_cache": True}, alone=True, shows="num_hit_tokens"),
        Way(name="one step a dispatch", changes={"decode_steps": 1}),
        Way(name="room for one request", changes={PAGES: max_context}, shows="num_preemptions"),
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class WayResult:
    """One way beside the first. differing: requests whose ids or log-probabilities have another bit, with where."""

    name: str
    answers: tuple[Completion, ...]
    num_compared: int
    differing: Mapping[int, str]
    faults: tuple[str, ...] = ()

    def to_dict(self) -> dict[str, Any]:
        return {
            "way": self.name,
            "compared": self.num_compared,
            "bitwise_equal": self.num_compared - len(self.differing),
            "differing": {str(index): where for index, where in self.differing.items()},
            "faults": list(self.faults),
        }


def watched(waves: Sequence[Wave]) -> list[Arrival]:
    """The arrivals, each asking for log-probabilities, so that there are bits to compare."""
    arrivals = []
    for arrival in (arrival for wave in waves for arrival in wave.arrivals):
        sampling = arrival.request.sampling
        if sampling.logprobs is None:
            arrival = replace(arrival, request=replace(arrival.request, sampling=replace(sampling, logprobs=3)))
        arrivals.append(arrival)
    return arrivals


def serve_in_ways(
    arrivals: Sequence[Arrival],
    ways: Sequence[Way],
    *,
    params: Params,
    config: ModelConfig,
    tokenizer: Tokenizer | None,
    serve: ServeConfig,
    progress: Progress = lambda done: None,
) -> Iterator[WayResult]:
    """Each way's answers against those of the first. The order of arrival, the bursts, and which answers are streamed
    are drawn anew for each way.

    Raises:
      TypeError: this version of the engine has no such setting.
    """
    first: tuple[Completion, ...] | None = None
    engine: Engine | None = None
    before: Mapping[str, Any] | None = None
    try:
        for number, way in enumerate(ways):
            if engine is None or way.changes != before:
                if engine is not None:
                    engine.close()
                engine = Engine(params, config, tokenizer, replace(serve, **way.changes))
                engine.start()
                engine.wait_ready()
                before = way.changes
            answers, faults = _serve(engine, arrivals, way, np.random.default_rng(number), progress)
            first = answers if first is None else first
            yield WayResult(
                name=way.name,
                answers=answers,
                num_compared=len(answers),
                differing=differing(first, answers),
                faults=tuple(faults),
            )
    finally:
        if engine is not None:
            engine.close(finish=False)


def _serve(
    engine: Engine, arrivals: Sequence[Arrival], way: Way, rng: np.random.Generator, progress: Progress
) -> tuple[tuple[Completion, ...], list[str]]:
    order = rng.permutation(len(arrivals))
    mixed = [replace(arrivals[index], streamed=bool(rng.random() < 0.5)) for index in order]
    before = _counts(engine)
    if way.alone:
        answers = [drive(engine, [Wave(arrivals=(one,), pause=0)])[0] for one in mixed]
    else:
        answers = drive(engine, in_waves(mixed, rng), progress)
    after, faults = _counts(engine), []
    if way.shows is not None and after.get(way.shows, 0) <= before.get(way.shows, 0):
        faults.append(f"{way.name}: the engine's {way.shows} did not rise, so this way has shown nothing")
    if after["num_late_compilations"]:
        faults.append(f"{way.name}: {after['num_late_compilations']} programs were compiled while serving")
    by_request = dict(zip(order.tolist(), answers, strict=True))
    return tuple(by_request[index] for index in range(len(arrivals))), faults


def _counts(engine: Engine) -> dict[str, Any]:
    stats = engine.stats()
    return {name: getattr(stats, name) for name in type(stats).__dataclass_fields__}


def differing(first: Sequence[Completion], other: Sequence[Completion]) -> dict[int, str]:
    """The requests whose answers are not the same to the bit, and where they part.

    Of a request that was called off, what both have.
    """
    found = {}
    for index, (a, b) in enumerate(zip(first, other, strict=True)):
        cut = Reason.CANCELLED in (a.reason, b.reason)
        num = min(len(a.ids), len(b.ids)) if cut else max(len(a.ids), len(b.ids))
        at = next((n for n in range(num) if a.ids[n : n + 1] != b.ids[n : n + 1]), None)
        logprobs_at = next((n for n in range(num) if a.logprobs[n : n + 1] != b.logprobs[n : n + 1]), None)
        if at is not None:
            found[index] = f"output {at}: ids {a.ids[at : at + 1]} and {b.ids[at : at + 1]}"
        elif logprobs_at is not None:
            one, two = a.logprobs[logprobs_at].logprob, b.logprobs[logprobs_at].logprob
            found[index] = f"output {logprobs_at}: log-probabilities {one!r} and {two!r}, or those beside them"
        elif not cut and (a.reason, a.text) != (b.reason, b.text):
            found[index] = f"the end: {a.reason} and {b.reason}"
    return found


def measure_cost(
    arrivals: Sequence[Arrival],
    *,
    params: Params,
    config: ModelConfig,
    tokenizer: Tokenizer | None,
    serve: ServeConfig,
    cheap: ServeConfig,
) -> dict[str, Any]:
    """Output tokens/s of `serve` and of `cheap` on the same requests, all at once: medians of rounds in turn."""
    rates: dict[str, list[float]] = {"deterministic": [], "default": []}
    whole = [replace(arrival, streamed=False, cancel_after=None) for arrival in arrivals]
    with (
        Engine(params, config, tokenizer, serve) as slow,
        Engine(params, config, tokenizer, cheap) as fast,
    ):
        for _ in range(ROUNDS):
            for name, engine in (("deterministic", slow), ("default", fast)):
                started = time.perf_counter()
                answers = drive(engine, [Wave(arrivals=tuple(whole), pause=0)])
                tokens = sum(answer.usage.completion_tokens for answer in answers)
                rates[name].append(tokens / (time.perf_counter() - started))
    medians = {f"{name}_tokens_per_s": statistics.median(values) for name, values in rates.items()}
    ratios = [a / b for a, b in zip(rates["deterministic"], rates["default"], strict=True)]
    return {**medians, "speed_ratio": statistics.median(ratios), "rounds": ROUNDS}
