"""What an engine is doing: its status and its counts."""

from dataclasses import dataclass
from enum import StrEnum


class Status(StrEnum):
    """LOADING: programs are being compiled. DRAINING: accepted requests finish, and no more are taken."""

    LOADING = "loading"
    READY = "ready"
    DRAINING = "draining"
    CLOSED = "closed"
    FAILED = "failed"


@dataclass(frozen=True, slots=True, kw_only=True)
class SlotStats:
    """One running request. phase: "prefill" or "decode". num_cached: its tokens whose keys and values are kept."""

    slot: int
    request_id: int
    phase: str
    num_prompt: int
    num_cached: int
    num_output: int
    max_tokens: int


@dataclass(frozen=True, slots=True, kw_only=True)
class LastDecode:
    """The last decode dispatch: its requests, the mean of their cells, seconds a step and tokens a second, as measured.

    A step that speculates gives a request several tokens.
    """

    rows: int = 0
    cells: int = 0
    step_s: float = 0.0
    tokens_per_s: float = 0.0
    speculated: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineStats:
    """What the engine is doing, and what it has done since it was made. Cells count tokens' keys and values.

    num_late_compilations: those on the engine's thread after it was ready, which should be none.
    num_pages: of `page_tokens` tokens each; free + cached + used = num_pages, where cached ones hold what no running
    request needs and a later one may find. num_prompt_tokens counts whole prompts, num_hit_tokens those of them that
    were found in cached pages. num_drafted, num_accepted: tokens guessed, and guessed right.
    decode_batch, decode_cells: requests of the last decode dispatch, and the cells that each attended to on average;
    last_decode_step_s: its seconds over its steps; decode_tokens_per_s: the tokens that it made a second;
    decode_speculated: whether its steps judged guesses.
    """

    status: Status
    slots: int
    num_running: int
    num_waiting: int
    num_cells: int
    num_cells_used: int
    num_programs: int
    num_late_compilations: int
    num_dispatches: int
    num_decode_steps: int
    num_prompt_tokens: int
    num_output_tokens: int
    page_tokens: int = 0
    num_pages: int = 0
    num_pages_free: int = 0
    num_pages_cached: int = 0
    num_pages_used: int = 0
    num_hit_tokens: int = 0
    num_preemptions: int = 0
    num_drafted: int = 0
    num_accepted: int = 0
    running: tuple[SlotStats, ...] = ()
    decode_batch: int = 0
    decode_cells: int = 0
    last_decode_step_s: float = 0.0
    decode_tokens_per_s: float = 0.0
    decode_speculated: bool = False
