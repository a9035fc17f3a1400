"""What the plan predicts for the load that a benchmark puts on a server. No figure here is measured. No JAX.

The plan says what B requests that run together get. How many run together follows from the load: a closed loop keeps
as many as it has senders, at most the server's slots; requests that arrive at a rate are, by Little's law, rate times
the time that each stays.
"""

import dataclasses
from dataclasses import dataclass
from typing import Any

from gcompute.hardware.target import Target
from gcompute.plan.serving import Load, ServeRun, load_of
from gcompute.serve.load import Arrivals

# Beyond it a rate is not searched for where nobody says how many requests run together at most.
MOST_TOGETHER = 4096


@dataclass(frozen=True, slots=True, kw_only=True)
class Predicted:
    """The plan's figures for one load. together: requests that run at once. saturated: more are sent than served, so
    that requests wait without end and times to first token and in all are not predicted (None)."""

    together: int
    saturated: bool
    ttft_s: float | None
    tpot_s: float
    e2e_s: float | None
    output_tokens_per_s: float
    prompt_tokens_per_s: float
    requests_per_s: float
    fits: bool

    @property
    def under_way(self) -> float | None:
        """Mean number of requests in the server, waiting ones too: throughput times the time in all (Little)."""
        return None if self.e2e_s is None else self.requests_per_s * self.e2e_s

    def to_dict(self) -> dict[str, Any]:
        return dataclasses.asdict(self)


def predict(
    run: ServeRun, target: Target, arrivals: Arrivals, *, slots: int | None, num_requests: int | None
) -> Predicted:
    """Predict a load of requests as in `run`; slots: how many the server runs together at most, if known."""
    most = slots or MOST_TOGETHER
    if arrivals.rate is None:
        assert arrivals.concurrency is not None
        return _closed(run, target, arrivals.concurrency, most)
    if arrivals.concurrency is not None:
        most = min(most, arrivals.concurrency)
    if arrivals.all_at_once:
        together = min(most, num_requests or most)
        return _full(run, load_of(run, target, together))
    return _open(run, target, arrivals.rate, most)


def _closed(run: ServeRun, target: Target, senders: int, most: int) -> Predicted:
    load = load_of(run, target, min(senders, most))
    predicted = _full(run, load)
    # Each sender has one request in the server, so each takes senders / throughput in all, waiting included.
    e2e_s = senders / predicted.requests_per_s
    ttft_s = load.ttft_s if senders <= most else e2e_s - load.time_per_token_s * (run.output - 1)
    return dataclasses.replace(
        predicted, saturated=False, ttft_s=ttft_s, e2e_s=max(e2e_s, ttft_s + load.time_per_token_s * (run.output - 1))
    )


def _open(run: ServeRun, target: Target, rate: float, most: int) -> Predicted:
    """The fewest requests together that are served as fast as they arrive."""

    def served_per_s(load: Load) -> float:
        return load.tokens_per_s / run.output

    top = load_of(run, target, most)
    if served_per_s(top) < rate:
        return _full(run, top)
    low, high = 0, most
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if served_per_s(load_of(run, target, middle)) >= rate else (middle, high)
    load = load_of(run, target, high)
    return Predicted(
        together=high,
        saturated=False,
        ttft_s=load.ttft_s,
        tpot_s=load.time_per_token_s,
        e2e_s=load.ttft_s + load.time_per_token_s * (run.output - 1),
        output_tokens_per_s=rate * run.output,
        prompt_tokens_per_s=rate * run.prompt,
        requests_per_s=rate,
        fits=load.fits,
    )


def _full(run: ServeRun, load: Load) -> Predicted:
    """All that the server can do with so many together, while there are always that many."""
    per_s = load.tokens_per_s / run.output
    return Predicted(
        together=load.concurrency,
        saturated=True,
        ttft_s=None,
        tpot_s=load.time_per_token_s,
        e2e_s=None,
        output_tokens_per_s=load.tokens_per_s,
        prompt_tokens_per_s=per_s * run.prompt,
        requests_per_s=per_s,
        fits=load.fits,
    )
