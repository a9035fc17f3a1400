"""One problem of the exam: what is asked, what was published, and how the library answers."""

from collections.abc import Callable
from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class Problem:
    """A worked problem of the scaling-book; `file` is its chapter, `answer` the published figures.

    tolerance: relative, of every figure. solve: a composition of public functions, its givens in sight. note: what a
    reader should know of the answer, as why it misses.
    """

    id: str
    file: str
    ask: str
    answer: tuple[float, ...]
    tolerance: float
    solve: Callable[[], tuple[float, ...]]
    note: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Solved:
    """What the library answers to a problem; `errors` are relative to the published figures."""

    problem: Problem
    answer: tuple[float, ...]
    errors: tuple[float, ...]

    @property
    def holds(self) -> bool:
        return all(abs(error) <= self.problem.tolerance for error in self.errors)


def solved(problem: Problem) -> Solved:
    """Answer a problem.

    Raises:
      ValueError: the solution gives another number of figures than were published.
    """
    answer = problem.solve()
    if len(answer) != len(problem.answer):
        raise ValueError(f"problem {problem.id} has {len(problem.answer)} figures and its solution {len(answer)}.")
    errors = tuple(found / published - 1 for found, published in zip(answer, problem.answer, strict=True))
    return Solved(problem=problem, answer=answer, errors=errors)
