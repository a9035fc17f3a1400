"""The pipeline against a program for one device that is written in NumPy: losses and gradients, bit by bit.

Small integers keep every sum exact, so the order of additions cannot matter.
"""

import dataclasses
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec
from tiers import mostly_slow

from gcompute.aot.hlo import count_collectives
from gcompute.config.mesh import Axis, MeshShape
from gcompute.parallel.mesh import build_mesh
from gcompute.parallel.pipeline import executor
from gcompute.parallel.pipeline.executor import run_pipeline
from gcompute.parallel.pipeline.forward import pipeline_forward
from gcompute.parallel.pipeline.layout import layer_order
from gcompute.parallel.pipeline.lowering import lower
from gcompute.parallel.pipeline.schedule import Schedule, gpipe, interleaved, one_f_one_b, zero_bubble

WIDTH, VOCAB, ROWS = 4, 5, 2


def first(extra, tokens):
    return extra["table"][tokens]


def stage(weight, x):
    z = x @ weight
    return jnp.where(z >= 0, z, -z)


def last(extra, x, targets):
    return ((x @ extra["table"].T) * targets).sum()


def problem(num_virtual, num_microbatches, rows=ROWS, seed=0):
    """Weights, a table that embeds and is the output layer, tokens and targets: small integers."""
    draw = np.random.default_rng(seed)
    weights = draw.integers(-1, 2, (num_virtual, WIDTH, WIDTH)) + np.eye(WIDTH, dtype=int)
    table = draw.integers(-1, 3, (VOCAB, WIDTH))
    tokens = draw.integers(0, VOCAB, (num_microbatches, rows))
    return weights, table, tokens, draw.integers(-1, 3, (num_microbatches, rows, VOCAB))


def reference(weights, table, tokens, targets):
    """Sums over microbatches of the loss, and its gradients by hand."""
    loss, weight_grads, table_grads = 0, np.zeros_like(weights), np.zeros_like(table)
    for tokens_i, targets_i in zip(tokens, targets, strict=True):
        xs, zs = [table[tokens_i]], []
        for weight in weights:
            zs.append(xs[-1] @ weight)
            xs.append(np.abs(zs[-1]))
        loss += (xs[-1] @ table.T * targets_i).sum()
        table_grads += targets_i.T @ xs[-1]
        dx = targets_i @ table
        for layer in reversed(range(len(weights))):
            dz = np.where(zs[layer] >= 0, dx, -dx)
            weight_grads[layer] += xs[layer].T @ dz
            dx = dz @ weights[layer].T
        np.add.at(table_grads, tokens_i, dx)
    for sums in (loss, weight_grads, table_grads):
        assert np.abs(sums).max() < 2**24, "larger integers are not exact in float32"
    return tuple(np.float32(sums) / np.float32(len(tokens)) for sums in (loss, weight_grads, table_grads))


def build(schedule, *, uniform_ends=True, forward=False):
    """The jitted pipeline over the stage axis: (weights in storage order, extra, tokens, targets) -> result."""
    mesh = build_mesh(MeshShape(stage=schedule.num_stages))
    arguments = {"schedule": schedule, "first": first, "last": last, "uniform_ends": uniform_ends}
    replicated, split = PartitionSpec(), PartitionSpec(Axis.STAGE)
    out = executor.PipelineResult(loss=replicated, aux=replicated, stage_grads=split, extra_grads=replicated)
    return jax.jit(
        jax.shard_map(
            partial(pipeline_forward if forward else run_pipeline, stage, **arguments),
            mesh=mesh,
            in_specs=(split, replicated, replicated, replicated),
            out_specs=replicated if forward else out,
        )
    )


def problem_in_storage_order(schedule, **options):
    weights, table, tokens, targets = problem(schedule.num_virtual_stages, schedule.num_microbatches, **options)
    order = layer_order(schedule.num_virtual_stages, schedule.num_stages, schedule.num_chunks)
    return np.float32(weights)[order], {"table": np.float32(table)}, tokens, np.float32(targets)


def run(schedule, **options):
    """Loss, gradients of the weights in the model's order, gradients of the table; the reference's; the program."""
    program = build(schedule, **options).lower(*problem_in_storage_order(schedule)).compile()
    result = program(*problem_in_storage_order(schedule))
    order = layer_order(schedule.num_virtual_stages, schedule.num_stages, schedule.num_chunks)
    found = (result.loss, np.asarray(result.stage_grads)[np.argsort(order)], result.extra_grads["table"])
    expected = reference(*problem(schedule.num_virtual_stages, schedule.num_microbatches))
    assert all(np.any(numbers) for numbers in expected)
    return found, expected, program


def differs(schedule):
    found, expected, _ = run(schedule)
    return [not np.array_equal(one, other) for one, other in zip(found, expected, strict=True)]


# With the number of permutes: one a direction and segment of [F][B], [F][F B][B], [F][F B][F B W][B W], and none where
# nothing arrives: over one stage, and in a last segment of one tick.
CASES = [
    (gpipe(1, 2), True, 0),
    (gpipe(2, 3), False, 2),
    (gpipe(4, 4), True, 2),
    (one_f_one_b(2, 2), True, 3),
    (one_f_one_b(4, 5), False, 4),
    (interleaved(2, 4, 2), False, 4),
    (interleaved(4, 4, 2), True, 4),
    (zero_bubble(2, 4), True, 5),
    (zero_bubble(4, 6), False, 6),
]


@pytest.mark.parametrize(
    ("schedule", "uniform_ends", "permutes"),
    mostly_slow(CASES, *(CASES[at] for at in (1, 3, 5, 7))),
    ids=[f"{s.name}-{s.num_stages}-{s.num_microbatches}-{u}" for s, u, _ in CASES],
)
def test_loss_and_gradients_are_those_of_one_device_bit_by_bit(schedule, uniform_ends, permutes):
    found, expected, program = run(schedule, uniform_ends=uniform_ends)
    for one, other in zip(found, expected, strict=True):
        # XLA divides by a constant by way of its reciprocal: a second rounding where M is not a power of two.
        np.testing.assert_array_max_ulp(one, other, maxulp=int(schedule.num_microbatches in (3, 5, 6)))
    # Loss, aux and the gradient of the table are one all-reduce after the last tick.
    counts = count_collectives(program)
    assert counts.pop("collective-permute", 0) == permutes
    assert counts == {"all-reduce": 1}


TABLES = {
    # The order of free stages; microbatches that overtake each other, values that wait, an empty tick; B and W split.
    "free": [["F0", ""], ["F1", "F0"], ["", "B0"], ["B0", "F1"], ["", "B1"], ["B1", ""]],
    "overtaking": [["F1", ""], ["F0", "F1"], ["", "B1 F0"], ["", ""], ["", "B0"], ["B0", ""], ["B1", ""]],
    "split": [["F0", ""], ["F1", "F0 B0"], ["B0", "F1 B1 W1"], ["B1 W0", ""], ["W1", "W0"]],
}


@pytest.mark.parametrize("name", mostly_slow(TABLES, "split"))
def test_a_table_of_the_users_own_gives_the_same_numbers(name):
    schedule = Schedule.from_dict({"num_stages": 2, "num_microbatches": 2, "ticks": TABLES[name]})
    assert differs(schedule) == [False, False, False]


def test_two_entries_exchanged_give_the_same_numbers():
    schedule = gpipe(2, 4)
    rows = [list(cells) for cells in schedule.ticks]
    rows[5][1], rows[6][1] = rows[6][1], rows[5][1]
    with pytest.raises(ValueError, match="tick 6, stage 0: B of microbatch 0, chunk 0 needs B of microbatch 0"):
        lower(dataclasses.replace(schedule, ticks=tuple(map(tuple, rows))))
    # With the same exchange on the stage that waits for them, it is an order like another.
    rows[6][0], rows[7][0] = rows[7][0], rows[6][0]
    assert differs(dataclasses.replace(schedule, ticks=tuple(map(tuple, rows)))) == [False, False, False]


def test_memory_of_1f1b_does_not_grow_with_the_microbatches():
    def temporary_bytes(schedule):
        arguments = problem_in_storage_order(schedule, rows=64)
        return build(schedule).lower(*arguments).compile().memory_analysis().temp_size_in_bytes

    # 16 inputs are kept by one, 1 by the other.
    kept_bytes = 15 * 64 * WIDTH * 4
    assert temporary_bytes(gpipe(2, 16)) >= temporary_bytes(one_f_one_b(2, 16)) + 0.9 * kept_bytes


@pytest.mark.oldest
@pytest.mark.parametrize(("schedule", "uniform_ends"), [(one_f_one_b(4, 5), True), (interleaved(2, 4, 2), False)])
def test_forward_alone_gives_every_microbatchs_result_on_every_stage(schedule, uniform_ends):
    weights, table, tokens, targets = problem(schedule.num_virtual_stages, schedule.num_microbatches)
    losses = build(schedule, uniform_ends=uniform_ends, forward=True)(*problem_in_storage_order(schedule))
    expected = [reference(weights, table, tokens[[i]], targets[[i]])[0] for i in range(len(tokens))]
    np.testing.assert_array_equal(losses, np.float32(expected))


@pytest.mark.oldest
def test_one_program_for_all_batches():
    step = build(one_f_one_b(2, 4))
    for seed in (0, 1):
        weights, table, tokens, targets = problem(2, 4, seed=seed)
        loss = step(np.float32(weights), {"table": np.float32(table)}, tokens, np.float32(targets)).loss
        assert loss == reference(weights, table, tokens, targets)[0]
    assert step._cache_size() == 1


def test_bfloat16_gradients_are_summed_in_float32():
    # 300 gradients of one: a bfloat16 sum stays at 256.
    def gradients(weights, x):
        ends = {"first": lambda _, x: x, "last": lambda _, x, y: x.sum()}
        return run_pipeline(lambda weight, x: x @ weight, weights, {}, x, x, one_f_one_b(2, 300), **ends).stage_grads

    split, replicated = PartitionSpec(Axis.STAGE), PartitionSpec()
    mesh = build_mesh(MeshShape(stage=2))
    step = jax.jit(jax.shard_map(gradients, mesh=mesh, in_specs=(split, replicated), out_specs=split))
    grads = step(jnp.ones((2, 1, 1), jnp.bfloat16), jnp.ones((300, 1, 1), jnp.bfloat16))
    assert grads.dtype == jnp.float32
    np.testing.assert_array_max_ulp(np.asarray(grads), np.ones((2, 1, 1), np.float32), maxulp=1)


# Faults that a test must see: each breaks one line of the executor, and the numbers must no longer agree.
def lose_a_microbatch(monkeypatch):
    def broken(schedule):
        program = lower(schedule)
        program.segments[-1].backward.active[-1] = False
        return program

    monkeypatch.setattr(executor, "lower", broken)


def send_the_wrong_way(monkeypatch):
    right = executor.to_neighbour
    monkeypatch.setattr(executor, "to_neighbour", lambda tree, axis, step: right(tree, axis, -step))


def sum_where_a_mean_is_due(monkeypatch):
    right = executor._means
    monkeypatch.setattr(executor, "_means", lambda carry, microbatches, *rest: right(carry, 1, *rest))


def add_up_the_table_on_one_stage(monkeypatch):
    monkeypatch.setattr(executor.jax.lax, "psum", lambda tree, axes: jax.lax.pmax(tree, axes))


def keep_nothing(monkeypatch):
    monkeypatch.setattr(executor, "store", lambda buffer, slot, value: buffer)


FAULTS = [
    (lose_a_microbatch, [False, True, True]),
    (send_the_wrong_way, [True, True, True]),
    (sum_where_a_mean_is_due, [True, True, True]),
    (add_up_the_table_on_one_stage, [False, False, True]),
    (keep_nothing, [True, True, True]),
]


@pytest.mark.parametrize(
    ("fault", "expected"), mostly_slow(FAULTS, FAULTS[0]), ids=lambda value: getattr(value, "__name__", "")
)
def test_a_fault_is_seen(monkeypatch, fault, expected):
    fault(monkeypatch)
    assert differs(one_f_one_b(3, 4)) == expected


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda a: {**a, "schedule": gpipe(4, 2)},
            "schedule gpipe is for 4 stages and mesh axis 'stage' has 2.",
        ),
        (
            lambda a: {**a, "tokens": np.zeros((3, 2), int)},
            r"inputs has shape \(3, 2\); its first dim is 2, the microbatches of schedule gpipe.",
        ),
        (
            lambda a: {**a, "schedule": interleaved(2, 2, 2)},
            r"stage_params has shape \(1, 4, 4\); its first dim is 2, the chunks of schedule interleaved.",
        ),
        (
            lambda a: {**a, "stage": lambda weight, x: x[:, :2]},
            r"stage_fn returns float32\[2,2\] where it is given float32\[2,4\]: stages pass on one type.",
        ),
        (
            lambda a: {**a, "schedule": dataclasses.replace(gpipe(2, 2), ticks=gpipe(2, 2).ticks[1:])},
            "tick 0, stage 1: F of microbatch 0, chunk 0 needs F of microbatch 0, chunk 0 on stage 0",
        ),
    ],
)
def test_what_does_not_fit_is_refused_in_one_line(change, message):
    weights, table, tokens, targets = problem(2, 2)
    given = change({"schedule": gpipe(2, 2), "stage": stage, "tokens": tokens})
    pipeline = jax.shard_map(
        lambda *arguments: run_pipeline(given["stage"], *arguments, given["schedule"], first=first, last=last).loss,
        mesh=build_mesh(MeshShape(stage=2)),
        in_specs=(PartitionSpec(Axis.STAGE), *(PartitionSpec(),) * 3),
        out_specs=PartitionSpec(),
    )
    with pytest.raises(ValueError, match=message) as error:
        pipeline(np.float32(weights), {"table": np.float32(table)}, given["tokens"], np.float32(targets))
    assert "\n" not in str(error.value)
