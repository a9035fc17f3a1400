"""Names of targets: which slices exist, and what is said of those that don't."""

import math
import re

import jax
import pytest

from gcompute.aot.target import CHIPS, Target, check_installed, target_devices, target_environment


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
    ],
)
def test_sizes(text: str, chips: int, devices: int):
    target = Target.parse(text)
    assert (target.num_chips, target.num_devices) == (chips, devices)
    assert Target.parse(str(target)) == target


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("h100:8", "chip 'h100' is not known. Legal: v4, v5e, v5p, v6e, v7x, cpu."),
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


@pytest.mark.parametrize("chip", CHIPS)
def test_every_slice_is_within_a_pod(chip: str):
    shapes = CHIPS[chip].legal
    sizes = [math.prod(shape) for shape in shapes]
    assert sizes == sorted(sizes)
    assert len(set(shapes)) == len(shapes)
    assert max(sizes) == CHIPS[chip].max_chips
    assert all(shape == tuple(sorted(shape)) for shape in shapes if shape != (2, 2, 1))
    assert all(Target.parse(f"{chip}:{'x'.join(map(str, shape))}").shape == shape for shape in shapes)


def test_environment():
    environment = target_environment(Target.parse("v5p:4x4x4"))
    assert environment["TPU_ACCELERATOR_TYPE"] == "v5p-128"
    assert environment["JAX_PLATFORMS"] == "cpu"
    assert target_environment(Target.parse("2*v5e:4x4"))["TPU_ACCELERATOR_TYPE"] == "v5litepod-16"
    assert target_environment(Target.parse("cpu:6"))["JAX_NUM_CPU_DEVICES"] == "6"


def test_without_the_compiler(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r"v5e:2x2 needs the TPU compiler.* pip install gcompute\[tpu-aot\]"):
        check_installed(Target.parse("v5e:2x2"))
    check_installed(Target.parse("cpu:8"))


def test_cpu_devices():
    assert target_devices(Target.parse("cpu:8")) == jax.devices()[:8]
    with pytest.raises(ValueError, match="JAX_NUM_CPU_DEVICES=4096"):
        target_devices(Target.parse("cpu:4096"))
