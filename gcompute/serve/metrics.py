"""What the engine does, as Prometheus metrics in a registry of their own."""

from collections.abc import Iterator

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from gcompute.serve.engine import Engine
from gcompute.serve.stream import SERVED, Finished, Reason

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"
# With which calls are usually refused.
STATUSES = (400, 401, 404, 408, 413, 429, 500, 503)
SECONDS = (0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10, 30, 60, 120)


class Metrics:
    """Gauges and counters read from the engine when they are asked for; times observed as requests are served."""

    def __init__(self, engine: Engine):
        self.registry = CollectorRegistry()
        self.registry.register(_EngineCollector(engine))
        self._requests = Counter("gcompute_requests", "requests ended, by reason", ["reason"], registry=self.registry)
        self._rejected = Counter(
            "gcompute_rejected", "calls refused, by HTTP status", ["status"], registry=self.registry
        )
        # Rates miss the first event of a series that was not there before it.
        for reason in Reason:
            self._requests.labels(reason.value)
        for status in STATUSES:
            self._rejected.labels(str(status))
        self._queued_s = self._histogram("gcompute_queue_seconds", "from arrival to a slot")
        self._first_token_s = self._histogram("gcompute_time_to_first_token_seconds", "from arrival to the first token")
        self._per_token_s = self._histogram("gcompute_time_per_output_token_seconds", "between tokens after the first")
        self._total_s = self._histogram("gcompute_request_seconds", "from arrival to the end")
        engine.observe(self._finished)

    def reject(self, status: int) -> None:
        """Count a call that was answered with an error."""
        self._rejected.labels(str(status)).inc()

    def render(self) -> bytes:
        """The text exposition format."""
        return generate_latest(self.registry)

    def _histogram(self, name: str, help: str) -> Histogram:
        return Histogram(name, help, buckets=SECONDS, registry=self.registry)

    def _finished(self, event: Finished) -> None:
        self._requests.labels(event.reason.value).inc()
        # One that was cut short is no example of how long requests take, but is of how long they wait.
        served = event.reason in SERVED
        for histogram, seconds in (
            (self._queued_s, event.timing.queued_s),
            (self._first_token_s, event.timing.first_token_s),
            (self._per_token_s, event.timing.per_token_s(event.usage.completion_tokens) if served else None),
            (self._total_s, event.timing.total_s if served else None),
        ):
            if seconds is not None:
                histogram.observe(seconds)


class _EngineCollector(Collector):
    def __init__(self, engine: Engine):
        self._engine = engine

    def collect(self) -> Iterator[Metric]:
        stats = self._engine.stats()
        gauges = {
            "slots": (stats.slots, "requests that can run together"),
            "running": (stats.num_running, "requests in a slot"),
            "waiting": (stats.num_waiting, "requests in the queue"),
            "kv_cells": (stats.num_cells, "tokens that the key/value cache can hold"),
            "kv_cells_used": (
                stats.num_cells_used,
                "tokens of running requests in the key/value cache, those they share in each",
            ),
            "kv_pages": (stats.num_pages, "pages of the key/value cache"),
            "kv_pages_free": (stats.num_pages_free, "pages that hold nothing"),
            "kv_pages_cached": (stats.num_pages_cached, "pages that no request holds and a prefix may find"),
            "kv_pages_used": (stats.num_pages_used, "pages that running requests hold"),
            "programs": (stats.num_programs, "compiled programs"),
        }
        for name, (value, meaning) in gauges.items():
            yield GaugeMetricFamily(f"gcompute_{name}", meaning, value=value)
        counters = {
            "compilations_after_warmup": (stats.num_late_compilations, "compilations once requests were taken"),
            "dispatches": (stats.num_dispatches, "programs run"),
            "decode_steps": (stats.num_decode_steps, "decode steps run"),
            "prompt_tokens": (stats.num_prompt_tokens, "prompt tokens read"),
            "output_tokens": (stats.num_output_tokens, "tokens made"),
            "prefix_hit_tokens": (stats.num_hit_tokens, "prompt tokens found in the prefix cache"),
            "preemptions": (stats.num_preemptions, "times that a request gave way because pages ran out"),
            "draft_tokens": (stats.num_drafted, "tokens proposed by speculation"),
            "draft_tokens_accepted": (stats.num_accepted, "proposed tokens that were the model's own"),
        }
        for name, (value, meaning) in counters.items():
            yield CounterMetricFamily(f"gcompute_{name}", meaning, value=value)
