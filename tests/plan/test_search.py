"""The search against every legal candidate tried one by one, and what it says where nothing fits."""

import dataclasses
import itertools
import math

import pytest

from gcompute.config.architecture import Attention, FeedForward, Layers, architecture
from gcompute.config.mesh import Axis, MeshShape
from gcompute.config.model import ModelConfig
from gcompute.config.presets import PRESETS
from gcompute.config.train import REMAT_POLICIES
from gcompute.hardware.target import Target
from gcompute.plan.legal import check_mesh
from gcompute.plan.search import Candidate, legal_meshes, search
from gcompute.plan.train_plan import CLOSE, FITS, TOO_LARGE, TrainQuestion, answer, memory_of, time_of
from gcompute.plan.train_run import TrainRun

SMALL = ModelConfig(vocab=4096, layers=8, dim=512, heads=8, kv_heads=4, ffn=2048, context=4096)
MIXTURE = dataclasses.replace(SMALL, experts=4, capacity_factor=1.25)


def question(config: ModelConfig, target: str, seq: int = 1024, **changes: object) -> TrainQuestion:
    run = TrainRun(model=architecture(config), batch=1, seq=seq, **changes)  # pyright: ignore[reportArgumentType]
    return TrainQuestion(run=run, target=Target.parse(target), config=config)


def every_mesh(devices: int) -> list[MeshShape]:
    """Every way to write a number of devices as a product of six sizes."""
    divisors = [n for n in range(1, devices + 1) if devices % n == 0]
    return [
        MeshShape(**dict(zip((axis.value for axis in Axis), sizes, strict=True)))
        for sizes in itertools.product(divisors, repeat=len(Axis))
        if math.prod(sizes) == devices
    ]


def is_legal(asked: TrainQuestion) -> bool:
    run = asked.run
    try:
        check_mesh(
            run.model, run.mesh, batch=run.batch, seq=run.seq, accumulation=run.accumulation, schedule=run.schedule,
            chunks=run.chunks,
        )  # fmt: skip
    except ValueError:
        return False
    return True


def check_found(found: tuple[Candidate, ...], asked: TrainQuestion) -> None:
    """What holds of every answer: legal, of the right size, none twice, and predicted as when asked for alone."""
    assert found
    ways = [(one.run.mesh, one.run.batch, one.run.accumulation, one.run.remat) for one in found]
    assert len(set(ways)) == len(ways)
    for one in found:
        assert one.run.mesh.num_devices == asked.target.num_devices
        assert is_legal(one.question), one.run.mesh
    for one in found[:3]:
        told = answer(one.question)
        assert told.memory.verdict == one.verdict
        assert told.memory.total_bytes == pytest.approx(one.total_bytes)
        assert told.time.step_s == one.time.step_s


@pytest.mark.parametrize(
    ("config", "target", "batch", "seq"),
    [
        (SMALL, "v5e:2x4", 16, 1024),
        # So much that only some ways fit, and some only where all is recomputed.
        (SMALL, "v5e:2x4", 256, 4096),
        (SMALL, "v5p:2x2x2", 24, 512),
        (MIXTURE, "v5e:2x4", 64, 4096),
        (SMALL, "2*v5e:2x2", 16, 1024),
        (SMALL, "v7x:2x2x1", 16, 1024),
        (SMALL, "v5e:2x2", 6, 1001),
    ],
)
def test_nothing_legal_that_fits_is_faster(config: ModelConfig, target: str, batch: int, seq: int):
    asked = question(config, target, seq)
    found = search(asked, batch=batch)
    check_found(found, asked)
    fastest, fitting = math.inf, 0
    for mesh in every_mesh(asked.target.num_devices):
        for accumulation, remat in itertools.product((1, 2, 4, 8, 16, 32, 64), REMAT_POLICIES):
            one = asked.replace(mesh=mesh, batch=batch, accumulation=accumulation, remat=remat)
            if not is_legal(one) or memory_of(one).verdict != FITS:
                continue
            try:
                fastest = min(fastest, time_of(one).step_s)
            except ValueError as error:
                # A mesh that does not split over the slices.
                assert "slices" in str(error)  # noqa: PT017
                continue
            fitting += 1
    assert fitting
    assert found[0].verdict == FITS
    assert found[0].time.step_s == pytest.approx(fastest, rel=1e-12)


def test_legal_meshes_are_all_there_are():
    for config, devices, seq in ((SMALL, 8, 1024), (MIXTURE, 16, 64), (SMALL, 12, 1021), (PRESETS["gpt2"], 8, 1024)):
        model = architecture(config)

        def is_one(mesh: MeshShape, model=model, seq=seq) -> bool:
            batch = mesh.batch_shards * mesh.stage
            try:
                check_mesh(model, mesh, batch=batch, seq=seq, accumulation=mesh.stage)
            except ValueError:
                return False
            return True

        assert set(legal_meshes(model, devices, seq)) == {mesh for mesh in every_mesh(devices) if is_one(mesh)}


def test_the_trusted_come_first_and_the_fastest_of_them():
    found = search(question(SMALL, "v5e:2x4", 4096), batch=None)
    order = {FITS: 0, CLOSE: 1, TOO_LARGE: 2}
    keys = [(order[one.verdict], -one.time.tokens_per_s) for one in found]
    assert keys == sorted(keys)


@pytest.mark.parametrize("batch", [8, None])
def test_what_surely_fits_is_found_beside_what_is_too_close_to_call(batch: int | None):
    asked = question(SMALL, "v5e:1x1", 2048)
    at_most = 8 if batch else 32
    none, dots = (memory_of(asked.replace(batch=at_most, remat=remat)) for remat in ("none", "dots"))
    chip = asked.target.known
    assert chip is not None
    # None recomputed it would just fit, were the prediction exact.
    room = none.total_bytes * (1 + none.low / 2)
    assert dots.total_bytes * (1 + none.low) < room < none.total_bytes * (1 + none.low)
    tight = dataclasses.replace(asked.target, known=dataclasses.replace(chip, usable_hbm_bytes=room))
    found = search(dataclasses.replace(asked, target=tight), batch=batch)
    by_verdict = {verdict: [one for one in found if one.verdict == verdict] for verdict in (FITS, CLOSE)}
    assert [one.run.remat for one in by_verdict[CLOSE]] == ["none"]
    assert found[0].verdict == FITS
    assert "dots" in [one.run.remat for one in by_verdict[FITS]]
    if batch is None:
        assert "none" in [one.run.remat for one in by_verdict[FITS]]


def test_a_free_batch_is_searched():
    asked = question(SMALL, "v5e:2x4")
    found = search(asked, batch=None)
    check_found(found, asked)
    assert len({one.run.batch for one in found}) > 1
    # No smaller than what is best with one sequence a share.
    assert found[0].time.tokens_per_s >= max(one.time.tokens_per_s for one in search(asked, batch=8)) * (1 - 1e-9)


def test_what_is_given_stays():
    asked = question(SMALL, "v5e:2x4")
    assert {one.run.remat for one in search(asked, batch=16, remat="full")} == {"full"}
    assert {one.run.accumulation for one in search(asked, batch=16, accumulation=2)} == {2}
    assert {one.run.batch for one in search(asked, batch=16)} == {16}


def test_where_nothing_fits_the_nearest_comes_first():
    asked = question(PRESETS["llama3-70b"], "v5e:2x4", 8192)
    found = search(asked, batch=None)
    check_found(found, asked)
    assert {one.verdict for one in found} == {TOO_LARGE}
    totals = [one.total_bytes for one in found]
    assert totals == sorted(totals)
    # Nothing needs less: recompute all, one sequence a share.
    least = min(
        memory_of(asked.replace(mesh=mesh, batch=mesh.batch_shards * mesh.stage, accumulation=mesh.stage)).total_bytes
        for mesh in legal_meshes(asked.run.model, 8, 8192)
    )
    assert totals[0] == pytest.approx(least)


def test_no_mesh_at_all():
    with pytest.raises(ValueError, match=r"no mesh of 8 devices divides the model and batch=7\. Use another batch"):
        search(question(dataclasses.replace(SMALL, heads=1, kv_heads=1, layers=7), "v5e:2x4", 1023), batch=7)


def test_a_pipeline_in_chunks_has_stages():
    asked = question(SMALL, "v5e:2x4", schedule="interleaved", chunks=2)
    for batch in (None, 64):
        found = search(asked, batch=batch)
        check_found(found, asked)
        assert all(one.run.mesh.stage > 1 for one in found)
    with pytest.raises(ValueError, match="stages that divide the model's 8 layers in pipeline_chunks=3"):
        search(question(SMALL, "v5e:2x4", schedule="interleaved", chunks=3), batch=None)


@pytest.mark.parametrize(
    "target", ["v5e:1x1", "h100:8", "gb200:72", "mi300x:8", "t4:1", "l4:16", "v3:2x2", "2*v7x:2x2x1", "v5e:16x16"]
)
def test_on_every_kind_of_chip(target: str):
    asked = question(PRESETS["demo"], target, 256)
    found = search(asked, batch=None)
    check_found(found, asked)
    assert found[0].verdict == FITS
    assert all(0 < one.time.mfu < 1 and math.isfinite(one.time.step_s) for one in found)


def test_a_model_that_the_trainer_has_not():
    """Latent attention, experts and windows together."""
    latent = Attention(heads=16, kv_heads=16, head_dim=96, value_dim=64, q_rank=256, kv_rank=128, rope_dim=32)
    mixture = FeedForward(width=256, gated=True, experts=8, experts_per_token=2, capacity_factor=1.0, shared_width=256)
    seeing = Attention(heads=16, kv_heads=4, head_dim=64, window=128)
    model = dataclasses.replace(
        architecture(SMALL),
        layers=(
            Layers(num=2, attention=latent, feed_forward=FeedForward(width=2048, gated=True)),
            Layers(num=4, attention=latent, feed_forward=mixture),
            Layers(num=2, attention=seeing, feed_forward=mixture),
        ),
    )
    asked = TrainQuestion(run=TrainRun(model=model, batch=1, seq=1024), target=Target.parse("v5e:4x4"))
    found = search(asked, batch=None)
    check_found(found, asked)
    assert found[0].verdict == FITS
    assert any(one.run.mesh.expert > 1 for one in found)


def test_llama3_405b_on_a_pod():
    asked = question(PRESETS["llama3-405b"], "v5p:16x16x24", 8192)
    found = search(asked, batch=1536)
    check_found(found, asked)
    assert found[0].verdict == FITS
    assert 0.3 < found[0].time.mfu < 0.8
    assert found[0].run.batch == 1536
