"""Costs of schedules against the formulas of the papers, and the picture."""

import itertools

import pytest

from gcompute.parallel.pipeline.cost import (
    RECOMPUTING,
    asynchronous_timeline,
    idle_slots,
    lockstep_timeline,
    peak_activations,
    schedule_cost,
    textbook_bubble_fraction,
)
from gcompute.parallel.pipeline.gantt import draw, save
from gcompute.parallel.pipeline.lowering import lower
from gcompute.parallel.pipeline.schedule import Kind, Schedule, gpipe, interleaved, one_f_one_b, zero_bubble

SIZES = [(1, 1), (1, 3), (2, 2), (2, 7), (4, 4), (4, 5), (4, 16), (5, 20)]


def schedules(stages, microbatches):
    made = [gpipe(stages, microbatches), one_f_one_b(stages, microbatches), zero_bubble(stages, microbatches)]
    if microbatches % stages == 0:
        made += [interleaved(stages, microbatches, chunks) for chunks in (1, 2, 3)]
    return made


@pytest.mark.oldest
@pytest.mark.parametrize(("stages", "microbatches"), SIZES)
def test_bubbles_are_those_of_the_papers_on_both_clocks(stages, microbatches):
    fill = stages - 1
    for schedule in schedules(stages, microbatches):
        cost = schedule_cost(schedule)
        split = schedule.splits_backward
        book = textbook_bubble_fraction(stages, microbatches, schedule.num_chunks, split=split)
        in_lockstep = 2 * fill / (3 * microbatches + 2 * fill) if split else book
        assert cost.asynchronous_bubble_fraction == pytest.approx(book, abs=1e-12)
        assert cost.lockstep_bubble_fraction == pytest.approx(in_lockstep, abs=1e-12)
        assert f"{schedule.name}: {len(schedule.ticks)} ticks" in str(cost)


@pytest.mark.oldest
@pytest.mark.parametrize(("stages", "microbatches"), SIZES)
def test_idle_slots_of_the_program_are_what_the_formula_says(stages, microbatches):
    for schedule in schedules(stages, microbatches):
        # S - 1 idle F and S - 1 idle B slots a stage, and no idle W.
        assert idle_slots(schedule) == (2 * (stages - 1),) * stages
        idle = sum(
            (~entry.active).sum(0)
            for rows in lower(schedule).segments
            for entry in (rows.forward, rows.backward, rows.weight)
            if entry is not None
        )
        assert tuple(idle) == idle_slots(schedule)


@pytest.mark.parametrize(("stages", "microbatches"), SIZES)
def test_peak_activations_are_what_the_formula_says(stages, microbatches):
    def formula(schedule, stage):
        work = schedule.num_chunks * microbatches
        if schedule.name == "gpipe":
            return work
        if schedule.splits_backward:
            return min(work, 2 * stages - 1 - stage)
        return min(work, (schedule.num_chunks + 1) * stages - 2 * stage - 1)

    for schedule in schedules(stages, microbatches):
        assert peak_activations(schedule) == tuple(formula(schedule, stage) for stage in range(stages))


@pytest.mark.oldest
def test_clocks_take_durations():
    schedule = gpipe(2, 3)
    assert lockstep_timeline(schedule, RECOMPUTING).total_time == (3 + 1) * (1 + 3)
    # The order in which free stages run 1F1B. In lockstep its fourth tick holds a B and an F on different stages.
    ticks = [["F0", ""], ["F1", "F0"], ["", "B0"], ["B0", "F1"], ["", "B1"], ["B1", ""]]
    classic = Schedule.from_dict({"num_stages": 2, "num_microbatches": 2, "ticks": ticks})
    assert asynchronous_timeline(classic).total_time == one_f_one_b_time(2, 2)
    assert lockstep_timeline(classic).total_time == one_f_one_b_time(2, 2) + 2


def one_f_one_b_time(stages, microbatches):
    return 3.0 * (microbatches + stages - 1)


def test_splitting_never_pays_where_work_is_recomputed():
    for stages, microbatches in SIZES:
        whole = lockstep_timeline(one_f_one_b(stages, microbatches), RECOMPUTING).total_time
        assert lockstep_timeline(zero_bubble(stages, microbatches), RECOMPUTING).total_time > whole


@pytest.mark.parametrize("make", [lockstep_timeline, asynchronous_timeline])
def test_no_stage_does_two_things_at_once_nor_starts_before_what_it_needs(make):
    for schedule in schedules(4, 8):
        timeline = make(schedule)
        ends = {(bar.kind, bar.work.chunk * 4 + bar.stage, bar.work.microbatch): bar.end for bar in timeline.bars}
        assert len(ends) == len(timeline.bars) == sum(w is not None for row in schedule.ticks for c in row for w in c)
        for stage in range(4):
            mine = [bar for bar in timeline.bars if bar.stage == stage]
            assert all(before.end <= after.start for before, after in itertools.pairwise(mine))
        for bar in timeline.bars:
            virtual, microbatch = bar.work.chunk * 4 + bar.stage, bar.work.microbatch
            step = -1 if bar.kind is Kind.FORWARD else 1
            kind = Kind.BACKWARD if bar.kind is Kind.WEIGHT else bar.kind
            needed = virtual if bar.kind is Kind.WEIGHT else virtual + step
            assert ends.get((kind, needed, microbatch), 0.0) <= bar.start


@pytest.mark.oldest
def test_the_picture_has_a_bar_for_all_work_and_its_number(tmp_path):
    schedule = interleaved(2, 4, 2)
    figure = draw(schedule, lockstep_timeline(schedule), clock="lockstep")
    (axes,) = figure.axes
    assert len(axes.patches) == 2 * 4 * 2 * 2
    assert [text.get_text() for text in axes.texts].count("3") == 2 * 2 * 2
    assert axes.get_title(loc="left") == "interleaved, lockstep, 4 microbatches, 2 chunks a stage, bubble 11.1%"
    save(figure, tmp_path / "schedule.png")
    assert (tmp_path / "schedule.png").read_bytes().startswith(b"\x89PNG")
