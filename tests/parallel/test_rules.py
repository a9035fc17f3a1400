"""The one table from dims to axes: what it says of every model, and its errors."""

import re

import jax
import jax.numpy as jnp
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.sharding import PartitionSpec

from gcompute.config.mesh import Axis, MeshShape
from gcompute.config.presets import PRESETS
from gcompute.model.transformer import abstract_params, param_dims
from gcompute.parallel.explain import explain
from gcompute.parallel.mesh import abstract_mesh
from gcompute.parallel.rules import ACTIVATION_RULES, RULES, nearest_divisor, param_shardings, partition_spec

ALL = MeshShape(data=2, stage=2, fsdp=2, expert=2, context=2, tensor=2)


@pytest.mark.oldest
@pytest.mark.parametrize(
    ("dims", "rules", "spec"),
    [
        ("LDNH", RULES, (Axis.STAGE, Axis.FSDP, Axis.TENSOR, None)),
        ("VD", RULES, (Axis.TENSOR, Axis.FSDP)),
        ("LEDF", RULES, (Axis.STAGE, Axis.EXPERT, Axis.FSDP, Axis.TENSOR)),
        ("BT", ACTIVATION_RULES, ((Axis.DATA, Axis.FSDP, Axis.EXPERT), Axis.CONTEXT)),
        ("BTD", ACTIVATION_RULES, ((Axis.DATA, Axis.FSDP, Axis.EXPERT), Axis.CONTEXT, None)),
        ("BRD", ACTIVATION_RULES, ((Axis.DATA, Axis.FSDP, Axis.EXPERT), (Axis.CONTEXT, Axis.TENSOR), None)),
        ("BTNH", ACTIVATION_RULES, ((Axis.DATA, Axis.FSDP, Axis.EXPERT), Axis.CONTEXT, Axis.TENSOR, None)),
    ],
)
def test_every_kind_of_array_on_a_mesh_of_all_axes(dims: str, rules, spec):
    assert partition_spec(dims, ALL, rules) == PartitionSpec(*spec)


def test_axes_of_size_one_are_left_out():
    assert partition_spec("LDNH", MeshShape(tensor=4)) == PartitionSpec(None, None, Axis.TENSOR, None)
    assert partition_spec("BT", MeshShape(fsdp=2), ACTIVATION_RULES) == PartitionSpec(Axis.FSDP, None)


@pytest.mark.parametrize("name", PRESETS)
def test_no_parameter_of_any_preset_claims_an_axis_twice(name: str):
    config = PRESETS[name]
    for dims in jax.tree.leaves(param_dims(config)):
        partition_spec(dims, ALL)


@pytest.mark.oldest
def test_all_axes_of_a_mesh_split_the_parameters_of_a_mixture():
    config = PRESETS["mixtral-8x7b"]
    shape = MeshShape(stage=4, fsdp=8, expert=8, tensor=4)
    params, mesh = abstract_params(config), abstract_mesh(shape)
    dims = param_dims(config)
    found = explain(params, param_shardings(dims, mesh, shape, abstract=params), dims=dims).placements
    assert {axis for row in found for axes in row.split for axis in axes} == {"stage", "fsdp", "expert", "tensor"}
    # The matrices of the experts are nearly all of the model, and every axis splits them.
    experts = [row for row in found if row.dims and set("EDF") <= set(row.dims)]
    assert len(experts) == 3
    assert all(row.copies == 1 and row.bytes_per_device * 1024 == row.total_bytes for row in experts)


def test_a_conflict_names_the_tensor_the_rules_and_what_is_legal():
    rules = {**RULES, "H": (Axis.TENSOR,)}
    with pytest.raises(ValueError, match="both claim") as caught:
        partition_spec("LDNH", MeshShape(tensor=4), rules, name="blocks.attention.q_DNH")
    message = str(caught.value)
    for part in ("blocks.attention.q_DNH (LDNH)", "tensor=4", "N -> tensor", "H -> tensor", "Use tensor=1"):
        assert part in message
    partition_spec("LDNH", MeshShape(fsdp=4), rules)


def test_a_size_that_does_not_divide_names_the_tensor_the_rule_and_the_nearest():
    with pytest.raises(ValueError, match="does not divide") as caught:
        partition_spec("DF", MeshShape(fsdp=5, tensor=3), shape=(16, 64), name="mlp.up_DF")
    for part in ("mlp.up_DF (DF)", "D -> fsdp", "size 16", "fsdp=5"):
        assert part in str(caught.value)
    assert re.search(r"Nearest legal: \D*4\.$", str(caught.value))


@pytest.mark.oldest
def test_the_tree_names_the_tensor_by_its_path():
    params = {"blocks": {"up_DF": jax.ShapeDtypeStruct((6, 8), jnp.float32)}}
    shape = MeshShape(fsdp=4)
    with pytest.raises(ValueError, match=r"^blocks\.up_DF \(DF\): rule D -> fsdp cuts size 6 into 4"):
        param_shardings({"blocks": {"up_DF": "DF"}}, abstract_mesh(shape), shape, abstract=params)


@given(st.integers(1, 4096), st.integers(1, 4096))
@settings(deadline=None, max_examples=100)
def test_the_nearest_divisor_divides_and_none_is_nearer(size: int, wanted: int):
    nearest = nearest_divisor(size, wanted)
    assert size % nearest == 0
    assert not any(size % n == 0 for n in range(wanted - abs(nearest - wanted) + 1, wanted) if n > 0)
    assert not any(size % n == 0 for n in range(wanted, wanted + abs(nearest - wanted)))
