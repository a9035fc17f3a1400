"""Training on a mesh against training on one device, in float64, where the order of sums is far below the tolerance."""

import re
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from float64 import float64
from jax.sharding import NamedSharding, PartitionSpec
from tiers import mostly_slow

from gcompute.config.mesh import MeshShape
from gcompute.config.presets import PRESETS
from gcompute.config.train import OptimizerConfig
from gcompute.model.transformer import Execution, abstract_params, init, param_dims
from gcompute.parallel.mesh import build_mesh
from gcompute.parallel.rules import param_shardings, partition_spec, state_shardings
from gcompute.train.optimizer import make_optimizer
from gcompute.train.step import StepMetrics, TrainState, make_train_steps

CONFIG = PRESETS["test"]
BATCH, SEQ, STEPS = 8, 16, 3
ONE_DEVICE = MeshShape()


def program(shape: MeshShape, optimizer_name: str):
    """The compiled train step on `shape` in float64, the initial state in its place, and its shardings."""
    mesh = build_mesh(shape)
    execution = Execution(compute=jnp.dtype("float64"), residual=jnp.dtype("float64"), unroll=CONFIG.layers)
    optimizer = make_optimizer(OptimizerConfig(optimizer=optimizer_name, learning_rate=1e-2, warmup_steps=1), STEPS)

    def initial(key):
        params = jax.tree.map(lambda leaf: leaf.astype(jnp.float64), init(CONFIG, key))
        return TrainState(jnp.zeros((), jnp.int32), params, optimizer.init(params))

    replicated = NamedSharding(mesh, PartitionSpec())
    placed = param_shardings(param_dims(CONFIG), mesh, shape)
    abstract = jax.eval_shape(initial, jax.random.key(0))
    shardings = TrainState(
        replicated, placed, state_shardings(abstract.optimizer, abstract_params(CONFIG), placed, mesh)
    )
    state = jax.jit(initial, out_shardings=shardings)(jax.random.key(0))
    out_shardings = (shardings, StepMetrics(replicated, replicated))
    steps = jax.jit(make_train_steps(CONFIG, execution, optimizer, 1), out_shardings=out_shardings)
    rows = np.random.default_rng(0).integers(0, CONFIG.vocab, (STEPS, BATCH, SEQ + 1), dtype=np.int32)
    put = partial(jax.device_put, device=NamedSharding(mesh, partition_spec("_BT", shape)))
    arguments = (state, put(rows[..., :-1]), put(rows[..., 1:]), jnp.asarray(STEPS, jnp.int32))
    return steps.lower(*arguments).compile(), arguments


def trained(shape: MeshShape, optimizer_name: str):
    with float64(True):
        compiled, arguments = program(shape, optimizer_name)
        state, metrics = compiled(*arguments)
        return compiled, state, np.asarray(metrics.loss)


@pytest.fixture(scope="module")
def reference():
    found = {}

    def get(optimizer_name: str):
        if optimizer_name not in found:
            found[optimizer_name] = trained(ONE_DEVICE, optimizer_name)
        return found[optimizer_name]

    return get


def collectives(compiled) -> set[str]:
    names = "all-reduce|all-gather|reduce-scatter|all-to-all|collective-permute"
    return set(re.findall(rf"\b({names})\(", compiled.as_text()))


MESHES = {
    "data=2": {"all-reduce"},
    "fsdp=4": {"all-reduce", "all-gather"},
    "tensor=2": {"all-reduce"},
    "data=2,fsdp=2,tensor=2": {"all-reduce", "all-gather"},
}


@pytest.mark.parametrize(
    ("mesh", "optimizer_name"),
    mostly_slow(
        [*((mesh, "adamw") for mesh in MESHES), ("data=2,fsdp=2,tensor=2", "muon")],
        ("data=2,fsdp=2,tensor=2", "adamw"),
    ),
)
def test_a_mesh_trains_as_one_device_does(mesh: str, optimizer_name: str, reference):
    shape = MeshShape.parse(mesh)
    _, expected, expected_loss = reference(optimizer_name)
    compiled, state, loss = trained(shape, optimizer_name)
    np.testing.assert_allclose(loss, expected_loss, rtol=1e-9)
    for (path, leaf), reference_leaf in zip(
        jax.tree_util.tree_flatten_with_path(state)[0], jax.tree.leaves(expected), strict=True
    ):
        # A sum of 128 terms in another order moves by 1e-14; Adam's division by a root near eps = 1e-8 and Muon's
        # iteration, whose slope at 0 is 3.4 a round, enlarge that by less than a thousand.
        np.testing.assert_allclose(leaf, reference_leaf, rtol=1e-9, atol=1e-11, err_msg=jax.tree_util.keystr(path))
    assert MESHES[mesh] <= collectives(compiled)
    if mesh == "data=2":
        assert "all-gather" not in collectives(compiled)


def test_one_device_needs_no_collective(reference):
    assert collectives(reference("adamw")[0]) == set()


@pytest.mark.parametrize("optimizer_name", ["adamw", "muon"])
def test_parameters_and_optimizer_state_are_split_not_copied(optimizer_name: str):
    shape = MeshShape.parse("data=2,fsdp=2,tensor=2")
    mesh = build_mesh(shape)
    optimizer = make_optimizer(OptimizerConfig(optimizer=optimizer_name), STEPS)
    params = abstract_params(CONFIG)
    placed = param_shardings(param_dims(CONFIG), mesh, shape)
    state = jax.eval_shape(optimizer.init, params)
    shardings = state_shardings(state, params, placed, mesh)
    arrays = jax.tree.map(
        lambda leaf, where: jax.device_put(jnp.zeros(leaf.shape, leaf.dtype), where), state, shardings
    )
    num_mirrored = 0
    for path, leaf in jax.tree_util.tree_flatten_with_path(arrays)[0]:
        (local, *others) = {shard.data.shape for shard in leaf.addressable_shards}
        assert not others
        share = leaf.size // int(np.prod(local))
        name = jax.tree_util.keystr(path)
        if leaf.ndim < 2 or "norm" in name:
            continue
        num_mirrored += 1
        # Keys and values have one head a device; every matrix is split over fsdp and tensor, an embedding too.
        assert share == 4, f"{name}: {leaf.shape} in pieces of {local}"
    matrices = [leaf for path, leaf in jax.tree_util.tree_flatten_with_path(params)[0] if "norm" not in str(path)]
    # Adam keeps two moments of each; Muon one of the matrices that it orthogonalises, two of the embedding.
    assert num_mirrored == (2 * len(matrices) if optimizer_name == "adamw" else len(matrices) + 1)


@pytest.mark.oldest
def test_the_second_call_does_not_compile_again():
    shape = MeshShape(data=2)
    mesh = build_mesh(shape)
    optimizer = make_optimizer(OptimizerConfig(optimizer="sgd", warmup_steps=1), STEPS)
    execution = Execution(compute=jnp.float32, unroll=1)
    placed = param_shardings(param_dims(CONFIG), mesh, shape)
    replicated = NamedSharding(mesh, PartitionSpec())

    def initial(key):
        params = init(CONFIG, key)
        return TrainState(jnp.zeros((), jnp.int32), params, optimizer.init(params))

    abstract = jax.eval_shape(initial, jax.random.key(0))
    shardings = TrainState(replicated, placed, state_shardings(abstract.optimizer, abstract.params, placed, mesh))
    out_shardings = (shardings, StepMetrics(replicated, replicated))
    steps = jax.jit(make_train_steps(CONFIG, execution, optimizer, 1), out_shardings=out_shardings)
    state = jax.jit(initial, out_shardings=shardings)(jax.random.key(0))
    rows = jax.device_put(np.zeros((2, BATCH, SEQ), np.int32), NamedSharding(mesh, partition_spec("_BT", shape)))
    for num in (2, 1):
        count = jax.device_put(np.int32(num), replicated)
        state, _ = steps(state, rows, rows, count)
    assert steps._cache_size() == 1
