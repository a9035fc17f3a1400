"""The bubble of each schedule, counted in the table that the pipeline's executor runs, against its formula.

A tick's slots are as long as the work in them: F, B and W of a chunk. The executor runs all stages in lockstep; the
clock of the papers lets each stage go on as soon as what it needs is there.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from fractions import Fraction

from gcompute.parallel.pipeline.cost import asynchronous_timeline, textbook_bubble_fraction
from gcompute.parallel.pipeline.lowering import lower
from gcompute.parallel.pipeline.schedule import Schedule, gpipe, interleaved, one_f_one_b, zero_bubble

# F and B; F, B and W where a schedule splits the backward pass.
WHOLE, SPLIT = (1, 2), (1, 1, 1)
CHUNKS = 2
CLOSE = 1e-12


@dataclass(frozen=True, slots=True, kw_only=True)
class Bubble:
    """Of one schedule: slots that it runs, those of them that are idle, and the idle share of time on both clocks."""

    schedule: str
    stages: int
    microbatches: int
    ticks: int
    slots: int
    idle_slots: int
    lockstep: float
    lockstep_formula: float
    asynchronous: float
    asynchronous_formula: float

    @property
    def agrees(self) -> bool:
        """Whether both clocks show what the formulas say."""
        return self.lockstep == self.lockstep_formula and abs(self.asynchronous - self.asynchronous_formula) < CLOSE


def bubbles() -> Iterator[Bubble]:
    """Every schedule over 2, 4 and 8 stages, with one, two and four microbatches a stage."""
    for stages in (2, 4, 8):
        for microbatches in (stages, 2 * stages, 4 * stages):
            for build in (gpipe, one_f_one_b, zero_bubble):
                yield measure(build(stages, microbatches))
            yield measure(interleaved(stages, microbatches, CHUNKS))


def measure(schedule: Schedule) -> Bubble:
    """Count the active entries of the executor's tables; slots that no stage uses in a tick are not there at all."""
    lengths = SPLIT if schedule.splits_backward else WHOLE
    program = lower(schedule)
    slots = idle = time = busy = 0
    for segment in program.segments:
        for entry, length in zip(segment[: len(lengths)], lengths, strict=True):
            if entry is not None:
                slots += entry.active.size
                time += entry.active.size * length
                idle += int(entry.active.size - entry.active.sum())
                busy += int(entry.active.sum()) * length
    return Bubble(
        schedule=schedule.name,
        stages=schedule.num_stages,
        microbatches=schedule.num_microbatches,
        ticks=sum(segment.num_ticks for segment in program.segments),
        slots=slots,
        idle_slots=idle,
        lockstep=float(1 - Fraction(busy, time)),
        lockstep_formula=float(lockstep_formula(schedule)),
        asynchronous=asynchronous_timeline(schedule).bubble_fraction,
        asynchronous_formula=textbook_bubble_fraction(
            schedule.num_stages,
            schedule.num_microbatches,
            schedule.num_chunks,
            split=schedule.splits_backward,
        ),
    )


def lockstep_formula(schedule: Schedule) -> Fraction:
    """(S - 1) / (v M + S - 1): each kind of work goes on for v M + S - 1 ticks, in v M of which a stage has some.

    With B split, W fills all its ticks, and only F and B, of length 1 as W, idle: 2 (S - 1) / (3 M + 2 (S - 1)).

    Source: Huang et al. 2019 (GPipe), section 2.3; Narayanan et al. 2021, section 2.2; for the split as above.
    """
    wait, work = schedule.num_stages - 1, schedule.num_chunks * schedule.num_microbatches
    return Fraction(2 * wait, 3 * work + 2 * wait) if schedule.splits_backward else Fraction(wait, work + wait)
