"""Experts on a mesh against one token at a time in numpy: results, gradients, drops and the collectives compiled."""

from collections import Counter
from functools import cache, partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from float64 import float64
from jax.sharding import NamedSharding, PartitionSpec
from textbook_experts import textbook_mixture
from tiers import mostly_slow

from gcompute.aot.hlo import count_collectives, read_collectives
from gcompute.config.mesh import Axis, MeshShape
from gcompute.parallel import expert
from gcompute.parallel.einsum import einsum
from gcompute.parallel.expert import ExpertAxes, automatic_mixture, check_experts, dense_mixture, mixture
from gcompute.parallel.load_balance import sequence_order
from gcompute.parallel.mesh import build_mesh, use_mesh
from gcompute.parallel.routing import assign_slots

B, T, D, E, F, K = 8, 8, 6, 8, 4, 2
TIGHT = 3
BALANCE = 0.3
ROWS = (Axis.DATA, Axis.FSDP, Axis.EXPERT)
FLOAT64 = np.dtype("float64")


@cache
def problem(exact=False):
    """x, weights and the pull on y: normal values, or small integers that float32 sums exactly."""
    rng = np.random.default_rng(0)
    if not exact:
        weights = {"router": rng.normal(size=(D, E)), "down": rng.normal(size=(E, F, D))}
        weights |= {name: rng.normal(size=(E, D, F)) for name in ("up", "gate")}
        return rng.normal(size=(B, T, D)), weights, rng.normal(size=(B, T, D))
    # The first E of D + E features are the token's two experts, with equal logits so far above the rest that the
    # weights are 1/2, 1/2 and the other probabilities 0 in float32.
    chosen = np.stack([rng.permutation(np.arange(E) < K) for _ in range(B * T)]).reshape(B, T, E)
    x = np.concatenate([chosen, rng.integers(-2, 3, (B, T, D))], axis=-1).astype(float)
    weights = {
        "router": np.concatenate([1024 * np.eye(E), np.zeros((D, E))]),
        "up": rng.integers(-2, 3, (E, D + E, F)).astype(float),
        "down": rng.integers(-2, 3, (E, F, D + E)).astype(float),
    }
    return x, weights, rng.integers(-2, 3, (B, T, D + E)).astype(float)


@cache
def expected(capacity, exact=False):
    x, weights, dy = problem(exact)
    room = T if capacity is None else capacity
    return textbook_mixture(x, weights, k=K, capacity=room, dy=dy, balance_weight=0.0 if exact else BALANCE)


def experts_of(weights, compute):
    def experts(x_ebCD):
        hidden = einsum("ebcd,edf->ebcf", x_ebCD, weights["up"], compute)
        if "gate" in weights:
            hidden = jax.nn.silu(einsum("ebcd,edf->ebcf", x_ebCD, weights["gate"], compute)) * hidden
        return einsum("ebcf,efd->ebcd", hidden, weights["down"], compute)

    return experts


def spec(shape, *entries):
    """A PartitionSpec without the axes of size 1."""
    kept = [tuple(axis for axis in entry if shape.size(axis) > 1) or None for entry in entries]
    return PartitionSpec(*kept)


def weight_specs(shape):
    up = spec(shape, (Axis.EXPERT,), (), (Axis.TENSOR,))
    return {"router": spec(shape), "up": up, "gate": up, "down": spec(shape, (Axis.EXPERT,), (Axis.TENSOR,))}


def axes_of(shape, layout="contiguous", scatter=False):
    used = {axis: axis if shape.size(axis) > 1 else None for axis in Axis}
    return ExpertAxes(
        expert=used[Axis.EXPERT],
        tensor=used[Axis.TENSOR],
        context=used[Axis.CONTEXT],
        batch=tuple(axis for axis in ROWS if used[axis]),
        layout=layout,
        scatter=scatter,
    )


def layer(shape, axes, *, capacity, compute, run=mixture):
    """The layer over whole arrays: shard_map over the mesh, or no mesh at all."""

    def local(x, weights):
        return run(
            x, weights["router"], experts_of(weights, compute), k=K, capacity=capacity, compute=compute, axes=axes
        )

    if axes is None:
        return local

    tokens = spec(shape, ROWS, (Axis.CONTEXT,))
    result = spec(shape, ROWS, (Axis.CONTEXT, Axis.TENSOR)) if axes.scatter else tokens

    def on_mesh(x, weights):
        in_specs = (tokens, {name: weight_specs(shape)[name] for name in weights})
        out_specs = (result, PartitionSpec())
        return jax.shard_map(local, mesh=build_mesh(shape), in_specs=in_specs, out_specs=out_specs)(x, weights)

    return on_mesh


def with_gradients(function, dy, balance_weight):
    def loss(x, weights):
        y, stats = function(x, weights)
        return (y * dy).sum() + balance_weight * stats.balance, (y, stats)

    def run(x, weights):
        (_, (y, stats)), (dx, dweights) = jax.value_and_grad(loss, (0, 1), has_aux=True)(x, weights)
        return y, stats, {**dweights, "x": dx}

    return jax.jit(run)


def run_on(shape, *, capacity, layout="contiguous", exact=False, scatter=False, run=mixture):
    """(results in the order of positions, compiled program)."""
    x, weights, dy = problem(exact)
    compute = np.dtype("float32") if exact else FLOAT64
    order = sequence_order(T, shape.context, layout)
    x, dy = x[:, order], dy[:, order]
    axes = None if shape.num_devices == 1 else axes_of(shape, layout, scatter)
    program = with_gradients(
        layer(shape, axes, capacity=capacity, compute=compute, run=run), dy.astype(compute), 0.0 if exact else BALANCE
    )
    cast = partial(jax.tree.map, lambda value: jnp.asarray(value, compute))
    with float64(not exact):
        arguments = cast(x), cast(weights)
        compiled = program.lower(*arguments).compile()
        y, stats, grads = jax.tree.map(np.asarray, program(*arguments))
        assert program._cache_size() == 1
    back = np.argsort(order)
    return y[:, back], stats, {**grads, "x": grads["x"][:, back]}, compiled


def check(result, reference, *, exact=False):
    y, stats, grads, _ = result
    compare = np.testing.assert_array_equal if exact else partial(np.testing.assert_allclose, rtol=1e-12, atol=1e-12)
    compare(y, reference.y)
    for name, value in reference.grads.items():
        compare(grads[name], value, err_msg=name)
    compare(stats.balance, np.float32(reference.balance) if exact else reference.balance)
    assert stats.dropped == reference.dropped
    np.testing.assert_array_equal(stats.load_E, reference.load)


MESHES = [
    (MeshShape(), None),
    (MeshShape(), TIGHT),
    (MeshShape(expert=8), TIGHT),
    (MeshShape(data=2, expert=4), TIGHT),
    (MeshShape(fsdp=2, expert=2, tensor=2), TIGHT),
    (MeshShape(expert=2, context=2), TIGHT),
    (MeshShape(expert=2, context=2, tensor=2), None),
]


@pytest.mark.oldest("expert=2,context=2-3")
@pytest.mark.parametrize(("shape", "capacity"), mostly_slow(MESHES, MESHES[0], MESHES[4]), ids=str)
def test_results_and_gradients_are_the_textbooks(shape, capacity):
    assert (expected(capacity).dropped > 0) == (capacity is not None)
    check(run_on(shape, capacity=capacity), expected(capacity))


@pytest.mark.parametrize("shape", [MeshShape(data=2, context=2, tensor=2)], ids=str)
def test_a_zigzag_sequence_gives_its_places_in_the_order_of_positions(shape):
    check(run_on(shape, capacity=TIGHT, layout="zigzag"), expected(TIGHT))


def test_a_tensor_group_may_keep_pieces_of_the_sequence():
    result = run_on(MeshShape(expert=2, tensor=4), capacity=TIGHT, scatter=True)
    check(result, expected(TIGHT))
    assert count_collectives(result[-1])["reduce-scatter"] == 1


@pytest.mark.oldest
def test_the_dense_form_is_the_mixture_with_room_for_all():
    def dense(x, router, experts, *, k, capacity, compute, axes):
        return dense_mixture(x, router, experts, k=k, compute=compute)

    check(run_on(MeshShape(), capacity=None, run=dense), expected(None))


COLLECTIVES = [
    # There and back, forward and backward.
    (MeshShape(expert=8), TIGHT, {"all-to-all": 4}),
    (MeshShape(expert=2, tensor=4), TIGHT, {"all-to-all": 4}),
    (MeshShape(expert=2, context=4), None, {"all-to-all": 4}),
    # Devices that share a sequence fill the same places: a scatter and a gather of places, each way.
    (MeshShape(expert=2, context=4), TIGHT, {"all-to-all": 4, "reduce-scatter": 2, "all-gather": 2}),
    (MeshShape(data=2, tensor=4), TIGHT, {}),
]


@pytest.mark.parametrize(
    ("shape", "capacity", "moves"), mostly_slow(COLLECTIVES, COLLECTIVES[0], COLLECTIVES[3]), ids=str
)
def test_integers_to_the_bit_and_tokens_by_all_to_all_alone(shape, capacity, moves):
    layout = "contiguous" if capacity is None else "zigzag"
    *results, compiled = run_on(shape, capacity=capacity, layout=layout, exact=True)
    check((*results, compiled), expected(capacity, exact=True), exact=True)
    found = read_collectives(compiled, build_mesh(shape))
    sums = [one for one in found if one.kind == "all-reduce"]
    assert Counter(one.kind for one in found if one.dtype == "f32" and one not in sums) == moves
    # The choices, gathered where a sequence is shared.
    gathered = [one.operand_bytes for one in found if one.dtype == "s32" and one.kind == "all-gather"]
    shared = shape.context > 1 and capacity is not None
    assert gathered == [4 * B * T * K // shape.num_devices] * shared
    assert all(one.axes is not None for one in sums)
    assert sum(one.operand_bytes for one in sums) == summed_bytes(shape)


def summed_bytes(shape):
    """What one device adds to sums over others: results, gradients and statistics, and no buffer of tokens."""
    x, weights, _ = problem(exact=True)
    rows, tokens = B // shape.batch_shards, B * T // (shape.batch_shards * shape.context)
    values = 0
    if shape.batch_shards * shape.context > 1:
        values += weights["router"].size + E + 1
    if shape.batch_shards > 1:
        values += 1
    if shape.context > 1:
        values += 2 * rows * E
    if shape.tensor > 1:
        values += tokens * (2 * x.shape[2] + K)
    if shape.data * shape.context > 1:
        values += (weights["up"].size + weights["down"].size) // (shape.expert * shape.tensor)
    return 4 * values


def test_a_second_batch_compiles_nothing():
    shape = MeshShape(expert=2)
    x, weights, dy = problem()
    with float64(True):
        program = with_gradients(
            layer(shape, axes_of(shape), capacity=TIGHT, compute=FLOAT64), jnp.asarray(dy), BALANCE
        )
        first, second = (program(jnp.asarray(tokens), jax.tree.map(jnp.asarray, weights)) for tokens in (x, -x))
    assert program._cache_size() == 1
    assert not np.array_equal(first[1].load_E, second[1].load_E)


def test_tokens_travel_in_the_compute_dtype():
    shape = MeshShape(expert=2)
    x, weights, _ = problem()
    run = jax.jit(layer(shape, axes_of(shape), capacity=TIGHT, compute=jnp.dtype("bfloat16")))
    cast = partial(jax.tree.map, lambda value: jnp.asarray(value, jnp.float32))
    # Before optimisation: XLA:CPU widens bfloat16 collectives.
    text = run.lower(cast(x), cast(weights)).as_text()
    moved = [line for line in text.splitlines() if "stablehlo.all_to_all" in line]
    assert len(moved) == 2
    assert all("bf16" in line for line in moved)
    y, stats = run(cast(x), cast(weights))
    assert y.dtype == jnp.float32
    assert stats.balance.dtype == jnp.float32
    # The router is in float32: no choice differs, and the rest is bfloat16 rounding of three products.
    np.testing.assert_array_equal(stats.load_E, expected(TIGHT).load)
    np.testing.assert_allclose(y, expected(TIGHT).y, rtol=0.05, atol=0.05 * np.abs(expected(TIGHT).y).max())


AUTOMATIC = [MeshShape(expert=8), MeshShape(data=2, expert=2, tensor=2)]


@pytest.mark.parametrize("shape", mostly_slow(AUTOMATIC, AUTOMATIC[0]), ids=str)
def test_the_automatic_form_is_the_same_layer_with_the_same_all_to_alls(shape):
    x, weights, dy = problem()

    def whole(x, weights):
        experts = experts_of(weights, FLOAT64)
        return automatic_mixture(x, weights["router"], experts, k=K, capacity=TIGHT, compute=FLOAT64)

    with float64(True), use_mesh(build_mesh(shape)):
        place = partial(placed, build_mesh(shape))
        rows = spec(shape, ROWS)
        arguments = place(x, rows), {name: place(weights[name], weight_specs(shape)[name]) for name in weights}
        program = with_gradients(whole, place(dy, rows), BALANCE)
        compiled = program.lower(*arguments).compile()
        check((*jax.tree.map(np.asarray, program(*arguments)), compiled), expected(TIGHT))
    found = count_collectives(compiled)
    assert {kind: count for kind, count in found.items() if kind != "all-reduce"} == {"all-to-all": 4}


def placed(mesh, value, where):
    return jax.device_put(jnp.asarray(value), NamedSharding(mesh, where))


def differs(**options):
    """Whether the layer on a mesh is no longer the textbook's."""
    try:
        check(run_on(**options, capacity=TIGHT, exact=True), expected(TIGHT, exact=True), exact=True)
    except AssertionError:
        return True
    return False


def without_the_way_back(monkeypatch):
    send = jax.lax.all_to_all

    def stay(x, axis, split_axis, concat_axis, *, tiled):
        if split_axis == 0:
            return send(x, axis, split_axis, concat_axis, tiled=tiled)
        return jnp.concatenate(jnp.split(x, jax.lax.axis_size(axis), axis=1), axis=0)

    monkeypatch.setattr(jax.lax, "all_to_all", stay)


def without_weights(monkeypatch):
    combine = expert.combine
    monkeypatch.setattr(expert, "combine", lambda y, slots, weight: combine(y, slots, jnp.ones_like(weight)))


def without_earlier_shards(monkeypatch):
    def alone(expert_btk, num_experts, capacity, *, axis, layout):
        places = -(-capacity // jax.lax.axis_size(axis)) * jax.lax.axis_size(axis)
        return assign_slots(expert_btk, num_experts, capacity, places=places)

    monkeypatch.setattr(expert, "assign_shared_slots", alone)


def without_the_layout(monkeypatch):
    shared = expert.assign_shared_slots
    monkeypatch.setattr(
        expert, "assign_shared_slots", lambda *args, axis, layout: shared(*args, axis=axis, layout="contiguous")
    )


def without_drops(monkeypatch):
    monkeypatch.setattr(expert, "assign_slots", lambda ids, num, capacity: assign_slots(ids, num, ids.shape[1]))


MUTANTS = [
    (without_the_way_back, {"shape": MeshShape(expert=2)}),
    (without_weights, {"shape": MeshShape(expert=2)}),
    (without_drops, {"shape": MeshShape(expert=2)}),
    (without_earlier_shards, {"shape": MeshShape(context=2)}),
    (without_the_layout, {"shape": MeshShape(context=2), "layout": "zigzag"}),
]


@pytest.mark.parametrize(
    ("fault", "options"), mostly_slow(MUTANTS, MUTANTS[0]), ids=lambda value: getattr(value, "__name__", "")
)
def test_a_fault_shows(monkeypatch, fault, options):
    fault(monkeypatch)
    assert differs(**options)


@pytest.mark.parametrize(("experts", "ways", "legal"), [(8, 3, "expert=1, 2, 4, 8."), (6, 4, "expert=1, 2, 3, 6.")])
def test_an_axis_that_does_not_divide_the_experts_is_refused(experts, ways, legal):
    with pytest.raises(ValueError, match="does not divide") as caught:
        check_experts(experts, ways)
    assert str(caught.value).endswith(f"each device needs whole experts. Legal: {legal}")


def test_the_layer_refuses_what_its_axis_does_not_divide():
    x, weights, _ = problem()
    three = {name: value[..., :6] if name == "router" else value[:6] for name, value in weights.items()}
    shape = MeshShape(expert=4)

    def local(x, router):
        return mixture(x, router, lambda x: x, k=K, capacity=None, compute=FLOAT64, axes=axes_of(shape))[0]

    specs = (spec(shape, ROWS), PartitionSpec())
    with pytest.raises(ValueError, match=r"expert=4 does not divide experts=6.*Legal: expert=1, 2, 3, 6"):
        jax.shard_map(local, mesh=build_mesh(shape), in_specs=specs, out_specs=specs[0])(x, three["router"])
