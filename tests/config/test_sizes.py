"""Sizes relative to the devices: one axis of a mesh that takes the rest, and a batch per device."""

import pytest

from gcompute.config.mesh import MeshShape, OpenMesh, mesh_over, parse_mesh
from gcompute.config.plain import from_plain
from gcompute.config.sizes import is_open, over_devices
from gcompute.config.train import TrainConfig

pytestmark = pytest.mark.oldest


@pytest.mark.parametrize(
    ("text", "num_devices", "filled"),
    [
        ("data=-1", 8, "data=8"),
        ("data=-1,tensor=2", 8, "data=4,tensor=2"),
        ("fsdp=2,context=-1,tensor=4", 8, "data=1,fsdp=2,context=1,tensor=4"),
        ("data=2,fsdp=-1", 1536, "data=2,fsdp=768"),
        ("data=2", 8, "data=2"),
    ],
)
def test_one_axis_takes_what_the_others_leave(text: str, num_devices: int, filled: str):
    assert mesh_over(parse_mesh(text), num_devices) == MeshShape.parse(text, num_devices) == MeshShape.parse(filled)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("data=-1,fsdp=-1", "mesh axes data and fsdp are both -1 in 'data=-1,fsdp=-1': one can take what is left"),
        ("data=-2", "'data=-2' needs a whole number above 0, as in data=2, or -1 for the rest"),
        ("data=--1", "needs a whole number above 0"),
        ("dta=-1", "mesh axis 'dta' is not known. Did you mean 'data'?"),
        ("data=-1,data=2", "mesh axis 'data' is given twice"),
    ],
)
def test_what_is_no_mesh_is_refused_before_devices_are_known(text: str, said: str):
    with pytest.raises(ValueError, match=said):
        parse_mesh(text)


def test_no_fit_is_refused_and_so_is_a_rest_of_unknown_devices():
    with pytest.raises(ValueError, match="mesh data=-1,tensor=3 does not fit 8 devices: the axes besides data are 3"):
        MeshShape.parse("data=-1,tensor=3", 8)
    with pytest.raises(ValueError, match="does not fit 4 devices"):
        MeshShape.parse("data=-1,tensor=8", 4)
    with pytest.raises(ValueError, match="takes what the devices leave, and none are known here"):
        MeshShape.parse("data=-1")


@pytest.mark.parametrize(
    ("fields", "batch"),
    [
        ({}, 3 * 8),
        ({"mesh": MeshShape(data=2, fsdp=2, expert=2)}, 3 * 8),
        ({"mesh": MeshShape(data=2, tensor=2, context=2)}, 3 * 2),
        ({"mesh": OpenMesh("data=-1,tensor=2"), "accumulation": 5}, 3 * 4 * 5),
        ({"mesh": MeshShape(stage=8), "accumulation": 8}, 3 * 8),
    ],
)
def test_a_batch_per_device_counts_batch_shards_and_microbatches(fields: dict, batch: int):
    found = over_devices({**fields, "per_device_batch": 3}, 8)
    assert found["batch"] == batch
    assert TrainConfig(**found).batch == batch
    assert not is_open(found)


def test_one_of_the_two_batches_is_given_and_is_positive():
    with pytest.raises(ValueError, match="batch=32 and per_device_batch=4 say the same twice"):
        over_devices({"batch": 32, "per_device_batch": 4}, 8)
    with pytest.raises(ValueError, match="per_device_batch must be above 0, got 0"):
        over_devices({"per_device_batch": 0}, 8)
    with pytest.raises(ValueError, match="means nothing before the devices are known"):
        TrainConfig(per_device_batch=4)


def test_a_toml_file_says_both():
    values = from_plain(TrainConfig, {"mesh": "data=-1,tensor=2", "per_device_batch": 2}, source="run.toml [train]")
    assert is_open(values)
    assert over_devices(values, 8) == {"mesh": MeshShape(data=4, tensor=2), "batch": 8}
