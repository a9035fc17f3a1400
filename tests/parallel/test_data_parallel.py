"""Data parallelism in three notations against one numpy program, and its one all-reduce in the compiled program."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from float64 import float64
from jax.sharding import NamedSharding, PartitionSpec
from small_network import ROWS, leaves, loss_fn, train, values
from tiers import mostly_slow

from gcompute.aot.hlo import read_collectives
from gcompute.config.mesh import Axis, MeshShape
from gcompute.parallel import data
from gcompute.parallel.data import jit_step, local_gradients, microbatches, pmap_step, shard_map_step
from gcompute.parallel.mesh import build_mesh

MESH = build_mesh(MeshShape(data=8))
STEPS = 3
NUM_VALUES = sum(x.size for x in leaves(values(exact=True)[0])) + 1  # every gradient, and the loss
OPTIMIZERS = {
    "sgd": lambda: optax.sgd(0.0625, momentum=0.5),
    "adamw": lambda: optax.adamw(0.01, weight_decay=0.1),
}


def build(notation, loss, optimizer, accumulation=1):
    if notation == "pmap":
        return pmap_step(loss, optimizer, accumulation=accumulation)
    builder = {"shard_map": shard_map_step, "jit": jit_step}[notation]
    return jax.jit(builder(loss, optimizer, MESH, accumulation=accumulation))


def check(notation, optimizer_name, *, accumulation=2, exact=False, steps=STEPS):
    """Losses of every step, and the parameters after the last, against numpy."""
    params, batches = values(exact=exact, steps=steps)
    dtype = np.float32 if exact else np.float64
    with float64(not exact):
        optimizer = OPTIMIZERS[optimizer_name]()
        step = build(notation, partial(loss_fn, exact=exact), optimizer, accumulation)
        cast = partial(jax.tree.map, lambda x: x.astype(dtype))
        trained = cast(params)
        state, losses = optimizer.init(trained), []
        for batch in batches:
            trained, state, loss = step(trained, state, cast(batch))
            losses.append(np.asarray(loss))
        trained = leaves(trained)
    wanted_losses, wanted = train(params, batches, optimizer_name, exact=exact)
    if exact:
        np.testing.assert_array_equal(losses, wanted_losses)
        for ours, theirs in zip(trained, leaves(wanted), strict=True):
            np.testing.assert_array_equal(ours, theirs)
    else:
        np.testing.assert_allclose(losses, wanted_losses, rtol=1e-12)
        for ours, theirs in zip(trained, leaves(wanted), strict=True):
            np.testing.assert_allclose(ours, theirs, rtol=1e-11, atol=1e-13)


@pytest.mark.oldest
@pytest.mark.parametrize(
    ("notation", "accumulation"), [("pmap", 2), ("shard_map", 1), ("shard_map", 2), ("jit", 1), ("jit", 2)]
)
def test_one_step_on_small_integers_is_bitwise_that_of_numpy(notation, accumulation):
    check(notation, "sgd", accumulation=accumulation, exact=True, steps=1)


@pytest.mark.parametrize(
    ("notation", "optimizer_name"),
    mostly_slow(
        [("pmap", "adamw"), ("shard_map", "sgd"), ("shard_map", "adamw"), ("jit", "sgd")],
        *(("pmap", "adamw"), ("shard_map", "adamw"), ("jit", "sgd")),
    ),
)
def test_several_steps_equal_numpys(notation, optimizer_name):
    check(notation, optimizer_name)


def compiled(notation, accumulation):
    params, (batch,) = jax.tree.map(np.float32, values(exact=False))
    optimizer = OPTIMIZERS["adamw"]()
    return build(notation, loss_fn, optimizer, accumulation).lower(params, optimizer.init(params), batch).compile()


@pytest.mark.parametrize(
    ("notation", "accumulation"),
    mostly_slow([("shard_map", 1), ("shard_map", 4), ("jit", 4)], ("shard_map", 4), ("jit", 4)),
)
def test_gradients_are_reduced_once_after_the_last_microbatch(notation, accumulation):
    found = read_collectives(compiled(notation, accumulation), MESH)
    assert [(one.kind, one.loops, one.axes) for one in found] == [("all-reduce", (), (Axis.DATA,))]
    assert found[0].operand_bytes == 4 * NUM_VALUES
    assert found[0].sent_bytes == 2 * 7 / 8 * 4 * NUM_VALUES


def test_the_gradient_of_invariant_parameters_would_be_reduced_in_the_loop():
    """Why `shard_map_step` makes the parameters varying: without that, a device sends every microbatch's gradient."""
    params, (batch,) = jax.tree.map(np.float32, values(exact=False))

    def naive(params, rows):
        def add(total, microbatch):
            return jax.tree.map(jnp.add, total, jax.grad(loss_fn)(params, microbatch)), None

        zeros = jax.tree.map(jnp.zeros_like, params)
        return jax.lax.scan(add, zeros, jax.tree.map(lambda leaf: microbatches(leaf, 4), rows))[0]

    rows = PartitionSpec(Axis.DATA)
    program = jax.shard_map(naive, mesh=MESH, in_specs=(PartitionSpec(), rows), out_specs=PartitionSpec())
    found = read_collectives(jax.jit(program).lower(params, batch).compile(), MESH)
    assert {(one.kind, one.loops) for one in found} == {("all-reduce", (4,))}


@pytest.mark.oldest("jit")
@pytest.mark.parametrize("notation", mostly_slow(["shard_map", "jit"], "jit"))
def test_one_compilation_serves_every_step_and_the_batch_may_span_two_axes(notation):
    mesh, axes = build_mesh(MeshShape(data=2, fsdp=4)), (Axis.DATA, Axis.FSDP)
    builder = {"shard_map": shard_map_step, "jit": jit_step}[notation]
    params, batches = jax.tree.map(np.float32, values(exact=False, steps=2))
    optimizer, whole = OPTIMIZERS["sgd"](), NamedSharding(mesh, PartitionSpec())
    params, state = jax.device_put((params, optimizer.init(params)), whole)
    rows = jax.device_put(batches, NamedSharding(mesh, PartitionSpec(axes)))
    step = jax.jit(builder(loss_fn, optimizer, mesh, axis=axes, accumulation=2)).lower(params, state, rows[0]).compile()
    assert [one.axes for one in read_collectives(step, mesh)] == [axes]
    for batch in rows:
        # A compiled program refuses arguments that are not placed as those it was compiled for.
        params, state, loss = step(params, state, batch)
    wanted_losses, wanted = train(*jax.tree.map(np.float64, (values(exact=False)[0], batches)), "sgd")
    # Two steps in float32, whose sums are made in another order: a few units in the last place.
    np.testing.assert_allclose(loss, wanted_losses[-1], rtol=1e-5)
    np.testing.assert_allclose(leaves(params)[0], leaves(wanted)[0], rtol=1e-5, atol=1e-6)


def test_one_device_sends_nothing():
    mesh = build_mesh(MeshShape())
    params, (batch,) = jax.tree.map(np.float32, values(exact=True))
    optimizer = OPTIMIZERS["sgd"]()
    for builder in (shard_map_step, jit_step):
        step = jax.jit(builder(partial(loss_fn, exact=True), optimizer, mesh, accumulation=2))
        compiled_step = step.lower(params, optimizer.init(params), batch).compile()
        # XLA may leave an all-reduce of one device with itself.
        assert sum(one.sent_bytes for one in read_collectives(compiled_step)) == 0
        _, _, loss = compiled_step(params, optimizer.init(params), batch)
        assert loss == train(params, [batch], "sgd", exact=True)[0][0]


def test_microbatches_of_bfloat16_are_added_wide():
    rows = jnp.array([256.0] + [1.0] * 7, jnp.bfloat16)
    _, gradient = local_gradients(lambda w, x: jnp.mean(w * x), jnp.bfloat16(1), rows, 8)
    assert gradient.dtype == jnp.bfloat16
    assert gradient == jnp.bfloat16(263 / 8)
    assert gradient != jnp.bfloat16(256 / 8)  # what adding in bfloat16 gives: 256 + 1 rounds to 256


SOUND = data.all_reduce
MUTANTS = {
    "no reduction": ("all_reduce", lambda tree, axis, op: tree),
    "a sum where a mean belongs": ("all_reduce", lambda tree, axis, op: SOUND(tree, axis, "sum")),
    "another axis": ("all_reduce", lambda tree, axis, op: SOUND(tree, Axis.TENSOR, op)),
    "the loss alone": ("all_reduce", lambda pair, axis, op: (SOUND(pair[0], axis, op), pair[1])),
    "one device's rows": (
        "_grouped",
        lambda batch, size: jax.tree.map(lambda x: jnp.stack([x[: ROWS // 8]] * 8), batch),
    ),
    "one microbatch": ("microbatches", lambda rows, count: jnp.stack([rows[::count]] * count)),
}


@pytest.mark.parametrize(
    ("notation", "mutant"),
    mostly_slow(
        [
            *(("shard_map", name) for name in MUTANTS if name != "one device's rows"),
            ("pmap", "no reduction"),
            ("pmap", "a sum where a mean belongs"),
            ("pmap", "one device's rows"),
            ("jit", "one device's rows"),
            ("jit", "one microbatch"),
        ],
        *(("shard_map", name) for name in ("no reduction", "another axis", "the loss alone")),
        *(("pmap", "no reduction"), ("jit", "one microbatch")),
    ),
)
def test_a_fault_is_caught(notation, mutant, monkeypatch):
    monkeypatch.setattr(data, *MUTANTS[mutant])
    # Where a value that varies is returned as one that does not, shard_map itself refuses.
    with pytest.raises((AssertionError, ValueError), match=r"Arrays are not equal|Not equal|out_specs"):
        check(notation, "sgd", exact=True, steps=1)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda batch: {name: leaf[:20] for name, leaf in batch.items()},
            "20 rows.*8 devices x 2 micro.*multiple of 16",
        ),
        (lambda batch: {name: leaf[:0] for name, leaf in batch.items()}, "0 rows does not divide"),
        (lambda batch: {**batch, "y": batch["y"][:16]}, r"batch\['x'\] has 32, batch\['y'\] has 16"),
        (lambda batch: {**batch, "y": 1.0}, r"batch\['y'\] is a scalar"),
        (lambda batch: {}, "no leaves"),
    ],
)
@pytest.mark.parametrize("notation", ["pmap", "shard_map", "jit"])
def test_a_batch_that_does_not_divide_is_one_line(notation, change, message):
    params, (batch,) = values(exact=True)
    optimizer = OPTIMIZERS["sgd"]()
    with pytest.raises(ValueError, match=message) as caught:
        build(notation, loss_fn, optimizer, accumulation=2)(params, optimizer.init(params), change(batch))
    assert "\n" not in str(caught.value)


def test_other_bad_input_is_one_line():
    with pytest.raises(ValueError, match="the mesh has no axis 'rows': it has data, stage, fsdp"):
        shard_map_step(loss_fn, OPTIMIZERS["sgd"](), MESH, axis="rows")
    params, (batch,) = values(exact=True)
    with pytest.raises(ValueError, match="accumulation=0 must be a whole number above 0"):
        build("jit", loss_fn, OPTIMIZERS["sgd"](), accumulation=0)(params, (), batch)
