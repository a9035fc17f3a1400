"""Whether a schedule can run: every piece of work once, and nothing before what it needs."""

from gcompute.parallel.pipeline.schedule import Kind, Schedule, Work


def validate(schedule: Schedule) -> None:
    """Check a table, and name its first broken dependency.

    For microbatch i and virtual stage k = c S + s (chunk c of stage s):
      F(k, i) needs F(k - 1, i) in an earlier tick;
      B(k, i) needs B(k + 1, i) in an earlier tick, and F(k, i) in the same tick or before;
      W(k, i), where a table has any W, needs B(k, i) in the same tick or before.
    Each happens exactly once.

    >>> from gcompute.parallel.pipeline.schedule import Schedule
    >>> validate(Schedule.from_dict({"num_stages": 2, "num_microbatches": 1, "ticks": [["F0", "F0"], ["", "B0"]]}))
    Traceback (most recent call last):
      ...
    ValueError: tick 0, stage 1: F of microbatch 0, chunk 0 needs F of microbatch 0, chunk 0 on stage 0 in an earlier \
tick; the table has it in tick 0.

    Raises:
      ValueError: a dependency is broken, or work is missing, done twice or out of range; the first in order of tick,
        stage and F, B, W.
    """
    ticks_of: dict[tuple[Kind, int, int], int] = {}
    entries = [
        (tick, stage, kind, work)
        for tick, cells in enumerate(schedule.ticks)
        for stage, cell in enumerate(cells)
        for kind, work in zip(Kind, cell, strict=True)
        if work is not None
    ]
    # A later duplicate is reported where it stands, so what others depend on is the first.
    for tick, stage, kind, work in entries:
        ticks_of.setdefault((kind, work.chunk * schedule.num_stages + stage, work.microbatch), tick)

    for tick, stage, kind, work in entries:
        where = f"tick {tick}, stage {stage}: {kind} of {_text(work)}"
        if not (0 <= work.microbatch < schedule.num_microbatches and 0 <= work.chunk < schedule.num_chunks):
            raise ValueError(
                f"{where} does not exist: microbatches are 0 to {schedule.num_microbatches - 1}, chunks 0 to"
                f" {schedule.num_chunks - 1}."
            )
        virtual = work.chunk * schedule.num_stages + stage
        first = ticks_of[kind, virtual, work.microbatch]
        if first != tick:
            raise ValueError(f"{where} is done twice, first in tick {first}.")
        for needed, other, same_tick in _needs(kind, virtual, schedule.num_virtual_stages):
            done = ticks_of.get((needed, other, work.microbatch))
            if done is None or done > tick or (done == tick and not same_tick):
                chunk, owner = divmod(other, schedule.num_stages)
                when = "in this tick or an earlier one" if same_tick else "in an earlier tick"
                found = "the table never does it" if done is None else f"the table has it in tick {done}"
                raise ValueError(
                    f"{where} needs {needed} of {_text(Work(work.microbatch, chunk))} on stage {owner} {when}; {found}."
                )

    kinds = [Kind.FORWARD, Kind.BACKWARD, *([Kind.WEIGHT] if schedule.splits_backward else [])]
    for kind in kinds:
        for virtual in range(schedule.num_virtual_stages):
            for microbatch in range(schedule.num_microbatches):
                if (kind, virtual, microbatch) not in ticks_of:
                    chunk, stage = divmod(virtual, schedule.num_stages)
                    missing = _text(Work(microbatch, chunk))
                    raise ValueError(f"the table never does {kind} of {missing} on stage {stage}.")


def _text(work: Work) -> str:
    return f"microbatch {work.microbatch}, chunk {work.chunk}"


def _needs(kind: Kind, virtual: int, num_virtual: int) -> list[tuple[Kind, int, bool]]:
    """(kind, virtual stage, whether the same tick will do) of all that a piece of work waits for."""
    if kind is Kind.FORWARD:
        return [(Kind.FORWARD, virtual - 1, False)] if virtual else []
    if kind is Kind.WEIGHT:
        return [(Kind.BACKWARD, virtual, True)]
    own = (Kind.FORWARD, virtual, True)
    return [own] if virtual == num_virtual - 1 else [own, (Kind.BACKWARD, virtual + 1, False)]
