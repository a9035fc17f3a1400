"""Step times: the parts add up, every published run is finite, and the fit's own sums are the planner's."""

import dataclasses
import itertools
import math

import numpy as np
import pytest

from gcompute.config.architecture import architecture
from gcompute.config.mesh import Axis, MeshShape
from gcompute.config.presets import PRESETS
from gcompute.exam.fit import _errors, _work
from gcompute.exam.published import PublishedRun, published_runs
from gcompute.hardware.target import Target
from gcompute.plan.efficiency import BY_KIND, DATASHEET, Efficiency
from gcompute.plan.mfu import model_flops
from gcompute.plan.params import weight_arrays
from gcompute.plan.train_run import TrainRun, params_on_device
from gcompute.plan.train_time import (
    TrainTime,
    bubble,
    optimizer_operation,
    train_time,
)

LLAMA = architecture(PRESETS["llama3-8b"])
MIXTRAL = architecture(PRESETS["mixtral-8x7b"])
SLICE = Target.parse("v5e:4x4")


def timed(mesh: str, target: Target = SLICE, efficiency: Efficiency | None = None, **changes: object) -> TrainTime:
    run = TrainRun(model=LLAMA, batch=64, seq=2048, mesh=MeshShape.parse(mesh))
    return train_time(dataclasses.replace(run, **changes), target, efficiency)  # pyright: ignore[reportArgumentType]


@pytest.fixture(scope="module")
def published() -> list[tuple[PublishedRun, TrainTime]]:
    return [(one, train_time(one.run, one.target)) for one in published_runs()]


@pytest.mark.oldest
def test_published_runs_are_finite_and_add_up(published):
    assert len(published) > 200
    for one, time in published:
        parts = (
            time.matmul_s, time.attention_s, time.sweep_s, time.exposed_s, time.bubble_s, time.optimizer_s
        )  # fmt: skip
        assert all(math.isfinite(part) and part >= 0 for part in parts), one.name
        assert time.step_s == pytest.approx(sum(parts), rel=1e-12), one.name
        assert 0 < time.mfu < 1, one.name
        assert time.tokens_per_s * time.step_s == pytest.approx(one.run.batch * one.run.seq)
        for sent in time.communication:
            assert 0 <= sent.hidden_s <= sent.seconds, one.name
        hidden = sum(sent.hidden_s for sent in time.communication)
        assert hidden <= (time.matmul_s + time.attention_s + time.sweep_s) * (1 + 1e-12), one.name


@pytest.mark.parametrize("kind", ["tpu", "gpu"])
def test_the_fits_sums_are_the_planners(published, kind: str):
    own = [(one, time) for one, time in published if one.target.backend == kind]
    errors = _errors(_work([one for one, _ in own]), BY_KIND[kind])
    mine = [math.log(time.step_s / one.step_s) for one, time in own]
    np.testing.assert_allclose(errors, mine, rtol=0, atol=1e-9)
    # And with other constants, so that nothing in the arrays is of these.
    other = Efficiency(
        matmul=0.6, reuse_flops_per_byte=500, attention=0.5, sweep=0.4, link=0.7, hidden=0.9,
        attention_flops_per_byte=200,
    )  # fmt: skip
    errors = _errors(_work([one for one, _ in own]), other)
    mine = [math.log(train_time(one.run, one.target, other).step_s / one.step_s) for one, _ in own]
    np.testing.assert_allclose(errors, mine, rtol=0, atol=1e-9)


@pytest.mark.parametrize("mesh", ["fsdp=16", "fsdp=4,tensor=4", "data=2,context=8", "stage=4,fsdp=4"])
def test_a_larger_batch_takes_longer_and_wastes_no_more(mesh: str):
    accumulation = 4 if "stage" in mesh else 1
    steps = [timed(mesh, batch=batch, accumulation=accumulation) for batch in (64, 128, 256, 512)]
    for small, large in itertools.pairwise(steps):
        assert small.step_s < large.step_s <= 2 * small.step_s
        assert small.mfu <= large.mfu < 1


@pytest.mark.parametrize("mesh", ["fsdp=16", "fsdp=4,tensor=4", "fsdp=8,context=2"])
def test_recomputing_more_takes_longer(mesh: str):
    none, dots, full = (timed(mesh, remat=remat).step_s for remat in ("none", "dots", "full"))
    assert none < dots < full < 4 / 3 * none


@pytest.mark.parametrize("schedule", ["1f1b", "gpipe"])
@pytest.mark.parametrize(("stages", "microbatches"), [(2, 2), (4, 4), (4, 16), (8, 64)])
def test_a_pipelines_bubble(schedule: str, stages: int, microbatches: int):
    """Each stage waits for the microbatches of those before it: of p - 1 + m turns it works m."""
    mesh = f"stage={stages},fsdp={16 // stages}"
    time = timed(mesh, schedule=schedule, accumulation=microbatches, batch=64 * 16)
    working = time.matmul_s + time.attention_s + time.sweep_s + time.exposed_s
    turns, worked = microbatches + stages - 1, microbatches
    assert time.bubble_s / working == pytest.approx((turns - worked) / worked)
    assert time.bubble_s / working == pytest.approx((stages - 1) / microbatches)


def test_better_schedules():
    run = TrainRun(model=LLAMA, batch=64, seq=64, mesh=MeshShape(stage=4), accumulation=8)
    plain = bubble(run)
    assert bubble(dataclasses.replace(run, schedule="interleaved", chunks=2)) == plain / 2
    assert bubble(dataclasses.replace(run, schedule="zero-bubble")) == pytest.approx(plain / 3)
    assert bubble(dataclasses.replace(run, mesh=MeshShape())) == 0
    with pytest.raises(ValueError, match=r"schedule 'dualpipe' is not known. Legal: gpipe, 1f1b"):
        bubble(dataclasses.replace(run, schedule="dualpipe"))


def test_zero_splits_the_update_over_data():
    runs = {zero: TrainRun(model=LLAMA, batch=16, seq=64, mesh=MeshShape(data=8), zero=zero) for zero in (0, 1, 2)}
    moved = {zero: optimizer_operation(run).moved_bytes for zero, run in runs.items()}
    # A gradient is read twice, a parameter read and written; two values of state likewise.
    assert moved[0] == 8_030_261_248 * (16 + 2 * 2 * 4)
    assert moved[1] == moved[2] == moved[0] / 8
    plain = dataclasses.replace(runs[0], state_values=0.0)
    assert optimizer_operation(plain).moved_bytes == 8_030_261_248 * 16


@pytest.mark.parametrize("preset", PRESETS)
@pytest.mark.parametrize(
    "mesh", ["", "fsdp=4", "tensor=2", "stage=2", "expert=2,fsdp=2", "data=2,stage=2,fsdp=2,tensor=2"]
)
def test_parameters_on_a_device_array_by_array(preset: str, mesh: str):
    config, shape = PRESETS[preset], MeshShape.parse(mesh)
    if shape.expert > 1 and config.experts is None:
        pytest.skip("no experts")
    run = TrainRun(model=architecture(config), batch=shape.batch_shards, seq=8, mesh=shape)
    split = {"D": shape.fsdp, "L": shape.stage, "E": shape.expert, **dict.fromkeys("NKFV", shape.tensor)}
    held = gathered = 0.0
    for array in weight_arrays(config):
        piece = math.prod(
            size / split.get(dim, 1) for dim, size in zip(array.dims, array.shape, strict=True)
        )  # fmt: skip
        held += piece
        gathered += piece * (shape.fsdp if "D" in array.dims else 1)
    assert params_on_device(run) == pytest.approx((held, gathered), rel=1e-12)


def test_what_travels_along_each_axis_by_hand():
    """Bytes of one step of a small run, with no efficiency in between."""
    batch, seq, params = 32, 1024, 8_030_261_248
    sent = timed("fsdp=16", batch=batch, seq=seq, efficiency=DATASHEET).communication
    assert {(one.axis, one.what): one.payload_bytes for one in sent} == {
        # Weights in bfloat16, for the forward and for the backward pass; gradients in float32.
        (Axis.FSDP, "all-gather"): 2 * 2 * params,
        (Axis.FSDP, "reduce-scatter"): 4 * params,
    }
    sent = timed("data=16", batch=batch, seq=seq, efficiency=DATASHEET).communication
    assert [(one.axis, one.what, one.payload_bytes) for one in sent] == [(Axis.DATA, "all-reduce", 4 * params)]
    # Of 4 sequences a device, in bfloat16: two gathers and two sums a layer, forwards, again and backwards.
    sent = timed("fsdp=4,tensor=4", batch=batch, seq=seq, remat="full").communication
    stream = batch / 4 * seq * 4096 * 2
    assert [one.payload_bytes for one in sent if one.axis is Axis.TENSOR] == [32 * 4 * 3 * stream]
    sent = timed("fsdp=4,tensor=4", batch=batch, seq=seq, remat="none").communication
    assert [one.payload_bytes for one in sent if one.axis is Axis.TENSOR] == [32 * 4 * 2 * stream]


def test_microbatches_gather_weights_each_time():
    one, four = (
        {c.what: c.payload_bytes for c in timed("fsdp=16", accumulation=n).communication} for n in (1, 4)
    )  # fmt: skip
    assert four == {what: 4 * payload for what, payload in one.items()}


def test_nothing_travels_on_one_device_or_inside_a_chip():
    assert timed("", Target.parse("v5e:1x1")).communication == ()
    inside = timed("fsdp=8,tensor=2", Target.parse("v7x:2x2x2"))
    assert {one.axis for one in inside.communication} == {Axis.FSDP}


def test_hidden_is_no_more_than_the_work():
    # A tiny batch has little to hide communication behind, even where all of it could.
    eager = dataclasses.replace(BY_KIND["tpu"], hidden=1.0)
    time = timed("fsdp=16", batch=16, seq=1, efficiency=eager)
    work = time.matmul_s + time.attention_s + time.sweep_s
    assert sum(one.hidden_s for one in time.communication) == pytest.approx(work)
    assert time.exposed_s > 0
    idle = dataclasses.replace(eager, hidden=0.0)
    assert all(one.hidden_s == 0 for one in timed("fsdp=16", efficiency=idle).communication)


def test_mfu_by_hand():
    time = timed("fsdp=16", batch=64, seq=2048)
    params = 8_030_261_248 - 128256 * 4096 - (2 * 32 + 1) * 4096
    # A query sees 2049 / 2 keys on average.
    flops = 64 * 2048 * (6 * params + 12 * 32 * 32 * 128 * 2049 / 2)
    assert model_flops(LLAMA, 64, 2048) == flops
    assert time.mfu == pytest.approx(flops / time.step_s / (16 * 197e12))


def test_two_devices_of_a_chip_have_half_each():
    one, two = (train_time(TrainRun(model=LLAMA, batch=16, seq=512, mesh=MeshShape(fsdp=n)), Target.parse(target))
                for n, target in ((8, "v7x:2x2x1"), (4, "v5p:2x2x1")))  # fmt: skip
    assert one.matmul_s > 0
    assert two.matmul_s > 0
    assert one.mfu < 1


def test_refused():
    with pytest.raises(ValueError, match="must be at least 1"):
        TrainRun(model=LLAMA, batch=0, seq=1)
    with pytest.raises(ValueError, match="has no figures in the catalogue"):
        timed("data=8", Target.parse("cpu:8"))
    with pytest.raises(ValueError, match="mesh fsdp=8 is of 8 devices and v5e:4x4 has 16"):
        timed("fsdp=8")
    with pytest.raises(ValueError, match="v5e has no peak for float32"):
        timed("fsdp=16", precision="float32")
