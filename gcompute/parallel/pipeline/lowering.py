"""From a schedule to what each device reads in each tick: integer tables, and a slot for every activation on its way.

What a stage receives is kept in a buffer of slots from its arrival to its last read. Which slot is decided here, as a
compiler gives registers to variables: the lifetimes are known, so a slot is given to the next arrival as soon as its
value is dead, and as many slots are enough as there are values alive at once. All devices run one program, so the
fullest stage sets the size. Virtual stage 0 reads the batch and needs none.
"""

from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from gcompute.parallel.pipeline.schedule import Kind, Schedule
from gcompute.parallel.pipeline.validate import validate

NOTHING = -1


# Tables of `lower`: Int or Bool[np.ndarray, "ticks stages"]. In a tick of a running program: the scalars of one stage.
Column = Any


class Entry(NamedTuple):
    """One kind of work, for each tick of a segment and each stage. Idle entries are zeros."""

    active: Column
    microbatch: Column
    chunk: Column
    is_first: Column  # virtual stage 0, which reads the batch
    is_last: Column  # the last virtual stage, which finds the loss
    input_slot: Column
    gradient_slot: Column


class Rows(NamedTuple):
    """The ticks of a segment; what it does not have is None. Arrivals: slots to write at a tick's end, or NOTHING."""

    forward: Entry | None
    backward: Entry | None
    weight: Entry | None
    input_arrival: Column
    gradient_arrival: Column

    @property
    def num_ticks(self) -> int:
        return next(entry.active.shape[0] for entry in self[:3] if entry is not None)


@dataclass(frozen=True, slots=True, kw_only=True)
class Program:
    """A schedule as `executor` runs it: segments of ticks with one set of kinds, and the sizes of the two buffers."""

    segments: tuple[Rows, ...]
    num_input_slots: int
    num_gradient_slots: int


class _Lifetime(NamedTuple):
    """A value that is written at the end of tick `arrival` and read for the last time in tick `last_read`."""

    stage: int
    arrival: int
    last_read: int
    value: tuple[int, int]  # (virtual stage, microbatch)


def lower(schedule: Schedule, *, forward_only: bool = False) -> Program:
    """Check a schedule and give every activation and gradient its slot; `forward_only` keeps its F entries alone.

    >>> from gcompute.parallel.pipeline.schedule import one_f_one_b
    >>> program = lower(one_f_one_b(4, 16))
    >>> [segment.num_ticks for segment in program.segments]  # F; F and B; B
    [3, 16, 3]
    >>> program.num_input_slots  # stage 1: 2 (S - 1) - 1
    5

    Raises:
      ValueError: the schedule is not valid.
    """
    validate(schedule)
    if forward_only:
        cells = [tuple(cell._replace(backward=None, weight=None) for cell in cells) for cells in schedule.ticks]
        table = [row for row in cells if any(cell.forward for cell in row)]
    else:
        table = list(schedule.ticks)
    last_virtual = schedule.num_virtual_stages - 1
    ticks: dict[tuple[Kind, int, int], int] = {}
    for tick, cells in enumerate(table):
        for stage, cell in enumerate(cells):
            for kind, work in zip(Kind, cell, strict=True):
                if work is not None:
                    ticks[kind, work.chunk * schedule.num_stages + stage, work.microbatch] = tick

    inputs, gradients = [], []
    for virtual in range(last_virtual + 1):
        stage = virtual % schedule.num_stages
        for microbatch in range(schedule.num_microbatches):
            own = [ticks[kind, virtual, microbatch] for kind in Kind if (kind, virtual, microbatch) in ticks]
            value = (virtual, microbatch)
            if virtual > 0:
                arrival = ticks[Kind.FORWARD, virtual - 1, microbatch]
                inputs.append(_Lifetime(stage, arrival, max(own), value))
            if forward_only:
                continue
            if virtual < last_virtual:
                arrival = ticks[Kind.BACKWARD, virtual + 1, microbatch]
                gradients.append(_Lifetime(stage, arrival, max(own), value))
            elif schedule.splits_backward:
                # The last virtual stage finds its gradient in B and keeps it for W: as if it had just arrived.
                arrival = ticks[Kind.BACKWARD, virtual, microbatch] - 1
                gradients.append(_Lifetime(stage, arrival, max(own), value))
    input_slots, num_inputs = _allocate(inputs)
    gradient_slots, num_gradients = _allocate(gradients)

    def entry(kind: Kind, start: int, end: int) -> Entry | None:
        shape = (end - start, schedule.num_stages)
        dtypes = [bool if name in ("active", "is_first", "is_last") else np.int32 for name in Entry._fields]
        entry = Entry._make(np.zeros(shape, dtype) for dtype in dtypes)
        for row, cells in enumerate(table[start:end]):
            for stage, cell in enumerate(cells):
                if (work := cell.of(kind)) is None:
                    continue
                virtual = work.chunk * schedule.num_stages + stage
                value = (virtual, work.microbatch)
                places = (
                    virtual == 0,
                    virtual == last_virtual,
                    input_slots.get(value, 0),
                    gradient_slots.get(value, 0),
                )
                for column, number in zip(entry, (True, *work, *places), strict=True):
                    column[row, stage] = number
        return entry if entry.active.any() else None

    def arrivals(lifetimes: list[_Lifetime], slots: dict[tuple[int, int], int]) -> np.ndarray:
        column = np.full((len(table), schedule.num_stages), NOTHING, np.int32)
        for life in lifetimes:
            column[life.arrival, life.stage] = slots[life.value]
        return column

    sent = [life for life in gradients if life.value[0] < last_virtual]
    input_arrival, gradient_arrival = arrivals(inputs, input_slots), arrivals(sent, gradient_slots)
    kinds = [tuple(kind for kind in Kind if any(cell.of(kind) for cell in cells)) for cells in table]
    starts = [tick for tick in range(len(table)) if kinds[tick] and (tick == 0 or kinds[tick] != kinds[tick - 1])]
    segments = tuple(
        Rows(
            entry(Kind.FORWARD, start, end),
            entry(Kind.BACKWARD, start, end),
            entry(Kind.WEIGHT, start, end),
            _if_any(input_arrival[start:end]),
            _if_any(gradient_arrival[start:end]),
        )
        for start, end in zip(starts, [*starts[1:], len(table)], strict=True)
    )
    return Program(segments=segments, num_input_slots=num_inputs, num_gradient_slots=num_gradients)


def _if_any(arrivals: np.ndarray) -> np.ndarray | None:
    return arrivals if (arrivals != NOTHING).any() else None


def _allocate(lifetimes: list[_Lifetime]) -> tuple[dict[tuple[int, int], int], int]:
    """A slot for each value, on each stage anew, and the number of slots of the fullest stage."""
    slots: dict[tuple[int, int], int] = {}
    busy: dict[int, list[int]] = {}  # stage -> for each slot, the last tick that reads it
    for life in sorted(lifetimes, key=lambda life: life.arrival):
        ends = busy.setdefault(life.stage, [])
        free = next((slot for slot, end in enumerate(ends) if end <= life.arrival), len(ends))
        ends[free : free + 1] = [life.last_read]
        slots[life.value] = free
    num_slots = max(map(len, busy.values()), default=0)
    assert num_slots == most_alive(lifetimes), "intervals need as many slots as overlap at once"
    return slots, num_slots


def most_alive(lifetimes: list[_Lifetime]) -> int:
    """The most values that one stage holds in one tick."""
    ticks = [(life.stage, tick) for life in lifetimes for tick in range(life.arrival + 1, life.last_read + 1)]
    return max(np.unique(np.asarray(ticks), axis=0, return_counts=True)[1]) if ticks else 0
