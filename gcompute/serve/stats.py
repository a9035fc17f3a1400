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
class EngineStats:
    """What the engine is doing, and what it has done since it was made. Cells count tokens' keys and values.

    num_late_compilations: those on the engine's thread after it was ready, which should be none.
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
