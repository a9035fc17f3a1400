"""What the exam found of each class of prediction, and whether a question lies inside what was examined.

accuracy.json is written by `gcompute exam --write`; a test holds it to what the exam finds.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path

RECORD = Path(__file__).with_name("accuracy.json")


@dataclass(frozen=True, slots=True, kw_only=True)
class Accuracy:
    """The error of one class of prediction, as shares: of `num` cases, `median` and `worst`. low: the most by which a
    prediction was too small. outside: in what the question differs from all cases, empty where it does not."""

    kind: str
    num: int
    median: float
    worst: float
    low: float
    outside: tuple[str, ...] = ()

    def __str__(self) -> str:
        words = f"median {self.median:.1%}, worst {self.worst:.1%} of {self.num} examined"
        return words + (f"; outside what was examined: {', '.join(self.outside)}" if self.outside else "")


@cache
def _record() -> Mapping[str, Mapping[str, object]]:
    return json.loads(RECORD.read_text(encoding="utf-8"))["classes"]


def accuracy_of(kind: str, facts: Mapping[str, str | tuple[str, ...]]) -> Accuracy:
    """The accuracy of predictions of class `kind`; `facts` say what the question is about, as in {"chip": "v5e"}.

    A fact that the exam had no case of is named in `outside`.

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
    return Accuracy(kind=kind, num=int(str(found["num"])), outside=tuple(outside), **figures)
