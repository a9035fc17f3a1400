"""The logical mesh: how many ways each kind of parallelism splits the work."""

import math
from dataclasses import dataclass
from enum import StrEnum

from gcompute.config.fields import check_numbers, nearest, option


class Axis(StrEnum):
    """The mesh axes, outermost first: what crosses the slowest links comes first."""

    DATA = "data"
    STAGE = "stage"
    FSDP = "fsdp"
    EXPERT = "expert"
    CONTEXT = "context"
    TENSOR = "tensor"


# The size of an axis that fills what the others leave of the devices.
FILL = -1


@dataclass(frozen=True, slots=True, kw_only=True)
class MeshShape:
    """Sizes of the six mesh axes; an axis of size 1 splits nothing.

    >>> MeshShape.parse("data=2,fsdp=4").num_devices
    8
    """

    data: int = option(1, "copies of the model that see different sequences")
    stage: int = option(1, "pipeline stages")
    fsdp: int = option(1, "shards of parameters, gradients and optimizer state (ZeRO-3)")
    expert: int = option(1, "groups of experts")
    context: int = option(1, "pieces of a sequence")
    tensor: int = option(1, "pieces of each matrix")

    def __post_init__(self) -> None:
        check_numbers(self, positive=tuple(axis.value for axis in Axis))

    @classmethod
    def parse(cls, text: str, num_devices: int | None = None) -> "MeshShape":
        """Read "data=2,fsdp=4"; an empty text is one device. One size may be -1: what the others leave of the devices.

        >>> str(MeshShape.parse("data=-1,tensor=2", 8))
        'data=4,tensor=2'

        Args:
          num_devices: how many there are; None: not known, so no size may be -1.

        Raises:
          ValueError: an axis is unknown or named twice, a size is not a whole number above 0, or nothing fits -1.
        """
        sizes = _sizes(text)
        fill = next((name for name, size in sizes.items() if size == FILL), None)
        if fill is None:
            return cls(**sizes)
        if num_devices is None:
            raise ValueError(
                f"mesh axis {fill}={FILL} takes what the devices leave, and none are known here. Give a number."
            )
        others = math.prod(size for size in sizes.values() if size != FILL)
        if num_devices % others:
            raise ValueError(
                f"mesh {text} does not fit {num_devices} devices: the axes besides {fill} are {others}, which does not"
                f" divide them."
            )
        return cls(**{**sizes, fill: num_devices // others})

    def size(self, axis: Axis) -> int:
        return getattr(self, axis.value)

    @property
    def num_devices(self) -> int:
        return self.data * self.stage * self.fsdp * self.expert * self.context * self.tensor

    @property
    def batch_shards(self) -> int:
        """Over how many shards the batch dim is split."""
        return self.data * self.fsdp * self.expert

    def __str__(self) -> str:
        return ",".join(f"{axis}={self.size(axis)}" for axis in Axis if self.size(axis) > 1) or "data=1"


@dataclass(frozen=True, slots=True)
class OpenMesh:
    """A mesh of which one axis is -1, until the devices are known: "data=-1,tensor=2"."""

    text: str

    def __str__(self) -> str:
        return self.text


def parse_mesh(text: str) -> MeshShape | OpenMesh:
    """Read a mesh where the devices are not known yet.

    Raises:
      ValueError: as `MeshShape.parse`, but that one size may be -1.
    """
    return OpenMesh(text) if FILL in _sizes(text).values() else MeshShape.parse(text)


def mesh_over(mesh: MeshShape | OpenMesh, num_devices: int) -> MeshShape:
    """The mesh, with the axis that is -1 filled.

    Raises:
      ValueError: the other axes do not divide the devices.
    """
    return MeshShape.parse(mesh.text, num_devices) if isinstance(mesh, OpenMesh) else mesh


def _sizes(text: str) -> dict[str, int]:
    """The size of each axis that is named, at most one of them -1.

    Raises:
      ValueError: an axis is unknown or named twice, a size is wrong, or two are -1.
    """
    sizes: dict[str, int] = {}
    for part in filter(None, (part.strip() for part in text.split(","))):
        name, equals, size = (piece.strip() for piece in part.partition("="))
        if name not in list(Axis):
            raise ValueError(f"mesh axis {name!r} is not known. {nearest(name, list(Axis))}")
        if not equals or (size != str(FILL) and (not size.isdecimal() or int(size) < 1)):
            raise ValueError(
                f"mesh axis {part!r} needs a whole number above 0, as in {name}=2, or {FILL} for the rest."
            )
        if name in sizes:
            raise ValueError(f"mesh axis {name!r} is given twice in {text!r}.")
        sizes[name] = int(size)
    filled = [name for name, size in sizes.items() if size == FILL]
    if len(filled) > 1:
        raise ValueError(f"mesh axes {' and '.join(filled)} are both {FILL} in {text!r}: one can take what is left.")
    return sizes
