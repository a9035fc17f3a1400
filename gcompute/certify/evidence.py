"""What a row of the certificate holds: numbers beside their limits, collectives, compilations, and a verdict."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any

import numpy as np

# A leaf smaller than this share of its tree is compared on the tree's scale. A key bias under a softmax has a gradient
# of exactly 0, and what a program returns for it is rounding: relative to itself that would be an error of 1.
SMALLEST_LEAF = 1e-2


class Verdict(StrEnum):
    """equal: all within limits. differs: something is not. refused: illegal, and the library said so."""

    EQUAL = "equal"
    DIFFERS = "differs"
    REFUSED = "refused"


@dataclass(frozen=True, slots=True, kw_only=True)
class Check:
    """One compared quantity: the relative error, the most that is allowed, and where the error is largest.

    band: what one device errs by in the same precision when only the order of its sums changes; None where the limit
    is not measured. leaves: the error of each array of a tree, by path.
    """

    quantity: str
    precision: str
    error: float
    limit: float
    band: float | None = None
    where: str = ""
    leaves: Mapping[str, float] = field(default_factory=dict)

    @property
    def passed(self) -> bool:
        # Written so that NaN fails.
        return self.error <= self.limit

    @property
    def ratio(self) -> float | None:
        """error / band."""
        return None if self.band is None else self.error / self.band if self.band else math.inf

    def to_dict(self) -> dict[str, Any]:
        numbers = {"error": self.error, "limit": self.limit, "band": self.band, "ratio": self.ratio}
        return {
            "quantity": self.quantity,
            "precision": self.precision,
            **{name: _plain(value) for name, value in numbers.items()},
            "where": self.where,
            "leaves": {path: _plain(value) for path, value in self.leaves.items()},
            "passed": self.passed,
        }


def _plain(number: float | None) -> float | str | None:
    """JSON has no NaN and no infinity."""
    return number if number is None or math.isfinite(number) else str(number)


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """One program against its reference.

    collectives: {where it was compiled: {axes: {kind: how many}}}. faults: what is wrong besides numbers, as sentences.
    """

    name: str
    form: str
    strategies: tuple[str, ...]
    checks: tuple[Check, ...] = ()
    collectives: Mapping[str, Mapping[str, Mapping[str, int]]] = field(default_factory=dict)
    compilations: int | None = None
    faults: tuple[str, ...] = ()
    refusal: str | None = None
    seconds: float = 0.0

    @property
    def verdict(self) -> Verdict:
        if self.faults or not all(check.passed for check in self.checks):
            return Verdict.DIFFERS
        return Verdict.REFUSED if self.refusal is not None else Verdict.EQUAL

    @property
    def reasons(self) -> list[str]:
        """Why the row is red, a sentence each."""
        return [
            *(
                f"{check.quantity} in {check.precision} is off by {check.error:.1e}, and {check.limit:.1e} is the most"
                + (f" (worst: {check.where})" if check.where else "")
                for check in self.checks
                if not check.passed
            ),
            *self.faults,
        ]

    def to_dict(self) -> dict[str, Any]:
        return {
            "name": self.name,
            "form": self.form,
            "strategies": list(self.strategies),
            "verdict": self.verdict.value,
            "checks": [check.to_dict() for check in self.checks],
            "collectives": {
                place: {axes: dict(kinds) for axes, kinds in found.items()} for place, found in self.collectives.items()
            },
            "compilations": self.compilations,
            "reasons": self.reasons,
            "refusal": self.refusal,
            "seconds": round(self.seconds, 3),
        }


def relative_errors(found: Mapping[str, Any], truth: Mapping[str, Any]) -> dict[str, float]:
    """max |found - truth| / max |truth| of each leaf, in float64; inf where a leaf is missing or of another shape.

    >>> relative_errors({"w": [1.0, 2.5]}, {"w": [1.0, 2.0]})
    {'w': 0.25}
    """
    wide = {path: np.asarray(leaf, np.float64) for path, leaf in truth.items()}
    largest = max((float(np.abs(leaf).max(initial=0.0)) for leaf in wide.values()), default=0.0)
    errors = dict.fromkeys(found.keys() - wide.keys(), math.inf)
    for path, leaf in wide.items():
        other = None if path not in found else np.asarray(found[path], np.float64)
        if other is None or other.shape != leaf.shape:
            errors[path] = math.inf
            continue
        scale = max(float(np.abs(leaf).max(initial=0.0)), SMALLEST_LEAF * largest)
        # With a truth of nothing but zeros there is no scale: any difference counts in full.
        errors[path] = float(np.abs(other - leaf).max(initial=0.0)) / (scale or 1.0)
    return errors


def compare(
    quantity: str,
    found: Mapping[str, Any],
    truth: Mapping[str, Any],
    *,
    precision: str,
    limit: float,
    band: float | None = None,
) -> Check:
    """The leaf of `found` that is furthest from `truth`, as a check."""
    errors = relative_errors(found, truth)
    # NaN is the worst of all, and max() would step over it.
    where = max(errors, key=lambda path: math.inf if math.isnan(errors[path]) else errors[path])
    return Check(
        quantity=quantity,
        precision=precision,
        error=errors[where],
        limit=limit,
        band=band,
        where=where if len(errors) > 1 else "",
        leaves=errors if len(errors) > 1 else {},
    )
