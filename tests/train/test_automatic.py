"""What a run leaves open is settled once, for the device at hand, and by one rule."""

import dataclasses

import pytest

from gcompute.config.mesh import MeshShape
from gcompute.config.presets import PRESETS
from gcompute.config.train import DataConfig, OptimizerConfig, RunConfig, TrainConfig
from gcompute.hardware.catalogue import catalogue
from gcompute.plan.precision import choose_precision
from gcompute.train import automatic, resolve
from gcompute.train.automatic import settle, with_open_microbatches

WITHOUT_BFLOAT16 = {"float32": 71e9, "bfloat16": 48e9}
WITH_BFLOAT16 = {"float32": 410e9, "bfloat16": 803e9}
# The same dtypes within the noise of measuring: float32 keeps its digits.
NEARLY = {"float32": 100e9, "bfloat16": 105e9}


def run(**train) -> RunConfig:
    return RunConfig(
        model=PRESETS["demo"], optimizer=OptimizerConfig(), train=TrainConfig(batch=16, **train), data=DataConfig()
    )


@pytest.mark.parametrize(
    ("measured", "precision"), [(WITHOUT_BFLOAT16, "float32"), (WITH_BFLOAT16, "bfloat16"), (NEARLY, "float32")]
)
def test_the_faster_dtype_of_the_measured_roofline(monkeypatch, measured, precision):
    monkeypatch.setattr(automatic, "instruction_set", lambda: "AVX512_BF16")
    settled, reasons = settle(run(), MeshShape(), "cpu", measured)
    assert (settled.train.precision, settled.train.residual) == (precision, "float32")
    assert 16 % (settled.train.accumulation or 32) == 0
    assert set(reasons) == {"precision", "residual", "accumulation"}
    assert "GFLOP/s" in reasons["precision"]
    assert settle(settled, MeshShape(), "cpu", WITH_BFLOAT16) == (settled, {})


def test_a_processor_that_does_not_multiply_bfloat16_is_not_asked_to(monkeypatch):
    monkeypatch.setattr(automatic, "instruction_set", lambda: "AVX2")
    settled, reasons = settle(run(), MeshShape(), "cpu", WITH_BFLOAT16)
    assert settled.train.precision == "float32"
    assert "AVX2 does not multiply bfloat16" in reasons["precision"]


def test_accelerators_have_bfloat16_streams_and_one_microbatch():
    settled, _ = settle(run(), MeshShape(), "tpu", WITH_BFLOAT16)
    assert (settled.train.precision, settled.train.residual, settled.train.accumulation) == ("bfloat16",) * 2 + (1,)


def test_what_is_given_is_kept():
    given = run(precision="bfloat16", residual="bfloat16", accumulation=2)
    assert settle(given, MeshShape(), "cpu", WITHOUT_BFLOAT16) == (given, {})


def test_microbatches_can_be_opened_for_another_mesh():
    settled, _ = settle(run(), MeshShape(), "cpu", WITHOUT_BFLOAT16)
    again, reasons = settle(with_open_microbatches(settled), MeshShape(data=8), "cpu", WITH_BFLOAT16)
    assert set(reasons) == {"accumulation"}
    assert again.train.precision == "float32"
    assert 16 // 8 % again.train.accumulation == 0


@pytest.mark.parametrize(
    ("instructions", "precision"), [("AVX2", "float32"), ("AVX512", "float32"), ("AVX512_BF16", "bfloat16")]
)
def test_without_a_measurement_the_processor_decides(monkeypatch, instructions, precision):
    monkeypatch.setattr(resolve, "instruction_set", lambda: instructions)
    assert resolve.resolve_precision(run(), "cpu") == precision
    assert resolve.resolve_precision(run(), "tpu") == "bfloat16"
    assert resolve.resolve_precision(dataclasses.replace(run(), train=TrainConfig(precision="float32")), "tpu") == (
        "float32"
    )


@pytest.mark.parametrize("name", sorted(catalogue()))
def test_every_chip_of_the_catalogue_multiplies_bfloat16(name):
    # So the trainer, which settles "auto" for TPUs and GPUs without figures, agrees with the planner.
    assert choose_precision(catalogue()[name].peak_flops_per_s)[0] == "bfloat16"
