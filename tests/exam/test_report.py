"""The exam itself: every class within what is demanded, no wrong "fits", and plans carry the errors that it found."""

import json
import math

import numpy as np
import pytest

from gcompute.cli.exam import write_accuracy
from gcompute.exam.compiled import compiled_train
from gcompute.exam.compiled_serve import compiled_serve
from gcompute.exam.fit import _errors, _work, fit, left_out_errors
from gcompute.exam.published import published_runs
from gcompute.exam.report import KINDS, MEMORY_LIMITS, STEP_LIMITS, headline_errors, sit
from gcompute.exam.unseen import SERVING as SERVING_UNSEEN
from gcompute.exam.unseen import unseen_points
from gcompute.plan.accuracy import RECORD
from gcompute.plan.efficiency import BY_KIND


@pytest.fixture(scope="module")
def parts():
    return {part.kind: part for part in sit()}


@pytest.mark.oldest
def test_every_class_passes(parts):
    assert {kind: part.passed for kind, part in parts.items()} == dict.fromkeys(parts, True)


@pytest.mark.parametrize("kind", ["train step, TPU", "train step, GPU"])
def test_step_times_left_out_of_their_fit(parts, kind: str):
    part = parts[kind]
    assert len(part.cases) >= 60
    assert part.median <= STEP_LIMITS[0]
    assert part.worst <= STEP_LIMITS[1]


def test_memory_against_the_tpu_compiler(parts):
    part = parts["train memory, TPU compiler"]
    assert len(part.cases) >= 30
    assert part.median <= MEMORY_LIMITS[0]
    assert part.worst <= MEMORY_LIMITS[1]
    assert part.wrong_fits == 0
    examined = part.examined()
    assert {"v4", "v5e", "v5p", "v6e"} <= set(examined["chip"])
    assert {"none", "dots", "full"} <= set(examined["remat"])
    assert {"data", "fsdp", "tensor", "context", "expert", "stage"} <= set(examined["axis"])
    # Some of them do not fit, and it says so.
    assert any(not one.fits for one in compiled_train())


def test_memory_of_serving(parts):
    part = parts["serve memory, TPU compiler"]
    # Programs of few layers, of the engine that keeps keys and values in pages.
    assert len(part.cases) >= 16
    assert {"v5e", "v5p", "v6e"} <= set(part.examined()["chip"])
    assert (part.median <= MEMORY_LIMITS[0], part.worst <= MEMORY_LIMITS[1], part.wrong_fits) == (True, True, 0)
    assert any(not one.fits for one in compiled_serve())


def test_only_a_slip_of_the_book_may_miss(parts):
    missed = [case for case in parts["worked problems"].cases if not case.within]
    assert all(case.note for case in missed)
    assert len(missed) <= 1


def test_plans_carry_what_the_exam_found(parts, tmp_path):
    """`gcompute exam --write` was run after the last change that moved an error."""
    again = tmp_path / "accuracy.json"
    write_accuracy(parts.values(), again)
    assert json.loads(again.read_text()) == json.loads(RECORD.read_text())


def test_what_no_fit_saw_is_in_no_fit():
    """No published step that a plan's error is stated by is among those that the efficiencies were fitted to."""
    points = unseen_points()
    assert {point.kind for point in points} == {*KINDS.values(), *SERVING_UNSEEN.values()}
    fitted = {(one.name, round(one.step_s, 2)) for one in published_runs()}
    assert not fitted & {(point.name, round(point.published, 2)) for point in points}
    assert all(point.predicted > 0 and point.source.startswith(("https://", "arXiv:")) for point in points)


def test_ten_runs_are_shown():
    shown = headline_errors()
    assert len(shown) == 10
    assert max(abs(error) for _, error in shown) < STEP_LIMITS[1]


def test_a_fit_is_no_worse_than_its_start():
    runs = [one for one in published_runs() if one.target.chip in ("v6e", "v5p")]
    start = BY_KIND["tpu"]
    before, after = (np.abs(_errors(_work(runs), e)).mean() for e in (start, fit(runs, start, rounds=4)))
    # The loss weighs sources alike and their worst run, so a plain mean may rise, a little.
    assert after <= 1.1 * before


def test_left_out_is_left_out():
    """A run whose time is wrong by far is seen to be: its own time does not pull the fit that judges it."""
    import dataclasses

    runs = [one for one in published_runs() if one.target.chip == "v5e"]
    wrong = [
        dataclasses.replace(one, step_s=3 * one.step_s) if one.group.startswith("maxtext-16b") else one for one in runs
    ]
    errors = left_out_errors(wrong, BY_KIND["tpu"], rounds=4)
    judged = [error for one, error in zip(wrong, errors, strict=True) if one.group.startswith("maxtext-16b")]
    assert all(error < -0.5 for error in judged)
    with pytest.raises(ValueError, match="nothing is left"):
        left_out_errors([one for one in runs if one.group.startswith("maxtext-16b")], BY_KIND["tpu"])


def test_no_error_is_nan(parts):
    assert all(math.isfinite(case.error) for part in parts.values() for case in part.cases)
