"""Names of targets: which slices exist, and what is said of those that don't."""

import math
import re

import pytest

from gcompute.hardware.catalogue import catalogue, find_chip
from gcompute.hardware.target import Target, slices_of


@pytest.mark.parametrize(
    ("text", "chips", "devices"),
    [
        ("v5e:4x4", 16, 16),
        ("2*v5e:4x4", 32, 32),
        ("v6e:2x4", 8, 8),
        ("v4:2x2x1", 4, 4),
        ("v5p:8x8x16", 1024, 1024),
        ("v5p:16x16x24", 6144, 6144),
        ("v7x:4x4x4", 64, 128),
        ("cpu:8", 8, 8),
        ("h100:64", 64, 64),
        ("gb200:72", 72, 72),
        ("v3:4x4", 16, 32),
    ],
)
def test_sizes(text: str, chips: int, devices: int):
    target = Target.parse(text)
    assert (target.num_chips, target.num_devices) == (chips, devices)
    assert Target.parse(str(target)) == target


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("v5x:8", "chip 'v5x' is not known. Did you mean"),
        ("h100", "Give a number of devices, as in h100-sxm:8."),
        ("h100:0", "Give a number of devices, as in h100-sxm:8."),
        ("2*h100:8", "Give a number of devices, as in h100-sxm:8."),
        ("h100:12", "12 GPUs are not whole hosts of 8. Nearest: h100-sxm:8, or h100-sxm:16."),
        ("v5e:3x4", "v5e:3x4 is not a slice that exists. Nearest: v5e:2x4, v5e:4x4."),
        ("v5e:8x4", "v5e:8x4 is not a slice that exists. Nearest: v5e:4x8."),
        ("v5p:4x4", "v5p:4x4 is not a slice that exists. Slices of v5p have 3 dims. Nearest: v5p:2x2x4."),
        ("v6e:4x4x4", "v6e:4x4x4 is not a slice that exists. Slices of v6e have 2 dims. Nearest: v6e:8x8."),
        ("v5p:64x64x64", "v5p:64x64x64 is not a slice that exists. Nearest: v5p:16x20x28."),
        ("v5p-128", "target 'v5p-128' names 128 cores, that is 64 chips. Say in which shape: v5p:4x4x4."),
        ("v5litepod-16", "target 'v5litepod-16' names 16 chips. Say in which shape: v5e:4x4."),
        ("v6e-7", "No slice has that many; as in v6e:2x2"),
        ("v5e", "target 'v5e' names no slice. Give its shape, as in v5e:2x2, v5e:2x4"),
        ("v5e:", "names no slice"),
        ("0*v5e:2x2", "has no slice"),
        ("cpu", "Give a number of devices, as in cpu:8."),
        ("cpu:0", "Give a number of devices, as in cpu:8."),
        ("2*cpu:8", "Give a number of devices, as in cpu:8."),
        ("", "Give a chip and its slice, as in v5e:4x4 or cpu:8."),
    ],
)
def test_refused(text: str, said: str):
    with pytest.raises(ValueError, match=re.escape(said)) as refused:
        Target.parse(text)
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize("chip", [name for name, chip in catalogue().items() if chip.kind == "tpu"])
def test_every_slice_is_within_a_pod(chip: str):
    shapes = slices_of(find_chip(chip))
    sizes = [math.prod(shape) for shape in shapes]
    assert sizes == sorted(sizes)
    assert len(set(shapes)) == len(shapes)
    assert max(sizes) == find_chip(chip).max_chips
    assert all(shape == tuple(sorted(shape)) for shape in shapes if shape != (2, 2, 1))
    assert all(Target.parse(f"{chip}:{'x'.join(map(str, shape))}").shape == shape for shape in shapes)
