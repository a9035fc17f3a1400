"""Which devices to plan or compile for: a TPU slice or several, GPUs, this machine's CPU split in fake devices.

`Target.parse("v5e:4x4")` is one slice, `"2*v5e:4x4"` two that the data centre's network joins, `"h100:64"` eight hosts
of eight GPUs, `"cpu:8"` eight devices of this machine.
"""

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field

from gcompute.hardware.catalogue import ALIASES, catalogue, find_chip
from gcompute.hardware.chip import Chip
from gcompute.hardware.torus import legal_slices

CPU = "cpu"
# Names of whole slices, as v5p-128, count cores on these generations, two to a chip.
CORES_IN_NAME = {"v2": 2, "v3": 2, "v4": 2, "v5p": 2, "v7x": 2}
# GPUs that NVLink does not join sit by so many on the PCIe switch of a host.
PCIE_HOST_CHIPS = 8
# Of a GPU's memory, less what the driver and the libraries take. JAX takes 75 % unless XLA_PYTHON_CLIENT_MEM_FRACTION
# says otherwise.
GPU_USABLE = 0.92


@dataclass(frozen=True, slots=True, kw_only=True)
class Target:
    """Devices of one kind. `chip` is a name of the catalogue, or "cpu"; `known`, what the catalogue says of it.

    shape: of one TPU slice; of GPUs and CPU devices, their number.
    """

    chip: str
    shape: tuple[int, ...]
    slices: int = 1
    known: Chip | None = field(default=None, compare=False, repr=False)

    @classmethod
    def parse(cls, text: str, chips: Mapping[str, Chip] | None = None) -> "Target":
        """Read "v5e:4x4", "2*v5e:4x4", "h100:8" or "cpu:8"; `chips` are those of the catalogue unless given.

        >>> target = Target.parse("2*v5e:4x4")
        >>> target.num_devices, str(target)
        (32, '2*v5e:4x4')

        Raises:
          ValueError: the chip is not known, or there is no such slice of it; the message names the nearest.
        """
        chips = catalogue() if chips is None else chips
        match = re.fullmatch(r"(?:(\d+)\*)?([a-z][\w-]*?)(?::(.*))?", text.strip().lower())
        if match is None:
            raise ValueError(f"target {text!r} is not understood. Give a chip and its slice, as in v5e:4x4 or cpu:8.")
        slices, chip, size = int(match[1] or 1), match[2], match[3]
        number = re.fullmatch(r"(\w+?)-(\d+)", chip)
        if number and size is None and _name(number[1], chips) in chips and chip not in (*chips, *ALIASES):
            raise ValueError(_named_by_number(text, chips[_name(number[1], chips)], number[2]))
        chip, size = _name(chip, chips), size or ""
        if slices < 1:
            raise ValueError(f"target {text!r} has no slice: give at least 1, as in 2*{chip}:...")
        if chip not in chips and chip != CPU:
            find_chip(chip, {**chips, CPU: next(iter(chips.values()))})
        known = chips.get(chip)
        if known is None or known.torus_dims is None:
            return cls(chip=chip, shape=(_number(text, chip, known, size, joined=bool(match[1])),), known=known)
        if not re.fullmatch(r"\d+(x\d+)*", size):
            raise ValueError(f"target {text!r} names no slice. Give its shape, as in {_examples(known)}.")
        shape = tuple(int(number) for number in size.split("x"))
        if shape not in slices_of(known):
            raise ValueError(_no_such_slice(known, shape))
        return cls(chip=chip, shape=shape, slices=slices, known=known)

    @property
    def backend(self) -> str:
        return CPU if self.known is None else self.known.kind

    @property
    def num_chips(self) -> int:
        return self.slices * math.prod(self.shape)

    @property
    def num_devices(self) -> int:
        return self.num_chips * (1 if self.known is None else self.known.devices_per_chip)

    @property
    def hbm_bytes(self) -> int | None:
        """What a program may use of one device: the compiler's figure, else a share of the nominal one; None on CPU
        devices, which share the machine's memory."""
        if self.known is None:
            return None
        share = GPU_USABLE if self.known.kind == "gpu" else 1.0
        return int(self.known.usable_hbm_bytes or share * self.known.hbm_bytes / self.known.devices_per_chip)

    @property
    def domain_devices(self) -> int:
        """Devices that fast links join: of a TPU slice all, of GPUs those of a host or NVLink domain."""
        if self.backend != "gpu":
            return self.num_devices // self.slices
        assert self.known is not None
        return min(self.num_devices, self.known.domain_chips or self.known.host_chips or PCIE_HOST_CHIPS)

    def __str__(self) -> str:
        slices = f"{self.slices}*" if self.slices > 1 else ""
        return f"{slices}{self.chip}:{'x'.join(map(str, self.shape))}"


def slices_of(chip: Chip) -> tuple[tuple[int, ...], ...]:
    """The slices of a TPU that can be rented, smallest first.

    Raises:
      ValueError: the catalogue does not say how large its pod is.
    """
    if chip.torus_dims is None or chip.max_chips is None:
        raise ValueError(f"{chip.name} has no slices in the catalogue: torus_dims and max_chips say which there are.")
    return legal_slices(chip.torus_dims, chip.max_chips)


def slice_of(chip: Chip, num_chips: int) -> tuple[int, ...] | None:
    """The slice of `num_chips` whose longest side is shortest, None where there is none.

    >>> slice_of(find_chip("v5p"), 1024)
    (8, 8, 16)
    """
    return min(
        (shape for shape in slices_of(chip) if math.prod(shape) == num_chips),
        key=lambda shape: (max(shape), sum(shape)),
        default=None,
    )


def _name(chip: str, chips: Mapping[str, Chip]) -> str:
    return chip if chip in chips else ALIASES.get(chip, chip)


def _number(text: str, chip: str, known: Chip | None, size: str, *, joined: bool) -> int:
    """The number of GPUs or CPU devices in a target's text."""
    if joined or not size.isdecimal() or int(size) < 1:
        raise ValueError(f"target {text!r} is not understood. Give a number of devices, as in {chip}:8.")
    number = int(size)
    domain = known.domain_chips if known is not None else None
    if domain and number > domain and number % domain:
        below = number // domain * domain
        raise ValueError(
            f"target {text!r}: {number} GPUs are not whole hosts of {domain}. Nearest: {chip}:{below}, or"
            f" {chip}:{below + domain}."
        )
    return number


def _examples(chip: Chip) -> str:
    return ", ".join(_written(chip, shape) for shape in slices_of(chip)[1:5])


def _written(chip: Chip, shape: tuple[int, ...]) -> str:
    return f"{chip.name}:{'x'.join(map(str, shape))}"


def _no_such_slice(chip: Chip, shape: tuple[int, ...]) -> str:
    """Says which legal slices are nearest: the same sizes in order, as many chips, or the next on either side."""
    legal, size = slices_of(chip), math.prod(shape)
    same = [one for one in legal if sorted(one) == sorted(shape)] or [one for one in legal if math.prod(one) == size]
    below = [one for one in legal if math.prod(one) < size][-1:]
    above = [one for one in legal if math.prod(one) > size][:1]
    found = ", ".join(_written(chip, one) for one in (same[:4] or below + above))
    dims = f" Slices of {chip.name} have {chip.torus_dims} dims." if len(shape) != chip.torus_dims else ""
    return f"{_written(chip, shape)} is not a slice that exists.{dims} Nearest: {found}."


def _named_by_number(text: str, chip: Chip, size: str) -> str:
    """A name such as v5p-128 says how many cores or chips, and not in which shape."""
    if chip.torus_dims is None:
        return f"target {text!r} is not understood. Give a number of devices, as in {chip.name}:8."
    cores = CORES_IN_NAME.get(chip.name, 1)
    chips = int(size) // cores
    counted = f"{size} cores, that is {chips} chips" if cores > 1 else f"{chips} chips"
    shapes = [one for one in slices_of(chip) if math.prod(one) == chips]
    found = " or ".join(_written(chip, one) for one in shapes[:4])
    what_to_do = f"Say in which shape: {found}." if found else f"No slice has that many; as in {_examples(chip)}."
    return f"target {text!r} names {counted}. {what_to_do}"
