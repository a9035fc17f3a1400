"""ZeRO-1, -2, -3, explicit and automatic, against one numpy program; collectives and bytes against the paper."""

import importlib.util
import json
import subprocess
import sys
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from float64 import float64
from jax.sharding import NamedSharding, PartitionSpec
from small_network import leaves, loss_fn, train, values
from tiers import mostly_slow

from gcompute.aot.hlo import collective_bytes_by_axis, read_collectives
from gcompute.config.mesh import Axis, MeshShape
from gcompute.parallel import zero
from gcompute.parallel.collectives import shift
from gcompute.parallel.mesh import abstract_mesh, build_mesh
from gcompute.parallel.zero import automatic_zero_step, gather, zero_step
from gcompute.parallel.zero_layout import (
    layer_specs,
    place,
    placements,
    replicated_leaves,
    shard_specs,
    zero_bytes,
)
from gcompute.parallel.zero_update import clip_by_global_norm

MESH = build_mesh(MeshShape(fsdp=8))
HYBRID = build_mesh(MeshShape(data=2, fsdp=4))
NOTATIONS = {"explicit": zero_step, "automatic": automatic_zero_step}
OPTIMIZERS = {
    "sgd": lambda *clip: optax.chain(*clip, optax.sgd(0.0625, momentum=0.5)),
    "adamw": lambda *clip: optax.chain(*clip, optax.adamw(0.01, weight_decay=0.1)),
}
PARAMS, _ = values(exact=True)
SPECS = shard_specs(PARAMS, MESH)
SPLIT, WHOLE = 4 * (6 * 16 + 16 + 16 * 4), 4 * 4  # bytes in float32 of what eight devices divide, and of the rest


def program(notation, stage, optimizer, params, batch, mesh=MESH, loss=loss_fn, **options):
    """The compiled step, and its arguments in their places."""
    specs = shard_specs(params, mesh)
    step = NOTATIONS[notation](loss, optimizer, mesh, specs, stage=stage, **options)
    rows = NamedSharding(mesh, PartitionSpec((*options.get("replicas", ()), Axis.FSDP)))
    arguments = (*place(params, optimizer, mesh, specs, stage), jax.device_put(batch, rows))
    return jax.jit(step).lower(*arguments).compile(), arguments


def check(notation, stage, name, *, clip=None, exact=False, steps=3, accumulation=2, explicit_clip=None, **options):
    """Losses of every step, and the parameters after the last, against numpy."""
    start, batches = values(exact=exact, steps=steps)
    with float64(not exact):
        cast = partial(jax.tree.map, lambda x: x.astype(np.float32 if exact else np.float64))
        specs = shard_specs(start, options.get("mesh", MESH))
        clips = () if clip is None else (optax.clip_by_global_norm(clip),)
        if notation == "explicit" and clip is not None:
            clips = ((explicit_clip or clip_by_global_norm)(clip, specs, Axis.FSDP),)
        optimizer = OPTIMIZERS[name](*clips)
        loss = partial(loss_fn, exact=exact)
        step, (params, state, rows) = program(
            *(notation, stage, optimizer, cast(start), cast(batches[0])),
            accumulation=accumulation,
            loss=loss,
            **options,
        )
        losses = []
        for batch in batches:
            # A compiled program refuses arguments that are not placed as those it was compiled for: one serves all.
            batch = jax.device_put(cast(batch), jax.tree.map(lambda x: x.sharding, rows))
            params, state, loss = step(params, state, batch)
            losses.append(np.asarray(loss))
        params = leaves(params)
    wanted_losses, wanted = train(start, batches, name, exact=exact, clip=clip)
    if exact:
        np.testing.assert_array_equal(losses, wanted_losses)
        for ours, theirs in zip(params, leaves(wanted), strict=True):
            np.testing.assert_array_equal(ours, theirs)
    else:
        np.testing.assert_allclose(losses, wanted_losses, rtol=1e-12)
        for ours, theirs in zip(params, leaves(wanted), strict=True):
            np.testing.assert_allclose(ours, theirs, rtol=1e-11, atol=1e-13)


@pytest.mark.parametrize("stage", mostly_slow([1, 2, 3], 2))
@pytest.mark.parametrize("notation", NOTATIONS)
def test_one_step_on_small_integers_is_bitwise_that_of_numpy(notation, stage):
    check(notation, stage, "sgd", exact=True, steps=1)


@pytest.mark.oldest("explicit-3")
@pytest.mark.parametrize("stage", mostly_slow([1, 2, 3], 1, 3))
@pytest.mark.parametrize("notation", NOTATIONS)
def test_several_steps_of_adamw_with_clipping_equal_numpys(notation, stage):
    check(notation, stage, "adamw", clip=0.5)


@pytest.mark.parametrize(
    ("notation", "stage", "accumulation"),
    mostly_slow([("explicit", 2, 1), ("explicit", 3, 2), ("automatic", 1, 2)], ("explicit", 3, 2)),
)
def test_hybrid_sharding_equals_numpy(notation, stage, accumulation):
    check(notation, stage, "sgd", accumulation=accumulation, mesh=HYBRID, replicas=(Axis.DATA,))


def kinds(found):
    return sorted((one.kind, one.loops) for one in found)


def lowered(notation, stage, **options):
    params, (batch,) = jax.tree.map(np.float32, values(exact=False))
    return program(notation, stage, OPTIMIZERS["adamw"](), params, batch, **options)[0]


def times(kind, loops=()):
    """The collective once for each of the three leaves that eight devices divide."""
    return [(kind, loops)] * 3


@pytest.mark.parametrize(
    ("stage", "accumulation", "scattered"), [(1, 2, times("reduce-scatter")), (2, 2, times("reduce-scatter", (2,)))]
)
def test_explicit_stages_1_and_2_scatter_gradients_and_gather_parameters(stage, accumulation, scattered):
    found = read_collectives(lowered("explicit", stage, accumulation=accumulation), MESH)
    assert kinds(found) == [*times("all-gather"), ("all-reduce", ()), *scattered]
    sent = collective_bytes_by_axis(found)[(Axis.FSDP,)]
    assert sent["all-gather"] == 7 / 8 * SPLIT
    assert sent["reduce-scatter"] == 7 / 8 * SPLIT * (accumulation if stage == 2 else 1)
    assert sent["all-reduce"] == 2 * 7 / 8 * (WHOLE + 4)  # the leaf that does not divide, and the loss


def test_explicit_stage_3_gathers_parameters_and_scatters_gradients():
    found = read_collectives(lowered("explicit", 3, accumulation=2), MESH)
    # Parameters do not change between microbatches: XLA gathers them once, before the loop.
    assert kinds(found) == [*times("all-gather"), ("all-reduce", ()), *times("reduce-scatter", (2,))]


def test_hybrid_sharding_reduces_between_replicas_once():
    found = read_collectives(lowered("explicit", 2, accumulation=2, mesh=HYBRID, replicas=(Axis.DATA,)), HYBRID)
    sent = collective_bytes_by_axis(found)
    assert sent[(Axis.DATA,)] == {"all-reduce": 2 * 1 / 2 * (SPLIT + WHOLE) / 4}
    assert sent[(Axis.FSDP,)] == {
        "reduce-scatter": 2 * 3 / 4 * (SPLIT + WHOLE),
        "all-gather": 3 / 4 * (SPLIT + WHOLE),
    }


@pytest.mark.oldest("2-loops1")
@pytest.mark.parametrize(("stage", "loops"), [(1, ()), (2, (2,))])
def test_automatic_stages_reduce_where_explicit_ones_do(stage, loops):
    found = read_collectives(lowered("automatic", stage, accumulation=2), MESH)
    # XLA on CPU has no pass that makes a reduce-scatter of an all-reduce and a slice.
    assert kinds(found) == [*times("all-gather"), ("all-reduce", loops)]


# A stack of layers, gathered one at a time.
LAYERS, WIDTH = 4, 16


def stacked_values():
    rng = np.random.default_rng(1)
    params = {
        "blocks": {"w": rng.normal(size=(LAYERS, WIDTH, WIDTH)) / 4, "b": rng.normal(size=(LAYERS, WIDTH))},
        "scale": rng.normal(size=3),
    }
    return params, {"x": rng.normal(size=(16, WIDTH)), "y": rng.normal(size=(16, WIDTH))}


def stacked_loss(params, batch, specs=None):
    """The mean squared error after a scan over layers, which gathers each where it gets shards."""

    @jax.checkpoint
    def block(x, layer):
        if specs is not None:
            layer = gather(layer, layer_specs(specs["blocks"]), Axis.FSDP)
        return jnp.tanh(x @ layer["w"] + layer["b"]), None

    x, _ = jax.lax.scan(block, batch["x"], params["blocks"])
    scale = params["scale"] if specs is None else gather(params["scale"], specs["scale"], Axis.FSDP)
    return jnp.mean((x * scale.sum() - batch["y"]) ** 2)


def stacked_specs(params):
    blocks = shard_specs(params["blocks"], MESH, keep=1)
    return {"blocks": blocks, "scale": shard_specs(params["scale"], MESH)}


@pytest.mark.oldest
def test_a_layer_is_whole_only_while_it_is_used():
    params, batch = stacked_values()
    specs = stacked_specs(params)
    assert specs["blocks"] == {"w": PartitionSpec(None, Axis.FSDP), "b": PartitionSpec(None, Axis.FSDP)}
    with float64(True):
        optimizer = OPTIMIZERS["sgd"]()
        loss = partial(stacked_loss, specs=specs)
        step = jax.jit(zero_step(loss, optimizer, MESH, specs, stage=3, loss_gathers=True))
        placed, state = place(params, optimizer, MESH, specs, 3)
        compiled = step.lower(placed, state, batch).compile()
        trained, _, loss = jax.tree.map(np.asarray, step(placed, state, batch))
        wanted, gradients = jax.value_and_grad(stacked_loss)(params, batch)
        np.testing.assert_allclose(loss, wanted, rtol=1e-12)
        for ours, start, gradient in zip(*map(jax.tree.leaves, (trained, params, gradients)), strict=True):
            np.testing.assert_allclose(ours, start - 0.0625 * np.asarray(gradient), rtol=1e-11, atol=1e-13)
    found = read_collectives(compiled, MESH)
    each_layer = [("all-gather", (LAYERS,))] * 4  # two leaves, in the forward pass and again in the backward pass
    assert kinds(found) == [*each_layer, ("all-reduce", ()), *[("reduce-scatter", (LAYERS,))] * 2]
    sent = collective_bytes_by_axis(found)[(Axis.FSDP,)]
    blocks_bytes = 8 * LAYERS * (WIDTH * WIDTH + WIDTH)
    assert sent["all-gather"] == 2 * 7 / 8 * blocks_bytes
    assert sent["reduce-scatter"] == 7 / 8 * blocks_bytes
    text = compiled.as_text()
    assert f"f64[{LAYERS},{WIDTH // 8},{WIDTH}]" in text
    assert f"f64[{LAYERS},{WIDTH},{WIDTH}]" not in text


def mixed_precision_adam():
    """What the paper counts: a float32 copy, momentum and variance of float16 parameters, 12 bytes each."""

    def init(params):
        return [jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, jnp.float32), params) for _ in range(3)]

    return optax.GradientTransformation(init, lambda updates, state, params: (updates, state))


@pytest.mark.oldest
def test_bytes_are_those_of_figure_1():
    mesh = abstract_mesh(MeshShape(fsdp=64))
    params = {"w": jax.ShapeDtypeStruct((64, 117_187_500), jnp.float16)}  # 7.5 billion parameters
    held = zero_bytes(params, mixed_precision_adam(), mesh, shard_specs(params, mesh))
    assert [round(stage.total_bytes / 1e9, 1) for stage in held] == [120.0, 31.4, 16.6, 1.9]


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_bytes_are_those_of_real_shards(stage):
    params, optimizer = jax.tree.map(np.float32, PARAMS), OPTIMIZERS["adamw"]()
    placed, state = place(params, optimizer, MESH, SPECS, stage)
    gradients_at, _ = placements(params, optimizer, MESH, SPECS, 3 if stage >= 2 else 0)
    gradients = jax.device_put(params, gradients_at)

    def on_first_device(tree):
        shards = [leaf.addressable_shards[0] for leaf in jax.tree.leaves(tree)]
        assert {one.device for one in shards} == {MESH.devices.flat[0]}
        return sum(one.data.nbytes for one in shards)

    held = zero_bytes(params, optimizer, MESH, SPECS)[stage]
    assert held.params_bytes == on_first_device(placed) == (SPLIT / 8 + WHOLE if stage == 3 else SPLIT + WHOLE)
    assert held.gradients_bytes == on_first_device(gradients)
    assert held.optimizer_bytes == on_first_device(state)
    assert held.total_bytes == held.params_bytes + held.gradients_bytes + held.optimizer_bytes


def test_the_step_keeps_what_place_laid_out():
    """What a step returns lies where its arguments did, whose bytes the compiler counts alike."""
    params, (batch,) = jax.tree.map(np.float32, values(exact=False))
    optimizer = OPTIMIZERS["adamw"]()
    for stage in (1, 3):
        step, arguments = program("explicit", stage, optimizer, params, batch)
        held = zero_bytes(params, optimizer, MESH, SPECS)[stage]
        rows_bytes = sum(leaf.nbytes for leaf in batch.values()) // 8
        argument_bytes = step.memory_analysis().argument_size_in_bytes
        assert argument_bytes == held.params_bytes + held.optimizer_bytes + rows_bytes
        before, after = arguments[:2], step(*arguments)[:2]
        assert [leaf.sharding for leaf in jax.tree.leaves(after)] == [leaf.sharding for leaf in jax.tree.leaves(before)]


@pytest.mark.oldest
def test_leaves_are_split_by_the_rule_and_the_rest_is_reported():
    assert {
        "into": {"w": PartitionSpec(None, Axis.FSDP), "b": PartitionSpec(Axis.FSDP)},
        "out": PartitionSpec(Axis.FSDP),
        "scale": PartitionSpec(),
    } == SPECS
    assert replicated_leaves(PARAMS, SPECS) == ("['scale'] (4,)",)
    square = {"w": jax.ShapeDtypeStruct((8, 16, 16), np.float32), "s": jax.ShapeDtypeStruct((), np.float32)}
    assert shard_specs(square, MESH) == {"w": PartitionSpec(None, Axis.FSDP), "s": PartitionSpec()}
    tall = {"w": jax.ShapeDtypeStruct((64, 8), np.float32), "b": jax.ShapeDtypeStruct((64,), np.float32)}
    assert shard_specs(tall, MESH, keep=1) == {"w": PartitionSpec(None, Axis.FSDP), "b": PartitionSpec()}


def faulty_clip(max_norm, specs, axis):
    """The norm of a device's own shards: what `optax.clip_by_global_norm` would take, out of sight of the check."""

    def clip(updates, state, params=None):
        def sharded_global_norm(tree):
            return optax.tree.norm(tree)

        factor = max_norm / jnp.maximum(jax.jit(sharded_global_norm)(updates), max_norm)
        # As if the same everywhere, or the types would give it away.
        factor = zero.all_reduce(factor, axis, "max")
        return jax.tree.map(lambda leaf: leaf * factor, updates), state

    return optax.GradientTransformation(lambda params: optax.EmptyState(), clip)


def test_clipping_by_the_norm_of_a_shard_is_caught():
    with pytest.raises(AssertionError, match="Not equal to tolerance"):
        check("explicit", 1, "adamw", clip=0.5, explicit_clip=faulty_clip, steps=2)


SOUND_SCATTER, SOUND_REDUCE, SOUND_SHARD = zero.reduce_scatter, zero.all_reduce, zero.shard


def own_block(x, axis, dim):
    size = jax.lax.axis_size(axis)
    return jax.lax.dynamic_slice_in_dim(x, jax.lax.axis_index(axis) * (x.shape[dim] // size), x.shape[dim] // size, dim)


def neighbours(tree, specs, axis):
    mine = SOUND_SHARD(tree, specs, axis)
    return jax.tree.map(lambda leaf, spec: shift(leaf, axis) if any(spec) else leaf, mine, specs)


MUTANTS = {
    "no reduction": ("reduce_scatter", own_block),
    "a mean where a sum belongs": ("reduce_scatter", lambda *args: SOUND_SCATTER(*args) / 8),
    "a sum where a mean belongs": ("all_reduce", lambda tree, axis, op="sum": SOUND_REDUCE(tree, axis, "sum")),
    "what is whole is not reduced": ("all_reduce", lambda tree, axis, op="sum": SOUND_REDUCE(tree, axis, "max")),
    "another axis": ("all_reduce", lambda tree, axis, op="sum": SOUND_REDUCE(tree, Axis.DATA, op)),
    "the neighbour's shard": ("shard", neighbours),
}


@pytest.mark.parametrize("mutant", mostly_slow(MUTANTS, "no reduction", "another axis"))
def test_a_fault_is_caught(mutant, monkeypatch):
    name, faulty = MUTANTS[mutant]
    monkeypatch.setattr(zero, name, faulty)
    # Where a value that varies is returned as one that does not, shard_map itself refuses.
    with pytest.raises((AssertionError, ValueError), match=r"Arrays are not equal|Not equal|out_specs"):
        check("explicit", 1, "sgd", exact=True, steps=1)


@pytest.mark.parametrize("notation", NOTATIONS)
@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"stage": 4}, "ZeRO has no stage 4: use 1, 2, 3"),
        ({"stage": 0}, "ZeRO has no stage 0: use 1, 2, 3"),
        ({"stage": 1, "axis": "rows"}, "the mesh has no axis 'rows': it has data, stage, fsdp"),
    ],
)
def test_a_step_that_cannot_be_built_is_one_line(notation, options, message):
    with pytest.raises(ValueError, match=message):
        NOTATIONS[notation](loss_fn, OPTIMIZERS["sgd"](), MESH, SPECS, **options)


@pytest.mark.parametrize("notation", NOTATIONS)
@pytest.mark.parametrize(
    ("specs", "rows", "message"),
    [
        (SPECS, 12, "a batch of 12 rows does not divide over 8 devices x 1 microbatches: use a multiple of 8"),
        (
            {**SPECS, "scale": PartitionSpec(Axis.FSDP)},
            32,
            r"params\['scale'\] of shape \(4,\) cannot be split by .* 8",
        ),
        ({**SPECS, "scale": PartitionSpec(None, Axis.FSDP)}, 32, r"params\['scale'\] of shape \(4,\) cannot be split"),
        ({**SPECS, "scale": PartitionSpec(Axis.DATA)}, 32, "splits over more than"),
        ({"scale": SPECS["scale"]}, 32, "specs are not of these parameters"),
    ],
)
def test_specs_and_batches_that_do_not_fit_are_one_line(notation, specs, rows, message):
    optimizer = OPTIMIZERS["sgd"]()
    batch = {"x": np.ones((rows, 6)), "y": np.ones((rows, 4))}
    step = NOTATIONS[notation](loss_fn, optimizer, MESH, specs, stage=2)
    with pytest.raises(ValueError, match=message) as caught:
        step(PARAMS, optimizer.init(PARAMS), batch)
    assert "\n" not in str(caught.value)


def test_other_bad_input_is_one_line():
    with pytest.raises(ValueError, match="loss_gathers is for stage 3"):
        zero_step(loss_fn, OPTIMIZERS["sgd"](), MESH, SPECS, stage=2, loss_gathers=True)
    with pytest.raises(ValueError, match="max_norm=0 must be above 0"):
        clip_by_global_norm(0, SPECS, Axis.FSDP)
    with pytest.raises(ValueError, match="ZeRO has no stage 5: use 0, 1, 2, 3"):
        place(PARAMS, OPTIMIZERS["sgd"](), MESH, SPECS, 5)


MIXING = {
    "clip": (lambda: optax.chain(optax.clip_by_global_norm(1.0), optax.sgd(0.1)), "reduce_sum"),
    "lamb": (lambda: optax.lamb(0.1), "reduce_sum"),
    "adafactor": (lambda: optax.adafactor(0.1), "reduce_sum"),
    "muon": (lambda: optax.contrib.muon(0.1), "dot_general"),
    "finite": (lambda: optax.apply_if_finite(optax.adam(0.1), 3), "reduce_and"),
}
ELEMENTWISE = {
    "lion": lambda: optax.lion(0.1),
    "rmsprop": lambda: optax.rmsprop(0.1, momentum=0.9),
    "schedule": lambda: optax.adam(optax.cosine_decay_schedule(0.1, 10)),
    "masked": lambda: optax.masked(optax.adamw(0.1), {"into": {"w": True, "b": False}, "out": True, "scale": False}),
    "many": lambda: optax.MultiSteps(optax.adam(0.1), 2).gradient_transformation(),
}


@pytest.mark.parametrize("name", MIXING)
def test_an_optimizer_that_mixes_elements_is_refused(name):
    make, primitive = MIXING[name]
    with pytest.raises(ValueError, match=rf"mixes the elements of an array \(.*{primitive}.*automatic_zero_step"):
        trace(make())


@pytest.mark.parametrize("name", ELEMENTWISE)
def test_an_elementwise_optimizer_is_taken(name):
    trace(ELEMENTWISE[name]())


def trace(optimizer):
    params, (batch,) = jax.tree.map(np.float32, values(exact=True))
    jax.eval_shape(zero_step(loss_fn, optimizer, MESH, SPECS, stage=2), params, optimizer.init(params), batch)


# Every data-parallel and ZeRO step on a v5e:2x4, two microbatches: its collectives of more than a few bytes.
ON_TPU = """
import json, os
from gcompute.aot.target import target_devices, target_environment
from gcompute.hardware.target import Target

target = Target.parse("v5e:2x4")
os.environ.update(target_environment(target))
import jax, jax.numpy as jnp, optax
from jax.sharding import NamedSharding, PartitionSpec
from gcompute.aot.hlo import read_collectives
from gcompute.config.mesh import Axis, MeshShape
from gcompute.parallel.data import jit_step, shard_map_step
from gcompute.parallel.mesh import build_mesh
from gcompute.parallel.zero import automatic_zero_step, zero_step
from gcompute.parallel.zero_layout import placements, shard_specs

mesh, optimizer = build_mesh(MeshShape(fsdp=8), target_devices(target)), optax.adamw(1e-3)
shape = jax.ShapeDtypeStruct
params = {"into": shape((512, 2048), jnp.float32), "out": shape((2048, 512), jnp.float32)}
rows = shape((256, 512), jnp.float32, sharding=NamedSharding(mesh, PartitionSpec(Axis.FSDP)))
specs = shard_specs(params, mesh)

def loss_fn(params, batch):
    return jnp.mean((jnp.tanh(batch["x"] @ params["into"]) @ params["out"]) ** 2)

def collectives(step, stage):
    trees = (params, jax.eval_shape(optimizer.init, params))
    at = placements(params, optimizer, mesh, specs, stage)
    placed = jax.tree.map(lambda leaf, place: shape(leaf.shape, leaf.dtype, sharding=place), trees, at)
    compiled = jax.jit(step, donate_argnums=(0, 1)).lower(*placed, {"x": rows}).compile()
    found = [one for one in read_collectives(compiled, mesh) if one.operand_bytes > 64]
    return sorted({(one.kind, len(one.loops)) for one in found})

report = {}
for name, build in (("shard_map", shard_map_step), ("jit", jit_step)):
    report[name] = collectives(build(loss_fn, optimizer, mesh, axis=Axis.FSDP, accumulation=2), 0)
for name, build in (("explicit", zero_step), ("automatic", automatic_zero_step)):
    for stage in (1, 2, 3):
        step = build(loss_fn, optimizer, mesh, specs, stage=stage, accumulation=2)
        report[f"{name} {stage}"] = collectives(step, stage)
print(json.dumps(report))
"""


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="the TPU compiler, libtpu, is not installed")
def test_the_tpu_compiler_reduces_where_each_stage_says():
    with subprocess.Popen([sys.executable, "-c", ON_TPU], stdout=subprocess.PIPE, text=True) as process:
        out, _ = process.communicate(timeout=300)
    assert process.returncode == 0
    found = json.loads(out.splitlines()[-1])
    once, each = [["all-gather", 0], ["reduce-scatter", 0]], [["all-gather", 0], ["reduce-scatter", 1]]
    assert found["shard_map"] == found["jit"] == [["all-reduce", 0]]
    assert found["explicit 1"] == found["automatic 1"] == once
    assert found["explicit 2"] == found["automatic 2"] == each
    # Explicit parameters are gathered in the loop; what is pinned whole, before it.
    assert found["explicit 3"] == [["all-gather", 1], ["reduce-scatter", 1]]
    assert found["automatic 3"] == each
