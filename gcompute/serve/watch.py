"""What somebody who watches the engine is shown: counts as they are, rates over the last seconds, times of late.

Rates come from successive `EngineStats`, so that the engine keeps none and nobody pays while nobody looks. A snapshot
has numbers of requests and tokens, and no text. No JAX.
"""

import dataclasses
import math
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from typing import Any

from gcompute.serve.position import DecodeRoofline, position_json
from gcompute.serve.stats import EngineStats
from gcompute.serve.stream import SERVED, Finished

# Rates are over about so long, of samples at least this far apart; older ones say nothing about now.
WINDOW_S, SPACING_S, STALE_S = 2.0, 0.1, 6.0
# Requests whose times the percentiles are of.
RECENT = 128
COUNTERS = (
    *("num_output_tokens", "num_prompt_tokens", "num_hit_tokens", "num_decode_steps", "num_dispatches"),
    *("num_preemptions", "num_drafted", "num_accepted", "num_late_compilations"),
)


class Watch:
    """Turns an engine's stats into snapshots. Safe on any thread.

    about: what does not change, shown as it is. read: `Engine.stats`; `finished` is for `Engine.observe`.
    """

    def __init__(
        self,
        read: Callable[[], EngineStats],
        *,
        about: dict[str, Any],
        roofline: DecodeRoofline | None = None,
        clock: Callable[[], float] = time.monotonic,
    ):
        self._read = read
        self._about = about
        self._roofline = roofline
        self._ceilings = roofline.to_dict() if roofline is not None else None
        self._clock = clock
        self._started_s = clock()
        self._lock = threading.Lock()
        self._samples: deque[tuple[float, EngineStats]] = deque()
        self._recent: deque[Finished] = deque(maxlen=RECENT)
        self._num_finished = 0

    def finished(self, event: Finished) -> None:
        """Hear of a request's end."""
        with self._lock:
            self._num_finished += 1
            if event.reason in SERVED:
                self._recent.append(event)

    def look(self) -> dict[str, Any]:
        """The snapshot of now, as plain values."""
        stats = self._read()
        with self._lock:
            now_s = self._clock()
            rates = self._rates(now_s, stats)
            recent, num_finished = list(self._recent), self._num_finished
        return {
            "about": self._about,
            "status": stats.status,
            "uptime_s": now_s - self._started_s,
            "slots": {"num": stats.slots, "running": [dataclasses.asdict(slot) for slot in stats.running]},
            "num_running": stats.num_running,
            "num_waiting": stats.num_waiting,
            "cells": {"num": stats.num_cells, "used": stats.num_cells_used},
            "pages": {
                "tokens": stats.page_tokens,
                "num": stats.num_pages,
                "free": stats.num_pages_free,
                "cached": stats.num_pages_cached,
                "used": stats.num_pages_used,
            },
            "totals": {"num_finished": num_finished, **{name: getattr(stats, name) for name in COUNTERS}},
            "rates": rates,
            "hit_share": share(stats.num_hit_tokens, stats.num_prompt_tokens),
            "accepted_share": share(stats.num_accepted, stats.num_drafted),
            "recent": times_of(recent),
            "roofline": self._ceilings,
            "decode": self._decode(stats),
        }

    def _rates(self, now_s: float, stats: EngineStats) -> dict[str, float | None]:
        """Counts a second since the sample of about `WINDOW_S` ago; None where nobody looked then."""
        samples = self._samples
        while samples and now_s - samples[0][0] > STALE_S:
            samples.popleft()
        while len(samples) > 1 and now_s - samples[1][0] >= WINDOW_S:
            samples.popleft()
        since_s, before = samples[0] if samples else (now_s, stats)
        if not samples or now_s - samples[-1][0] >= SPACING_S:
            samples.append((now_s, stats))
        window_s = now_s - since_s
        known = window_s >= SPACING_S
        names = {
            "output_tokens_per_s": "num_output_tokens",
            "prompt_tokens_per_s": "num_prompt_tokens",
            "decode_steps_per_s": "num_decode_steps",
        }
        rates = {
            rate: (getattr(stats, name) - getattr(before, name)) / window_s if known else None
            for rate, name in names.items()
        }
        return {"window_s": window_s if known else None, **rates}

    def _decode(self, stats: EngineStats) -> dict[str, Any]:
        """The last decode step, measured, and what the roofline predicts of it and of other batches."""
        batch, cells, step_s = stats.decode_batch, stats.decode_cells, stats.last_decode_step_s
        known = batch > 0 and step_s > 0
        body: dict[str, Any] = {
            "live": any(slot.phase == "decode" for slot in stats.running),
            "batch": batch,
            "cells": cells,
            "measured": {"step_s": step_s, "tokens_per_s": stats.decode_tokens_per_s} if known else None,
            "predicted": None,
            "path": [],
        }
        if self._roofline is None:
            return body
        # A step that judges guesses does more than the prediction is of.
        if known and not stats.decode_speculated:
            position = self._roofline.at(batch, cells)
            body["predicted"] = position_json(position)
            body["measured"]["flops_per_s"] = position.flops / step_s
        # Before the first step: a quarter of all room, as good a guess as any.
        cells = cells if known else stats.num_cells / stats.slots / 4
        body["path"] = [position_json(one) for one in self._roofline.path(cells, stats.slots)]
        return body


def share(part: int, whole: int) -> float | None:
    """part / whole; None of nothing."""
    return min(1.0, part / whole) if whole else None


def times_of(events: Sequence[Finished]) -> dict[str, Any]:
    """Percentiles of the times of finished requests, and of how many; None where none has such a time."""
    queued_s = [event.timing.queued_s for event in events]
    first_token_s = [event.timing.first_token_s for event in events]
    per_token_s = [event.timing.per_token_s(event.usage.completion_tokens) for event in events]
    return {
        "num": len(events),
        "queued_s": percentiles([one for one in queued_s if one is not None]),
        "first_token_s": percentiles([one for one in first_token_s if one is not None]),
        "per_token_s": percentiles([one for one in per_token_s if one is not None]),
    }


def percentiles(values: Sequence[float]) -> dict[str, float] | None:
    """The smallest value that at least so many percent of the values do not exceed.

    >>> percentiles([4.0, 1.0, 3.0, 2.0])
    {'p50': 2.0, 'p90': 4.0, 'p99': 4.0}
    """
    if not values:
        return None
    ranked = sorted(values)
    return {f"p{percent}": ranked[math.ceil(len(ranked) * percent / 100) - 1] for percent in (50, 90, 99)}
