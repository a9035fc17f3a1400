"""Meshes that a model cannot be split over are refused in one line, with the sizes that are legal."""

import dataclasses

import pytest

from gcompute.config.mesh import MeshShape
from gcompute.config.presets import PRESETS
from gcompute.config.train import TrainConfig
from gcompute.plan.legal import check_mesh

LLAMA = PRESETS["llama3-8b"]
MIXTRAL = PRESETS["mixtral-8x7b"]
# As of a character tokenizer.
ODD = dataclasses.replace(LLAMA, vocab=27)


@pytest.mark.parametrize(
    ("mesh", "changes", "words"),
    [
        ("tensor=6", {}, "tensor=6 does not divide heads=32.*Legal: tensor=1, 2, 4, 8"),
        ("tensor=4", {"config": ODD}, "divide vocab=27: .*Legal: tensor=1; or pad the vocabulary: --vocab 28"),
        ("tensor=16", {}, "tensor=16 does not divide kv_heads=8"),
        ("fsdp=3", {}, "fsdp=3 does not divide dim=4096"),
        ("expert=2", {}, "needs a model with experts"),
        ("expert=16", {"config": MIXTRAL}, "expert=16 does not divide experts=8.*Legal: expert=1, 2, 4, 8"),
        ("stage=5", {"accumulation": 8}, "stage=5 does not divide layers=32"),
        ("stage=4", {"accumulation": 2}, "accumulation=2 microbatches leaves stages idle.*accumulation=4 or more"),
        ("stage=4", {"accumulation": 6, "batch": 12, "schedule": "interleaved", "chunks": 2}, "not a multiple"),
        ("stage=4", {"accumulation": 4, "chunks": 3}, "pipeline_chunks=3 does not divide layers=32"),
        ("data=2", {"chunks": 2}, "needs pipeline stages"),
        ("context=3", {}, "context=3 does not divide seq / 2=64"),
        ("context=4", {"seq": 30}, "does not divide seq / 2=15"),
        ("context=3", {"context_attention": "ulysses"}, "does not divide seq=128"),
        ("context=8,tensor=8", {"context_attention": "ulysses"}, "context=8 does not divide heads / tensor=4"),
        ("data=3", {}, "batch=8 does not divide over data=3.*multiple of 3"),
        ("data=2,fsdp=2", {"accumulation": 4}, "use a multiple of 16"),
        ("data=1", {"batch": 0}, "must all be at least 1"),
    ],
)
def test_a_mesh_that_does_not_fit_is_refused(mesh: str, changes: dict, words: str):
    given = {"config": LLAMA, "batch": 8, "seq": 128, **changes}
    with pytest.raises(ValueError, match=words) as caught:
        check_mesh(given.pop("config"), MeshShape.parse(mesh), **given)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("mesh", "changes"),
    [
        ("data=2,fsdp=2,tensor=2", {}),
        ("stage=4,tensor=8,context=2", {"accumulation": 4}),
        ("stage=4", {"accumulation": 8, "schedule": "interleaved", "chunks": 4}),
        ("context=4,tensor=8", {"context_attention": "ulysses"}),
        ("fsdp=2,expert=4", {"config": MIXTRAL}),
    ],
)
def test_a_mesh_that_fits_is_taken(mesh: str, changes: dict):
    given = {"config": LLAMA, "batch": 8, "seq": 128, **changes}
    check_mesh(given.pop("config"), MeshShape.parse(mesh), **given)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"zero": 3}, "zero must be 0, 1 or 2.*fsdp"),
        ({"pipeline_schedule": "interleaved"}, "do not go together"),
        ({"pipeline_chunks": 2}, "do not go together"),
        ({"pipeline_schedule": "dualpipe"}, "dualpipe"),
        ({"context_attention": "rings"}, "Did you mean 'ring'"),
    ],
)
def test_settings_of_a_mesh_are_checked(changes: dict, words: str):
    with pytest.raises(ValueError, match=words) as caught:
        dataclasses.replace(TrainConfig(), **changes)
    assert "\n" not in str(caught.value)
