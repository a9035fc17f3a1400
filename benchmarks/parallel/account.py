"""A compiled program's collectives held against the textbook: every byte has a formula, a reason, or no explanation."""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import jax
from jax.sharding import Mesh
from textbook import ALL_REDUCE, REDUCE_SCATTER, Bytes, gathered, reduced

from gcompute.aot.compiler import MemoryByKind, compile_lowered
from gcompute.aot.hlo import Collective, read_collectives
from gcompute.config.mesh import Axis, MeshShape
from gcompute.parallel.collectives import HAS_PCAST
from gcompute.parallel.mesh import build_mesh

Axes = tuple[str, ...]
SCALAR_BYTES = 4
NO_REDUCE_SCATTER = "XLA:CPU makes no reduce-scatters of its own, but all-reduces, of which each device keeps a slice"
NARROWED = "sent as bfloat16, which is all that the TPU's products of float32 arrays read"
PLACES = "JAX 0.7 tells a device its place by a reduce-scatter of integers"


@dataclass(frozen=True, slots=True, kw_only=True)
class Reason:
    """Bytes that no textbook counts, or below zero those that it counts and nobody sends, and why.

    backend: the only compiler that it holds for; None for all.
    """

    axes: Axes
    kind: str
    sent_bytes: float
    why: str
    backend: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Program:
    """What to compile, and what it should send.

    textbook: by mesh axes. scalars: by axes, the most numbers that may be all-reduced beside it, and what they are.
    """

    name: str
    mesh: MeshShape
    lower: Callable[[Mesh], jax.stages.Lowered]
    textbook: Mapping[Axes, Bytes]
    reasons: tuple[Reason, ...] = ()
    scalars: Mapping[Axes, tuple[int, str]] | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Sent:
    """One kind of collective along the same axes. unexplained_bytes: what neither formula nor reason accounts for."""

    axes: Axes | None
    kind: str
    num_instructions: int
    runs: int
    sent_bytes: float
    textbook_bytes: float
    reasons: tuple[str, ...]
    unexplained_bytes: float

    @property
    def ratio(self) -> float | None:
        """Of what is sent to the textbook; None where that has nothing."""
        return self.sent_bytes / self.textbook_bytes if self.textbook_bytes else None


@dataclass(frozen=True, slots=True, kw_only=True)
class Account:
    """A program that was compiled."""

    name: str
    mesh: MeshShape
    compile_s: float
    memory: MemoryByKind
    sent: tuple[Sent, ...]


def scattered_whole(axes: Axes, size: float, n: int) -> tuple[Reason, Reason]:
    """Where the compiler is to scatter a sum and reduces it whole."""
    return (
        Reason(axes=axes, kind=REDUCE_SCATTER, sent_bytes=-gathered(size, n), why=NO_REDUCE_SCATTER, backend="cpu"),
        Reason(axes=axes, kind=ALL_REDUCE, sent_bytes=reduced(size, n), why=NO_REDUCE_SCATTER, backend="cpu"),
    )


def account(program: Program, devices: list[Any]) -> Account:
    """Compile `program` for the first of `devices` and account for what a device sends."""
    mesh = build_mesh(program.mesh, devices[: program.mesh.num_devices])
    backend = devices[0].platform
    done = compile_lowered(program.lower(mesh), backend)
    if done.text is None:
        raise ValueError(f"{program.name}: {done.unreadable}")
    collectives = [one for one in read_collectives(done.text, mesh) if one.group_size != 1]
    return Account(
        name=program.name,
        mesh=program.mesh,
        compile_s=done.compile_s,
        memory=done.memory,
        sent=tuple(compare(program, collectives, backend)),
    )


def compare(program: Program, collectives: Iterable[Collective], backend: str) -> list[Sent]:
    """The collectives by axes and kind, each against the textbook and the reasons."""
    found: dict[tuple[Axes | None, str], list[Collective]] = {}
    for one in collectives:
        found.setdefault((one.axes, one.kind), []).append(one)
    expected: dict[tuple[Axes | None, str], float] = {
        (axes, kind): size for axes, kinds in program.textbook.items() for kind, size in kinds.items() if size
    }
    reasons: dict[tuple[Axes | None, str], list[Reason]] = {}
    for reason in (*program.reasons, *_places(found), *_narrowed(found)):
        if reason.backend in (None, backend) and reason.sent_bytes:
            reasons.setdefault((reason.axes, reason.kind), []).append(reason)
    return [
        _sent(
            axes,
            kind,
            found.get((axes, kind), []),
            expected.get((axes, kind), 0),
            reasons.get((axes, kind), []),
            program,
        )
        for axes, kind in sorted({*found, *expected, *reasons}, key=lambda key: (_order(key[0]), key[1]))
    ]


def _order(axes: Axes | None) -> list[int]:
    return [list(Axis).index(Axis(axis)) for axis in axes] if axes else [len(Axis)]


def _places(found: Mapping[tuple[Axes | None, str], list[Collective]]) -> list[Reason]:
    """On JAX 0.7, see `gcompute.parallel.collectives.axis_index`: n integers."""
    if jax.__version_info__ >= HAS_PCAST:
        return []
    return [
        Reason(axes=one.axes or (), kind=one.kind, sent_bytes=one.sent_bytes * one.known_trips, why=PLACES)
        for (_, kind), members in found.items()
        for one in members
        if kind == REDUCE_SCATTER and one.dtype == "s32" and one.operand_bytes == SCALAR_BYTES * (one.group_size or 0)
    ]


def _narrowed(found: Mapping[tuple[Axes | None, str], list[Collective]]) -> list[Reason]:
    """Programs are float32 throughout: what travels as bfloat16 is half of what was to be sent."""
    return [
        Reason(axes=one.axes or (), kind=kind, sent_bytes=-one.sent_bytes * one.known_trips, why=NARROWED)
        for (_, kind), members in found.items()
        for one in members
        if one.dtype == "bf16"
    ]


def _sent(
    axes: Axes | None, kind: str, members: list[Collective], expected: float, reasons: list[Reason], program: Program
) -> Sent:
    sent = sum(one.sent_bytes * one.known_trips for one in members)
    left = sent - expected - sum(reason.sent_bytes for reason in reasons)
    told = list(dict.fromkeys(reason.why for reason in reasons))
    if kind == ALL_REDUCE and axes is not None and left > 0 and program.scalars and axes in program.scalars:
        most, what = program.scalars[axes]
        each = reduced(SCALAR_BYTES, max(one.group_size or 1 for one in members))
        count = round(left / each)
        if count * each == left and count <= most:
            left, told = 0.0, [*told, f"{count} scalar{'s' * (count > 1)}: {what}"]
    return Sent(
        axes=axes,
        kind=kind,
        num_instructions=len(members),
        runs=sum(one.known_trips for one in members),
        sent_bytes=sent,
        textbook_bytes=expected,
        reasons=tuple(told),
        unexplained_bytes=left,
    )
