"""What `explain` says of a sharding against what JAX's own arrays hold."""

import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec, SingleDeviceSharding

from gcompute.config.mesh import Axis, MeshShape
from gcompute.parallel.explain import explain, holders
from gcompute.parallel.mesh import abstract_mesh, build_mesh
from gcompute.parallel.picture import plot_sharding, plot_shardings

SHAPE = MeshShape(data=2, fsdp=2, tensor=2)
SPECS = {
    "both": PartitionSpec(Axis.FSDP, Axis.TENSOR),
    "joined": PartitionSpec(None, (Axis.TENSOR, Axis.DATA)),
    "unused": PartitionSpec(Axis.EXPERT, Axis.DATA),
    "short": PartitionSpec(Axis.DATA),
    "whole": PartitionSpec(),
}


@pytest.fixture(scope="module")
def arrays() -> dict[str, jax.Array]:
    mesh = build_mesh(SHAPE)
    return {
        name: jax.device_put(np.arange(96, dtype=np.float32).reshape(8, 12), NamedSharding(mesh, spec))
        for name, spec in SPECS.items()
    }


@pytest.mark.oldest
def test_pieces_bytes_and_copies_are_those_of_the_arrays(arrays):
    explanation = explain(arrays)
    assert explanation.num_devices == 8
    for row in explanation.placements:
        array = arrays[row.path]
        shards = array.addressable_shards
        assert row.piece == shards[0].data.shape
        assert row.bytes_per_device == shards[0].data.nbytes
        distinct = {str(shard.index) for shard in shards}
        assert row.copies == 8 // len(distinct)
        assert row.copies == np.prod([SHAPE.size(Axis(axis)) for axis in row.copied_over], initial=1)
        assert row.whole == array.is_fully_replicated
    first = jax.devices()[0]
    held = sum(s.data.nbytes for array in arrays.values() for s in array.addressable_shards if s.device == first)
    assert explanation.bytes_per_device == held
    assert explanation.total_bytes == sum(array.nbytes for array in arrays.values())
    assert explanation.whole_bytes == arrays["whole"].nbytes


def test_abstract_arrays_on_an_abstract_mesh_say_the_same(arrays):
    mesh = abstract_mesh(SHAPE)
    abstract = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), arrays)
    shardings = {name: NamedSharding(mesh, spec) for name, spec in SPECS.items()}
    assert explain(abstract, shardings) == explain(arrays)
    for name, array in arrays.items():
        assert holders(shardings[name], array.shape) == holders(array.sharding, array.shape)


@pytest.mark.parametrize("name", SPECS)
def test_holders_are_the_devices_of_the_shards(name: str, arrays):
    array = arrays[name]
    for place, devices in holders(array.sharding, array.shape).items():
        piece = array.sharding.shard_shape(array.shape)
        start = tuple(at * size for at, size in zip(place, piece, strict=True))
        here = [s.device.id for s in array.addressable_shards if tuple(part.start or 0 for part in s.index) == start]
        assert devices == sorted(here)


def test_other_shardings_than_named_ones():
    one = SingleDeviceSharding(jax.devices()[3])
    rows = explain({"a": jnp.zeros((2, 3)), "n": np.zeros((2,), np.int8)}, {"a": one, "n": one}).placements
    assert [(row.num_devices, row.copies, row.split, row.bytes_per_device) for row in rows] == [
        (1, 1, None, 24),
        (1, 1, None, 2),
    ]
    assert "on one device" in str(explain(jnp.zeros(2)))
    assert holders(one, (2, 3)) == {(0, 0): [3]}


def test_scalars_empty_arrays_keys_and_no_arrays():
    tree = {"scalar": jnp.float32(1), "empty": jnp.zeros((0, 4)), "key": jax.random.key(0)}
    rows = {row.path: row for row in explain(tree).placements}
    assert (rows["scalar"].piece, rows["scalar"].bytes_per_device) == ((), 4)
    assert (rows["empty"].copies, rows["empty"].bytes_per_device) == (1, 0)
    assert explain({}).to_dict() == {
        **dict.fromkeys(("num_devices", "bytes_per_device", "total_bytes", "whole_bytes"), 0),
        "tensors": [],
    }


def test_json_holds_every_field(arrays):
    document = explain(arrays, dims=dict.fromkeys(arrays, "DF")).to_dict()
    assert json.loads(json.dumps(document)) == document
    joined = next(row for row in document["tensors"] if row["path"] == "joined")
    assert joined == {
        "path": "joined",
        "dims": "DF",
        "shape": [8, 12],
        "dtype": "float32",
        "split": [[], ["tensor", "data"]],
        "piece": [8, 3],
        "bytes_per_device": 96,
        "total_bytes": 384,
        "num_devices": 8,
        "copies": 2,
        "copied_over": ["fsdp"],
    }


MESH = abstract_mesh(SHAPE)
LEAF = jax.ShapeDtypeStruct((8, 6), jnp.float32)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (({"w": LEAF},), "w has no sharding: pass `shardings`"),
        (({"w": LEAF}, {"w": PartitionSpec(Axis.DATA)}), "wrap a PartitionSpec in a NamedSharding"),
        (({"w": LEAF}, {"v": NamedSharding(MESH, PartitionSpec())}), "trees of different structure"),
        (({"w": LEAF}, {"w": 3}), "must be a tree of Sharding, got 3"),
        (
            ({"w": LEAF}, NamedSharding(MESH, PartitionSpec(None, (Axis.DATA, Axis.FSDP)))),
            r"w: mesh data=2 x fsdp=2 cuts dim 1 of size 6 into 4, which does not divide it\. Nearest legal: 3",
        ),
        (({"w": LEAF}, NamedSharding(MESH, PartitionSpec(None, None, Axis.DATA))), "w: .* names 3 dims"),
    ],
)
def test_what_cannot_be_explained(arguments, message):
    with pytest.raises(ValueError, match=message):
        explain(*arguments)


def test_dims_that_are_not_those_of_the_array():
    with pytest.raises(ValueError, match="dims 'DFV' name 3 dims, and its shape"):
        explain(jnp.zeros((2, 2)), dims="DFV")


def read_png(path: Path) -> np.ndarray:
    from matplotlib.image import imread

    return imread(path)


def num_colours(path: Path) -> int:
    """Colours that fill more than a hundredth of a picture, white left out."""
    pixels = (read_png(path)[..., :3] * 255).round().astype(np.uint32) @ np.array([1 << 16, 1 << 8, 1], np.uint32)
    colours, counts = np.unique(pixels, return_counts=True)
    return int(((counts > pixels.size / 100) & (colours != 0xFFFFFF)).sum())


@pytest.mark.oldest
@pytest.mark.parametrize(("name", "pieces"), [("both", 4), ("whole", 1), ("joined", 4)])
def test_a_picture_has_a_colour_a_piece(name: str, pieces: int, arrays, tmp_path: Path):
    plot_sharding(arrays[name], None, tmp_path / "one.png", name=name)
    assert num_colours(tmp_path / "one.png") == pieces


def test_pictures_of_a_thousand_devices_and_of_what_is_no_matrix(tmp_path: Path):
    mesh = abstract_mesh(MeshShape(data=8, fsdp=32, tensor=4))
    big = NamedSharding(mesh, PartitionSpec(None, Axis.FSDP, Axis.TENSOR))
    panels = {
        "stack": (jax.ShapeDtypeStruct((2, 64, 16), jnp.float32), big, "LDF"),
        "vector": (jax.ShapeDtypeStruct((64,), jnp.float32), NamedSharding(mesh, PartitionSpec(Axis.FSDP)), None),
        "scalar": (jax.ShapeDtypeStruct((), jnp.float32), NamedSharding(mesh, PartitionSpec()), None),
    }
    plot_shardings(panels, tmp_path / "three.png", title="three")
    assert read_png(tmp_path / "three.png").shape[1] > 1000
    with pytest.raises(ValueError, match="no array to draw"):
        plot_shardings({}, tmp_path / "none.png")
