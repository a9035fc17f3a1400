"""The text of a compiled program (HLO) as instructions, computations and the loops around them.

Only the grammar that XLA prints is read here: names, shapes, operands, the computations that an instruction calls, and
how often a loop runs. Layouts such as {1,0:T(8,128)(2,1)S(1)} are skipped.
"""

import math
import re
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Any

ARRAY = re.compile(r"([a-z]\w*)\[([^\]]*)\]")
HEADER = re.compile(r"^(ENTRY )?%?([\w.\-]+) \(.*\) -> .* \{$")
END = re.compile(r"^\}(, execution_thread=.*)?$")
INSTRUCTION = re.compile(r"^\s+(?:ROOT )?%?[\w.\-]+ = ")
CALLED = re.compile(
    r"(?:calls|to_apply|condition|body|true_computation|false_computation|called_computations|branch_computations)"
    r"=(?:\{([^}]*)\}|(%?[\w.\-]+))"
)
TRANSPARENT = {"copy", "bitcast", "convert", "reshape", "copy-start", "copy-done", "opt-barrier"}
STEPS = {"LT": (1, 0), "LE": (1, 1), "GT": (-1, 0), "GE": (-1, 1)}


@dataclass(frozen=True, slots=True)
class Shape:
    """The arrays of one value, in order: (element type, dims). `parts` are the elements of a tuple."""

    arrays: tuple[tuple[str, tuple[int, ...]], ...]
    parts: tuple["Shape", ...] | None = None

    @property
    def num_bytes(self) -> int:
        """Bytes without the padding that a layout adds."""
        return math.ceil(sum(element_bits(kind) * math.prod(dims) for kind, dims in self.arrays) / 8)

    def part(self, index: int) -> "Shape":
        return self.parts[index] if self.parts else self


@dataclass(frozen=True, slots=True)
class Instruction:
    """One line: `%name = shape opcode(operands), attributes`."""

    name: str
    shape: Shape
    opcode: str
    operands: tuple[str, ...]
    literal: str
    attributes: str

    @property
    def called(self) -> tuple[str, ...]:
        """Names of the computations that it runs, a loop's body and condition too."""
        found = CALLED.findall(self.attributes)
        return tuple(name.strip().lstrip("%") for many, one in found for name in (many or one).split(","))

    def attribute(self, pattern: str) -> str | None:
        """The first group of `pattern` in the attributes."""
        match = re.search(pattern, self.attributes)
        return match.group(1) if match else None


@dataclass(frozen=True)
class Computation:
    """Instructions in order; the last of them or the one marked ROOT is the result."""

    name: str
    instructions: dict[str, Instruction]
    root: str

    def operand_shape(self, operand: str) -> Shape:
        """The shape of an operand, which may be one element of a tuple as in `x#2`."""
        name, _, index = operand.partition("#")
        found = self.instructions.get(name)
        if found is None:
            return Shape(())
        return found.shape.part(int(index)) if index else found.shape


@dataclass(frozen=True)
class Program:
    """One HLO module."""

    num_devices: int
    entry: str
    computations: dict[str, Computation]

    @cached_property
    def reached(self) -> list[tuple[Computation, Instruction, tuple[int | None, ...]]]:
        """Every instruction that the entry reaches, with the trip counts of the loops around it, outermost first."""
        return list(self._walk(self.entry, ()))

    def _walk(self, name: str, loops: tuple[int | None, ...]) -> Iterator[tuple[Computation, Instruction, Any]]:
        computation = self.computations[name]
        for instruction in computation.instructions.values():
            yield computation, instruction, loops
            # The computation of an async-start is named again by its updates and its done.
            if instruction.opcode in ("async-update", "async-done"):
                continue
            inner = (*loops, self.trips(computation, instruction)) if instruction.opcode == "while" else loops
            for called in instruction.called:
                if called in self.computations:
                    yield from self._walk(called, inner)

    def trips(self, computation: Computation, loop: Instruction) -> int | None:
        """How often a while loop runs: as the compiler notes it, or start, bound and step where all are constants."""
        noted = loop.attribute(r'"known_trip_count":\{"n":"(\d+)"\}')
        if noted:
            return int(noted)
        condition, body = (
            self.computations.get(str(loop.attribute(rf"{name}=%?([\w.\-]+)"))) for name in ("condition", "body")
        )
        if condition is None or body is None or len(loop.operands) != 1:
            return None
        initial = computation.instructions.get(loop.operands[0])
        last = body.instructions[body.root]
        compare = condition.instructions[condition.root]
        if initial is None or initial.opcode != "tuple" or last.opcode != "tuple" or compare.opcode != "compare":
            return None

        def constant(place: Computation, name: str) -> int | None:
            """A constant of this place, or one that the loop was given and passes on unchanged."""
            found = _source(place, name)
            if found is None:
                return None
            index = _element_of_parameter(place, found)
            if index is not None and place is not computation:
                passed = _source(body, last.operands[index])
                same = passed is not None and _element_of_parameter(body, passed) == index
                return constant(computation, initial.operands[index]) if same else None
            number = re.fullmatch(r"-?\d+", found.literal) if found.opcode == "constant" else None
            return int(number.group()) if number else None

        counter = _source(condition, compare.operands[0])
        index = _element_of_parameter(condition, counter) if counter is not None else None
        direction = STEPS.get(str(compare.attribute(r"direction=(\w+)")))
        if index is None or direction is None:
            return None
        bound, start = constant(condition, compare.operands[1]), constant(computation, initial.operands[index])
        step = _increment(body, last.operands[index], index, constant)
        if bound is None or start is None or step is None or step * direction[0] <= 0:
            return None
        distance = (bound - start) * direction[0] + direction[1]
        return max(0, math.ceil(distance / abs(step)))


def _source(computation: Computation, name: str) -> Instruction | None:
    """Where a value comes from, past copies and conversions."""
    found = computation.instructions.get(name)
    while found is not None and found.opcode in TRANSPARENT and found.operands:
        found = computation.instructions.get(found.operands[0])
    return found


def _element_of_parameter(computation: Computation, found: Instruction) -> int | None:
    """i where `found` is element i of the computation's one parameter."""
    if found.opcode != "get-tuple-element":
        return None
    origin = computation.instructions.get(found.operands[0])
    index = found.attribute(r"index=(\d+)")
    return int(index) if index and origin is not None and origin.opcode == "parameter" else None


def _increment(body: Computation, name: str, index: int, constant: Any) -> int | None:
    """What one pass adds to element `index` of the loop's state."""
    added = _source(body, name)
    if added is None or added.opcode not in ("add", "subtract"):
        return None
    for counter, step in (added.operands, added.operands[::-1]):
        source = _source(body, counter)
        if source is not None and _element_of_parameter(body, source) == index:
            value = constant(body, step)
            return -value if value is not None and added.opcode == "subtract" else value
    return None


def element_bits(kind: str) -> int:
    """Bits of one element: f32 is 32, f8e4m3fn 8, pred 8; tokens have none.

    >>> [element_bits(kind) for kind in ("bf16", "f8e4m3fn", "s4", "pred", "token")]
    [16, 8, 4, 8, 0]
    """
    if kind == "pred":
        return 8
    digits = re.search(r"\d+", kind)
    return int(digits.group()) if digits else 0


def parse_programs(text: str) -> list[Program]:
    """The modules of a compiled program's text.

    Raises:
      ValueError: this is not the text of a compiled program.
    """
    modules = re.split(r"^(?=HloModule )", text, flags=re.MULTILINE)
    programs = [_parse_module(module) for module in modules if module.startswith("HloModule ")]
    if not programs:
        raise ValueError("this is not the text of a compiled program: give jit(f).lower(...).compile(), or its text.")
    return programs


def _parse_module(text: str) -> Program:
    lines = text.splitlines()
    counts = (re.search(rf"{name}=(\d+)", lines[0]) for name in ("replica_count", "num_partitions"))
    num_devices = math.prod(int(count.group(1)) for count in counts if count)
    computations: dict[str, Computation] = {}
    entry, name, body = "", "", []
    for line in lines[1:]:
        header = HEADER.match(line)
        if header:
            name, body = header.group(2), []
            entry = name if header.group(1) else entry
        elif name and END.match(line):
            computations[name] = _computation(name, body)
            name = ""
        elif name and (INSTRUCTION.match(line) or not body):
            body.append(line)
        elif name:
            # The metadata of a kernel may hold line ends.
            body[-1] += line
    return Program(num_devices, entry, computations)


def _computation(name: str, lines: list[str]) -> Computation:
    found = [(line, _parse_instruction(line)) for line in lines]
    instructions = {one.name: one for _, one in found if one is not None}
    roots = [one.name for line, one in found if one is not None and line.lstrip().startswith("ROOT ")]
    return Computation(name, instructions, roots[0] if roots else next(reversed(instructions)))


def _parse_instruction(line: str) -> Instruction | None:
    left, equals, right = line.strip().removeprefix("ROOT ").partition(" = ")
    if not equals:
        return None
    end = _closing(right, 0) + 1 if right.startswith("(") else right.find(" ")
    opcode, _, rest = right[end:].strip().partition("(")
    close = _closing(f"({rest}", 0)
    inside = rest[: close - 1]
    operands = () if opcode in ("constant", "parameter") else tuple(_operand(part) for part in _split(inside))
    return Instruction(left.lstrip("%"), parse_shape(right[:end]), opcode, operands, inside, rest[close:])


def _operand(text: str) -> str:
    """The name in `f32[8]{0} %x.1`, `/*index=5*/%x.1` or `%x.1`."""
    return text.split("*/")[-1].split()[-1].lstrip("%")


def parse_shape(text: str) -> Shape:
    """The shape in `bf16[8,128]{1,0:T(8,128)}` or `(f32[2]{0}, (u32[], pred[4]{0}))`.

    >>> parse_shape("(f32[2,3]{1,0:T(8,128)}, /*index=5*/pred[])").num_bytes
    25
    """
    text = text.split("*/")[-1].strip() if text.lstrip().startswith("/*") else text.strip()
    if text.startswith("("):
        parts = tuple(parse_shape(part) for part in _split(text[1 : _closing(text, 0)]))
        return Shape(tuple(array for part in parts for array in part.arrays), parts)
    match = ARRAY.match(text)
    if match is None:
        return Shape(())
    dims = (re.sub(r"\D", "", dim) for dim in match.group(2).split(","))
    return Shape(((match.group(1), tuple(int(dim) for dim in dims if dim)),))


def _closing(text: str, start: int) -> int:
    """Where the bracket that opens at `start` closes; brackets inside strings do not count."""
    depth, quoted = 0, False
    for index in range(start, len(text)):
        char = text[index]
        if char == '"' and text[index - 1] != "\\":
            quoted = not quoted
        elif quoted:
            continue
        elif char in "([{":
            depth += 1
        elif char in ")]}":
            depth -= 1
            if depth == 0:
                return index
    return len(text)


def _split(text: str) -> list[str]:
    """The parts between the commas that no bracket encloses."""
    parts, depth, begin = [], 0, 0
    for index, char in enumerate(text):
        if char in "([{":
            depth += 1
        elif char in ")]}":
            depth -= 1
        elif char == "," and depth == 0:
            parts.append(text[begin:index])
            begin = index + 1
    parts.append(text[begin:])
    return [part.strip() for part in parts if part.strip()]
