"""What the scheduler asks the engine to do next, and the requests that it is about. No arrays here."""

from dataclasses import dataclass, field

from gcompute.serve.blocks import Digest


@dataclass(slots=True, kw_only=True)
class Sequence:
    """A request as the scheduler knows it, from its arrival to its end.

    tokens: the prompt and what was chosen. cached: how many of them have keys and values in `pages`. share: the part
    of the pool, and of a mesh, that it lives in. saved: its keys and values wait on the host. num_published: of its
    pages, how many can be found. entered: it was admitted before. single: one token a dispatch, for the host has a say
    in each.
    """

    request_id: int
    tokens: list[int]
    num_prompt: int
    max_tokens: int
    reuse: bool = True
    cached: int = 0
    pages: list[int] = field(default_factory=list)
    digests: list[Digest] = field(default_factory=list)
    slot: int | None = None
    share: int = 0
    saved: bool = False
    num_published: int = 0
    entered: bool = False
    single: bool = False

    @property
    def num_output(self) -> int:
        return len(self.tokens) - self.num_prompt

    @property
    def remaining(self) -> int:
        return self.max_tokens - self.num_output

    @property
    def decodes(self) -> bool:
        """Whether all its tokens but the one chosen last are cached, and one was chosen."""
        return self.num_output > 0 and self.cached == len(self.tokens) - 1


@dataclass(frozen=True, slots=True, kw_only=True)
class Prefill:
    """Read `num_tokens` tokens from `start` on, padded to `chunk`, attending to the first `bucket` cells of `pages`.

    first: the slot must be told of its request before. last: choose the next token.
    """

    request_id: int
    slot: int
    pages: tuple[int, ...]
    start: int
    num_tokens: int
    chunk: int
    bucket: int
    first: bool
    last: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """One request's part of a decode dispatch."""

    request_id: int
    slot: int
    pages: tuple[int, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Decode:
    """Take up to `num_steps` steps for all `rows`, None being padding, attending to `bucket` cells of each.

    until_free: stop early when a request ends, because another waits for its slot. speculate: with drafts.
    """

    rows: tuple[Row | None, ...]
    bucket: int
    speculate: bool
    num_steps: int
    until_free: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class SwapOut:
    """Keep a preempted request's keys and values on the host. To be done at once: its pages have been given away."""

    request_id: int
    pages: tuple[int, ...]
    bucket: int


@dataclass(frozen=True, slots=True, kw_only=True)
class SwapIn:
    """Put them back into new pages, and tell the slot of its request, which goes on where it was."""

    request_id: int
    slot: int
    pages: tuple[int, ...]
    bucket: int


Work = Prefill | Decode | SwapOut | SwapIn
