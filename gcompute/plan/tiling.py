"""What a TPU's memory layout adds to arrays: the last two dims are stored in whole tiles of 8 x 128 values."""

import itertools
import math

from gcompute.config.mesh import MeshShape
from gcompute.config.model import ModelConfig
from gcompute.plan.params import WeightArray, weight_arrays

SUBLANES, LANES = 8, 128


def tiled_values(shape: tuple[int, ...]) -> int:
    """Values that an array of `shape` takes, in the order of dims that wastes least, as the compiler chooses.

    >>> tiled_values((25, 64, 100)) / (25 * 64 * 100)
    1.28

    Source: XLA, "Tiled layout"; libtpu 0.0.52 chooses such orders for parameters.
    """
    if len(shape) < 2:
        return math.ceil(math.prod(shape) / LANES) * LANES
    least = math.inf
    for second, last in itertools.permutations(range(len(shape)), 2):
        rest = math.prod(size for index, size in enumerate(shape) if index not in (second, last))
        rows, columns = math.ceil(shape[second] / SUBLANES), math.ceil(shape[last] / LANES)
        least = min(least, rest * rows * SUBLANES * columns * LANES)
    return int(least)


def local_shape(array: WeightArray, mesh: MeshShape) -> tuple[int, ...]:
    """The piece of `array` on one device, by the rules of `parallel.rules`."""
    split = {"D": mesh.fsdp, "L": mesh.stage if array.stacked else 1, "E": mesh.expert}
    split |= dict.fromkeys("NKFV", mesh.tensor)
    return tuple(math.ceil(size / split.get(dim, 1)) for dim, size in zip(array.dims, array.shape, strict=True))


def tile_padding(config: ModelConfig, mesh: MeshShape) -> float:
    """What the parameters of `config` on one device take in tiles, against their values."""
    pieces = [local_shape(array, mesh) for array in weight_arrays(config)]
    return sum(tiled_values(piece) for piece in pieces) / sum(math.prod(piece) for piece in pieces)
