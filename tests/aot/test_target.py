"""What a process needs to compile for a target, and what is said where it has it not."""

import jax
import pytest

from gcompute.aot.target import check_installed, compile_target, target_devices, target_environment
from gcompute.hardware.target import Target


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


@pytest.mark.parametrize("text", ["mi300x:8", "v3:4x4"])
def test_nothing_compiles_for_some(text: str):
    with pytest.raises(ValueError, match="there is no compiler for"):
        compile_target(text)
