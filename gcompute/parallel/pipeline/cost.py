"""What a schedule costs: time, bubble and activations, from the table alone.

Two clocks. In *lockstep* every stage waits for the end of the tick, and a tick lasts as long as the kinds of work that
any stage does in it: this is what an SPMD program does, and what `executor` runs. In the *asynchronous* view each stage
does its own entries in order as soon as what they need is there: the clock of the papers, whose stages are processes.
"""

from collections import Counter
from dataclasses import dataclass
from typing import NamedTuple

from gcompute.parallel.pipeline.schedule import Kind, Schedule, Work
from gcompute.parallel.pipeline.validate import validate


@dataclass(frozen=True, slots=True, kw_only=True)
class Durations:
    """How long the work of one chunk takes, in any unit; `backward` is B in schedules without W."""

    forward: float = 1.0
    backward: float = 2.0
    backward_input: float = 1.0
    backward_weight: float = 1.0

    def of(self, kind: Kind, *, split: bool) -> float:
        if kind is Kind.FORWARD:
            return self.forward
        if kind is Kind.WEIGHT:
            return self.backward_weight
        return self.backward_input if split else self.backward


# The executor keeps only a chunk's input: B computes its forward again, W that and the gradients between its layers.
RECOMPUTING = Durations(forward=1.0, backward=3.0, backward_input=2.0, backward_weight=3.0)


class Bar(NamedTuple):
    """One piece of work on a clock."""

    stage: int
    kind: Kind
    work: Work
    start: float
    end: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Timeline:
    """All work of a schedule on a clock, in the order of the table."""

    num_stages: int
    bars: tuple[Bar, ...]

    @property
    def total_time(self) -> float:
        return max(bar.end for bar in self.bars)

    @property
    def bubble_fraction(self) -> float:
        """The idle share of all stages' time."""
        return 1 - sum(bar.end - bar.start for bar in self.bars) / (self.num_stages * self.total_time)


def lockstep_timeline(schedule: Schedule, durations: Durations = Durations()) -> Timeline:
    """The clock of one SPMD program: a tick runs its F, then its B, then its W slots.

    >>> from gcompute.parallel.pipeline.schedule import one_f_one_b
    >>> lockstep_timeline(one_f_one_b(4, 8)).total_time  # (M + S - 1) (F + B)
    33.0
    """
    bars, now = [], 0.0
    for tick, cells in enumerate(schedule.ticks):
        for kind in schedule.kinds(tick):
            end = now + durations.of(kind, split=schedule.splits_backward)
            bars += [Bar(stage, kind, work, now, end) for stage, cell in enumerate(cells) if (work := cell.of(kind))]
            now = end
    return Timeline(num_stages=schedule.num_stages, bars=tuple(bars))


def asynchronous_timeline(schedule: Schedule, durations: Durations = Durations()) -> Timeline:
    """The clock of stages that run freely, each in its own order, with transfers that take no time."""
    validate(schedule)
    size, last = schedule.num_stages, schedule.num_virtual_stages - 1
    free = [0.0] * size
    done: dict[tuple[Kind, int, int], float] = {}
    bars = []
    # In a valid table what a piece of work needs stands before it, so one pass knows every end that it asks for.
    for cells in schedule.ticks:
        for kind in Kind:
            for stage, cell in enumerate(cells):
                if (work := cell.of(kind)) is None:
                    continue
                virtual = work.chunk * size + stage
                ready = free[stage]
                if kind is Kind.FORWARD and virtual > 0:
                    ready = max(ready, done[kind, virtual - 1, work.microbatch])
                if kind is Kind.BACKWARD and virtual < last:
                    ready = max(ready, done[kind, virtual + 1, work.microbatch])
                end = ready + durations.of(kind, split=schedule.splits_backward)
                free[stage] = done[kind, virtual, work.microbatch] = end
                bars.append(Bar(stage, kind, work, ready, end))
    return Timeline(num_stages=size, bars=tuple(bars))


def textbook_bubble_fraction(
    num_stages: int, num_microbatches: int, num_chunks: int = 1, *, split: bool = False
) -> float:
    """The bubble of the papers as a share of all time: (S - 1) / (v M + S - 1), or (S - 1) / (3 M + S - 1) for ZB-H1.

    GPipe and 1F1B are v = 1. ZB-H1 (`split`) is for F, B and W of one length each, where the bubble is
    (S - 1) (F + B - W); in lockstep it is (S - 1) (F + B), so a share of 2 (S - 1) / (3 M + 2 (S - 1)).

    >>> textbook_bubble_fraction(4, 12), textbook_bubble_fraction(4, 12, split=True)
    (0.2, 0.07692307692307693)

    Source: Narayanan et al. 2021, section 2.2 (there as a share of the ideal time); Qi et al. 2023, table 1.
    """
    work = 3 * num_microbatches if split else num_chunks * num_microbatches
    return (num_stages - 1) / (work + num_stages - 1)


def peak_activations(schedule: Schedule) -> tuple[int, ...]:
    """For each stage, the most chunk inputs alive at once: from F to the end of the last tick that reads them.

    GPipe M; 1F1B min(M, 2 (S - s) - 1); interleaved min(v M, (v + 1) S - 2 s - 1), in inputs of a chunk.

    >>> from gcompute.parallel.pipeline.schedule import gpipe, one_f_one_b
    >>> peak_activations(gpipe(4, 16)), peak_activations(one_f_one_b(4, 16))
    ((16, 16, 16, 16), (7, 5, 3, 1))
    """
    last_read = Kind.WEIGHT if schedule.splits_backward else Kind.BACKWARD
    alive, peaks = [0] * schedule.num_stages, [0] * schedule.num_stages
    for cells in schedule.ticks:
        for stage, cell in enumerate(cells):
            alive[stage] += cell.forward is not None
            peaks[stage] = max(peaks[stage], alive[stage])
            alive[stage] -= cell.of(last_read) is not None
    return tuple(peaks)


def idle_slots(schedule: Schedule) -> tuple[int, ...]:
    """For each stage, the slots that it runs masked: in a tick with that kind of work, and none for this stage."""
    run = sum(len(schedule.kinds(tick)) for tick in range(len(schedule.ticks)))
    used = Counter(
        stage for cells in schedule.ticks for stage, cell in enumerate(cells) for work in cell if work is not None
    )
    return tuple(run - used[stage] for stage in range(schedule.num_stages))


@dataclass(frozen=True, slots=True, kw_only=True)
class ScheduleCost:
    """A schedule's figures; times are in the unit of the durations, for chunks of one size."""

    name: str
    num_ticks: int
    lockstep_time: float
    lockstep_bubble_fraction: float
    asynchronous_time: float
    asynchronous_bubble_fraction: float
    textbook_bubble_fraction: float
    peak_activations: tuple[int, ...]

    def __str__(self) -> str:
        return (
            f"{self.name}: {self.num_ticks} ticks; lockstep {self.lockstep_time:g}, bubble"
            f" {self.lockstep_bubble_fraction:.1%}; asynchronous {self.asynchronous_time:g}, bubble"
            f" {self.asynchronous_bubble_fraction:.1%} (textbook {self.textbook_bubble_fraction:.1%}); peak activations"
            f" {', '.join(map(str, self.peak_activations))}"
        )


def schedule_cost(schedule: Schedule, durations: Durations = Durations()) -> ScheduleCost:
    """All figures of a schedule. `RECOMPUTING` holds the durations of the executor of this package.

    >>> from gcompute.parallel.pipeline.schedule import zero_bubble
    >>> print(schedule_cost(zero_bubble(4, 12)))
    zero-bubble: 18 ticks; lockstep 42, bubble 14.3%; asynchronous 39, bubble 7.7% (textbook 7.7%); \
peak activations 7, 6, 5, 4
    """
    lockstep, asynchronous = lockstep_timeline(schedule, durations), asynchronous_timeline(schedule, durations)
    return ScheduleCost(
        name=schedule.name,
        num_ticks=len(schedule.ticks),
        lockstep_time=lockstep.total_time,
        lockstep_bubble_fraction=lockstep.bubble_fraction,
        asynchronous_time=asynchronous.total_time,
        asynchronous_bubble_fraction=asynchronous.bubble_fraction,
        textbook_bubble_fraction=textbook_bubble_fraction(
            schedule.num_stages,
            schedule.num_microbatches,
            schedule.num_chunks,
            split=schedule.splits_backward,
        ),
        peak_activations=peak_activations(schedule),
    )
