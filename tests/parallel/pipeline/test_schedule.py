"""Schedules as tables: what the constructors make, text and dict forms, and what validation refuses."""

import itertools
import json
import re

import pytest

from gcompute.parallel.pipeline.layout import layer_order
from gcompute.parallel.pipeline.schedule import Cell, Kind, Schedule, gpipe, interleaved, one_f_one_b, zero_bubble
from gcompute.parallel.pipeline.validate import validate

SCHEDULES = [
    *(
        make(stages, stages * times)
        for make in (gpipe, one_f_one_b, zero_bubble)
        for stages in (1, 2, 4, 5)
        for times in (1, 3)
    ),
    *(interleaved(stages, stages * times, chunks) for stages in (1, 2, 4) for times in (1, 3) for chunks in (2, 3)),
    *(gpipe(4, 1), gpipe(3, 2), one_f_one_b(3, 7), zero_bubble(3, 7)),
]


@pytest.mark.oldest
@pytest.mark.parametrize(
    "schedule", SCHEDULES, ids=lambda s: f"{s.name}-{s.num_stages}-{s.num_microbatches}-{s.num_chunks}"
)
def test_every_constructor_makes_a_valid_table_that_survives_json(schedule):
    validate(schedule)
    assert Schedule.from_dict(json.loads(json.dumps(schedule.to_dict()))) == schedule


@pytest.mark.oldest
def test_in_lockstep_each_kind_of_work_fills_one_run_of_ticks():
    for schedule in (one_f_one_b(4, 9), interleaved(4, 8, 2)):
        kinds = [schedule.kinds(tick) for tick in range(len(schedule.ticks))]
        assert [kind for kind, _ in itertools.groupby(kinds)] == [
            (Kind.FORWARD,),
            (Kind.FORWARD, Kind.BACKWARD),
            (Kind.BACKWARD,),
        ]


@pytest.mark.oldest
def test_a_table_reads_as_text():
    assert str(interleaved(2, 2, 2)).splitlines() == [
        "interleaved: 2 stages, 2 microbatches, 2 chunks a stage",
        "tick  stage 0  stage 1",
        "   0  F0.0     .",
        "   1  F1.0     F0.0",
        "   2  F0.1     F1.0",
        "   3  F1.1     F0.1 B0.1",
        "   4  B0.1     F1.1 B1.1",
        "   5  B1.1     B0.0",
        "   6  B0.0     B1.0",
        "   7  B1.0     .",
    ]
    assert Cell.parse("B1.2 F3") == Cell(forward=(3, 0), backward=(1, 2))


def table(*ticks, stages=2, microbatches=1, chunks=1):
    values = {"num_stages": stages, "num_microbatches": microbatches, "num_chunks": chunks, "ticks": ticks}
    return Schedule.from_dict(values)


@pytest.mark.parametrize(
    ("ticks", "message"),
    [
        (
            [["F0", ""], ["", "B0"], ["B0", "F0"]],
            (
                "tick 1, stage 1: B of microbatch 0, chunk 0 needs F of microbatch 0, chunk 0 on stage 1 in this tick"
                " or an earlier one; the table has it in tick 2."
            ),
        ),
        (
            [["F0", ""], ["B0", "F0 B0"]],
            (
                "tick 1, stage 0: B of microbatch 0, chunk 0 needs B of microbatch 0, chunk 0 on stage 1 in an earlier"
                " tick; the table has it in tick 1."
            ),
        ),
        (
            [["", "F0"], ["", "B0"], ["B0", ""]],
            (
                "tick 0, stage 1: F of microbatch 0, chunk 0 needs F of microbatch 0, chunk 0 on stage 0 in an earlier"
                " tick; the table never does it."
            ),
        ),
        ([["F0", ""], ["", "F0"], ["", "B0"]], "the table never does B of microbatch 0, chunk 0 on stage 0."),
        (
            [["F0", ""], ["", "F0 B0"], ["B0 W0", ""]],
            "the table never does W of microbatch 0, chunk 0 on stage 1.",
        ),
        (
            [["F0", ""], ["", "F0 W0"], ["", "B0"], ["B0 W0", ""]],
            (
                "tick 1, stage 1: W of microbatch 0, chunk 0 needs B of microbatch 0, chunk 0 on stage 1 in this tick"
                " or an earlier one; the table has it in tick 2."
            ),
        ),
        (
            [["F0", ""], ["F0", "F0 B0"], ["B0", ""]],
            "tick 1, stage 0: F of microbatch 0, chunk 0 is done twice, first in tick 0.",
        ),
        (
            [["F1", ""]],
            "tick 0, stage 0: F of microbatch 1, chunk 0 does not exist: microbatches are 0 to 0, chunks 0 to 0.",
        ),
    ],
)
def test_the_first_broken_dependency_is_named(ticks, message):
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        validate(table(*ticks))


@pytest.mark.oldest
@pytest.mark.parametrize(
    ("make", "message"),
    [
        (
            lambda: one_f_one_b(4, 3),
            "a 1f1b schedule needs at least as many microbatches as its 4 stages, not 3: with fewer",
        ),
        (
            lambda: zero_bubble(4, 3),
            "a zero-bubble schedule needs at least as many microbatches as its 4 stages, not 3",
        ),
        (lambda: interleaved(4, 6, 2), "needs a multiple of its 4 stages as microbatches, not 6. Use 4 or 8."),
        (lambda: gpipe(0, 3), "num_stages of a schedule is a whole number above 0, not 0."),
        (lambda: gpipe(2, 0), "num_microbatches of a schedule is a whole number above 0, not 0."),
        (lambda: table(["F0", "X1"]), "schedule entry 'X1' is not of the form"),
        (lambda: table(["F0 F1", ""]), "schedule cell 'F0 F1' has two entries of kind F"),
        (lambda: table(["F0"]), "tick 0 has 1 cells and the schedule 2 stages."),
        (lambda: Schedule.from_dict({"num_stages": 2}), r"schedule lacks \['num_microbatches', 'ticks'\]"),
        (lambda: Schedule.from_dict({"stages": 2}), r"schedule does not know \['stages'\]"),
        (lambda: layer_order(10, 4), "10 layers cannot be divided over 4 stages. Use 1, 2, 5 or 10 stages."),
        (lambda: layer_order(8, 4, 4), "8 layers cannot be divided over 4 stages of 4 chunks each. Use 1 or 2 stages."),
        (lambda: layer_order(8, 4, 3), "over 4 stages of 3 chunks each. Use fewer chunks than 3."),
    ],
)
def test_bad_input_is_refused_in_one_line(make, message):
    with pytest.raises(ValueError, match=message) as error:
        make()
    assert "\n" not in str(error.value)
