"""The exam's problems: each within its tolerance of the published figures, by public functions."""

import pytest

from gcompute.exam.problem import Problem, solved
from gcompute.exam.problems import PROBLEMS, find_problem

# The public half as it was set: answers and tolerance.
PUBLIC = {
    "roofline-v5e": ((240, 120, 243), 0.02),
    "load-200b": ((0.01,), 0.05),
    "v5e-pod": ((32, 5.1e16, 4e12), 0.05),
    "allgather-y": ((0.00056,), 0.05),
    "allgather-small": ((2e-06,), 0.1),
    "allgather-3d": ((2.3e-05, 4.6e-05), 0.06),
    "mha-16b": ((16e9, 512e3), 0.05),
    "deepseek-util": ((0.217,), 0.03),
    "v5p-dp-limit": ((2550, 850), 0.02),
    "l70-params": ((70.4e9, 4.2e11, 6.3e24), 0.02),
    "l70-days": ((44,), 0.03),
    "30b-decode": ((0.0025, 0.021), 0.05),
    "l70-serve": ((160e3, 112e9, 0.017), 0.05),
    "l70-prefill": ((0.91,), 0.05),
}
# The book rounds its dims down before it multiplies; our count is exact. See the problem's note.
MISSES = {"mha-16b"}


def _marked(problem: Problem):
    missing = pytest.mark.xfail(strict=True, reason=str(problem.note))
    return pytest.param(problem, id=problem.id, marks=[missing] if problem.id in MISSES else [])


@pytest.mark.oldest
@pytest.mark.parametrize("problem", [_marked(problem) for problem in PROBLEMS])
def test_within_tolerance(problem: Problem):
    found = solved(problem)
    assert found.holds, f"{found.answer} and published {problem.answer}: {found.errors}"


def test_what_misses_says_why():
    assert all(find_problem(name).note for name in MISSES)


def test_names_are_unique():
    names = [problem.id for problem in PROBLEMS]
    assert len(names) == len(set(names)) >= 60


@pytest.mark.oldest("l70-params")
@pytest.mark.parametrize("name", PUBLIC)
def test_the_public_half_is_as_it_was_set(name: str):
    problem = find_problem(name)
    assert (problem.answer, problem.tolerance) == PUBLIC[name]


def test_tolerances_are_tight():
    assert all(0 < problem.tolerance <= 0.06 for problem in PROBLEMS if problem.id not in PUBLIC)


def test_a_wrong_answer_does_not_hold():
    problem = Problem(id="x", file="x", ask="x", answer=(1.0, 2.0), tolerance=0.1, solve=lambda: (1.05, 2.5))
    found = solved(problem)
    assert not found.holds
    assert found.errors == pytest.approx((0.05, 0.25))


def test_refused():
    short = Problem(id="x", file="x", ask="x", answer=(1.0, 2.0), tolerance=0.1, solve=lambda: (1.0,))
    with pytest.raises(ValueError, match="problem x has 2 figures and its solution 1"):
        solved(short)
    with pytest.raises(ValueError, match="problem 'nothing' is not known"):
        find_problem("nothing")
