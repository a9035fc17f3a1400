"""What slots and cells of the cache hold, as a watcher sees it: each running request, and its cells as pages."""

import math
from collections.abc import Mapping
from dataclasses import dataclass

from gcompute.serve.scheduler import Running
from gcompute.serve.stats import SlotStats
from gcompute.serve.stream import Output

PAGE_TOKENS = 16


@dataclass(frozen=True, slots=True, kw_only=True)
class Pages:
    total: int
    used: int

    @property
    def free(self) -> int:
        return self.total - self.used


def count_pages(running: Mapping[int, Running], *, num_cells: int) -> Pages:
    """Pages of `PAGE_TOKENS` cells, of which a request uses as many as its cells begin."""
    used = sum(math.ceil(entry.cached / PAGE_TOKENS) for entry in running.values())
    return Pages(total=max(used, math.ceil(num_cells / PAGE_TOKENS)), used=used)


def slot_stats(running: Mapping[int, Running], outputs: Mapping[int, Output]) -> tuple[SlotStats, ...]:
    """One entry for each request that holds a slot; it reads its prompt until it has a token."""
    return tuple(
        SlotStats(
            slot=entry.slot,
            request_id=request_id,
            phase="decode" if outputs[request_id].num_tokens else "prefill",
            num_prompt=len(outputs[request_id].stream.request.prompt),
            num_cached=entry.cached,
            num_output=outputs[request_id].num_tokens,
            max_tokens=outputs[request_id].stream.request.sampling.max_tokens,
        )
        for request_id, entry in running.items()
    )
