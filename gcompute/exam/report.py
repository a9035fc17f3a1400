"""Sit the exam: worked problems, published step times left out of their own fit, and programs that were compiled."""

import dataclasses
import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from gcompute.exam.compiled import CompiledTrain, compiled_train
from gcompute.exam.compiled_serve import compiled_serve
from gcompute.exam.fit import left_out_errors
from gcompute.exam.problem import Problem, solved
from gcompute.exam.problems import PROBLEMS
from gcompute.exam.published import PublishedRun, published_runs
from gcompute.plan.efficiency import BY_KIND
from gcompute.plan.serving import serve_memory
from gcompute.plan.train_plan import TRAIN_MEMORY, memory_facts, memory_of, time_facts
from gcompute.plan.train_time import train_time

# What the exam demands: of published step times and of compiled memory, the median and the worst.
STEP_LIMITS = (0.10, 0.25)
MEMORY_LIMITS = (0.05, 0.15)
KINDS = {"tpu": "train step, TPU", "gpu": "train step, GPU"}
SERVE_MEMORY = "serve memory, TPU compiler"
SERVING = "serving times, worked problems"
SERVING_FILES = ("inference", "applied-inference")


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """One question: what was asked, the error as a share (predicted / true - 1), and whether it is within what is
    demanded. facts: what an examination distinguishes. note: why the published figure, not the answer, is off."""

    name: str
    error: float
    within: bool
    predicted: float
    true: float
    facts: dict[str, Any] = dataclasses.field(default_factory=dict)
    note: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Part:
    """All questions of one class. limits: what median and worst may be; None where each case has its own tolerance.

    wrong_fits: cases that were said to fit where the compiler ran out.
    """

    kind: str
    cases: tuple[Case, ...]
    limits: tuple[float, float] | None
    wrong_fits: int = 0

    @property
    def median(self) -> float:
        return statistics.median(abs(case.error) for case in self.cases)

    @property
    def worst(self) -> float:
        return max(abs(case.error) for case in self.cases)

    @property
    def low(self) -> float:
        """By how much the true value was above the smallest prediction, as a share of it."""
        return max(0.0, *(case.true / case.predicted - 1 if case.predicted else 0.0 for case in self.cases))

    @property
    def passed(self) -> bool:
        if self.limits is None:
            return all(case.within or case.note for case in self.cases)
        return self.median <= self.limits[0] and self.worst <= self.limits[1] and not self.wrong_fits

    def examined(self) -> dict[str, list[str]]:
        """Every value of every fact among the cases."""
        found: dict[str, set[str]] = {}
        for case in self.cases:
            for name, value in case.facts.items():
                found.setdefault(name, set()).update((value,) if isinstance(value, str) else value)
        return {name: sorted(values) for name, values in sorted(found.items())}

    def to_dict(self) -> dict[str, Any]:
        return {
            "kind": self.kind,
            "num": len(self.cases),
            "median": self.median,
            "worst": self.worst,
            "low": self.low,
            "limits": self.limits,
            "wrong_fits": self.wrong_fits,
            "passed": self.passed,
            "examined": self.examined(),
            "cases": [dataclasses.asdict(case) for case in self.cases],
        }


def sit() -> tuple[Part, ...]:
    """Every part of the exam, from the records; nothing is compiled or run."""
    return (
        problems_part("worked problems", PROBLEMS),
        *(steps_part(kind, [one for one in published_runs() if one.target.backend == kind]) for kind in KINDS),
        *(memory_part(kind, [one for one in compiled_train() if one.target.backend == kind]) for kind in TRAIN_MEMORY),
        serve_part(),
        problems_part(SERVING, [one for one in PROBLEMS if one.file in SERVING_FILES]),
    )


def problems_part(kind: str, problems: Iterable[Problem]) -> Part:
    """Worked problems, each within its own tolerance; a problem of several numbers counts by its worst."""
    cases = []
    for one in problems:
        found = solved(one)
        worst = max(range(len(found.errors)), key=lambda index: abs(found.errors[index]))
        cases.append(
            Case(
                name=f"{one.id}: {one.ask}",
                error=found.errors[worst],
                within=found.holds,
                predicted=found.answer[worst],
                true=one.answer[worst],
                note=None if found.holds else one.note,
            )
        )
    return Part(kind=kind, cases=tuple(cases), limits=None)


def steps_part(kind: str, runs: Sequence[PublishedRun]) -> Part:
    """Published steps, each predicted by efficiencies fitted without all runs of its model on its chip."""
    errors = left_out_errors(runs, BY_KIND[kind])
    cases = [
        Case(
            name=one.name,
            error=error,
            within=abs(error) <= STEP_LIMITS[1],
            predicted=(1 + error) * one.step_s,
            true=one.step_s,
            facts=time_facts(one.run, one.target),
        )
        for one, error in zip(runs, errors, strict=True)
    ]
    return Part(kind=KINDS[kind], cases=tuple(cases), limits=STEP_LIMITS)


def memory_part(kind: str, compiled: Sequence[CompiledTrain]) -> Part:
    """Train steps that the compiler of a kind of chip compiled."""
    cases, wrong = [], 0
    for one in compiled:
        question = one.question
        told = memory_of(question)
        error = told.total_bytes / one.needed_bytes - 1
        wrong += told.verdict == "fits" and not one.fits
        cases.append(
            Case(
                name=one.name,
                error=error,
                within=abs(error) <= MEMORY_LIMITS[1],
                predicted=told.total_bytes,
                true=one.needed_bytes,
                facts=memory_facts(question),
            )
        )
    return Part(kind=TRAIN_MEMORY[kind], cases=tuple(cases), limits=MEMORY_LIMITS, wrong_fits=wrong)


def serve_part() -> Part:
    """The engine's programs that the TPU compiler compiled."""
    cases, wrong = [], 0
    for one in compiled_serve():
        memory = serve_memory(one.run, one.target)
        predicted = one.predicted_bytes(memory)
        error = predicted / one.needed_bytes - 1
        wrong += memory.fits and not one.fits
        cases.append(
            Case(
                name=one.name,
                error=error,
                within=abs(error) <= MEMORY_LIMITS[1],
                predicted=predicted,
                true=one.needed_bytes,
                facts={"chip": one.target.chip},
            )
        )
    return Part(kind=SERVE_MEMORY, cases=tuple(cases), limits=MEMORY_LIMITS, wrong_fits=wrong)


def headline_errors() -> list[tuple[PublishedRun, float]]:
    """The ten runs of the README and their errors by the efficiencies in use (of which they are a part)."""
    return [(one, train_time(one.run, one.target).step_s / one.step_s - 1) for one in published_runs() if one.headline]
