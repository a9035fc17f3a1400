"""What `why` recommends, done: it is legal, of the same chips, fits, and gives the gain that was said."""

import dataclasses
import re

import pytest

from gcompute.config.architecture import architecture
from gcompute.config.mesh import MeshShape
from gcompute.config.presets import PRESETS
from gcompute.hardware.catalogue import find_chip
from gcompute.hardware.target import Target
from gcompute.plan.serving import ServeRun, load_of, most_concurrency
from gcompute.plan.train_plan import FITS, TOO_LARGE, TrainAnswer, TrainQuestion, answer
from gcompute.plan.train_run import TrainRun
from gcompute.plan.why import LEAST_GAIN, best_change, why_serve, why_train


def told(preset: str, target: str, mesh: str, batch: int, seq: int = 2048, **changes: object) -> TrainAnswer:
    config = PRESETS[preset]
    run = TrainRun(
        model=architecture(config, preset), batch=batch, seq=seq, mesh=MeshShape.parse(mesh),
        **changes,  # pyright: ignore[reportArgumentType]
    )  # fmt: skip
    return answer(TrainQuestion(run=run, target=Target.parse(target), config=config))


def done(found: TrainAnswer, what: str) -> TrainAnswer:
    """The answer where the flags in `what` are given, read here on their own."""
    microbatches = re.search(r" in (\d+) microbatches", what)
    flags = dict(re.findall(r"--([\w-]+) (\S+)", what))
    names = {"pipeline-schedule": "schedule", "pipeline-chunks": "chunks"}
    changes: dict[str, object] = {
        str(names.get(flag, flag)): MeshShape.parse(value)
        if flag == "mesh"
        else int(value)
        if value.isdigit()
        else value
        for flag, value in flags.items()
    }
    if microbatches:
        changes["accumulation"] = int(microbatches[1])
    assert changes, what
    return answer(found.question.replace(**changes))


CASES = [
    ("llama3-70b", "v5p:8x8x16", "fsdp=256,tensor=4", 1024, {}),
    ("llama3-8b", "v5e:4x4", "fsdp=8,tensor=2", 16, {}),
    ("llama3-8b", "v5p:4x4x4", "fsdp=64", 128, {"remat": "full"}),
    ("llama3-8b", "v5p:4x4x4", "stage=8,fsdp=8", 64, {"accumulation": 8}),
    ("llama3-8b", "v5p:4x4x4", "stage=8,fsdp=8", 128, {"accumulation": 16, "schedule": "interleaved", "chunks": 2}),
    ("llama3-8b", "v5p:4x4x4", "tensor=8,context=8", 4, {}),
    ("llama3-8b", "h100:64", "fsdp=8,tensor=8", 64, {}),
    ("mixtral-8x7b", "v5p:4x4x8", "fsdp=16,expert=8", 128, {}),
    ("gpt2-xl", "v5e:2x2", "fsdp=4", 64, {"accumulation": 16, "seq": 1024}),
    ("demo", "v5e:1x1", "", 1, {"seq": 64}),
    ("llama3-8b", "2*v5e:8x8", "data=2,fsdp=64", 128, {}),
    ("llama3-8b", "v7x:2x2x2", "tensor=8,fsdp=2", 16, {}),
]


@pytest.mark.parametrize(("preset", "target", "mesh", "batch", "changes"), CASES)
def test_what_is_recommended_gives_what_is_said(preset: str, target: str, mesh: str, batch: int, changes: dict):
    found = told(preset, target, mesh, batch, **changes)
    assert found.memory.verdict != TOO_LARGE
    change = best_change(found)
    if change is None:
        assert "brings 2% more" in why_train(found)
        return
    after = done(found, change.what)
    assert after.question == change.question
    assert after.question.run.mesh.num_devices == found.question.target.num_devices
    assert after.memory.verdict == FITS or after.memory.verdict == found.memory.verdict
    assert after.time.tokens_per_s / found.time.tokens_per_s - 1 == pytest.approx(change.gain)
    assert change.gain > LEAST_GAIN
    assert f"{change.what}, {change.gain:+.0%} tokens a second (predicted)" in why_train(found)


def test_most_cases_have_something_to_say():
    assert sum(best_change(told(*case[:4], **case[4])) is not None for case in CASES) > len(CASES) / 2


def test_what_does_not_fit_is_told_what_would():
    found = told("gpt2-xl", "v5e:2x2", "data=4", 8, seq=1024)
    assert found.memory.verdict == TOO_LARGE
    change = best_change(found)
    assert change is not None
    assert done(found, change.what).memory.verdict != TOO_LARGE
    assert f"It would fit with {change.what}" in why_train(found)
    # Even where that is slower.
    found = told("llama3-8b", "v5e:8x8", "fsdp=64", 128, seq=8192, remat="none")
    assert found.memory.verdict == TOO_LARGE
    change = best_change(found)
    assert change is not None
    assert change.gain < 0
    assert done(found, change.what).memory.verdict != TOO_LARGE
    hopeless = told("llama3-405b", "v5e:1x1", "", 1)
    assert best_change(hopeless) is None
    assert "makes it fit" in why_train(hopeless)


def test_shares_are_of_one_step():
    for case in CASES:
        words = why_train(told(*case[:4], **case[4]))
        assert re.match(r"A step is \d+% arithmetic", words)
        shares = [
            int(share) for share in re.findall(r"(\d+)% (?:arith|memory traf|communication that|pipe|the opt)", words)
        ]
        assert 96 <= sum(shares) <= 104, words
        assert all(0 < int(share) <= 100 for share in re.findall(r"(?<![+\d])(\d+)%", words.split("What would")[0])
                   if share != "0"), words  # fmt: skip
        assert "nan" not in words
        assert "inf" not in words.replace("information", "")


def test_on_this_machine_both_sides_are_the_trainers_own():
    chip = dataclasses.replace(
        find_chip("t4"), name="this", kind="cpu", peak_flops_per_s={"float32": 1e11, "bfloat16": 2e10},
        hbm_bytes_per_s=2e10,
    )  # fmt: skip
    config = PRESETS["demo"]
    run = TrainRun(model=architecture(config), batch=4, seq=256, remat="full", activation_bytes=4.0)
    question = TrainQuestion(
        run=run, target=Target(chip="this", shape=(1,), known=chip), config=config, residual="float32"
    )
    found = answer(question)
    change = best_change(found)
    assert change is not None
    after = done(found, change.what)
    assert after.time.tokens_per_s / found.time.tokens_per_s - 1 == pytest.approx(change.gain)


SERVED = architecture(PRESETS["llama3-8b"])


@pytest.mark.parametrize(
    ("target", "mesh", "concurrency", "changes"),
    [
        ("v5e:2x4", "tensor=8", 32, {}),
        ("v5e:2x4", "data=2,tensor=4", 8, {"weights": "int8"}),
        ("h100:8", "tensor=8", 64, {}),
        ("v5e:2x4", "tensor=8", 32, {"weights": "int8", "cache": "int8"}),
    ],
)
def test_serving_too(target: str, mesh: str, concurrency: int, changes: dict):
    run = ServeRun(
        model=SERVED, prompt=1024, output=256, concurrency=concurrency, mesh=MeshShape.parse(mesh), **changes
    )
    words = why_serve(run, Target.parse(target))
    match = re.search(r"What would help most: --(\w+) (\S+), ([+-]\d+)%", words)
    if match is None:
        return
    flag, value, gain = match.groups()
    field = {"kv": "cache"}.get(flag, flag)
    given = MeshShape.parse(value) if flag == "mesh" else int(value) if value.isdigit() else value
    other = dataclasses.replace(run, **{field: given})
    assert other.mesh.num_devices == Target.parse(target).num_devices
    assert most_concurrency(other, Target.parse(target)) >= other.concurrency
    now, then = (load_of(one, Target.parse(target), one.concurrency).tokens_per_s for one in (run, other))
    assert round(100 * (then / now - 1)) == int(gain)


def test_serving_what_does_not_fit():
    run = ServeRun(model=architecture(PRESETS["llama3-405b"]), prompt=16, output=16)
    assert "or --weights int8" in why_serve(run, Target.parse("v5e:1x1"))
    narrow = dataclasses.replace(run, weights="int8", cache="int8")
    assert "--weights int8" not in why_serve(narrow, Target.parse("v5e:1x1"))
