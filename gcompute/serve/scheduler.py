"""Continuous batching over slots: which request enters the batch, and how far one dispatch decodes. No arrays here.

A request waits, then holds one slot from its prefill to its end. Invariant: free slots + running requests = slots.
"""

from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType

from gcompute.serve.request import QueueFull

SMALLEST_BUCKET = 16


@dataclass(frozen=True, slots=True, kw_only=True)
class Prefill:
    """Read the prompt of one request, padded to `bucket` tokens, into `slot`, and choose its first token."""

    request_id: int
    slot: int
    bucket: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Decode:
    """Choose up to `num_steps` tokens for every running request, attending to `bucket` cells of each slot.

    until_free: stop early when a request ends, because another waits for its slot.
    """

    num_steps: int
    bucket: int
    until_free: bool


@dataclass(slots=True, kw_only=True)
class Running:
    """Where a running request stands. cached: tokens whose keys and values are in its slot."""

    slot: int
    cached: int
    remaining: int


def make_buckets(max_context: int) -> tuple[int, ...]:
    """Powers of two from 16 up to `max_context`, which is always the last.

    >>> make_buckets(100)
    (16, 32, 64, 100)
    """
    sizes = []
    size = SMALLEST_BUCKET
    while size < max_context:
        sizes.append(size)
        size *= 2
    return (*sizes, max_context)


class Scheduler:
    """Waiting requests, running requests, free slots, and the choice of what to do next.

    A waiting request is read as soon as a slot is free, so that the batch is as full as it can be; otherwise all
    running requests decode. Ids are given by the caller, in order of arrival.
    """

    def __init__(self, *, slots: int, max_queue: int, max_context: int, decode_steps: int):
        self.slots = slots
        self.max_queue = max_queue
        self.decode_steps = decode_steps
        self.buckets = make_buckets(max_context)
        self._waiting: deque[tuple[int, int, int]] = deque()
        self._running: dict[int, Running] = {}
        self._free = list(reversed(range(slots)))

    @property
    def num_waiting(self) -> int:
        return len(self._waiting)

    @property
    def running(self) -> Mapping[int, Running]:
        return MappingProxyType(self._running)

    @property
    def num_free(self) -> int:
        return len(self._free)

    def bucket(self, num_tokens: int) -> int:
        """The smallest bucket that holds `num_tokens`."""
        return next(size for size in self.buckets if size >= num_tokens)

    def check_room(self, num_requests: int) -> None:
        """Raise QueueFull unless so many more may enter; one that can have a slot at once does not count as waiting."""
        if len(self._waiting) + num_requests > self.max_queue + len(self._free):
            raise QueueFull(
                f"{len(self._waiting)} requests are waiting, and at most {self.max_queue} may. Try again later."
            )

    def add(self, request_id: int, *, num_prompt: int, max_tokens: int) -> None:
        """Put a request at the end of the queue.

        Raises:
          QueueFull: no room.
        """
        self.check_room(1)
        assert num_prompt >= 1
        assert max_tokens >= 1
        assert num_prompt + max_tokens <= self.buckets[-1]
        self._waiting.append((request_id, num_prompt, max_tokens))

    def next_work(self) -> Prefill | Decode | None:
        """What to dispatch now; None when there is nothing to do. A Prefill's request is running from here on."""
        if self._waiting and self._free:
            request_id, num_prompt, max_tokens = self._waiting.popleft()
            slot = self._free.pop()
            self._running[request_id] = Running(slot=slot, cached=num_prompt, remaining=max_tokens)
            return Prefill(request_id=request_id, slot=slot, bucket=self.bucket(num_prompt))
        if not self._running:
            return None
        longest = max(entry.cached for entry in self._running.values())
        bucket = self.bucket(longest + 1)
        # A dispatch stays within one bucket: the next step that needs a larger one begins a new dispatch.
        need = max(entry.remaining for entry in self._running.values())
        num_steps = min(self.decode_steps, need, bucket - longest)
        return Decode(num_steps=num_steps, bucket=bucket, until_free=bool(self._waiting))

    def advance(self, request_id: int, num_tokens: int, *, prefill: bool = False) -> None:
        """Record the tokens that a dispatch chose for a running request.

        A prefill's token is not in the cache yet; each decode step writes the token before and chooses the next.
        """
        entry = self._running[request_id]
        assert num_tokens <= entry.remaining
        entry.remaining -= num_tokens
        if not prefill:
            entry.cached += num_tokens

    def remove(self, request_id: int) -> None:
        """Take out a request that ended or was cancelled, waiting or running; its slot is free at once."""
        entry = self._running.pop(request_id, None)
        if entry is not None:
            self._free.append(entry.slot)
        else:
            self._waiting = deque(item for item in self._waiting if item[0] != request_id)
        self.check()

    def check(self) -> None:
        """Assert that every slot is free or held by exactly one request."""
        held = [entry.slot for entry in self._running.values()]
        assert sorted(self._free + held) == list(range(self.slots)), (self._free, held)
