"""The logical mesh: how many ways each kind of parallelism splits the work."""

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
    def parse(cls, text: str) -> "MeshShape":
        """Read "data=2,fsdp=4"; an empty text is one device.

        Raises:
          ValueError: an axis is unknown or named twice, or a size is not a whole number above 0.
        """
        sizes: dict[str, int] = {}
        for part in filter(None, (part.strip() for part in text.split(","))):
            name, equals, size = (piece.strip() for piece in part.partition("="))
            if name not in list(Axis):
                raise ValueError(f"mesh axis {name!r} is not known. {nearest(name, list(Axis))}")
            if not equals or not size.isdecimal() or int(size) < 1:
                raise ValueError(f"mesh axis {part!r} needs a whole number above 0, as in {name}=2.")
            if name in sizes:
                raise ValueError(f"mesh axis {name!r} is given twice in {text!r}.")
            sizes[name] = int(size)
        return cls(**sizes)

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
