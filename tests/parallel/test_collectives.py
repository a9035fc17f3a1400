"""Collectives and rings against numpy, bitwise: every value is a small integer, and so is every sum of them."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec
from tiers import mostly_slow

from gcompute.aot.hlo import read_collectives
from gcompute.config.mesh import Axis, MeshShape
from gcompute.parallel import collectives
from gcompute.parallel.collectives import (
    all_gather,
    all_reduce,
    all_to_all,
    reduce_scatter,
    ring_all_gather,
    ring_all_reduce,
    ring_reduce_scatter,
    shift,
    varying,
    varying_axes,
)
from gcompute.parallel.mesh import build_mesh

RING = Axis.CONTEXT
ROWS = PartitionSpec(RING)


def per_device(function, size, *arguments, check_vma=True):
    """[n, ...] results of a function of one device's [...] arguments, and the compiled program."""

    def local(*rows):
        return jax.tree.map(lambda y: y[None], function(*(row[0] for row in rows)))

    mapped = jax.shard_map(
        local, mesh=build_mesh(MeshShape(context=size)), in_specs=ROWS, out_specs=ROWS, check_vma=check_vma
    )
    compiled = jax.jit(mapped).lower(*arguments).compile()
    return jax.tree.map(np.asarray, compiled(*arguments)), compiled


def integers(*shape):
    return np.random.default_rng(sum(shape)).integers(-9, 10, shape).astype(np.float32)


def gathered(x_n, dim):
    return np.stack([np.concatenate(list(x_n), dim)] * len(x_n))


def scattered(x_n, dim):
    return np.stack(np.split(x_n.sum(0), len(x_n), dim))


def reduced(x_n):
    return np.stack([x_n.sum(0)] * len(x_n))


def with_gradient(function, x, cotangent):
    value, pull = jax.vjp(function, x)
    return value, pull(cotangent)[0]


def check_rings(size, bidirectional, check_vma=True, dim=1):
    """Values and gradients of the rings and of the built-in collectives."""
    shard, whole = integers(size, 2, 3, 2), integers(size, 2, 3 * size, 2)

    def three(shard, whole, gather, scatter, reduce, **options):
        return (
            with_gradient(lambda x: gather(x, RING, dim, **options), shard, whole),
            with_gradient(lambda x: scatter(x, RING, dim, **options), whole, shard),
            with_gradient(lambda x: varying(reduce(x, RING, dim, **options), RING), whole, whole + 1),
        )

    def program(*arrays):
        built_in = three(*arrays, all_gather, reduce_scatter, lambda x, axis, _: all_reduce(x, axis))
        rings = (ring_all_gather, ring_reduce_scatter, ring_all_reduce)
        return {"built-in": built_in, "ring": three(*arrays, *rings, bidirectional=bidirectional)}

    results, _ = per_device(program, size, shard, whole, check_vma=check_vma)
    for found in results.values():
        (gather, gather_grad), (scatter, scatter_grad), (reduce, reduce_grad) = found
        np.testing.assert_array_equal(gather, gathered(shard, dim))
        np.testing.assert_array_equal(gather_grad, scattered(whole, dim))
        np.testing.assert_array_equal(scatter, scattered(whole, dim))
        np.testing.assert_array_equal(scatter_grad, gathered(shard, dim))
        np.testing.assert_array_equal(reduce, reduced(whole))
        np.testing.assert_array_equal(reduce_grad, reduced(whole + 1))


@pytest.mark.parametrize(
    ("size", "bidirectional"),
    mostly_slow(
        [(1, False), (1, True), (2, True), (3, False), (4, True), (8, False)], (1, True), (3, False), (4, True)
    ),
)
def test_rings_equal_numpy_and_so_do_their_gradients(size, bidirectional):
    check_rings(size, bidirectional)


def test_rings_are_the_same_where_types_are_not_checked():
    check_rings(3, bidirectional=True, check_vma=False)


@pytest.mark.oldest("4-False-ring_all_reduce-2")
@pytest.mark.parametrize(("ring", "phases"), [(ring_all_gather, 1), (ring_reduce_scatter, 1), (ring_all_reduce, 2)])
@pytest.mark.parametrize(("size", "bidirectional"), [(4, False), (4, True)])
def test_rings_send_the_bytes_of_the_formula(ring, phases, size, bidirectional):
    x = integers(size, size, 5)
    _, compiled = per_device(lambda x: ring(x, RING, bidirectional=bidirectional), size, x)
    found = read_collectives(compiled, build_mesh(MeshShape(context=size)))
    assert {(one.kind, one.axes) for one in found} == {("collective-permute", (RING,))}
    whole_bytes = size * 5 * 4
    shard_bytes = whole_bytes if ring is ring_all_gather else whole_bytes // size
    assert sum(one.sent_bytes * one.trips for one in found) == phases * (size - 1) * shard_bytes
    upwards = [one for one in found if (0, 1) in one.pairs]
    assert sum(one.trips for one in upwards) == phases * (size // 2 if bidirectional else size - 1)


@pytest.mark.oldest("4")
@pytest.mark.parametrize("size", [1, 4])
def test_wrappers_equal_numpy_and_so_do_their_gradients(size):
    x, y = integers(size, 2, 3 * size), integers(size, 2 * size, 3)
    tied = np.minimum(x, 1)

    def program(x, y, tied):
        return {
            "to all": with_gradient(lambda x: all_to_all(x, RING, split_dim=-1, concat_dim=0), x, y),
            "before": with_gradient(lambda x: shift(x, RING, by=1), x, 2 * x),
            "after": shift(x, RING, by=-1),
            "round": shift(x, RING, by=size),
            "mean": with_gradient(lambda x: varying(all_reduce(x, RING, "mean"), RING), size * x, size * x),
            "max": with_gradient(lambda x: varying(all_reduce(x, RING, "max"), RING), tied, x),
            "tree": varying(all_reduce({"x": x, "y": [y]}, RING), RING),
        }

    found, _ = per_device(program, size, x, y, tied)
    blocks = np.stack(np.split(x, size, axis=2))  # [receiver, sender, 2, 3]
    np.testing.assert_array_equal(found["to all"][0], blocks.reshape(size, 2 * size, 3))
    back = y.reshape(size, size, 2, 3).transpose(1, 2, 0, 3).reshape(size, 2, 3 * size)
    np.testing.assert_array_equal(found["to all"][1], back)
    np.testing.assert_array_equal(found["before"][0], np.roll(x, 1, 0))
    np.testing.assert_array_equal(found["before"][1], np.roll(2 * x, -1, 0))
    np.testing.assert_array_equal(found["after"], np.roll(x, -1, 0))
    np.testing.assert_array_equal(found["round"], x)
    np.testing.assert_array_equal(found["mean"][0], reduced(x))
    np.testing.assert_array_equal(found["mean"][1], reduced(x))
    np.testing.assert_array_equal(found["tree"]["x"], reduced(x))
    np.testing.assert_array_equal(found["tree"]["y"][0], reduced(y))
    highest = tied == tied.max(0)
    np.testing.assert_array_equal(found["max"][0], np.stack([tied.max(0)] * size))
    np.testing.assert_allclose(found["max"][1], np.where(highest, x.sum(0) / highest.sum(0), 0), rtol=1e-6)
    assert size == 1 or highest.sum(0).max() > 1  # there were ties


def test_maximum_has_the_gradient_of_numpys():
    x = integers(4, 6)
    wanted = jax.grad(lambda x: (jnp.max(x, axis=0) * jnp.arange(6.0)).sum())(x)
    found, _ = per_device(jax.grad(lambda x: (all_reduce(x, RING, "max") * jnp.arange(6.0)).sum()), 4, x)
    np.testing.assert_array_equal(found, wanted)


def test_an_invariant_gather_may_leave_the_axis_out_and_its_gradient_is_a_slice():
    mesh, x = build_mesh(MeshShape(context=4)), integers(4, 3)

    def local(x, weight):
        whole, pull = jax.vjp(lambda x: all_gather(x, RING, invariant=True), x)
        return whole, pull(weight)[0]

    whole, gradient = jax.jit(
        jax.shard_map(local, mesh=mesh, in_specs=(ROWS, PartitionSpec()), out_specs=(PartitionSpec(), ROWS))
    )(x, x + 1)
    np.testing.assert_array_equal(whole, x)
    np.testing.assert_array_equal(gradient, x + 1)


def test_axes_taken_as_one_count_the_first_as_slowest():
    mesh, both = build_mesh(MeshShape(data=2, context=4)), (Axis.DATA, Axis.CONTEXT)
    spec, x = PartitionSpec(both), np.arange(16.0, dtype=np.float32)

    def local(x):
        whole = ring_all_gather(x, both)
        return all_gather(x, both), whole, ring_reduce_scatter(whole, both), shift(x, both)

    built_in, ring, sums, next_one = jax.jit(jax.shard_map(local, mesh=mesh, in_specs=spec, out_specs=spec))(x)
    np.testing.assert_array_equal(built_in, np.tile(x, 8))
    np.testing.assert_array_equal(ring, np.tile(x, 8))
    np.testing.assert_array_equal(sums, 8 * x)
    np.testing.assert_array_equal(next_one, np.roll(x, 2))


def test_varying_adds_what_is_missing_and_its_gradient_is_the_sum():
    mesh = build_mesh(MeshShape(data=2, context=4))
    seen = []

    def local(x, w):
        tree = varying({"x": x, "w": w}, (Axis.DATA, RING))
        tree = varying(varying(tree, RING), (RING,))
        seen.extend((varying_axes(w), varying_axes(tree["x"]), varying_axes(tree["w"])))
        return jax.grad(lambda w: (varying(w, (Axis.DATA, RING)) * x).sum())(w)

    x = integers(8, 3)
    specs = PartitionSpec((Axis.DATA, RING))
    run = jax.jit(jax.shard_map(local, mesh=mesh, in_specs=(specs, PartitionSpec()), out_specs=PartitionSpec()))
    np.testing.assert_array_equal(run(x, np.float32(1)), x.sum())
    assert [set(axes) for axes in seen] == [set(), {Axis.DATA, RING}, {Axis.DATA, RING}]


def test_one_compilation_serves_two_calls():
    mesh, traces = build_mesh(MeshShape(context=4)), []

    def local(x):
        traces.append(x.shape)
        return ring_all_reduce(x, RING, bidirectional=True)

    run = jax.jit(jax.shard_map(local, mesh=mesh, in_specs=ROWS, out_specs=ROWS))
    run(integers(16, 3)), run(integers(16, 3) + 1)
    assert len(traces) == 1


@pytest.mark.parametrize(
    ("function", "message"),
    [
        (lambda x: reduce_scatter(x, RING), r"dim 0 of shape \(6, 8\) into 4 equal blocks.*multiple of 4"),
        (lambda x: ring_reduce_scatter(x, RING), r"dim 0 of shape \(6, 8\) into 4 equal blocks.*multiple of 4"),
        (lambda x: ring_all_reduce(x, RING, -2), r"dim 0 of shape \(6, 8\) into 4 equal blocks.*multiple of 4"),
        (lambda x: all_to_all(x, RING, 0, 1), r"dim 0 of shape \(6, 8\) into 4 equal blocks.*multiple of 4"),
        (lambda x: all_to_all(x, RING, 1, 2), r"no dim 2: the shard has shape \(6, 8\), so use 0 to 1"),
        (lambda x: all_gather(x, RING, 2), r"no dim 2: the shard has shape \(6, 8\)"),
        (lambda x: ring_all_gather(x, RING, -3), r"no dim -3: the shard has shape \(6, 8\)"),
        (lambda x: all_gather(x[0, 0], RING), r"no dim 0: the shard is a scalar"),
        (lambda x: all_reduce(x, RING, "product"), r"no op 'product': use sum, mean or max"),
    ],
)
def test_bad_input_is_one_line(function, message):
    with pytest.raises(ValueError, match=message) as caught:
        per_device(function, 4, integers(4, 6, 8))
    assert "\n" not in str(caught.value)


SOUND_SHIFT = shift
MUTANTS = {
    "goes the wrong way": lambda x, axis, by=1: SOUND_SHIFT(x, axis, -by),
    "skips a device": lambda x, axis, by=1: SOUND_SHIFT(x, axis, 2 * by),
    "stays at home": lambda x, axis, by=1: varying(x, axis),
}


@pytest.mark.parametrize("mutant", mostly_slow(MUTANTS, "skips a device"))
def test_a_broken_hop_is_caught(mutant, monkeypatch):
    monkeypatch.setattr(collectives, "shift", MUTANTS[mutant])
    with pytest.raises(AssertionError):
        check_rings(3, bidirectional=False)


def test_a_missing_hop_is_caught(monkeypatch):
    monkeypatch.setattr(collectives, "_hops", lambda size, bidirectional: (size - 2, 0))
    with pytest.raises((AssertionError, TypeError, ValueError)):
        check_rings(3, bidirectional=False)
