"""Rows of the pipeline: every schedule, forward and backward, against the layers one after another."""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec as P

from gcompute.certify.collectives import expect
from gcompute.certify.explicit import Case, integers, spread
from gcompute.config.mesh import Axis, MeshShape
from gcompute.parallel.pipeline.executor import run_pipeline
from gcompute.parallel.pipeline.forward import pipeline_forward
from gcompute.parallel.pipeline.schedule import Schedule, gpipe, interleaved, one_f_one_b, zero_bubble

WIDTH, VOCAB, ROWS, MICROBATCHES = 4, 4, 2, 4
SPLIT, WHOLE = P(Axis.STAGE), P()


def _first(extra: Any, tokens: Any) -> Any:
    return extra["table"][tokens]


def _stage(weight: Any, x: Any) -> Any:
    return jnp.abs(x @ weight)


def _last(extra: Any, x: Any, targets: Any) -> Any:
    """The table is the output layer too, so its gradient comes from both ends."""
    return ((x @ extra["table"].T) * targets).sum()


def _arguments(num_virtual: int) -> tuple[Any, ...]:
    weights, table = integers(0, num_virtual, WIDTH, WIDTH, most=1), integers(1, VOCAB, WIDTH)
    tokens = np.abs(integers(2, MICROBATCHES, ROWS, most=VOCAB - 1)).astype(np.int32)
    return weights, {"table": table}, tokens, integers(3, MICROBATCHES, ROWS, VOCAB)


def _losses(weights: Any, extra: Any, tokens: Any, targets: Any, schedule: Schedule) -> Any:
    """Each microbatch's loss; stage s of S stores its chunks together, and chunk c is layer c S + s of the model."""
    x = extra["table"][tokens]
    for chunk in range(schedule.num_chunks):
        for stage in range(schedule.num_stages):
            x = jnp.abs(x @ weights[stage * schedule.num_chunks + chunk])
    return ((x @ extra["table"].T) * targets).sum(axis=(1, 2))


def _reference(weights: Any, extra: Any, tokens: Any, targets: Any, schedule: Schedule) -> dict[str, Any]:
    def mean(weights: Any, extra: Any) -> Any:
        return _losses(weights, extra, tokens, targets, schedule).mean()

    loss, (stage_grads, extra_grads) = jax.value_and_grad(mean, (0, 1))(weights, extra)
    return {"loss": loss, "aux": jnp.zeros(()), "stage_grads": stage_grads, "extra_grads": extra_grads}


def _case(schedule: Schedule, *, forward: bool = False, data: int = 1) -> Case:
    rows = P(None, Axis.DATA) if data > 1 else WHOLE
    options: dict[str, Any] = {"schedule": schedule, "first": _first, "last": _last}
    of_training: Any = {"loss": WHOLE, "aux": WHOLE, "stage_grads": SPLIT, "extra_grads": WHOLE}
    batch_axes = (Axis.DATA,) if data > 1 else ()

    def run(*arguments: Any) -> Any:
        if forward:
            return pipeline_forward(_stage, *arguments, **options)
        result = run_pipeline(_stage, *arguments, batch_axes=batch_axes, **options)
        return {name: getattr(result, name) for name in of_training}

    def reference(*arguments: Any) -> Any:
        if forward:
            return _losses(*arguments, schedule=schedule)
        # Each device's loss is a sum over its own rows, and the pipeline returns their mean.
        return jax.tree.map(lambda x: x / data, _reference(*arguments, schedule=schedule))

    expected = {Axis.STAGE: expect("collective-permute", "all-reduce")}
    if data > 1:
        expected[Axis.DATA] = expect("all-reduce")
    name = "forward.pipeline_forward" if forward else "executor.run_pipeline"
    chunks = f", {schedule.num_chunks} chunks" if schedule.num_chunks > 1 else ""
    return Case(
        name=f"pipeline.{name} {schedule.name}, {schedule.num_stages} stages{chunks}{', 2 x data' if data > 1 else ''}",
        certifies=(f"pipeline.{name}",),
        strategies=(Axis.STAGE.value,),
        mesh=MeshShape(data=data, stage=schedule.num_stages),
        build=spread(run, (SPLIT, WHOLE, rows, rows), WHOLE if forward else of_training),
        reference=reference,
        arguments=partial(_arguments, schedule.num_stages * schedule.num_chunks),
        expected=expected,
        differentiable=False,
    )


def cases() -> list[Case]:
    """The four schedules, with more stages, more chunks and a data axis, and the forward pass alone."""
    m = MICROBATCHES
    schedules = (
        gpipe(2, m),
        one_f_one_b(2, m),
        one_f_one_b(4, m),
        interleaved(2, m, 2),
        zero_bubble(2, m),
        zero_bubble(4, m),
    )
    return [
        *(_case(schedule) for schedule in schedules),
        _case(one_f_one_b(2, m), data=2),
        _case(gpipe(2, m), forward=True),
        _case(interleaved(2, m, 2), forward=True),
    ]
