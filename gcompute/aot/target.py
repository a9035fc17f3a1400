"""What to compile for: a TPU slice that need not be here, several of them, or fake CPU devices.

`Target.parse("v5e:4x4")` is one slice, `"2*v5e:4x4"` two that the data centre's network joins, `"cpu:8"` eight devices
of this machine. Importing this module does not load JAX: `target_environment` must be set before it starts.
"""

import importlib.util
import math
import re
from dataclasses import dataclass
from typing import Any

from gcompute.config.fields import nearest
from gcompute.hardware.catalogue import ALIASES, find_chip
from gcompute.hardware.torus import legal_slices

INSTALL = "pip install gcompute[tpu-aot]"
GIB = 2**30


@dataclass(frozen=True, slots=True, kw_only=True)
class Generation:
    """A TPU generation as its compiler knows it.

    `accelerator` begins the names of whole slices, as in v5p-128; on some generations these count cores, and
    `cores_in_name` of them make one chip. `hbm_gib` is what the compiler lets one device use, which is less than the
    chip has. How it was read: libtpu 0.0.52, 2x2 or 2x2x1 chips, a program that needs 1 TiB; the compiler's error names
    what is available. It shrinks by 0.01 GiB on the largest slices.
    """

    topology: str
    accelerator: str
    dims: int
    max_chips: int
    hbm_gib: float
    cores_in_name: int = 1
    devices_per_chip: int = 1
    # On a v4 the two cores of a chip are one device only where this is asked for.
    chip_config: str | None = None

    @property
    def legal(self) -> tuple[tuple[int, ...], ...]:
        """The shapes that can be rented, smallest first."""
        return legal_slices(self.dims, self.max_chips)


def _chip(name: str, **named: Any) -> Generation:
    """What the catalogue knows of a chip, with the names that its compiler uses."""
    known = find_chip(name)
    assert known.torus_dims is not None
    assert known.max_chips is not None
    assert known.usable_hbm_bytes is not None
    return Generation(
        dims=known.torus_dims,
        max_chips=known.max_chips,
        hbm_gib=known.usable_hbm_bytes / GIB,
        devices_per_chip=known.devices_per_chip,
        **named,
    )


CHIPS = {
    "v4": _chip("v4", topology="v4", accelerator="v4", cores_in_name=2, chip_config="megacore"),
    "v5e": _chip("v5e", topology="v5e", accelerator="v5litepod"),
    "v5p": _chip("v5p", topology="v5p", accelerator="v5p", cores_in_name=2),
    "v6e": _chip("v6e", topology="v6e", accelerator="v6e"),
    "v7x": _chip("v7x", topology="tpu7x", accelerator="tpu7x", cores_in_name=2),
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Target:
    """Devices to compile for. `chip` is a key of CHIPS, or "cpu" with `shape` the number of devices."""

    chip: str
    shape: tuple[int, ...]
    slices: int = 1

    @classmethod
    def parse(cls, text: str) -> "Target":
        """Read "v5e:4x4", "2*v5e:4x4" or "cpu:8".

        >>> target = Target.parse("2*v5e:4x4")
        >>> target.num_devices, str(target)
        (32, '2*v5e:4x4')

        Raises:
          ValueError: the chip is not known, or there is no such slice of it; the message names the nearest.
        """
        match = re.fullmatch(r"(?:(\d+)\*)?([a-z]\w*)(?:([:-])(.*))?", text.strip().lower())
        if match is None:
            raise ValueError(f"target {text!r} is not understood. Give a chip and its slice, as in v5e:4x4 or cpu:8.")
        slices, chip, separator, size = int(match[1] or 1), match[2], match[3], match[4] or ""
        chip = ALIASES[chip] if ALIASES.get(chip) in CHIPS else chip
        if chip not in CHIPS and chip != "cpu":
            raise ValueError(f"chip {chip!r} is not known. {nearest(chip, [*CHIPS, 'cpu'])}")
        if slices < 1:
            raise ValueError(f"target {text!r} has no slice: give at least 1, as in 2*{chip}:...")
        if chip == "cpu":
            if match[1] or separator != ":" or not size.isdecimal() or int(size) < 1:
                raise ValueError(f"target {text!r} is not understood. Give a number of devices, as in cpu:8.")
            return cls(chip=chip, shape=(int(size),))
        if separator == "-":
            raise ValueError(_named_by_number(text, chip, size))
        if not re.fullmatch(r"\d+(x\d+)*", size):
            raise ValueError(f"target {text!r} names no slice. Give its shape, as in {_examples(chip)}.")
        shape = tuple(int(number) for number in size.split("x"))
        if shape not in CHIPS[chip].legal:
            raise ValueError(_no_such_slice(chip, shape))
        return cls(chip=chip, shape=shape, slices=slices)

    @property
    def backend(self) -> str:
        return "cpu" if self.chip == "cpu" else "tpu"

    @property
    def num_chips(self) -> int:
        return self.slices * math.prod(self.shape)

    @property
    def num_devices(self) -> int:
        return self.num_chips * (1 if self.chip == "cpu" else CHIPS[self.chip].devices_per_chip)

    @property
    def hbm_bytes(self) -> int | None:
        """What the compiler lets one device use; None on a CPU, whose devices share the machine's memory."""
        return None if self.chip == "cpu" else int(CHIPS[self.chip].hbm_gib * GIB)

    def __str__(self) -> str:
        slices = f"{self.slices}*" if self.slices > 1 else ""
        return f"{slices}{self.chip}:{'x'.join(map(str, self.shape))}"


def _examples(chip: str) -> str:
    shapes = CHIPS[chip].legal
    return ", ".join(_written(chip, shape) for shape in shapes[1 : min(5, len(shapes))])


def _written(chip: str, shape: tuple[int, ...]) -> str:
    return f"{chip}:{'x'.join(map(str, shape))}"


def _no_such_slice(chip: str, shape: tuple[int, ...]) -> str:
    """Says which legal slices are nearest: the same sizes in order, as many chips, or the next on either side."""
    legal, size = CHIPS[chip].legal, math.prod(shape)
    same = [one for one in legal if sorted(one) == sorted(shape)] or [one for one in legal if math.prod(one) == size]
    below = [one for one in legal if math.prod(one) < size][-1:]
    above = [one for one in legal if math.prod(one) > size][:1]
    found = ", ".join(_written(chip, one) for one in (same[:4] or below + above))
    dims = f" Slices of {chip} have {CHIPS[chip].dims} dims." if len(shape) != CHIPS[chip].dims else ""
    return f"{_written(chip, shape)} is not a slice that exists.{dims} Nearest: {found}."


def _named_by_number(text: str, chip: str, size: str) -> str:
    """A name such as v5p-128 says how many cores or chips, and not in which shape."""
    known = CHIPS[chip]
    if not size.isdecimal() or int(size) < known.cores_in_name:
        return f"target {text!r} is not understood. Give the slice's shape, as in {_examples(chip)}."
    chips = int(size) // known.cores_in_name
    counted = f"{size} cores, that is {chips} chips" if known.cores_in_name > 1 else f"{chips} chips"
    shapes = [one for one in known.legal if math.prod(one) == chips]
    found = " or ".join(_written(chip, one) for one in shapes[:4])
    what_to_do = f"Say in which shape: {found}." if found else f"No slice has that many; as in {_examples(chip)}."
    return f"target {text!r} names {counted}. {what_to_do}"


def target_environment(target: Target) -> dict[str, str]:
    """Environment variables that a process needs before JAX starts, to compile for `target`."""
    shared = {"JAX_PLATFORMS": "cpu", "TF_CPP_MIN_LOG_LEVEL": "2"}
    if target.chip == "cpu":
        return {**shared, "JAX_NUM_CPU_DEVICES": str(target.num_devices)}
    chip = CHIPS[target.chip]
    return {
        **shared,
        # libtpu would ask the metadata server of a cloud machine what it runs on.
        "TPU_SKIP_MDS_QUERY": "1",
        "TPU_ACCELERATOR_TYPE": f"{chip.accelerator}-{math.prod(target.shape) * chip.cores_in_name}",
        "TPU_WORKER_HOSTNAMES": "localhost",
        "TPU_WORKER_ID": "0",
        # libtpu lets one process at a time use the chips, by a lock file; compiling uses none of them.
        "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
    }


def check_installed(target: Target) -> None:
    """Raise ValueError, with what to install, where the target's compiler is not here."""
    if target.backend == "tpu" and importlib.util.find_spec("libtpu") is None:
        raise ValueError(f"compiling for {target} needs the TPU compiler, which is not installed. Run: {INSTALL}")


def target_devices(target: Target) -> list[Any]:
    """The devices of `target`, to build a mesh of; nothing can run on those of a TPU, only compile.

    The process must have been started with `target_environment(target)`.

    Raises:
      ValueError: the compiler is not installed, or this process has too few CPU devices.
    """
    check_installed(target)
    if target.chip == "cpu":
        import jax

        devices = jax.devices("cpu")
        if len(devices) < target.num_devices:
            raise ValueError(
                f"{target} needs {target.num_devices} CPU devices and this process has {len(devices)}. Start it with"
                f" JAX_NUM_CPU_DEVICES={target.num_devices}."
            )
        return devices[: target.num_devices]
    from jax.experimental import topologies

    chip = CHIPS[target.chip]
    options: dict[str, Any] = {"chip_config_name": chip.chip_config} if chip.chip_config else {}
    if target.slices > 1:
        options["num_slices"] = target.slices
    name = f"{chip.topology}:{'x'.join(map(str, target.shape))}"
    return list(topologies.get_topology_desc(name, "tpu", **options).devices)
