"""Tiles of 8 x 128 values, counted by hand, and what they add to the parameters of models."""

import itertools
import math

import pytest

from gcompute.config.mesh import MeshShape
from gcompute.config.presets import PRESETS
from gcompute.plan.params import weight_arrays
from gcompute.plan.tiling import local_shape, tile_padding, tiled_values


@pytest.mark.parametrize(
    ("shape", "values"),
    [
        ((8, 128), 8 * 128),
        ((1, 1), 8 * 128),
        ((128, 8), 8 * 128),
        ((9, 128), 16 * 128),
        # 768 is whole lanes, and 50257 rows waste 7: the other way round 47 of each would be.
        ((768, 50257), 768 * 50264),
        ((25, 64, 100), 25 * 64 * 128),
        ((1,), 128),
        ((129,), 256),
        ((), 128),
        ((4, 4, 4), 4 * 8 * 128),
    ],
)
def test_by_hand(shape: tuple[int, ...], values: int):
    assert tiled_values(shape) == values


@pytest.mark.parametrize("shape", [(3, 5), (7, 300), (25, 64, 100), (2, 3, 129, 9), (1, 64), (50257, 1600)])
def test_against_every_order_of_dims(shape: tuple[int, ...]):
    def stored(order: tuple[int, ...]) -> int:
        *rest, rows, columns = order
        return math.prod(rest) * 8 * -(-rows // 8) * 128 * -(-columns // 128)

    assert tiled_values(shape) == min(stored(order) for order in itertools.permutations(shape))


def test_pieces_follow_the_mesh():
    pieces = {
        array.name: local_shape(array, MeshShape.parse("stage=2,fsdp=4,expert=8,tensor=2"))
        for array in weight_arrays(PRESETS["mixtral-8x7b"])
    }
    assert pieces["embedding"] == (16000, 1024)
    assert pieces["q"] == (16, 1024, 16, 128)
    assert pieces["k"] == (16, 1024, 4, 128)
    assert pieces["o"] == (16, 16, 128, 1024)
    assert pieces["router"] == (16, 1024, 1)
    assert pieces["gate"] == pieces["up"] == (16, 1, 1024, 7168)
    assert pieces["down"] == (16, 1, 7168, 1024)
    assert pieces["norm1.scale"] == (16, 1024)
    assert pieces["final_norm.scale"] == (1024,)


@pytest.mark.parametrize("preset", ["llama3-8b", "llama3-70b", "gpt2-xl", "qwen3-30b-a3b"])
def test_padding_never_shrinks_and_is_least_where_sizes_are_whole(preset: str):
    one = tile_padding(PRESETS[preset], MeshShape())
    assert one >= 1
    assert one < (1.001 if preset.startswith("llama") else 1.3)
    # 25 heads of 64 fill no tile: a model with such sizes pays for it.
    assert tile_padding(PRESETS["gpt2-xl"], MeshShape()) > 1.01
