"""What the compiler says of a program: whether it fits, memory by kind, collectives by kind and axis."""

import dataclasses
from dataclasses import dataclass
from typing import Any

import jax
from jax.sharding import Mesh

from gcompute.aot.compiler import Buffer, MemoryByKind, compile_lowered
from gcompute.aot.hlo import Collective, read_collectives
from gcompute.hardware.target import Target


@dataclass(frozen=True, slots=True, kw_only=True)
class CollectiveTotal:
    """All collectives of one kind and element type along the same axes.

    `num_instructions` are in the program; they run `runs` times. `sent_bytes` is what one device sends in all these
    runs, by the ring formula. A loop whose count is not a constant counts as one pass, as the trainer's over steps.
    """

    kind: str
    axes: tuple[str, ...] | None
    dtype: str
    between_slices: bool
    num_instructions: int
    runs: int
    sent_bytes: float


@dataclass(frozen=True, slots=True, kw_only=True)
class CompileReport:
    """What became of a program compiled for `target`; bytes are those of one device.

    limit_bytes: what the compiler may use, None on a CPU. largest: the largest buffers, where the compiler lists them.
    unreadable: why there are no collectives.
    """

    target: str
    num_devices: int
    compile_s: float
    fits: bool
    needed_bytes: int
    limit_bytes: int | None
    memory: MemoryByKind
    largest: tuple[Buffer, ...]
    collectives: tuple[CollectiveTotal, ...]
    unreadable: str | None

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return dataclasses.asdict(self)


def compile_report(
    lowered: jax.stages.Lowered, target: Target, *, mesh: Mesh | None = None
) -> tuple[CompileReport, str | None]:
    """Compile `lowered` for the devices of `target` that it was lowered for; what came of it, and the program's text.

    With the `mesh`, collectives say along which axes they run. The text is None where the compiler gives none.

    Raises:
      CompilerError: the compiler failed, and not for lack of device memory.
    """
    done = compile_lowered(lowered, target.backend)
    read = read_collectives(done.text, mesh, transfers=done.transfers) if done.text is not None else []
    needed, limit = done.memory.total_bytes, done.available_bytes or target.hbm_bytes
    report = CompileReport(
        target=str(target),
        num_devices=target.num_devices,
        compile_s=done.compile_s,
        # XLA compiles for a GPU, and for a CPU, what does not fit it.
        fits=done.fits and (limit is None or needed <= limit),
        needed_bytes=needed,
        limit_bytes=limit,
        memory=done.memory,
        largest=done.largest,
        collectives=total_collectives(read),
        unreadable=done.unreadable,
    )
    return report, done.text


def total_collectives(collectives: list[Collective]) -> tuple[CollectiveTotal, ...]:
    """The collectives added up by kind, axes and element type, what sends most first."""
    groups: dict[tuple[str, tuple[str, ...] | None, str, bool], list[Collective]] = {}
    for one in collectives:
        groups.setdefault((one.kind, one.axes, one.dtype, one.between_slices), []).append(one)
    totals = (
        CollectiveTotal(
            kind=kind,
            axes=axes,
            dtype=dtype,
            between_slices=between_slices,
            num_instructions=len(members),
            runs=sum(one.known_trips for one in members),
            sent_bytes=sum(one.known_trips * one.sent_bytes for one in members),
        )
        for (kind, axes, dtype, between_slices), members in groups.items()
    )
    return tuple(sorted(totals, key=lambda total: -total.sent_bytes))
