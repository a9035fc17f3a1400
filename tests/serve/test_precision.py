"""The dtype that a model is served in is one for the processor at hand."""

import pytest

from gcompute.config.mesh import MeshShape
from gcompute.config.serve import ServeConfig
from gcompute.serve import precision
from gcompute.serve.native import build
from gcompute.serve.precision import settle


@pytest.mark.parametrize(
    ("instructions", "kernels", "mesh", "chosen"),
    [
        ("AVX512_BF16", True, None, "bfloat16"),
        ("AVX512_BF16", False, None, "bfloat16"),
        ("AVX512_BF16", False, MeshShape(tensor=2), "bfloat16"),
        ("AVX2", True, None, "bfloat16"),
        ("AVX2", False, None, "float32"),
        ("AVX2", True, MeshShape(tensor=2), "float32"),
        ("x86_64", False, None, "float32"),
    ],
)
def test_a_cpu_serves_in_the_dtype_it_is_faster_with(monkeypatch, instructions, kernels, mesh, chosen):
    monkeypatch.setattr(precision, "instruction_set", lambda: instructions)
    monkeypatch.setattr(build, "available", lambda: kernels)
    settled, reason = settle(ServeConfig(mesh=mesh))
    assert settled.precision == chosen
    assert reason
    assert settle(settled) == (settled, None)


def test_an_accelerator_serves_in_bfloat16(monkeypatch):
    monkeypatch.setattr(precision.jax, "default_backend", lambda: "tpu")
    assert settle(ServeConfig())[0].precision == "bfloat16"


@pytest.mark.parametrize("given", ["float32", "bfloat16"])
def test_what_is_given_is_kept(given):
    assert settle(ServeConfig(precision=given)) == (ServeConfig(precision=given), None)
