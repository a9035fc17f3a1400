"""Run the compiler and keep what it says: program, text, memory, also of a program that does not fit.

The TPU compiler cannot always print a program through JAX (`async-update` in it ends in RET_CHECK), and says of one
that does not fit only how much is lacking. What it writes to a directory on request has both, so that is read.
"""

import re
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import jax

from gcompute.aot.device_groups import Groups
from gcompute.aot.hlo import UnreadableProgram, program_text

UNITS = {"": 0, "K": 10, "M": 20, "G": 30, "T": 40, "P": 50}
SIZE = r"([\d.]+)([KMGTP]?)i?B?"
# libtpu has worded it both ways.
TOO_LARGE = (
    re.compile(rf"\({SIZE}\) exceeds available HBM \({SIZE}\)"),
    re.compile(rf"Used {SIZE} of {SIZE} hbm"),
)
# allocation 6: size 4831838208, page 0, parameter 0, shape |f32[8,6144]| at ShapeIndex {}, maybe-live-out:
ALLOCATION = re.compile(r"^allocation \d+: size (\d+), (?!color)(.*):$", re.MULTILINE)
#   4.50GiB( 41%);    4.50GiB;        65536;                6; bf16[8,64], 5×f32[8,64]
BUFFER = re.compile(rf"^\s*[\d.]+\w+\(\s*\d+%\);\s*{SIZE};\s*\d+;\s*\d+; (.*)$", re.MULTILINE)
MOST_BUFFERS = 5
MOST_SHAPES = 3


class CompilerError(RuntimeError):
    """The compiler failed, and not for lack of device memory."""


@dataclass(frozen=True, slots=True, kw_only=True)
class MemoryByKind:
    """Bytes on one device, as the compiler planned them, padding included.

    `aliased` is the part of the outputs that takes the place of arguments that were given up.
    """

    arguments_bytes: int
    outputs_bytes: int
    aliased_bytes: int
    temporaries_bytes: int
    code_bytes: int

    @property
    def total_bytes(self) -> int:
        outputs = self.outputs_bytes - self.aliased_bytes
        return self.arguments_bytes + outputs + self.temporaries_bytes + self.code_bytes


@dataclass(frozen=True, slots=True, kw_only=True)
class Buffer:
    """A piece of device memory, and the arrays that lie in it one after another."""

    size_bytes: int
    arrays: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Compilation:
    """What the compiler made of a program, or why it does not fit.

    compiled: None where it does not fit; then available_bytes is what the compiler may use of a device.
    text: the compiled program, also of most that do not fit; None with the reason in `unreadable`.
    memory: of one device. largest: its largest buffers, where the compiler lists them. transfers: between TPU slices,
    the groups of device ids by the name of the transfer.
    """

    compiled: jax.stages.Compiled | None
    compile_s: float
    text: str | None
    unreadable: str | None
    memory: MemoryByKind
    available_bytes: int | None
    largest: tuple[Buffer, ...]
    transfers: dict[str, Groups]

    @property
    def fits(self) -> bool:
        return self.compiled is not None


def compile_lowered(lowered: jax.stages.Lowered, backend: str) -> Compilation:
    """Compile `lowered` for the devices that it was lowered for, which are of platform `backend`.

    Raises:
      CompilerError: the compiler failed, and not for lack of device memory.
    """
    with tempfile.TemporaryDirectory() as directory:
        wanted = {"xla_dump_to": directory, "xla_dump_hlo_as_text": True} if backend == "tpu" else None
        started = time.perf_counter()
        try:
            compiled = lowered.compile(compiler_options=wanted)
        except jax.errors.JaxRuntimeError as error:
            compiled, message = None, str(error)
        else:
            message = ""
        compile_s = time.perf_counter() - started
        written = _Written(Path(directory))
        text, unreadable = written.program, None
        if text is None and compiled is not None:
            try:
                text = program_text(compiled)
            except UnreadableProgram as error:
                unreadable = str(error)
        elif text is None:
            unreadable = "unreadable: the compiler wrote no program"
        sizes = parse_too_large(message)
        if compiled is None and sizes is None:
            raise CompilerError(f"the compiler failed: {message.strip()}")
        return Compilation(
            compiled=compiled,
            compile_s=compile_s,
            text=text,
            unreadable=unreadable,
            memory=_memory(compiled) if compiled is not None else written.memory(sizes[0] if sizes else 0),
            available_bytes=sizes[1] if sizes else None,
            largest=parse_largest(written.usage),
            transfers=parse_transfers(written.transfers),
        )


class _Written:
    """The files that the compiler left in a directory; each absent one reads as empty."""

    def __init__(self, directory: Path):
        def read(ending: str) -> str:
            found = sorted(directory.glob(f"*{ending}"), key=lambda path: path.stat().st_size)
            return found[-1].read_text(encoding="utf-8", errors="replace") if found else ""

        self.program = read("after_optimizations.txt") or None
        self.allocations = read("after_optimizations-buffer-assignment.txt")
        self.usage = read("after_optimizations-memory-usage-report.txt")
        self.transfers = read("host_transfers.txt")

    def memory(self, needed_bytes: int) -> MemoryByKind:
        """By kind from the list of allocations; what is left of the total, such as fragments, counts as temporary."""
        sizes = {"parameter": 0, "aliased": 0, "output": 0}
        for size, kind in ALLOCATION.findall(self.allocations):
            live_out = "maybe-live-out" in kind
            if kind.rpartition("page 0, ")[2].startswith("parameter"):
                sizes["parameter"] += int(size)
                sizes["aliased"] += int(size) * live_out
            elif live_out:
                sizes["output"] += int(size)
        exact = re.search(r"\(color=0\)\nTotal bytes: (\d+)", self.usage)
        total = int(exact.group(1)) if exact else needed_bytes
        return MemoryByKind(
            arguments_bytes=sizes["parameter"],
            outputs_bytes=sizes["output"] + sizes["aliased"],
            aliased_bytes=sizes["aliased"],
            temporaries_bytes=max(0, total - sizes["parameter"] - sizes["output"]),
            code_bytes=0,
        )


def _memory(compiled: jax.stages.Compiled) -> MemoryByKind:
    """The compiler's own account of one device's memory."""
    memory = compiled.memory_analysis()
    if memory is None:
        raise CompilerError("the compiler of this backend gives no account of memory.")
    return MemoryByKind(
        arguments_bytes=memory.argument_size_in_bytes,
        outputs_bytes=memory.output_size_in_bytes,
        aliased_bytes=memory.alias_size_in_bytes,
        temporaries_bytes=memory.temp_size_in_bytes,
        code_bytes=memory.generated_code_size_in_bytes,
    )


def parse_too_large(message: str) -> tuple[int, int] | None:
    """(needed bytes, available bytes) of the TPU compiler's error for lack of memory, None if it is another one.

    >>> parse_too_large("CompileTimeHbmOom: ... HLO temporaries (20.50G) exceeds available HBM (15.75G).")
    (22011707392, 16911433728)
    """
    for pattern in TOO_LARGE:
        match = pattern.search(message)
        if match:
            return _bytes(match[1], match[2]), _bytes(match[3], match[4])
    return None


def parse_largest(usage: str) -> tuple[Buffer, ...]:
    """The largest buffers in device memory, of the compiler's report on its use."""
    section = usage.partition("Memory Space: default")[2].partition("Memory Space:")[0]
    buffers = (
        Buffer(size_bytes=_bytes(number, unit), arrays=_short(arrays))
        for number, unit, arrays in BUFFER.findall(section)
    )
    return tuple(sorted(buffers, key=lambda buffer: -buffer.size_bytes)[:MOST_BUFFERS])


def _short(arrays: str) -> str:
    names = re.findall(r"(?:\d+×)?(?:\(.*?\)|\w+\[[\d,]*\])", arrays)
    return ", ".join(names[:MOST_SHAPES]) + (
        f" and {len(names) - MOST_SHAPES} more" if len(names) > MOST_SHAPES else ""
    )


def parse_transfers(text: str) -> dict[str, Groups]:
    """The groups of devices, or (source, target) pairs, of every transfer between TPU slices, by its name."""
    found = {}
    for transfer in re.split(r"^host_transfers \{", text, flags=re.MULTILINE):
        key = re.search(r'^  key: "([^"]*)"', transfer, flags=re.MULTILINE)
        groups = re.findall(r"(?:endpoint_groups|one_to_all_groups) \{([^}]*)\}", transfer)
        if key and groups:
            found[key.group(1)] = tuple(tuple(int(number) for number in re.findall(r"\d+", group)) for group in groups)
    return found


def _bytes(number: str, unit: str) -> int:
    return int(float(number) * 2 ** UNITS[unit])
