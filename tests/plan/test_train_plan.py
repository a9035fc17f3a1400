"""The whole answer on a run: the trainer's configuration as a question, the verdict, and what is refused."""

import dataclasses

import pytest

from gcompute.config.architecture import architecture
from gcompute.config.mesh import MeshShape
from gcompute.config.presets import PRESETS
from gcompute.config.train import OPTIMIZERS, DataConfig, OptimizerConfig, RunConfig, TrainConfig
from gcompute.hardware.catalogue import find_chip
from gcompute.hardware.target import Target
from gcompute.plan.memory import train_memory
from gcompute.plan.params import count_params
from gcompute.plan.train_plan import (
    CLOSE,
    FITS,
    SHARED,
    TOO_LARGE,
    MemoryAnswer,
    TrainQuestion,
    answer,
    check_question,
    memory_facts,
    memory_of,
    question_of,
    state_values,
    time_facts,
    time_of,
)
from gcompute.plan.train_run import TrainRun
from gcompute.plan.train_step import predict_train_step
from gcompute.plan.train_time import train_time

GIB = 2**30
LLAMA = PRESETS["llama3-8b"]


def asked(target: str, mesh: str, *, preset: str = "llama3-8b", **train: object) -> TrainQuestion:
    """The question that a configuration of the trainer is."""
    settings = {"batch": 64, "seq": 512, "accumulation": 1, **train}
    run = RunConfig(
        model=PRESETS[preset],
        optimizer=OptimizerConfig(),
        train=TrainConfig(mesh=MeshShape.parse(mesh), **settings),  # pyright: ignore[reportArgumentType]
        data=DataConfig(),
    )
    return question_of(run, Target.parse(target), settings["accumulation"], name=preset)  # pyright: ignore[reportArgumentType]


def test_every_setting_of_the_trainer_is_in_the_question():
    question = asked(
        "v5p:2x2x4", "stage=4,fsdp=4", accumulation=8, remat="dots", precision="bfloat16", residual="float32",
        sequence_parallel=False, pipeline_schedule="interleaved", pipeline_chunks=2, zero=1,
    )  # fmt: skip
    assert question.run == TrainRun(
        model=architecture(LLAMA, "llama3-8b"),
        batch=64,
        seq=512,
        mesh=MeshShape(stage=4, fsdp=4),
        accumulation=8,
        remat="dots",
        activation_bytes=4.0,
        sequence_parallel=False,
        schedule="interleaved",
        chunks=2,
        zero=1,
    )
    assert (question.config, question.optimizer, question.residual) == (LLAMA, "adamw", "float32")
    # Of two bytes where the device is no CPU.
    assert asked("v5e:4x4", "fsdp=16").run.activation_bytes == 2.0


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_state_of_optimizers(optimizer: str):
    memory = train_memory(LLAMA, batch=1, seq=8, optimizer=optimizer)
    total = count_params(LLAMA).total
    assert 4 * total * state_values(LLAMA, optimizer) == pytest.approx(memory.optimizer_bytes)


@pytest.mark.parametrize(
    ("total", "available", "low", "verdict"),
    [
        (10, 100, 0.1, FITS),
        (90, 100, 0.1, FITS),
        (91, 100, 0.1, CLOSE),
        (100, 100, 0.1, CLOSE),
        (101, 100, 0.1, TOO_LARGE),
        (100, 100, 0.0, FITS),
        (10**6, None, 0.1, SHARED),
    ],
)
def test_verdicts(total: float, available: float | None, low: float, verdict: str):
    memory = MemoryAnswer(components={}, total_bytes=total, available_bytes=available, accuracy=None, low=low)
    assert memory.verdict == verdict
    assert memory.left_bytes == (None if available is None else available - total)


def test_never_fits_with_less_than_nothing_left():
    for batch in range(16, 400, 16):
        memory = memory_of(asked("v5e:4x4", "fsdp=16", batch=batch, remat="full", seq=2048))
        assert memory.left_bytes is not None
        assert (memory.left_bytes < 0) == (memory.verdict == TOO_LARGE)
        if memory.verdict == FITS:
            assert memory.left_bytes >= memory.low * memory.total_bytes * (1 - 1e-9)


def test_what_may_be_used():
    tpu = memory_of(asked("v5e:4x4", "fsdp=16"))
    assert tpu.available_bytes == find_chip("v5e").usable_hbm_bytes
    assert tpu.accuracy is not None
    assert tpu.low == tpu.accuracy.low
    gpu = memory_of(asked("h100:8", "fsdp=8"))
    assert gpu.available_bytes == int(0.92 * find_chip("h100-sxm").hbm_bytes)
    # What no exam was sat for has no error: a model that the trainer has not, whose programs nobody compiled there.
    assert gpu.accuracy is not None
    assert gpu.accuracy.kind == "train memory, GPU compiler"
    unknown = memory_of(dataclasses.replace(asked("h100:8", "fsdp=8"), config=None))
    assert (unknown.accuracy, unknown.low) == (None, 0.0)
    # Half of a v7x for each of its devices.
    half = memory_of(asked("v7x:2x2x1", "fsdp=8")).available_bytes
    assert half is not None
    assert half <= find_chip("v7x").hbm_bytes / 2


def test_components_add_up():
    for target, mesh in (("v5e:4x4", "fsdp=16"), ("h100:8", "fsdp=8")):
        memory = memory_of(asked(target, mesh, seq=2048))
        assert all(value >= 0 for value in memory.components.values())
        named = dict(memory.components)
        working = [named.pop("logits"), named.pop("workspace")]
        working[1] += named.pop("gradients") if target.startswith("v5e") else 0
        assert memory.total_bytes == pytest.approx(sum(named.values()) + max(working))


def test_a_gpus_attention_is_plain():
    """No kernel does the attention of the trainer there, and its scores are kept."""
    question = asked("h100:8", "fsdp=8", seq=2048, remat="none")
    plain = train_memory(
        LLAMA, batch=64, seq=2048, mesh=MeshShape(fsdp=8), remat="none", residual="bfloat16", precision="bfloat16",
        fuses_mask=True,
    )  # fmt: skip
    assert memory_of(question).total_bytes == plain.total_bytes
    assert memory_of(question).total_bytes > memory_of(dataclasses.replace(question, config=None)).total_bytes


def test_padding_is_a_tpus():
    assert asked("v5e:2x2", "data=4", preset="gpt2-xl").padding > 1.01
    assert asked("h100:4", "data=4", preset="gpt2-xl").padding == 1
    unknown = dataclasses.replace(asked("v5e:2x2", "data=4", preset="gpt2-xl"), config=None)
    assert unknown.padding == 1
    assert memory_of(unknown).total_bytes < memory_of(asked("v5e:2x2", "data=4", preset="gpt2-xl")).total_bytes


def test_the_answer_has_memory_and_time_of_its_question():
    question = asked("v5e:4x4", "fsdp=16", remat="full")
    told = answer(question)
    assert told.memory == memory_of(question)
    assert told.time == train_time(question.run, question.target) == time_of(question)
    assert told.time_accuracy is not None
    assert told.time_accuracy.kind == "train step, TPU"
    gpu = answer(asked("h100:8", "fsdp=8"))
    assert gpu.time_accuracy is not None
    assert gpu.time_accuracy.kind == "train step, GPU"


@pytest.mark.parametrize(
    ("target", "mesh", "changes", "said"),
    [
        ("v5e:4x4", "fsdp=8", {}, "mesh fsdp=8 is of 8 devices and v5e:4x4 has 16"),
        ("v5e:4x4", "tensor=16", {}, "tensor=16 does not divide kv_heads=8.*Legal: tensor=1, 2, 4, 8"),
        ("v5e:4x4", "fsdp=16", {"batch": 24}, "use a multiple of 16"),
        ("v5e:4x4", "stage=4,fsdp=4", {}, "accumulation=4 or more"),
        ("v5e:4x4", "expert=16", {}, "needs a model with experts"),
    ],
)
def test_refused(target: str, mesh: str, changes: dict, said: str):
    with pytest.raises(ValueError, match=said) as refused:
        answer(asked(target, mesh, **changes))
    assert "\n" not in str(refused.value)
    with pytest.raises(ValueError, match=said):
        check_question(asked(target, mesh, **changes))


def test_facts_for_the_exam():
    question = asked("v5e:4x4", "fsdp=4,tensor=4", remat="dots", preset="mixtral-8x7b")
    assert memory_facts(question) == {
        "chip": "v5e", "axis": ("fsdp", "tensor"), "remat": "dots", "layers": ("experts",), "optimizer": "adamw"
    }  # fmt: skip
    assert time_facts(question.run, question.target)["precision"] == "bfloat16"
    group = question.run.model.layers[0]
    seeing = dataclasses.replace(group, attention=dataclasses.replace(group.attention, window=7))
    mixed = question.replace(model=dataclasses.replace(question.run.model, layers=(group, seeing)))
    assert memory_facts(mixed)["layers"] == ("experts", "windows")


def test_this_machines_step_is_the_trainers_own():
    """A CPU is measured, and its step follows the trainer's own sweeps."""
    chip = dataclasses.replace(
        find_chip("t4"), name="this", kind="cpu", peak_flops_per_s={"float32": 1e11, "bfloat16": 2e10},
        hbm_bytes_per_s=2e10, hbm_bytes=8 * GIB,
    )  # fmt: skip
    target = Target(chip="this", shape=(1,), known=chip)
    base = asked("v5e:1x1", "", preset="demo", batch=8, seq=128, remat="none", residual="float32")
    question = dataclasses.replace(base, target=target)
    told = answer(question)
    step = predict_train_step(
        PRESETS["demo"], batch=8, seq=128, precision="bfloat16", roofline_flops_per_s=2e10, memory_bytes_per_s=2e10
    )
    assert told.time.step_s == step.step_s == time_of(question).step_s
    assert told.time.tokens_per_s == pytest.approx(8 * 128 / step.step_s)
    parts = told.time.matmul_s + told.time.sweep_s + told.time.optimizer_s
    assert parts == pytest.approx(told.time.step_s)
    assert told.time_accuracy is None
    with pytest.raises(ValueError, match="is not a model of this library's trainer"):
        answer(dataclasses.replace(question, config=None))
