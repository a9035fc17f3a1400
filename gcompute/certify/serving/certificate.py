"""The whole proof for one model: random traffic through the engine, and every token against the reference."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from gcompute.certify.serving.drive import Progress, drive
from gcompute.certify.serving.reference import Reference
from gcompute.certify.serving.rounding import WITHIN, Rounding, measure_rounding
from gcompute.certify.serving.traffic import Arrival, Wave, random_traffic
from gcompute.certify.serving.verdict import Findings, check_answers
from gcompute.certify.serving.ways import Way, deterministic_ways, measure_cost, serve_in_ways, watched
from gcompute.config.model import ModelConfig
from gcompute.config.serve import ServeConfig
from gcompute.model.tokenizer import Tokenizer
from gcompute.model.transformer import Params
from gcompute.serve.engine import Engine
from gcompute.serve.stream import Completion

BAND_TEXTS = 64
COST_REQUESTS = 200


@dataclass(frozen=True, slots=True, kw_only=True)
class Subject:
    """A model to serve, and how.

    Raises:
      ValueError: its outputs depend on the shapes that it is served in, by its definition.
    """

    name: str
    params: Params
    config: ModelConfig
    tokenizer: Tokenizer | None
    serve: ServeConfig

    def __post_init__(self) -> None:
        if self.config.capacity_factor is not None:
            raise ValueError(
                f"capacity_factor={self.config.capacity_factor}: an expert's places are a share of the tokens that are"
                " read together, so what a token gets depends on how a text is cut up, and no two ways of serving need"
                " agree. Serve a model without capacity_factor."
            )

    @property
    def max_context(self) -> int:
        return self.serve.max_context or self.config.context

    @property
    def end(self) -> int | None:
        return None if self.tokenizer is None else self.tokenizer.end_of_text

    def traffic(self, num: int, seed: int) -> tuple[Wave, ...]:
        return random_traffic(num, vocab=self.config.vocab, max_context=self.max_context, end=self.end, seed=seed)


def prove_default(
    subject: Subject, num: int, *, seed: int = 0, progress: Progress = lambda done: None
) -> dict[str, Any]:
    """Serve `num` random requests and check every token: a plain dict, with "violations" to look at."""
    waves = subject.traffic(num, seed)
    with Engine(subject.params, subject.config, subject.tokenizer, subject.serve) as engine:
        answers = drive(engine, waves, progress)
        late = engine.stats().num_late_compilations
    findings, rounding = check(subject, [one for wave in waves for one in wave.arrivals], answers)
    if late:
        findings.faults.append(f"{late} programs were compiled while serving")
    return _result(subject, "default", findings, rounding)


def prove_deterministic(
    subject: Subject,
    num: int,
    *,
    seed: int = 0,
    ways: Sequence[Way] | None = None,
    cost: bool = True,
    progress: Progress = lambda done: None,
) -> dict[str, Any]:
    """Serve `num` random requests in every way: each bit the same, and the first way's tokens the reference's."""
    arrivals = watched(subject.traffic(num, seed))
    if ways is None:
        ways, serve = deterministic_ways(subject.max_context), replace(subject.serve, deterministic=True)
    else:
        serve = subject.serve
    served = {"params": subject.params, "config": subject.config, "tokenizer": subject.tokenizer}
    results = list(serve_in_ways(arrivals, ways, **served, serve=serve, progress=progress))
    findings, rounding = check(subject, arrivals, results[0].answers)
    for result in results:
        findings.faults += [f"{result.name}: request {index}, {where}" for index, where in result.differing.items()]
        findings.faults += result.faults
    told = _result(subject, "deterministic", findings, rounding)
    told["ways"] = [result.to_dict() for result in results]
    if cost:
        told["cost"] = measure_cost(arrivals[:COST_REQUESTS], **served, serve=serve, cheap=subject.serve)
    return told


def check(subject: Subject, arrivals: Sequence[Arrival], answers: Sequence[Completion]) -> tuple[Findings, Rounding]:
    """What the reference says of these answers, and the rounding that it allows."""
    reference = Reference(subject.params, subject.config, subject.serve.precision)
    texts = [(*one.request.prompt, *answer.ids) for one, answer in zip(arrivals, answers, strict=True)]
    rounding = measure_rounding(reference, texts[:BAND_TEXTS])
    findings = check_answers(arrivals, answers, reference=reference, rounding=rounding, end=subject.end)
    return findings, rounding


def _result(subject: Subject, mode: str, findings: Findings, rounding: Rounding) -> dict[str, Any]:
    return {
        "model": subject.name,
        "mode": mode,
        "precision": subject.serve.precision,
        "band": rounding.band,
        "logit_bound": WITHIN * rounding.band,
        **findings.to_dict(),
    }
