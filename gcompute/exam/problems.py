"""Every problem of the exam: the public ones, and further ones of the book by chapter.

Left out: what the book measured and does not derive, what it leaves unanswered, and where its figures contradict its
own formulae. Where its edition of February 2025 has another figure the newer one stands, or both are asked.
"""

from gcompute.exam.problem import Problem
from gcompute.exam.problems_gpus import GPUS
from gcompute.exam.problems_hardware import HARDWARE
from gcompute.exam.problems_inference import INFERENCE
from gcompute.exam.problems_public import PUBLIC
from gcompute.exam.problems_sharding import SHARDING
from gcompute.exam.problems_training import TRAINING

PROBLEMS: tuple[Problem, ...] = (*PUBLIC, *HARDWARE, *SHARDING, *TRAINING, *INFERENCE, *GPUS)


def find_problem(name: str) -> Problem:
    """The problem called `name`.

    >>> find_problem("l70-days").answer
    (44,)

    Raises:
      ValueError: there is none.
    """
    for problem in PROBLEMS:
        if problem.id == name:
            return problem
    raise ValueError(f"problem {name!r} is not known. Legal: {', '.join(problem.id for problem in PROBLEMS)}.")
