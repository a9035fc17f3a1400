"""The collectives of a compiled program: how many, of what size, between which devices, how often.

Read from the program's text (HLO), which says what the compiler chose, not what was asked for. Bytes are those of one
device, without the padding of layouts.
"""

import math
import re
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from jax.sharding import Mesh

from gcompute.aot.device_groups import (
    Groups,
    axes_between,
    axes_between_slices,
    axes_of_groups,
    parse_groups,
    parse_pairs,
    positions_in_mesh,
)
from gcompute.aot.program_text import Computation, Instruction, Program, Shape, parse_programs

KINDS = (
    "all-reduce",
    "all-gather",
    "reduce-scatter",
    "all-to-all",
    "ragged-all-to-all",
    "collective-permute",
    "collective-broadcast",
)
# A TPU fuses an all-reduce with the slice of it that a device keeps, under this name.
FUSED_REDUCE_SCATTER = "all-reduce-scatter"
# Between TPU slices a collective becomes a send to, and a receive from, a runtime on the hosts, which say what it is.
BETWEEN_SLICES = r'_xla_megascale_transfer_type="(\w+)"'


class UnreadableProgram(ValueError):
    """The compiler made a program that it cannot print; `compiler.compile_lowered` reads most such programs too."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Collective:
    """One collective instruction.

    `loops` are the trip counts of the loops around it, outermost first, None where the count is not a constant.
    `axes` are the mesh axes that its groups run along: None where no mesh was given or no whole axes fit. What goes
    `between_slices` uses the data centre's network; there the text alone does not always tell the `group_size`.
    """

    kind: str
    name: str
    dtype: str
    operand_bytes: int
    result_bytes: int
    group_size: int | None
    groups: Groups
    pairs: Groups
    axes: tuple[str, ...] | None
    loops: tuple[int | None, ...]
    source: str
    between_slices: bool = False

    @property
    def trips(self) -> int | None:
        """How often it runs, None if a loop around it has no constant count."""
        known = [count for count in self.loops if count is not None]
        return math.prod(known) if len(known) == len(self.loops) else None

    @property
    def known_trips(self) -> int:
        """How often it runs for one pass of each loop without a constant count."""
        return math.prod(count for count in self.loops if count is not None)

    @property
    def sent_bytes(self) -> float:
        """Bytes that one device sends in one run, by the ring formula with n devices a group.

        all-gather (n-1)/n result; reduce-scatter and all-to-all (n-1)/n operand; all-reduce 2 (n-1)/n operand;
        collective-permute the operand. For a ragged all-to-all, and where n is not known, it is the most that it can
        be.

        Source: Chan et al., "Collective communication: theory, practice, and experience", 2007, section 4.
        """
        others = (self.group_size - 1) / self.group_size if self.group_size else 1.0
        match self.kind:
            case "all-gather":
                return others * self.result_bytes
            case "all-reduce":
                return 2 * others * self.operand_bytes
            case "collective-permute":
                stays = self.pairs and all(source == target for source, target in self.pairs)
                return 0.0 if stays else float(self.operand_bytes)
            case "collective-broadcast":
                return float(self.operand_bytes)
            case _:
                return others * self.operand_bytes


def program_text(compiled: Any) -> str:
    """The text of a compiled program.

    Raises:
      UnreadableProgram: the compiler cannot print it.
    """
    errors = []
    for read in (
        lambda: compiled.as_text(),
        lambda: "\n\n".join(module.to_string() for module in compiled.runtime_executable().hlo_modules()),
    ):
        try:
            text = read()
        except Exception as error:  # libtpu raises what its status codes map to: RuntimeError and others
            errors.append((str(error).strip() or type(error).__name__).splitlines()[0])
        else:
            if text:
                return text
    raise UnreadableProgram(f"unreadable: {errors[0] if errors else 'the compiler gives no text'}")


def count_collectives(compiled: Any) -> dict[str, int]:
    """How many collectives of each kind a compiled program holds, each instruction once however often it runs.

    `compiled` is `jit(f).lower(...).compile()` or its text. An asynchronous pair counts once, and an all-reduce that
    the compiler fused with the slice it keeps counts as a reduce-scatter.

    Raises:
      UnreadableProgram: the compiler cannot print it.
      ValueError: a text that is not one of a compiled program.
    """
    return dict(Counter(collective.kind for collective in read_collectives(compiled)))


def count_kernels(text: str) -> dict[str, int]:
    """How many calls of each TPU kernel (Pallas) a program's text holds, each once however often it runs.

    Raises:
      ValueError: this is not the text of a compiled program.
    """
    reached = (one for program in parse_programs(text) for _, one, _ in program.reached)
    calls = (one.name for one in reached if 'custom_call_target="tpu_custom_call"' in one.attributes)
    return dict(Counter(re.sub(r"(\.\d+)+$", "", name) for name in calls))


def read_collectives(
    compiled: Any, mesh: Mesh | None = None, *, transfers: Mapping[str, Groups] | None = None
) -> list[Collective]:
    """Every collective of a compiled program, or of its text, in the order in which the text runs.

    With the `mesh` that the program was compiled for, each says which axes it runs along. `transfers` are the groups of
    device ids that talk between TPU slices, by name, which the text itself leaves out; see `compile_lowered`.

    Raises:
      UnreadableProgram: the compiler cannot print it.
      ValueError: a text that is not one of a compiled program.
    """
    text = compiled if isinstance(compiled, str) else program_text(compiled)
    found = []
    for program in parse_programs(text):
        for computation, instruction, loops in program.reached:
            kind = _kind(computation, instruction)
            if kind is None:
                continue
            if instruction.opcode == "send":
                found.append(_read_between_slices(computation, instruction, kind, loops, mesh, transfers or {}))
            else:
                found.append(_read(program, computation, instruction, kind, loops, mesh))
    return found


def collective_bytes_by_axis(collectives: Iterable[Collective]) -> dict[tuple[str, ...] | None, dict[str, float]]:
    """Bytes that one device sends, by axes and kind, loops included: {("fsdp",): {"all-gather": 1024.0}}.

    A loop without a constant count counts as one pass.
    """
    totals: dict[tuple[str, ...] | None, dict[str, float]] = {}
    for collective in collectives:
        kinds = totals.setdefault(collective.axes, {})
        kinds[collective.kind] = kinds.get(collective.kind, 0.0) + collective.sent_bytes * collective.known_trips
    return totals


def _kind(computation: Computation, instruction: Instruction) -> str | None:
    if instruction.opcode == "send":
        transfer = instruction.attribute(BETWEEN_SLICES)
        if transfer is None:
            return None
        return "collective-permute" if transfer == "ONE_TO_ONE" else transfer.lower().replace("_", "-")
    kind = instruction.opcode.removesuffix("-start")
    if kind not in KINDS:
        return None
    # A TPU writes one collective into the fusion that starts it, those that advance it beside their own work, and the
    # one that ends it.
    if '"async_collective_fusion_config"' in instruction.attributes and not _starts(computation):
        return None
    if kind == "all-reduce" and computation.name.startswith(FUSED_REDUCE_SCATTER):
        return "reduce-scatter"
    return kind


def _starts(computation: Computation) -> bool:
    return any('"AsyncCollectiveStart"' in one.attributes for one in computation.instructions.values())


def _result(computation: Computation, instruction: Instruction, kind: str) -> Shape:
    """The result, which a start holds beside its operand."""
    if kind == "reduce-scatter" and instruction.opcode.startswith("all-reduce"):
        return computation.instructions[computation.root].shape
    if instruction.opcode.endswith("-start") and kind != "all-reduce":
        return instruction.shape.part(1)
    return instruction.shape


def _read(
    program: Program,
    computation: Computation,
    instruction: Instruction,
    kind: str,
    loops: tuple[int | None, ...],
    mesh: Mesh | None,
) -> Collective:
    operands = [computation.operand_shape(name) for name in instruction.operands]
    if kind == "ragged-all-to-all":
        operands = operands[:1]
    positions = positions_in_mesh(mesh, program.num_devices) if mesh is not None else np.arange(0)
    groups, axes, size = (), None, 2
    pairs = parse_pairs(instruction.attribute(r"source_target_pairs=(\{(?:\{[^}]*\},?)*\})") or "{}")
    if kind == "collective-permute":
        axes = axes_between(pairs, mesh, positions) if mesh is not None else None
    else:
        written = instruction.attribute(
            r"replica_groups=(\{(?:\{[^}]*\},?\s*)*\}|\[[^ ]*\]<=\[[^\]]*\](?:T\([\d,]*\))?|@?mesh[^{]*\{[^}]*\})"
        )
        groups = parse_groups(written or "{}", program.num_devices)
        size = max(len(group) for group in groups)
        axes = axes_of_groups(groups, mesh, positions) if mesh is not None else None
    return Collective(
        kind=kind,
        name=instruction.name,
        dtype=_dtypes(operands),
        operand_bytes=sum(shape.num_bytes for shape in operands),
        result_bytes=_result(computation, instruction, kind).num_bytes,
        group_size=size,
        groups=groups,
        pairs=pairs,
        axes=axes,
        loops=loops,
        source=instruction.attribute(r'op_name="([^"]*)"') or "",
    )


def _read_between_slices(
    computation: Computation,
    send: Instruction,
    kind: str,
    loops: tuple[int | None, ...],
    mesh: Mesh | None,
    transfers: Mapping[str, Groups],
) -> Collective:
    """A send between slices together with its receive, which has the same name."""
    named = r'_xla_host_transfer_rendezvous="([^"]*)"'
    name = send.attribute(named) or send.name
    sent = computation.operand_shape(send.operands[0])
    receives = (one for one in computation.instructions.values() if one.opcode == "recv")
    received = next((one.shape.part(0) for one in receives if one.attribute(named) == name), sent)
    groups, axes, size = transfers.get(name, ()), None, None
    if groups and mesh is not None:
        places = {device.id: place for place, device in enumerate(mesh.devices.flat)}
        groups = tuple(tuple(places[number] for number in group) for group in groups)
        axes = axes_between(groups, mesh, np.arange(mesh.size))
    elif mesh is not None:
        # With several such axes the text does not tell which of them.
        crossing = axes_between_slices(mesh)
        axes = crossing if len(crossing) == 1 else None
    if groups:
        size = max(len(group) for group in groups)
    elif kind in ("all-gather", "reduce-scatter") and sent.num_bytes and received.num_bytes:
        size = max(sent.num_bytes, received.num_bytes) // min(sent.num_bytes, received.num_bytes)
    permutes = kind == "collective-permute"
    return Collective(
        kind=kind,
        name=send.name,
        dtype=_dtypes([sent]),
        operand_bytes=sent.num_bytes,
        result_bytes=received.num_bytes,
        group_size=size,
        groups=() if permutes else groups,
        pairs=groups if permutes else (),
        axes=axes,
        loops=loops,
        source=send.attribute(r'op_name="([^"]*)"') or "",
        between_slices=True,
    )


def _dtypes(shapes: list[Shape]) -> str:
    return "+".join(sorted({dtype for shape in shapes for dtype, _ in shape.arrays}))
