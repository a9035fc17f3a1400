"""What the exam found of each class of prediction, and whether a question lies inside what was examined.

accuracy.json is written by `gcompute exam --write`; a test holds it to what the exam finds.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

RECORD = Path(__file__).with_name("accuracy.json")


@dataclass(frozen=True, slots=True, kw_only=True)
class Unseen:
    """The error, as shares, of `num` published figures that no efficiency was fitted to and nobody chose by."""

    num: int
    median: float
    worst: float

    def __str__(self) -> str:
        return f"median {self.median:.0%}, worst {self.worst:.0%} of {self.num} published that no fit saw"


@dataclass(frozen=True, slots=True, kw_only=True)
class Accuracy:
    """The error of one class of prediction, as shares: of `num` cases, `median` and `worst`. low: the most by which a
    prediction was too small. outside: in what the question differs from all cases, empty where it does not. unseen: the
    error where nobody looked, None where there are no such figures."""

    kind: str
    num: int
    median: float
    worst: float
    low: float
    outside: tuple[str, ...] = ()
    unseen: Unseen | None = None

    def __str__(self) -> str:
        words = f"median {self.median:.1%}, worst {self.worst:.1%} of {self.num} examined"
        if self.unseen:
            words += f"; {self.unseen}"
        return words + (f"; outside what was examined: {', '.join(self.outside)}" if self.outside else "")


@cache
def _document() -> Mapping[str, Any]:
    return json.loads(RECORD.read_text(encoding="utf-8"))


def _record() -> Mapping[str, Mapping[str, object]]:
    return _document()["classes"]


def unseen_of(kind: str) -> Unseen | None:
    """The error on published figures that no fit saw; None where the record has none of class `kind`."""
    found = _document().get("unseen", {}).get(kind)
    return Unseen(**found) if found else None


def accuracy_of(kind: str, facts: Mapping[str, str | tuple[str, ...]], *, unseen: str | None = None) -> Accuracy:
    """The accuracy of predictions of class `kind`; `facts` say what the question is about, as in {"chip": "v5e"}.

    A fact that the exam had no case of is named in `outside`. unseen: the class of the published figures that no fit
    saw, `kind` where it is not given.

    Raises:
      ValueError: there is no such class.
    """
    if kind not in _record():
        raise ValueError(f"predictions of {kind!r} have not been examined. Legal: {', '.join(_record())}.")
    found = _record()[kind]
    examined: Mapping[str, list[str]] = found["examined"]  # pyright: ignore[reportAssignmentType]
    outside = []
    for name, value in facts.items():
        values = (value,) if isinstance(value, str) else value
        outside += [f"{name} {one}" for one in values if one not in examined.get(name, ())]
    figures = {name: float(found[name]) for name in ("median", "worst", "low")}  # pyright: ignore[reportArgumentType]
    return Accuracy(
        kind=kind, num=int(str(found["num"])), outside=tuple(outside), unseen=unseen_of(unseen or kind), **figures
    )
