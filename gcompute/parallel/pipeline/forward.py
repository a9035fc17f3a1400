"""A pipeline without gradients, for evaluation and inference."""

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array

from gcompute.config.mesh import Axis
from gcompute.parallel.collectives import varying
from gcompute.parallel.pipeline.array_type import cast, types_of, zeros
from gcompute.parallel.pipeline.executor import First, Last, Stage, check_sizes
from gcompute.parallel.pipeline.lowering import NOTHING, Rows, lower
from gcompute.parallel.pipeline.schedule import Schedule
from gcompute.parallel.pipeline.tick import (
    Entrance,
    activation_type,
    at,
    empty_buffer,
    own_rows,
    select,
    store,
    to_neighbour,
)

Tree = Any


def pipeline_forward(
    stage_fn: Stage,
    stage_params: Tree,
    extra_params: Tree,
    inputs: Tree,
    targets: Tree,
    schedule: Schedule,
    *,
    first: First,
    last: Last,
    axis: Axis = Axis.STAGE,
    has_aux: bool = False,
    uniform_ends: bool = True,
) -> Tree:
    """What `last` returns for each of M microbatches, stacked, on every stage.

    The arguments are those of `executor.run_pipeline`, of whose schedule the F entries alone are run; `last` may return
    any tree of numbers (a loss, logits), and an aux of `stage_fn` is dropped. Results are sent from the last stage to
    all by one sum, so return no more than is needed: a loss is a number, logits are T V of them. A stage holds one
    input at a time in the schedules of this package.

    Raises:
      ValueError: as `run_pipeline`.
    """
    check_sizes(schedule, stage_params, inputs, targets, axis)
    program = lower(schedule, forward_only=True)
    stage_params, extra_params, inputs, targets = varying((stage_params, extra_params, inputs, targets), axis)

    def run_stage(chunk: Tree, x: Tree) -> Tree:
        return stage_fn(chunk, x)[0] if has_aux else stage_fn(chunk, x)

    x_type = activation_type(
        lambda: first(extra_params, at(inputs, 0)), lambda x: run_stage(at(stage_params, 0), x), frozenset({axis})
    )
    entrance = Entrance(
        first=first,
        extra_params=extra_params,
        inputs=inputs,
        x_type=x_type,
        uniform=uniform_ends,
    )

    def run_last(y: Tree, microbatch: Array | int) -> Tree:
        return varying(last(extra_params, y, at(targets, microbatch)), axis)

    out_type = types_of(lambda: run_last(zeros(x_type), 0))

    def tick(carry: tuple[Tree, Tree], row: Rows) -> tuple[tuple[Tree, Tree], None]:
        (buffer, outputs), entry = carry, row.forward
        assert entry is not None, "a forward-only program has an F slot in every tick"
        y = cast(run_stage(at(stage_params, entry.chunk), entrance.enter(entry, buffer)), x_type)
        out = select(
            entry.is_last, lambda: run_last(y, entry.microbatch), lambda: zeros(out_type), uniform=uniform_ends
        )
        outputs = store(outputs, jnp.where(entry.active & entry.is_last, entry.microbatch, NOTHING), out)
        if row.input_arrival is not None:
            buffer = store(buffer, row.input_arrival, to_neighbour(y, axis, 1))
        return (buffer, outputs), None

    carry = (
        empty_buffer(x_type, program.num_input_slots),
        zeros(out_type, leading=(schedule.num_microbatches,)),
    )
    for segment in program.segments:
        carry, _ = jax.lax.scan(tick, carry, own_rows(segment, axis))
    return jax.lax.psum(carry[1], axis)
