"""What the scheduler may use, and the sizes of programs that follow from it. No arrays here."""

from dataclasses import dataclass

from gcompute.serve.buckets import batch_buckets, bucket_of, make_buckets


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """What the scheduler may use.

    page: tokens a page. num_pages: of the whole pool, beside one a share that is nobody's. shares: equal
    parts of slots and pages that cannot lend to each other. chunk: most prompt tokens a dispatch. token_budget: most
    tokens of decoding rows and prompts between two decode dispatches, though always one chunk. drafts: tokens that
    speculation writes beyond the one it must. draft_batch: most rows that do. swap: preemption keeps keys and values on
    the host.
    """

    slots: int
    max_queue: int
    max_context: int
    decode_steps: int
    page: int
    num_pages: int
    chunk: int
    token_budget: int
    shares: int = 1
    drafts: int = 0
    draft_batch: int = 0
    prefix_cache: bool = True
    swap: bool = False
    deterministic: bool = False

    def __post_init__(self) -> None:
        assert self.chunk % self.page == 0
        assert self.chunk <= self.buckets[-1]
        assert self.slots % self.shares == 0
        assert self.num_pages % self.shares == 0
        assert self.num_pages // self.shares >= self.pages_a_row, "a request of the largest size must fit alone"
        assert self.swap or not self.deterministic
        assert not (self.deterministic and self.drafts)

    @property
    def buckets(self) -> tuple[int, ...]:
        """Cells that a program attends to; a draft is written after the last token."""
        return make_buckets(self.max_context + self.drafts, self.page)

    @property
    def pages_a_row(self) -> int:
        return self.buckets[-1] // self.page

    @property
    def garbage_pages(self) -> tuple[int, ...]:
        """The first page of each share: it stands in tables for pages that a row lacks."""
        return tuple(share * (self.num_pages // self.shares + 1) for share in range(self.shares))

    @property
    def chunks(self) -> tuple[int, ...]:
        """Prompt tokens that a prefill takes; in deterministic mode always the same."""
        if self.deterministic:
            return (self.chunk,)
        return make_buckets(self.chunk, self.page)

    def prefill_bucket(self, start: int, chunk: int) -> int:
        """Cells that a chunk attends to: its own if it is the first, else by every other bucket, from the last down."""
        if start == 0:
            return bucket_of(chunk, self.buckets)
        return bucket_of(min(start + chunk, self.buckets[-1]), self.buckets[::-2][::-1])

    @property
    def batches(self) -> tuple[int, ...]:
        """Rows of a decode program."""
        per_share = self.slots // self.shares
        sizes = (per_share,) if self.deterministic else batch_buckets(per_share)
        return tuple(size * self.shares for size in sizes)

    @property
    def draft_batches(self) -> tuple[int, ...]:
        """Batches that speculate: beyond some size, judging drafts costs more than they save."""
        return tuple(size for size in self.batches if self.drafts and size <= bucket_of(self.draft_batch, self.batches))
