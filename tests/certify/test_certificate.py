"""Which rows there are: every axis, pair and triple, every public function, and what must be refused."""

import ast
import importlib
import itertools
from pathlib import Path

import pytest

from gcompute import parallel
from gcompute.certify.certificate import QUICK, select
from gcompute.certify.explicit import Case
from gcompute.certify.recipes import Recipe, products
from gcompute.certify.strategies import STRATEGIES
from gcompute.config.mesh import Axis

# Modules whose public functions are layout, planning or pictures: they compute no array of a model.
NOT_OF_ARRAYS = {
    *(
        "mesh",
        "rules",
        "placement",
        "explain",
        "picture",
        "load_balance",
        "zero_layout",
        "einsum",
        "product",
        "routing",
    ),
    *("pipeline.schedule", "pipeline.validate", "pipeline.cost", "pipeline.gantt", "pipeline.layout"),
    *("pipeline.lowering", "pipeline.tick", "pipeline.array_type"),
}
# What rows certify as a part of something else, or what only checks or describes.
PARTS = {
    "collectives": {"varying_axes", "axis_index"},
    "data": {"local_gradients", "grouped_gradients", "microbatches", "update", "num_shards", "check_rows"},
    "zero": {"shard", "gather"},
    "zero_update": {"global_norm", "clip_by_global_norm", "check_elementwise"},
    "tensor": {"feed_forward_specs", "attention_specs", "check_divides"},
    "sequence": {"sequence_specs", "check_sequence"},
    "vocabulary": {"vocabulary_specs"},
    "ring_attention": {"check_shapes"},
    "expert": {"check_experts", "dispatch", "combine"},
    "pipeline.executor": {"check_sizes"},
    # What stages are written with, and not a strategy: see tests/parallel/pipeline/test_other_axes.py.
    "pipeline.nested": {"nested_shard_map"},
}
EVERYTHING = select(devices=8).subjects


def test_every_axis_pair_and_triple_is_trained_in_three_precisions():
    found = {frozenset(axis for axis in Axis if recipe.mesh.size(axis) > 1): recipe for recipe in products()}
    expected = {frozenset(axes) for size in range(4) for axes in itertools.combinations(Axis, size)}
    assert set(found) == expected
    assert {recipe.precisions for recipe in found.values()} == {("float64", "float32", "bfloat16")}
    assert all(recipe.refused is None for recipe in found.values())


def modules() -> dict[str, Path]:
    root = Path(str(parallel.__file__)).parent
    return {".".join(path.relative_to(root).with_suffix("").parts): path for path in sorted(root.rglob("*.py"))}


@pytest.mark.parametrize(
    "name", [name for name in modules() if not name.endswith("__init__") and name not in NOT_OF_ARRAYS]
)
def test_every_public_function_of_a_module_has_a_row(name: str):
    tree = ast.parse(modules()[name].read_text(encoding="utf-8"))
    public = {node.name for node in tree.body if isinstance(node, ast.FunctionDef) and not node.name.startswith("_")}
    certified = {
        target.rpartition(".")[2]
        for one in EVERYTHING
        if isinstance(one, Case)
        for target in one.certifies
        if target.rpartition(".")[0] == name
    }
    assert public - PARTS.get(name, set()) == certified


def test_what_rows_certify_exists():
    for one in EVERYTHING:
        for target in one.certifies if isinstance(one, Case) else ():
            module, _, function = target.rpartition(".")
            assert callable(getattr(importlib.import_module(f"gcompute.parallel.{module}"), function))


@pytest.mark.oldest
def test_names_are_rows_of_their_own():
    for form in (Recipe, Case):
        names = [one.name for one in EVERYTHING if isinstance(one, form)]
        assert len(set(names)) == len(names)
    assert {one.name for one in EVERYTHING} >= QUICK
    assert {strategy for one in EVERYTHING for strategy in one.strategies} == {*STRATEGIES, "one device"}


@pytest.mark.oldest
def test_a_strategy_selects_its_rows_and_one_device():
    rows = select("tensor", devices=8).subjects
    assert {"one device", "tensor=2", "data=2,fsdp=2,tensor=2", "tensor.row_parallel"} <= {one.name for one in rows}
    assert all("tensor" in one.strategies or one.name == "one device" for one in rows)


def test_fewer_devices_hold_fewer_rows():
    selection = select(devices=2)
    assert selection.num_left_out == len(EVERYTHING) - len(selection.subjects)
    assert all(one.mesh.num_devices <= 2 for one in selection.subjects)


def test_bad_requests_are_one_clear_line():
    with pytest.raises(ValueError, match=r"strategy 'tensr' is not known. Did you mean 'tensor'\?"):
        select("tensr", devices=8)
    with pytest.raises(ValueError, match="hold no row"):
        select("collectives", devices=1) if not select(devices=1).subjects else select("vocabulary", devices=0)
