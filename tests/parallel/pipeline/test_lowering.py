"""Slots: any valid table, played through with names in place of arrays, reads the values that it needs."""

import dataclasses
import random

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gcompute.parallel.pipeline.cost import peak_activations
from gcompute.parallel.pipeline.lowering import NOTHING, lower
from gcompute.parallel.pipeline.schedule import (
    Cell,
    Kind,
    Schedule,
    Work,
    gpipe,
    interleaved,
    one_f_one_b,
    zero_bubble,
)
from gcompute.parallel.pipeline.validate import validate


def play(schedule, *, forward_only=False):
    """Run the tables with ("x", virtual stage, microbatch) for arrays; returns what was done, in order."""
    size, last = schedule.num_stages, schedule.num_virtual_stages - 1
    program = lower(schedule, forward_only=forward_only)
    inputs = [[None] * program.num_input_slots for _ in range(size)]
    gradients = [[None] * program.num_gradient_slots for _ in range(size)]
    done = []
    for rows in program.segments:
        for tick in range(rows.num_ticks):
            sent_x, sent_g = [None] * size, [None] * size
            for kind, entry in zip(Kind, (rows.forward, rows.backward, rows.weight), strict=True):
                for stage in range(size) if entry is not None else ():
                    if not entry.active[tick, stage]:
                        continue
                    cell = {name: column[tick, stage] for name, column in entry._asdict().items()}
                    virtual, microbatch = cell["chunk"] * size + stage, cell["microbatch"]
                    assert cell["is_first"] == (virtual == 0)
                    assert cell["is_last"] == (virtual == last)
                    if virtual > 0:
                        assert inputs[stage][cell["input_slot"]] == ("x", virtual, microbatch)
                    if kind is Kind.FORWARD:
                        sent_x[stage] = ("x", virtual + 1, microbatch)
                    elif virtual < last:
                        assert gradients[stage][cell["gradient_slot"]] == ("g", virtual, microbatch)
                    elif kind is Kind.BACKWARD and schedule.splits_backward:
                        gradients[stage][cell["gradient_slot"]] = ("g", virtual, microbatch)
                    elif kind is Kind.WEIGHT:
                        assert gradients[stage][cell["gradient_slot"]] == ("g", virtual, microbatch)
                    if kind is Kind.BACKWARD:
                        sent_g[stage] = ("g", virtual - 1, microbatch)
                    done.append((kind, virtual, microbatch))
            for stage in range(size):
                for arrivals, buffer, sent in (
                    (rows.input_arrival, inputs, sent_x[stage - 1]),
                    (rows.gradient_arrival, gradients, sent_g[(stage + 1) % size]),
                ):
                    if arrivals is not None and arrivals[tick, stage] != NOTHING:
                        buffer[stage][arrivals[tick, stage]] = sent
    return done


def everything(schedule, kinds):
    return {
        (kind, virtual, microbatch)
        for kind in kinds
        for virtual in range(schedule.num_virtual_stages)
        for microbatch in range(schedule.num_microbatches)
    }


def kinds_of(schedule):
    return Kind if schedule.splits_backward else (Kind.FORWARD, Kind.BACKWARD)


MADE = [
    gpipe(4, 3),
    one_f_one_b(4, 9),
    interleaved(4, 8, 2),
    interleaved(2, 6, 3),
    zero_bubble(4, 9),
    zero_bubble(1, 2),
]


@pytest.mark.parametrize("schedule", MADE, ids=lambda schedule: f"{schedule.name}-{schedule.num_stages}")
def test_every_schedule_plays_through(schedule):
    done = play(schedule)
    assert len(done) == len(set(done))
    assert set(done) == everything(schedule, kinds_of(schedule))
    assert set(play(schedule, forward_only=True)) == everything(schedule, [Kind.FORWARD])


@pytest.mark.oldest
def test_buffers_are_as_large_as_the_activations_alive():
    for stages, microbatches in ((2, 8), (4, 16), (5, 20)):
        # Stage 0 reads the batch, so the fullest buffer is stage 1's.
        for make in (gpipe, one_f_one_b, zero_bubble):
            schedule = make(stages, microbatches)
            assert lower(schedule).num_input_slots == peak_activations(schedule)[1]
        assert lower(one_f_one_b(stages, microbatches)).num_input_slots == 2 * stages - 3
        assert lower(one_f_one_b(stages, microbatches)).num_gradient_slots == 1
        # Between B and W, S - 1 gradients wait on the last stage, and one more is being made.
        assert lower(zero_bubble(stages, microbatches)).num_gradient_slots == stages
        assert lower(interleaved(stages, microbatches, 2)).num_input_slots <= 3 * stages - 1
        assert lower(interleaved(stages, microbatches, 2), forward_only=True).num_input_slots == 1


@st.composite
def valid_tables(draw):
    """A table by throwing dice: each tick, each stage does some of what it could, or nothing."""
    stages, microbatches, chunks = draw(st.integers(1, 3)), draw(st.integers(1, 4)), draw(st.integers(1, 2))
    split, dice = draw(st.booleans()), random.Random(draw(st.integers(0, 10**6)))
    kinds, last = (tuple(Kind) if split else (Kind.FORWARD, Kind.BACKWARD)), stages * chunks - 1
    done, ticks, missing = {}, [], True
    while missing:
        row = [dict.fromkeys(Kind) for _ in range(stages)]
        for stage in range(stages):
            for kind in kinds:
                ready = [
                    Work(microbatch, chunk)
                    for microbatch in range(microbatches)
                    for chunk in range(chunks)
                    if may_run(kind, chunk * stages + stage, microbatch, done, len(ticks), last)
                ]
                if ready and dice.random() < 0.6:
                    row[stage][kind] = work = dice.choice(ready)
                    done[kind, work.chunk * stages + stage, work.microbatch] = len(ticks)
        ticks.append(tuple(Cell(*cells.values()) for cells in row))
        missing = len(done) < len(kinds) * (last + 1) * microbatches
    return Schedule(num_stages=stages, num_microbatches=microbatches, num_chunks=chunks, ticks=tuple(ticks))


def may_run(kind, virtual, microbatch, done, now, last):
    def was(kind, virtual, before):
        return done.get((kind, virtual, microbatch), now + 1) <= now - before

    if (kind, virtual, microbatch) in done:
        return False
    if kind is Kind.FORWARD:
        return virtual == 0 or was(kind, virtual - 1, 1)
    if kind is Kind.WEIGHT:
        return was(Kind.BACKWARD, virtual, 0)
    return was(Kind.FORWARD, virtual, 0) and (virtual == last or was(kind, virtual + 1, 1))


@settings(max_examples=60, deadline=None)
@given(schedule=valid_tables())
def test_any_valid_table_plays_through(schedule):
    validate(schedule)
    assert set(play(schedule)) == everything(schedule, kinds_of(schedule))
    assert set(play(schedule, forward_only=True)) == everything(schedule, [Kind.FORWARD])
    assert lower(schedule).num_input_slots <= max(peak_activations(schedule)) + schedule.num_microbatches


def swapped(schedule, kind, first, second):
    """The table with two entries of a kind exchanged; places are (tick, stage)."""
    rows = [list(cells) for cells in schedule.ticks]
    work = [rows[tick][stage].of(kind) for tick, stage in (first, second)]
    for (tick, stage), new in zip((first, second), reversed(work), strict=True):
        rows[tick][stage] = rows[tick][stage]._replace(**{kind.name.lower(): new})
    return dataclasses.replace(schedule, ticks=tuple(map(tuple, rows)))


@settings(max_examples=100, deadline=None)
@given(
    data=st.data(), schedule=st.sampled_from([gpipe(2, 3), one_f_one_b(3, 4), interleaved(2, 4, 2), zero_bubble(2, 4)])
)
def test_two_entries_exchanged_are_still_valid_or_refused(data, schedule):
    kind = data.draw(st.sampled_from(kinds_of(schedule)))
    places = [
        (tick, stage)
        for tick, cells in enumerate(schedule.ticks)
        for stage, cell in enumerate(cells)
        if cell.of(kind) is not None
    ]
    first, second = data.draw(st.lists(st.sampled_from(places), min_size=2, max_size=2, unique=True))
    table = swapped(schedule, kind, first, second)
    try:
        validate(table)
    except ValueError:
        with pytest.raises(ValueError, match=r"tick|never"):
            lower(table)
    else:
        assert set(play(table)) == everything(table, kinds_of(table))


@pytest.mark.oldest
def test_tables_are_small():
    rows = lower(one_f_one_b(4, 8)).segments[1]
    assert rows.forward.microbatch.dtype == np.int32
    assert rows.forward.microbatch.shape == (8, 4)
    assert rows.weight is None
