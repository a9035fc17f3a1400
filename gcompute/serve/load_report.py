"""What a run of a load comes to: percentiles, throughput, errors by kind, goodput. Every figure here is measured."""

import dataclasses
import math
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from gcompute.serve.load_answer import INTERRUPTED, Outcome
from gcompute.serve.load_run import Run

# A request sent so long after it was due counts as late.
LATE_S = 0.01


@dataclass(frozen=True, slots=True, kw_only=True)
class Spread:
    """How `num` values are spread; percentiles are interpolated linearly between the nearest two."""

    num: int
    mean: float
    p50: float
    p90: float
    p99: float
    least: float
    most: float

    @classmethod
    def of(cls, values: Iterable[float]) -> "Spread | None":
        """The spread of some values; None where there is none.

        >>> spread = Spread.of([4.0, 1.0, 3.0, 2.0, 5.0])
        >>> spread.p50, spread.p90
        (3.0, 4.6)
        """
        known = np.fromiter(values, dtype=float)
        if not known.size:
            return None
        p50, p90, p99 = np.percentile(known, (50, 90, 99)).tolist()
        return cls(
            num=known.size,
            mean=float(known.mean()),
            p50=p50,
            p90=p90,
            p99=p99,
            least=float(known.min()),
            most=float(known.max()),
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Slo:
    """The most seconds that a request may take to its first token, for a token after it, and in all; None: any.

    Raises:
      ValueError: a limit is not a number above 0.
    """

    ttft_s: float | None = None
    tpot_s: float | None = None
    e2e_s: float | None = None

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if value is not None and not (math.isfinite(value) and value > 0):
                raise ValueError(f"--slo-{field.name.removesuffix('_s')} {value:g} must be a number above 0.")

    @property
    def asked(self) -> bool:
        return any(limit is not None for limit in (self.ttft_s, self.tpot_s, self.e2e_s))

    def met_by(self, one: Outcome) -> bool:
        """Whether a request was served within all limits; one of a single token has no time per token."""
        if one.error is not None:
            return False
        pairs = ((one.ttft_s, self.ttft_s), (one.tpot_s, self.tpot_s), (one.e2e_s, self.e2e_s))
        return all(limit is None or value is None or value <= limit for value, limit in pairs)

    def __str__(self) -> str:
        limits = (("TTFT", self.ttft_s), ("TPOT", self.tpot_s), ("E2E", self.e2e_s))
        return ", ".join(f"{name} <= {limit:g} s" for name, limit in limits if limit is not None) or "none"


@dataclass(frozen=True, slots=True, kw_only=True)
class Measured:
    """One run in figures. Times are seconds, rates per second of `wall_s`, from the start to the last end.

    num_ok + num_failed + num_unfinished = num_sent: nothing is lost. errors: kinds, most frequent first, with one
    message of each. num_short: answers of fewer tokens than asked for. tokens_per_chunk: above 1 where the server
    sends several tokens at once, so that `itl` is the time between such chunks. sent_per_s: over the time of sending.
    late: of the requests that were due at a moment, by how much they were sent after it. client_share: of one core,
    what this client took. counted: whether the server itself counted the tokens.
    """

    num_sent: int
    num_ok: int
    num_failed: int
    num_unfinished: int
    errors: dict[str, int]
    messages: dict[str, str]
    num_short: int
    wall_s: float
    ttft: Spread | None
    tpot: Spread | None
    itl: Spread | None
    e2e: Spread | None
    tokens_per_chunk: float | None
    prompt_tokens: int
    output_tokens: int
    prompt_tokens_per_s: float
    output_tokens_per_s: float
    requests_per_s: float
    sent_per_s: float | None
    num_late: int
    late: Spread | None
    mean_under_way: float
    most_under_way: int
    num_good: int
    goodput_per_s: float
    client_cpu_s: float
    client_share: float
    counted: bool
    stopped: str

    def to_dict(self) -> dict[str, Any]:
        return dataclasses.asdict(self)


def summarize(run: Run, slo: Slo) -> Measured:
    """All figures of a run."""
    every = run.outcomes
    ok = [one for one in every if one.error is None]
    failed = [one for one in every if one.error not in (None, INTERRUPTED)]
    kinds = Counter(one.error for one in failed if one.error is not None)
    wall_s = max(run.wall_s, 1e-9)
    output_tokens = sum(one.completion_tokens for one in ok)
    prompt_tokens = sum(one.prompt_tokens for one in ok)
    num_chunks = sum(len(one.token_s) for one in ok)
    good = sum(slo.met_by(one) for one in ok)
    late = [one.late_s for one in every if one.due_s is not None]
    return Measured(
        num_sent=len(every),
        num_ok=len(ok),
        num_failed=len(failed),
        num_unfinished=len(every) - len(ok) - len(failed),
        errors=dict(kinds.most_common()),
        messages={kind: next(one.message for one in failed if one.error == kind) for kind in kinds},
        num_short=sum(one.completion_tokens < one.asked_tokens for one in ok),
        wall_s=run.wall_s,
        ttft=Spread.of(one.ttft_s for one in ok if one.ttft_s is not None),
        tpot=Spread.of(one.tpot_s for one in ok if one.tpot_s is not None),
        itl=Spread.of(gap_s for one in ok for gap_s in one.gaps_s),
        e2e=Spread.of(one.e2e_s for one in ok),
        tokens_per_chunk=output_tokens / num_chunks if num_chunks else None,
        prompt_tokens=prompt_tokens,
        output_tokens=output_tokens,
        prompt_tokens_per_s=prompt_tokens / wall_s,
        output_tokens_per_s=output_tokens / wall_s,
        requests_per_s=len(ok) / wall_s,
        sent_per_s=sending_rate(every),
        num_late=sum(one > LATE_S for one in late),
        late=Spread.of(late),
        mean_under_way=sum(one.e2e_s for one in every) / wall_s,
        most_under_way=max((num for _, num in under_way(every)), default=0),
        num_good=good,
        goodput_per_s=good / wall_s,
        client_cpu_s=run.client_cpu_s,
        client_share=run.client_cpu_s / wall_s,
        counted=all(one.counted for one in ok),
        stopped=run.stopped,
    )


def sending_rate(outcomes: Sequence[Outcome]) -> float | None:
    """Requests a second, over the time from the first sending to the last; None below two, or all at once."""
    if len(outcomes) < 2:
        return None
    times = [one.sent_s for one in outcomes]
    span_s = max(times) - min(times)
    return (len(times) - 1) / span_s if span_s > 0 else None


def under_way(outcomes: Sequence[Outcome]) -> list[tuple[float, int]]:
    """(time, requests under way from then on), in order; one that ends as another begins makes room for it."""
    changes = sorted([(one.sent_s, 1) for one in outcomes] + [(one.end_s, -1) for one in outcomes])
    steps, num = [], 0
    for at_s, change in changes:
        num += change
        steps.append((at_s, num))
    return steps


def tokens_over_time(outcomes: Sequence[Outcome], *, num_bins: int) -> tuple[list[float], list[float]]:
    """(edges of equal bins in seconds, output tokens a second in each); the tokens of a request are even over its
    chunks. Requests that failed count as far as they came: the server made those tokens."""
    end_s = max((one.end_s for one in outcomes), default=0.0)
    if end_s <= 0:
        return [0.0, 1.0], [0.0]
    edges = np.linspace(0, end_s, num_bins + 1)
    counts = np.zeros(num_bins)
    for one in outcomes:
        if len(one.token_s):
            made, _ = np.histogram(one.token_s, bins=edges)
            counts += made * (one.completion_tokens / len(one.token_s))
    return edges.tolist(), (counts / (end_s / num_bins)).tolist()


def outcome_json(one: Outcome) -> dict[str, Any]:
    """One request as a file can hold it."""
    fields = {field.name: getattr(one, field.name) for field in dataclasses.fields(one)}
    derived = {"ttft_s": one.ttft_s, "tpot_s": one.tpot_s, "e2e_s": one.e2e_s}
    return {**fields, "token_s": [round(at_s, 6) for at_s in one.token_s], **derived}
