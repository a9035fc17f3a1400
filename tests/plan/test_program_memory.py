"""Memory of a compiled step: arguments array by array, what grows with what, and the largest that fits."""

import dataclasses
import math

import pytest

from gcompute.config.architecture import architecture
from gcompute.config.mesh import MeshShape
from gcompute.config.presets import PRESETS
from gcompute.plan.params import weight_arrays
from gcompute.plan.program_memory import ProgramMemory, largest_batch, largest_context, program_memory
from gcompute.plan.tiling import local_shape, tile_padding, tiled_values
from gcompute.plan.train_run import TrainRun

GIB = 2**30
MESHES = (
    "",
    "data=4",
    "fsdp=4",
    "tensor=2",
    "stage=2",
    "expert=4,fsdp=2",
    "stage=2,fsdp=2,tensor=2",
    "context=2,fsdp=8",
)
LLAMA = TrainRun(model=architecture(PRESETS["llama3-8b"]), batch=64, seq=2048, mesh=MeshShape(fsdp=16))


def changed(run: TrainRun, **changes: object) -> ProgramMemory:
    return program_memory(dataclasses.replace(run, **changes))  # pyright: ignore[reportArgumentType]


@pytest.mark.parametrize("preset", PRESETS)
@pytest.mark.parametrize("mesh", MESHES)
def test_arguments_array_by_array(preset: str, mesh: str):
    config, shape = PRESETS[preset], MeshShape.parse(mesh)
    if shape.expert > 1 and config.experts is None:
        pytest.skip("no experts")
    accumulation = shape.stage
    run = TrainRun(
        model=architecture(config),
        batch=shape.batch_shards * accumulation,
        seq=8,
        mesh=shape,
        accumulation=accumulation,
    )
    split = {"D": shape.fsdp, "L": shape.stage, "E": shape.expert, **dict.fromkeys("NKFV", shape.tensor)}
    arrays = weight_arrays(config)
    values = sum(
        math.prod(size / split.get(dim, 1) for dim, size in zip(array.dims, array.shape, strict=True))
        for array in arrays
    )
    memory = program_memory(run)
    assert memory.parameters_bytes == pytest.approx(4 * values, rel=1e-12)
    assert memory.arguments_bytes == pytest.approx(3 * 4 * values, rel=1e-12)
    # As a TPU stores them, in whole tiles of each device's piece.
    whole = all(
        size % split.get(dim, 1) == 0
        for array in arrays
        for dim, size in zip(array.dims, array.shape, strict=True)
    )  # fmt: skip
    if whole:
        tiled = program_memory(run, padding=tile_padding(config, shape))
        stored = sum(tiled_values(local_shape(array, shape)) for array in arrays)
        assert tiled.arguments_bytes == pytest.approx(12 * stored, rel=1e-12)


def test_optimizer_state():
    assert changed(LLAMA, state_values=0.0).optimizer_bytes == 0
    assert changed(LLAMA, state_values=1.0).optimizer_bytes == program_memory(LLAMA).parameters_bytes
    data = dataclasses.replace(LLAMA, mesh=MeshShape(data=8), batch=64)
    assert changed(data, zero=1).optimizer_bytes * 8 == program_memory(data).optimizer_bytes
    assert changed(data, zero=1).parameters_bytes == program_memory(data).parameters_bytes
    assert changed(data, zero=2).gradients_bytes * 8 == changed(data, zero=1).gradients_bytes


@pytest.mark.oldest
def test_total_is_the_sum_of_what_lies_there_at_once():
    for run in (LLAMA, dataclasses.replace(LLAMA, accumulation=4), dataclasses.replace(LLAMA, seq=64)):
        memory = program_memory(run)
        gradient = memory.gradients_bytes + memory.workspace_bytes
        stays = memory.parameters_bytes + memory.optimizer_bytes + memory.accumulator_bytes + memory.activations_bytes
        assert memory.total_bytes == pytest.approx(stays + max(gradient, memory.logits_bytes))
        assert (
            memory.total_bytes == memory.arguments_bytes + memory.temporaries_bytes == memory.to_dict()["total_bytes"]
        )


def test_fsdp_divides():
    one, four = (changed(LLAMA, mesh=MeshShape(fsdp=n), batch=64) for n in (4, 16))
    for name in ("parameters_bytes", "optimizer_bytes", "gradients_bytes", "activations_bytes"):
        assert getattr(one, name) == pytest.approx(4 * getattr(four, name)), name
    # Gathered matrices are whole wherever they are used.
    assert one.workspace_bytes < 4 * four.workspace_bytes


def test_data_divides_the_batch_alone():
    one, four = (changed(LLAMA, mesh=MeshShape(data=n), batch=64) for n in (4, 16))
    assert one.parameters_bytes == four.parameters_bytes
    assert one.activations_bytes == 4 * four.activations_bytes


@pytest.mark.parametrize("preset", ["llama3-8b", "mixtral-8x7b", "gpt2-xl", "qwen3-0.6b"])
@pytest.mark.parametrize("remat", ["none", "dots", "full"])
def test_grows_with_batch_and_sequence(preset: str, remat: str):
    run = TrainRun(model=architecture(PRESETS[preset]), batch=8, seq=512, mesh=MeshShape(fsdp=8), remat=remat)
    for name, sizes in (("batch", (8, 16, 24, 64, 256)), ("seq", (1, 64, 128, 200, 1024, 8192))):
        grown = [changed(run, **{name: size}) for size in sizes]
        layers = [one.activations_bytes + one.workspace_bytes for one in grown]
        assert layers == sorted(layers)
        assert layers[0] < layers[-1]
        # Losses are computed in equal chunks, whose size hangs on what divides the tokens: powers of two always do.
        totals = [one.total_bytes for one, size in zip(grown, sizes, strict=True) if size & (size - 1) == 0]
        assert totals == sorted(totals)
        assert totals[0] < totals[-1]


@pytest.mark.parametrize("preset", ["llama3-8b", "mixtral-8x7b", "gpt2-xl", "qwen3-0.6b"])
@pytest.mark.parametrize("mesh", ["fsdp=8", "data=8", "fsdp=4,tensor=2"])
def test_recomputing_more_keeps_less(preset: str, mesh: str):
    shape = MeshShape.parse(mesh)
    if preset == "gpt2-xl" and shape.tensor > 1:
        pytest.skip("25 heads")
    run = TrainRun(model=architecture(PRESETS[preset]), batch=64, seq=1024, mesh=shape)
    kept = [changed(run, remat=remat).activations_bytes for remat in ("none", "dots", "full")]
    assert kept[0] > kept[1] > kept[2] > 0


def test_microbatches_keep_less_and_sum_gradients():
    one, four = program_memory(LLAMA), changed(LLAMA, accumulation=4)
    assert four.activations_bytes * 4 == one.activations_bytes
    assert (one.accumulator_bytes, four.accumulator_bytes) == (0, 2 * four.parameters_bytes)


def test_a_pipelines_first_stage_keeps_as_many_microbatches_as_stages():
    staged = {n: changed(LLAMA, mesh=MeshShape(stage=4, fsdp=4), batch=16 * n, accumulation=n) for n in (4, 8, 32)}
    assert staged[4].activations_bytes == staged[8].activations_bytes == staged[32].activations_bytes
    # A quarter of the layers, four times.
    alone = changed(LLAMA, mesh=MeshShape(fsdp=4), batch=16)
    assert staged[8].activations_bytes == pytest.approx(alone.activations_bytes)


@pytest.mark.parametrize("available", [8 * GIB, 16 * GIB, 95 * GIB])
@pytest.mark.parametrize("mesh", ["fsdp=16", "fsdp=8,tensor=2", "data=2,fsdp=16"])
@pytest.mark.parametrize("accumulation", [1, 4])
def test_the_largest_batch_is_the_largest(available: int, mesh: str, accumulation: int):
    run = dataclasses.replace(LLAMA, mesh=MeshShape.parse(mesh), accumulation=accumulation, batch=1024)
    unit = run.mesh.batch_shards * accumulation
    largest = largest_batch(run, available)
    assert largest % unit == 0

    def total(batch: int) -> float:
        return changed(run, batch=batch).total_bytes

    if largest:
        assert total(largest) <= available
    # Nor does any larger one, as far as one looks.
    assert all(total(largest + more * unit) > available for more in range(1, 20))


@pytest.mark.parametrize("step", [128, 512])
def test_the_longest_sequence_is_the_longest(step: int):
    for available in (8 * GIB, 16 * GIB, 95 * GIB):
        longest = largest_context(LLAMA, available, step=step)
        assert longest % step == 0
        assert longest == 0 or changed(LLAMA, seq=longest).total_bytes <= available
        assert changed(LLAMA, seq=longest + step).total_bytes > available


def test_what_never_fits():
    assert largest_batch(LLAMA, 1 * GIB) == 0
    assert largest_context(LLAMA, 1 * GIB) == 0
