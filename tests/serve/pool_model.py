"""A model of the device under a scheduler: each cell of its pool holds the text that keys and values would stand for.

It does what the scheduler asks, asserts that every program would read exactly the cells of its own request's text, and
keeps its own account of who lives, who waits and how long decoding rows were made to wait.
"""

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from itertools import count, cycle

from gcompute.serve.buckets import bucket_of
from gcompute.serve.compilation import list_programs
from gcompute.serve.limits import Limits
from gcompute.serve.scheduler import Scheduler
from gcompute.serve.work import Decode, Prefill, Row, SwapIn, SwapOut, Work

# What stands in a cell: a text's beginning up to and with the token of the cell, and the program that wrote it.
Cell = tuple[tuple[int, ...], tuple[str, tuple[int, ...]]]
NUM_TOKENS = 3


class PoolModel:
    """Serves requests by a scheduler on modelled pages. `accepted`: drafts that hold, one count a decode step."""

    def __init__(self, limits: Limits, accepted: Sequence[int] = (0,)):
        self.limits = limits
        self.scheduler = Scheduler(limits)
        self.texts: dict[int, list[int]] = {}
        self.ends_at: dict[int, int] = {}
        self.prompts: dict[int, int] = {}
        self.alive: set[int] = set()
        self.seen: Counter[str] = Counter()
        self._ids = count()
        self._accepted: Iterator[int] = cycle(accepted)
        self._cells: dict[tuple[int, int], Cell] = {}
        self._saved: dict[int, list[Cell | None]] = {}
        self._admitted: set[int] = set()
        self._came_in: set[int] = set()
        self._reading: int | None = None
        self._delay = 0
        self._programs = {(program.kind, program.sizes) for program in list_programs(limits)}

    # From outside ----------------------------------------------------------------------------------------------------

    def arrive(
        self, prompt: Sequence[int], max_tokens: int, *, ends_after: int | None = None, reuse: bool = True
    ) -> int:
        """A request; it ends by itself after `ends_after` tokens, which the scheduler does not know."""
        request_id = next(self._ids)
        self.scheduler.add(request_id, prompt=prompt, max_tokens=max_tokens, reuse=reuse)
        self.texts[request_id], self.prompts[request_id] = list(prompt), len(prompt)
        self.ends_at[request_id] = len(prompt) + min(max_tokens, ends_after or max_tokens)
        self.alive.add(request_id)
        return request_id

    def end(self, request_id: int) -> None:
        self.scheduler.remove(request_id)
        self.alive.remove(request_id)
        self._saved.pop(request_id, None)

    def lose_contents(self) -> None:
        """A failure that takes the device's state with it."""
        for request_id in [*self.scheduler.running, *self.scheduler.saved]:
            self.end(request_id)
        self.scheduler.forget_contents()
        self._cells.clear()

    def work(self, *, fails: bool = False) -> Work | None:
        """Do what comes next; None when nobody is alive."""
        running = set(self.scheduler.running)
        waiting = self.alive - running
        decoding = self.decoding
        work = self.scheduler.next_work()
        self.check()
        if work is None:
            assert not self.alive, "somebody is alive and nothing is done"
            return None
        self.seen[type(work).__name__] += 1
        if self._reading not in self.scheduler.running:
            self._reading = None
        self._check_order(work, waiting)
        # Who gave way waits for its place, not for what is read.
        self._check_delay(work, len(decoding & self.scheduler.running.keys()))
        self._check_worth(work, running - set(self.scheduler.running))
        if fails:
            self._fail(work)
        else:
            self._run(work)
        self.check()
        return work

    def finish(self) -> list[Work]:
        """All work until nobody is alive."""
        done = []
        while (work := self.work()) is not None:
            done.append(work)
            assert len(done) < 20_000, "work goes on and nobody ends"
        self.check_all_free()
        return done

    def check(self) -> None:
        self.scheduler.check()
        for blocks in self.scheduler.blocks:
            assert blocks.num_free + blocks.num_cached + blocks.num_used == blocks.num_pages
        assert self.scheduler.num_free_slots + len(self.scheduler.running) == self.limits.slots
        assert len(self.scheduler.running) + self.scheduler.num_waiting == len(self.alive)
        assert set(self.scheduler.running) <= self.alive
        for request_id, seq in self.scheduler.running.items():
            assert seq.tokens == self.texts[request_id]

    def check_all_free(self) -> None:
        assert not self._saved
        assert self.scheduler.num_free_slots == self.limits.slots
        for blocks in self.scheduler.blocks:
            assert (blocks.num_used, blocks.num_free + blocks.num_cached) == (0, blocks.num_pages)
        self.seen["recomputed"] += self.scheduler.num_preemptions - self.seen["SwapOut"]
        self.seen["hits"] += self.scheduler.num_hit_tokens

    @property
    def decoding(self) -> set[int]:
        """Those that run and whose text is read."""
        return self.scheduler.running.keys() - {self._reading}

    # What the scheduler promises of an order -------------------------------------------------------------------------

    def _check_order(self, work: Work, waiting: set[int]) -> None:
        """Who comes first is served first, and who gave way comes back before anyone who came later."""
        if not (isinstance(work, SwapIn) or (isinstance(work, Prefill) and work.first)):
            return
        assert work.request_id in waiting
        if self.limits.shares == 1:
            assert work.request_id == min(waiting)
        elif work.request_id not in self._admitted:
            assert work.request_id == min(waiting - self._admitted)
        self._admitted.add(work.request_id)

    def _check_delay(self, work: Work, num_decoding: int) -> None:
        """Between two decode dispatches no more is read than the budget leaves, or one chunk."""
        if isinstance(work, Decode):
            self._delay = 0
        elif isinstance(work, Prefill) and num_decoding:
            self._delay += work.num_tokens
            assert self._delay <= max(self.limits.chunk, self.limits.token_budget - num_decoding)

    def _check_worth(self, work: Work, turned_out: set[int]) -> None:
        """Nobody gives way between coming in, at one go, and the next step."""
        assert not turned_out & self._came_in
        if isinstance(work, Decode):
            self._came_in.clear()
        elif isinstance(work, SwapIn) or (isinstance(work, Prefill) and work.first and work.last):
            self._came_in.add(work.request_id)

    # Programs --------------------------------------------------------------------------------------------------------

    def _run(self, work: Work) -> None:
        match work:
            case Prefill():
                self._prefill(work)
            case Decode():
                self._decode(work)
            case SwapOut():
                assert ("swap_out", (work.bucket,)) in self._programs
                self._saved[work.request_id] = [self._cells.get(cell) for cell in self._cells_of(work)]
            case SwapIn():
                assert ("swap_in", (work.bucket,)) in self._programs
                self._check_place(work.request_id, work.slot, work.pages)
                saved = self._saved.pop(work.request_id)
                contents = zip(self._cells_of(work), saved, strict=False)
                self._cells |= {cell: content for cell, content in contents if content is not None}

    def _fail(self, work: Work) -> None:
        """The program did nothing: whoever it was for ends."""
        rows = [row.request_id for row in work.rows if row] if isinstance(work, Decode) else [work.request_id]
        for request_id in rows:
            self.end(request_id)

    def _prefill(self, work: Prefill) -> None:
        limits, text = self.limits, self.texts[work.request_id]
        program = ("prefill", (work.chunk, work.bucket))
        assert program in self._programs
        assert 0 < work.num_tokens <= work.chunk
        assert work.last == (work.start + work.num_tokens == len(text))
        self._check_place(work.request_id, work.slot, work.pages)
        if limits.deterministic:
            assert work.start % limits.chunk == 0
            assert work.chunk == limits.chunk
            assert work.last or work.num_tokens == limits.chunk
        self._check_text(work.request_id, work.pages[: work.bucket // limits.page], work.start)
        for index in range(work.start, work.start + work.num_tokens):
            assert index < work.bucket
            self._write(work.request_id, work.pages, index, program)
        self._reading = None if work.last else work.request_id
        if work.last:
            text.append(self._next_token(text))
        self.scheduler.record_prefill(work, text[-1] if work.last else None)
        if work.last and len(text) >= self.ends_at[work.request_id]:
            self.end(work.request_id)

    def _decode(self, work: Decode) -> None:
        limits = self.limits
        program = ("speculate" if work.speculate else "decode", (len(work.rows), work.bucket))
        assert program in self._programs
        assert 1 <= work.num_steps <= limits.decode_steps
        assert work.until_free == (self.scheduler.num_waiting > 0)
        rows = [row for row in work.rows if row is not None]
        assert rows
        assert len({row.slot for row in rows}) == len(rows)
        per_share = len(work.rows) // limits.shares
        for at, row in enumerate(work.rows):
            if row is not None:
                assert self.scheduler.running[row.request_id].share == at // per_share
                self._check_place(row.request_id, row.slot, row.pages)
        if limits.deterministic:
            assert len(work.rows) == limits.slots
            buckets = {bucket_of(len(self.texts[row.request_id]), limits.buckets) for row in rows}
            assert buckets == {work.bucket}
        else:
            assert {row.request_id for row in rows} == self.decoding
        chosen: dict[int, list[int]] = {row.request_id: [] for row in rows}
        going = list(rows)
        for _ in range(work.num_steps):
            going = [row for row in going if self._step(row, program, chosen[row.request_id])]
            if not going or (work.until_free and len(going) < len(rows)):
                break
        for request_id, tokens in chosen.items():
            assert tokens, "a row that decodes gets a token from each dispatch"
            self.scheduler.record_decode(request_id, tokens)
            if len(self.texts[request_id]) >= self.ends_at[request_id]:
                self.end(request_id)

    def _step(self, row: Row, program: tuple[str, tuple[int, ...]], chosen: list[int]) -> bool:
        """One step of a row, and whether it goes on; one that speculates rests where drafts would leave the bucket."""
        text, (kind, (_, bucket)) = self.texts[row.request_id], program
        drafts = self.limits.drafts if kind == "speculate" else 0
        cached = len(text) - 1
        if cached + 1 + drafts > bucket:
            assert drafts
            assert chosen
            return True
        pages = row.pages[: bucket // self.limits.page]
        self._check_text(row.request_id, pages, cached)
        for index in range(cached, cached + 1 + drafts):
            self._write(row.request_id, pages, index, ("rejected", ()))
        for _ in range(min(1 + next(self._accepted) % (1 + drafts), self.ends_at[row.request_id] - len(text))):
            self._write(row.request_id, pages, len(text) - 1, program)
            text.append(self._next_token(text))
            chosen.append(text[-1])
        return len(text) < self.ends_at[row.request_id]

    # Cells -----------------------------------------------------------------------------------------------------------

    def _cells_of(self, work: SwapOut | SwapIn) -> Iterator[tuple[int, int]]:
        pages = work.pages[: work.bucket // self.limits.page]
        return ((page, offset) for page in pages for offset in range(self.limits.page))

    def _check_place(self, request_id: int, slot: int, pages: Sequence[int]) -> None:
        """Slot and pages are the request's own and of one share; none is the page that padding is written to."""
        seq, limits = self.scheduler.running[request_id], self.limits
        assert (seq.slot, tuple(seq.pages)) == (slot, tuple(pages))
        assert slot // (limits.slots // limits.shares) == seq.share
        per_share = limits.num_pages // limits.shares
        first = seq.share * (per_share + 1)
        assert all(first < page <= first + per_share for page in pages)

    def _check_text(self, request_id: int, pages: Sequence[int], num: int) -> None:
        """The first `num` cells hold the request's own text and, in deterministic mode, as it would be alone."""
        text = self.texts[request_id]
        for index in range(num):
            beginning, program = self._cells[pages[index // self.limits.page], index % self.limits.page]
            assert beginning == tuple(text[: index + 1])
            if self.limits.deterministic:
                assert program == self._alone(request_id, index)

    def _alone(self, request_id: int, index: int) -> tuple[str, tuple[int, ...]]:
        limits = self.limits
        if index < self.prompts[request_id]:
            start = index // limits.chunk * limits.chunk
            return ("prefill", (limits.chunk, limits.prefill_bucket(start, limits.chunk)))
        return ("decode", (limits.slots, bucket_of(index + 1, limits.buckets)))

    def _write(self, request_id: int, pages: Sequence[int], index: int, program: tuple[str, tuple[int, ...]]) -> None:
        page = pages[index // self.limits.page]
        holders = self.scheduler.blocks[self.scheduler.running[request_id].share].held
        assert holders[page] == 1, "a page that two hold is written to"
        self._cells[page, index % self.limits.page] = (tuple(self.texts[request_id][: index + 1]), program)

    @staticmethod
    def _next_token(text: Sequence[int]) -> int:
        """A function of the text, so that equal prompts go on alike and find each other's pages."""
        return (sum(text) + len(text)) % NUM_TOKENS


def until(model: PoolModel, wanted: Callable[[Work], bool]) -> Work:
    """Work on until a piece of work is such."""
    while (work := model.work()) is not None:
        if wanted(work):
            return work
    raise AssertionError("no such work came")
