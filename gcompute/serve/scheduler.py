"""Continuous batching over slots and pages: who enters, whose prompt is read, who decodes, who must give way.

    waiting -> reading, a chunk a dispatch -> decoding with all others -> ended
       ^------------- preempted: pages ran out --------------|

Between two decode dispatches at most a budget of prompt tokens is read, so that a long prompt delays nobody for long.
When pages run out the request that came last gives way, and is the next to come back: its tokens are read again, or its
keys and values are kept on the host. No arrays here.

Deterministic: what programs a request meets depends on it alone. Every chunk is whole and begins at a multiple of the
chunk, only such chunks are found by their prefix, a decode dispatch has all rows and those of one bucket alone, and
preemption keeps keys and values.

Source: Kwon et al. 2023 (PagedAttention), section 4.5; Agrawal et al. 2023 (Sarathi: chunked prefills).
"""

from collections import deque
from collections.abc import Mapping, Sequence
from types import MappingProxyType

from gcompute.serve.blocks import BlockManager, digests
from gcompute.serve.buckets import bucket_of
from gcompute.serve.limits import Limits
from gcompute.serve.request import QueueFull
from gcompute.serve.work import Decode, Prefill, Row, SwapIn, SwapOut, Work
from gcompute.serve.work import Sequence as Seq


class Scheduler:
    """Ids are given by the caller, in order of arrival, which is also the order of service."""

    def __init__(self, limits: Limits):
        self.limits = limits
        per_share = limits.num_pages // limits.shares
        self.blocks = tuple(BlockManager(per_share, first=page + 1) for page in limits.garbage_pages)
        slots_a_share = limits.slots // limits.shares
        self._free = [
            list(reversed(range(share * slots_a_share, (share + 1) * slots_a_share))) for share in range(limits.shares)
        ]
        self._waiting: deque[Seq] = deque()
        self._running: dict[int, Seq] = {}
        self._reading: Seq | None = None
        # Prompt tokens read since the last decode dispatch.
        self._read = 0
        # In deterministic mode, the order in which buckets had their turn.
        self._turn = 0
        self.num_preemptions = 0
        self.num_hit_tokens = 0

    # What is known ---------------------------------------------------------------------------------------------------

    @property
    def num_waiting(self) -> int:
        return len(self._waiting)

    @property
    def running(self) -> Mapping[int, Seq]:
        """Requests that hold a slot, by id."""
        return MappingProxyType(self._running)

    @property
    def saved(self) -> list[int]:
        """Ids of waiting requests whose keys and values are kept on the host."""
        return [seq.request_id for seq in self._waiting if seq.saved]

    @property
    def num_free_slots(self) -> int:
        return sum(map(len, self._free))

    # Coming and going ------------------------------------------------------------------------------------------------

    def check_room(self, num_requests: int) -> None:
        """Raise QueueFull unless so many more may enter; one that can have a slot at once does not count as waiting."""
        if len(self._waiting) + num_requests > self.limits.max_queue + self.num_free_slots:
            raise QueueFull(
                f"{len(self._waiting)} requests are waiting, and at most {self.limits.max_queue} may. Try again later."
            )

    def add(
        self, request_id: int, *, prompt: Sequence[int], max_tokens: int, reuse: bool = True, single: bool = False
    ) -> None:
        """Put a request at the end of the queue; without `reuse` its whole prompt is read.

        single: dispatches that it is in take one step.

        Raises:
          QueueFull: no room.
        """
        self.check_room(1)
        assert prompt
        assert max_tokens >= 1
        assert len(prompt) + max_tokens <= self.limits.max_context
        self._waiting.append(
            Seq(
                request_id=request_id,
                tokens=list(prompt),
                num_prompt=len(prompt),
                max_tokens=max_tokens,
                reuse=reuse and self.limits.prefix_cache,
                single=single,
            )
        )

    def remove(self, request_id: int) -> None:
        """Take out a request that ended or was cancelled; its slot and pages are free at once."""
        if request_id in self._running:
            self._leave(self._running[request_id])
        else:
            self._waiting = deque(seq for seq in self._waiting if seq.request_id != request_id)

    def check(self) -> None:
        """Assert that every slot and page is free or held by who says so."""
        for blocks in self.blocks:
            blocks.check()
        held = [seq.slot for seq in self._running.values() if seq.slot is not None]
        assert sorted([*(slot for free in self._free for slot in free), *held]) == list(range(self.limits.slots))
        assert all(not seq.pages and seq.slot is None for seq in self._waiting)
        for share, blocks in enumerate(self.blocks):
            mine = [seq for seq in self._running.values() if seq.share == share]
            assert {page for seq in mine for page in seq.pages} == set(blocks.held)
            assert sum(len(seq.pages) for seq in mine) == sum(blocks.held.values())
        for seq in self._running.values():
            assert len(seq.pages) * self.limits.page >= seq.cached
            assert len(set(seq.pages)) == len(seq.pages)
            assert seq is self._reading or seq.decodes, seq

    # What to do next -------------------------------------------------------------------------------------------------

    def next_work(self) -> Work | None:
        """What to dispatch now; None when there is nothing to do. What it is about is changed by it already."""
        decoding = [seq for seq in self._running.values() if seq is not self._reading]
        room = self.limits.token_budget - len(decoding) - self._read
        if not decoding or self._read == 0 or self._next_read() <= room:
            work = self._read_on(decoding)
            return work if work is not None else self._decode(decoding, few=False)
        # More could be read at once: let it wait for one step alone.
        pending = self._reading is not None or (bool(self._waiting) and self.num_free_slots > 0)
        work = self._decode(decoding, few=pending)
        # Where all that decoded gave way to what is read in another share, nothing else would wake that.
        return work if work is not None else self._read_on([])

    def record_prefill(self, work: Prefill, token: int | None) -> None:
        """Note that a chunk was read, and what was chosen after the last."""
        seq = self._running[work.request_id]
        seq.cached += work.num_tokens
        self._publish(seq)
        if work.last:
            assert token is not None
            seq.tokens.append(token)
            self._reading = None

    def record_decode(self, request_id: int, tokens: Sequence[int]) -> None:
        """Note what a decode dispatch chose: each step writes the token before and chooses the next."""
        seq = self._running[request_id]
        assert len(tokens) <= seq.remaining
        seq.tokens.extend(tokens)
        seq.cached += len(tokens)
        assert seq.cached <= len(seq.pages) * self.limits.page
        self._publish(seq)

    def forget_contents(self) -> None:
        """The pool lost what it held: nothing may be found in it. No request may be running."""
        assert not self._running
        for blocks in self.blocks:
            blocks.clear()

    # Reading ---------------------------------------------------------------------------------------------------------

    def _next_read(self) -> int:
        seq = self._reading or (self._waiting[0] if self._waiting else None)
        return 0 if seq is None else min(self.limits.chunk, len(seq.tokens) - seq.cached)

    def _read_on(self, decoding: list[Seq]) -> Work | None:
        """The next chunk of the prompt that is being read, or of the head of the queue if it can enter."""
        seq, first = self._reading, False
        if seq is None:
            seq, first = self._admit(decoding), True
            if seq is None:
                return None
            if seq.saved:
                seq.saved = False
                bucket = bucket_of(seq.cached, self.limits.buckets)
                assert seq.slot is not None
                return SwapIn(request_id=seq.request_id, slot=seq.slot, pages=tuple(seq.pages), bucket=bucket)
            self._reading = seq
        left = len(seq.tokens) - seq.cached
        num_tokens = min(left, self.limits.chunk)
        chunk = bucket_of(num_tokens, self.limits.chunks)
        self._read += num_tokens
        assert seq.slot is not None
        return Prefill(
            request_id=seq.request_id,
            slot=seq.slot,
            pages=tuple(seq.pages),
            start=seq.cached,
            num_tokens=num_tokens,
            chunk=chunk,
            bucket=self.limits.prefill_bucket(seq.cached, chunk),
            first=first,
            last=num_tokens == left,
        )

    def _admit(self, decoding: list[Seq]) -> Seq | None:
        """Give the head of the queue a slot and the pages of its tokens, if both are to be had."""
        if not self._waiting:
            return None
        seq = self._waiting[0]
        options = [share for share, free in enumerate(self._free) if free]
        found = {share: self._find(seq, share) for share in options}
        # The most of its prefix, then the most room.
        options.sort(key=lambda share: (-len(found[share]), -self.blocks[share].num_available))
        for share in options:
            blocks, hits = self.blocks[share], found[share]
            need = self._pages_to_enter(seq) - len(hits)
            room = blocks.num_available - blocks.num_idle(hits)
            # Those that decode keep what their next dispatch needs: they would turn it out again at once.
            if need + self._lacks([one for one in decoding if one.share == share]) > room:
                continue
            self._waiting.popleft()
            blocks.take(hits)
            seq.share, seq.slot = share, self._free[share].pop()
            seq.pages, seq.num_published = hits + blocks.allocate(need), len(hits)
            if not seq.saved:
                seq.cached = len(hits) * self.limits.page
                # One that was preempted finds its own pages again.
                self.num_hit_tokens += 0 if seq.entered else seq.cached
            seq.entered = True
            self._running[seq.request_id] = seq
            return seq
        return None

    def _pages_to_enter(self, seq: Seq) -> int:
        """Pages for all its tokens and its first step: with fewer it would give way before it had taken one."""
        read, steps = (seq.cached, 1) if seq.saved else (len(seq.tokens), min(1, seq.remaining - 1))
        cells = read + steps * (1 + self.limits.drafts)
        return -(-min(cells, self.limits.buckets[-1]) // self.limits.page)

    def _find(self, seq: Seq, share: int) -> list[int]:
        """Pages that hold the beginning of its tokens; the last token is always read, for what comes after it."""
        if seq.saved or not seq.reuse:
            return []
        seq.digests = digests(seq.tokens, self.limits.page, seq.digests)
        hits = self.blocks[share].find(seq.digests[: (len(seq.tokens) - 1) // self.limits.page])
        if self.limits.deterministic:
            a_chunk = self.limits.chunk // self.limits.page
            return hits[: len(hits) // a_chunk * a_chunk]
        return hits

    def _publish(self, seq: Seq) -> None:
        """Let the pages that are whole be found."""
        if not self.limits.prefix_cache:
            return
        cells, step = seq.cached, self.limits.page
        if self.limits.deterministic:
            # What whole chunks of a prompt wrote: a decode step's rounding differs.
            cells, step = min(seq.cached, seq.num_prompt), self.limits.chunk
        whole = cells // step * step // self.limits.page
        if whole <= seq.num_published:
            return
        seq.digests = digests(seq.tokens[: whole * self.limits.page], self.limits.page, seq.digests)
        for index in range(seq.num_published, whole):
            self.blocks[seq.share].publish(seq.pages[index], seq.digests[index])
        seq.num_published = whole

    # Decoding --------------------------------------------------------------------------------------------------------

    def _decode(self, decoding: list[Seq], *, few: bool) -> Work | None:
        """A dispatch for all that decode, once they have the pages for it; or keeping what one has that gives way."""
        while decoding:
            rows = self._rows_of_one_turn(decoding) if self.limits.deterministic else decoding
            longest = max(seq.cached for seq in rows)
            bucket = bucket_of(longest + 1 + self.limits.drafts, self.limits.buckets)
            # Steps stay within the bucket; a row that speculates rests before it would leave it.
            room = bucket - longest
            one = few or any(seq.single for seq in rows)
            num_steps = 1 if one else min(self.limits.decode_steps, max(seq.remaining for seq in rows), room)
            if self._lacking(rows, num_steps) is not None:
                num_steps = 1
            share = self._lacking(rows, num_steps)
            if share is not None:
                victim, work = self._preempt(share)
                if work is not None:
                    return work
                decoding = [seq for seq in decoding if seq is not victim]
                continue
            for seq in rows:
                more = self._pages_for(seq, num_steps) - len(seq.pages)
                seq.pages += self.blocks[seq.share].allocate(max(0, more))
            self._read = 0
            self._turn += 1
            arranged = self._arrange(rows)
            return Decode(
                rows=arranged,
                bucket=bucket,
                speculate=len(arranged) in self.limits.draft_batches,
                num_steps=num_steps,
                until_free=bool(self._waiting),
            )
        return None

    def _rows_of_one_turn(self, decoding: list[Seq]) -> list[Seq]:
        """Requests whose next step needs one same bucket; the buckets take turns."""
        by_bucket: dict[int, list[Seq]] = {}
        for seq in decoding:
            by_bucket.setdefault(bucket_of(seq.cached + 1, self.limits.buckets), []).append(seq)
        return by_bucket[sorted(by_bucket)[self._turn % len(by_bucket)]]

    def _pages_for(self, seq: Seq, num_steps: int) -> int:
        """Pages that a request must hold to take so many steps."""
        per_step = 1 + self.limits.drafts
        cells = seq.cached + min(num_steps * per_step, seq.remaining + self.limits.drafts)
        return -(-min(cells, self.limits.buckets[-1]) // self.limits.page)

    def _lacking(self, rows: list[Seq], num_steps: int) -> int | None:
        """A share without the pages for so many steps of its rows."""
        for share, blocks in enumerate(self.blocks):
            if self._lacks([seq for seq in rows if seq.share == share], num_steps) > blocks.num_available:
                return share
        return None

    def _lacks(self, rows: list[Seq], num_steps: int | None = None) -> int:
        """Pages that rows must still be given for so many steps, or for the most of a dispatch."""
        steps = num_steps or self.limits.decode_steps
        return sum(max(0, self._pages_for(seq, steps) - len(seq.pages)) for seq in rows)

    def _preempt(self, share: int) -> tuple[Seq, SwapOut | None]:
        """Turn out the request of a share that came last; it is the next to come back."""
        seq = max((seq for seq in self._running.values() if seq.share == share), key=lambda seq: seq.request_id)
        self.num_preemptions += 1
        pages = tuple(seq.pages)
        # What a prompt wrote is written again by the same programs; what steps wrote would not be.
        seq.saved = self.limits.swap and seq.decodes
        self._leave(seq)
        self._waiting.appendleft(seq)
        if not seq.saved:
            seq.cached = 0
            return seq, None
        bucket = bucket_of(seq.cached, self.limits.buckets)
        return seq, SwapOut(request_id=seq.request_id, pages=pages, bucket=bucket)

    def _leave(self, seq: Seq) -> None:
        assert seq.slot is not None
        del self._running[seq.request_id]
        self.blocks[seq.share].release(seq.pages)
        self._free[seq.share].append(seq.slot)
        seq.pages, seq.slot, seq.num_published = [], None, 0
        if self._reading is seq:
            self._reading = None

    def _arrange(self, rows: list[Seq]) -> tuple[Row | None, ...]:
        """Rows of the smallest batch that holds them, each share's together, padded with None."""
        shares = [[seq for seq in rows if seq.share == share] for share in range(self.limits.shares)]
        batch = bucket_of(self.limits.shares * max(map(len, shares)), self.limits.batches)
        arranged: list[Row | None] = []
        for mine in shares:
            padding = batch // self.limits.shares - len(mine)
            for seq in mine:
                assert seq.slot is not None
                arranged.append(Row(request_id=seq.request_id, slot=seq.slot, pages=tuple(seq.pages)))
            arranged += [None] * padding
        return tuple(arranged)
