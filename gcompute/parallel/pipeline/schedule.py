"""Pipeline schedules as data: which stage does what in which tick.

A *microbatch* is one of the M equal parts of a batch. A *stage* is a device, or a group that shares one position on
the stage axis. A *chunk* is one of the v pieces of the model that a stage holds, and the model passes through
*virtual stages* 0 .. S v - 1: chunk c of stage s is virtual stage c S + s, so that neighbours are neighbours on a ring.

A tick has three slots a stage, run in this order:
  F  forward of one microbatch through one chunk,
  B  the gradient with respect to the chunk's input, and to its weights unless the schedule splits them,
  W  the gradient with respect to the chunk's weights, in schedules that split it from B.
All stages go through the ticks in lockstep, as one SPMD program must: a tick costs the kinds of work that any stage
does in it. What a stage sends in a tick, its neighbour has in the next.
"""

import re
from collections.abc import Callable
from dataclasses import dataclass
from enum import StrEnum
from typing import Any, NamedTuple


class Kind(StrEnum):
    """The kinds of work, in the order of a tick's slots."""

    FORWARD = "F"
    BACKWARD = "B"
    WEIGHT = "W"


class Work(NamedTuple):
    """What a slot works on."""

    microbatch: int
    chunk: int = 0


class Cell(NamedTuple):
    """What one stage does in one tick; None where it does nothing of that kind."""

    forward: Work | None = None
    backward: Work | None = None
    weight: Work | None = None

    @classmethod
    def parse(cls, text: str) -> "Cell":
        """Read "F3 B1": F of microbatch 3 and B of microbatch 1. "F3.1" is chunk 1; no number after a dot is chunk 0.

        Raises:
          ValueError: a part is not of that form, or a kind is named twice.
        """
        found: dict[Kind, Work] = {}
        for part in text.split():
            match = re.fullmatch(r"([FBW])(\d+)(?:\.(\d+))?", part)
            if match is None:
                raise ValueError(
                    f'schedule entry {part!r} is not of the form "F3" or "F3.1": a kind, F, B or W, and numbers.'
                )
            kind = Kind(match[1])
            if kind in found:
                raise ValueError(f"schedule cell {text!r} has two entries of kind {kind}: one a tick and stage.")
            found[kind] = Work(int(match[2]), int(match[3] or 0))
        return cls(*(found.get(kind) for kind in Kind))

    def of(self, kind: Kind) -> Work | None:
        return self[list(Kind).index(kind)]

    def text(self, *, with_chunks: bool) -> str:
        """The inverse of `parse`."""
        chunk = ".{0.chunk}" if with_chunks else ""
        return " ".join(
            f"{kind}{work.microbatch}" + chunk.format(work) for kind, work in zip(Kind, self, strict=True) if work
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Schedule:
    """A table of cells, `ticks[tick][stage]`; `validate` says whether it can run.

    >>> print(one_f_one_b(2, 3))
    1f1b: 2 stages, 3 microbatches
    tick  stage 0  stage 1
       0  F0       .
       1  F1       F0 B0
       2  F2 B0    F1 B1
       3  B1       F2 B2
       4  B2       .
    """

    name: str = "custom"
    num_stages: int
    num_microbatches: int
    num_chunks: int = 1
    ticks: tuple[tuple[Cell, ...], ...]

    def __post_init__(self) -> None:
        for field in ("num_stages", "num_microbatches", "num_chunks"):
            _check_count(field, getattr(self, field))
        for tick, cells in enumerate(self.ticks):
            if len(cells) != self.num_stages:
                raise ValueError(f"tick {tick} has {len(cells)} cells and the schedule {self.num_stages} stages.")

    @property
    def num_virtual_stages(self) -> int:
        return self.num_stages * self.num_chunks

    @property
    def splits_backward(self) -> bool:
        """Whether the gradient of the weights has slots of its own."""
        return any(cell.weight is not None for cells in self.ticks for cell in cells)

    def kinds(self, tick: int) -> tuple[Kind, ...]:
        """The kinds of work that some stage does in a tick: what all stages must run."""
        return tuple(kind for kind in Kind if any(cell.of(kind) for cell in self.ticks[tick]))

    def __str__(self) -> str:
        chunks = f", {self.num_chunks} chunks a stage" if self.num_chunks > 1 else ""
        title = f"{self.name}: {self.num_stages} stages, {self.num_microbatches} microbatches{chunks}"
        rows = [["tick", *(f"stage {stage}" for stage in range(self.num_stages))]]
        rows += [[f"{tick:4}", *(cell or "." for cell in cells)] for tick, cells in enumerate(self._texts())]
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
        return "\n".join([title, *lines])

    def _texts(self) -> list[list[str]]:
        return [[cell.text(with_chunks=self.num_chunks > 1) for cell in cells] for cells in self.ticks]

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON or TOML: the fields, with each cell as text such as "F3 B1"."""
        return {
            "name": self.name,
            "num_stages": self.num_stages,
            "num_microbatches": self.num_microbatches,
            "num_chunks": self.num_chunks,
            "ticks": self._texts(),
        }

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> "Schedule":
        """The inverse of `to_dict`, for tables that a user writes; `name` and `num_chunks` may be left out.

        >>> Schedule.from_dict({"num_stages": 1, "num_microbatches": 1, "ticks": [["F0"], ["B0"]]}).name
        'custom'

        Raises:
          ValueError: a field is unknown or missing, or a cell cannot be read.
        """
        known, needed = {"name", "num_stages", "num_microbatches", "num_chunks", "ticks"}, {"name", "num_chunks"}
        unknown, missing = set(values) - known, known - needed - set(values)
        if unknown or missing:
            wrong = f"does not know {sorted(unknown)}" if unknown else f"lacks {sorted(missing)}"
            raise ValueError(f"schedule {wrong}. Its fields are {', '.join(sorted(known))}.")
        ticks = tuple(tuple(Cell.parse(text) for text in cells) for cells in values["ticks"])
        return cls(**{**values, "ticks": ticks})


def _check_count(field: str, value: int) -> None:
    if not isinstance(value, int) or value < 1:
        raise ValueError(f"{field} of a schedule is a whole number above 0, not {value!r}.")


# (microbatch, chunk, stage) -> tick
Timing = Callable[[int, int, int], int]


def from_timing(
    name: str,
    num_stages: int,
    num_microbatches: int,
    num_chunks: int = 1,
    *,
    forward: Timing,
    backward: Timing,
    weight: Timing | None = None,
) -> Schedule:
    """The table in which F, B and W of (microbatch i, chunk c, stage s) run in tick `forward(i, c, s)` and so on.

    Raises:
      ValueError: two entries meet in one slot.
    """
    table: dict[tuple[int, int], dict[Kind, Work]] = {}
    for kind, timing in zip(Kind, (forward, backward, weight), strict=True):
        if timing is None:
            continue
        for microbatch in range(num_microbatches):
            for chunk in range(num_chunks):
                for stage in range(num_stages):
                    tick, work = timing(microbatch, chunk, stage), Work(microbatch, chunk)
                    other = table.setdefault((tick, stage), {}).setdefault(kind, work)
                    if other != work:
                        raise ValueError(f"{kind} slot of tick {tick}, stage {stage} is given to {other} and {work}.")
    num_ticks = max((tick for tick, _ in table), default=-1) + 1
    ticks = tuple(
        tuple(Cell(*(table.get((tick, stage), {}).get(kind) for kind in Kind)) for stage in range(num_stages))
        for tick in range(num_ticks)
    )
    return Schedule(
        name=name, num_stages=num_stages, num_microbatches=num_microbatches, num_chunks=num_chunks, ticks=ticks
    )


def gpipe(num_stages: int, num_microbatches: int) -> Schedule:
    """All forwards, then all backwards: the fewest programs to compile, and M activations alive.

    F of microbatch i on stage s in tick i + s, B in tick M + S - 1 + i + (S - 1 - s).

    Source: Huang et al. 2019, "GPipe", section 2.3.
    """
    last, fill = num_stages - 1, num_microbatches + num_stages - 1
    return from_timing(
        "gpipe",
        num_stages,
        num_microbatches,
        forward=lambda i, c, s: i + s,
        backward=lambda i, c, s: fill + i + last - s,
    )


def one_f_one_b(num_stages: int, num_microbatches: int) -> Schedule:
    """One forward, one backward: GPipe's bubble, with a number of activations alive that M does not enter.

    F of microbatch i on stage s in tick i + s, B in tick i + 2 (S - 1) - s. In lockstep a hop takes a whole F and B,
    so stage s holds 2 (S - s) - 1 activations, where stages that run freely hold S - s.

    Raises:
      ValueError: fewer microbatches than stages.

    Source: Narayanan et al. 2019, "PipeDream", section 3.2, with the flush of Narayanan et al. 2021, section 2.2.1.
    """
    _at_least_stages("1f1b", num_stages, num_microbatches)
    return from_timing(
        "1f1b",
        num_stages,
        num_microbatches,
        forward=lambda i, c, s: i + s,
        backward=lambda i, c, s: i + 2 * (num_stages - 1) - s,
    )


def interleaved(num_stages: int, num_microbatches: int, num_chunks: int) -> Schedule:
    """1F1B in which each stage holds v chunks, for a bubble v times smaller and v times the transfers.

    Microbatches go round the ring in groups of S. With i = g S + r, F of chunk c on stage s is in tick
    g S v + c S + r + s, and B in tick g S v + (v - 1 - c) S + r + (v S - 1) + (S - 1 - s).

    Raises:
      ValueError: M is not a multiple of S.

    Source: Narayanan et al. 2021, "Efficient large-scale language model training on GPU clusters", section 2.2.2.
    """
    _check_count("num_stages", num_stages)
    size, round_trip = num_stages, num_stages * num_chunks
    if num_microbatches % size:
        raise ValueError(
            f"an interleaved schedule needs a multiple of its {size} stages as microbatches, not {num_microbatches}."
            f" Use {max(1, num_microbatches // size) * size} or {(num_microbatches // size + 1) * size}."
        )
    return from_timing(
        "interleaved",
        num_stages,
        num_microbatches,
        num_chunks,
        forward=lambda i, c, s: i // size * round_trip + c * size + i % size + s,
        backward=lambda i, c, s: (
            i // size * round_trip + (num_chunks - 1 - c) * size + i % size + round_trip - 1 + size - 1 - s
        ),
    )


def zero_bubble(num_stages: int, num_microbatches: int) -> Schedule:
    """1F1B with B and W split, and W late enough that it never waits.

    F and B as in `one_f_one_b`; W of microbatch i on every stage in tick i + 2 (S - 1), when B has left stage 0. So no
    stage idles in a W slot. No stage holds more activations than 1F1B's stage 0 does.

    Raises:
      ValueError: fewer microbatches than stages.

    Source: Qi et al. 2023, "Zero bubble pipeline parallelism", section 2.3, schedule ZB-H1.
    """
    _at_least_stages("zero-bubble", num_stages, num_microbatches)
    return from_timing(
        "zero-bubble",
        num_stages,
        num_microbatches,
        forward=lambda i, c, s: i + s,
        backward=lambda i, c, s: i + 2 * (num_stages - 1) - s,
        weight=lambda i, c, s: i + 2 * (num_stages - 1),
    )


def _at_least_stages(name: str, num_stages: int, num_microbatches: int) -> None:
    if num_microbatches < num_stages:
        raise ValueError(
            f"a {name} schedule needs at least as many microbatches as its {num_stages} stages, not {num_microbatches}:"
            f" with fewer it never has one forward and one backward to do. Use {num_stages} or more, or gpipe."
        )
