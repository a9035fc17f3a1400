"""One SPMD program that runs any valid schedule, forward and backward.

Per-device code, manual over the stage axis. Every device runs the same slots in the same order and masks what its own
entry of the table does not ask for, so `stage_fn` may hold collectives over other axes. A slot that no stage uses in a
tick is not there at all: ticks with the same kinds of work form a segment, which is one `lax.scan`, and GPipe compiles
to [F][B], 1F1B and interleaved to [F][F B][B].

What a tick sends goes to the neighbour on the ring by one `ppermute` a direction, and is stored in its slot when the
tick ends: in a tick with F and B, the transfer of activations can run while B computes.

Memory and recomputation: a stage keeps the *inputs* of its chunks, and nothing else, between F and B. B runs the
chunk's forward again (rematerialisation by stage), so B costs F + 2 F; inside it one microbatch's intermediate results
are alive, fewer if `stage_fn` uses `jax.checkpoint` itself. In a schedule that splits B, W runs the forward once more,
and the gradients between the layers of the chunk: 6 F a microbatch in place of 4 F. The bubble that it saves is one F
for each of S - 1 ticks, so with M >= S a split schedule is never the faster one here: it runs for what it teaches, and
for tables that were made for other machines. `cost.RECOMPUTING` has these durations.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from gcompute.config.mesh import Axis
from gcompute.parallel.collectives import varying
from gcompute.parallel.einsum import accumulator
from gcompute.parallel.pipeline.array_type import cast, type_of, types_of, zeros
from gcompute.parallel.pipeline.lowering import NOTHING, Entry, Rows, lower
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
First = Callable[[Tree, Tree], Tree]
Stage = Callable[[Tree, Tree], Any]
Last = Callable[[Tree, Tree, Tree], Any]


class PipelineResult(NamedTuple):
    """The same `loss`, `aux`, `extra_grads` and `counts` on every stage; each stage's own `stage_grads`, [v, ...]."""

    loss: Float[Array, ""]
    aux: Float[Array, ""]
    stage_grads: Tree
    extra_grads: Tree
    counts: Tree = ()


class _Carry(NamedTuple):
    """What goes from tick to tick; the last four are sums over the microbatches so far."""

    inputs: Tree  # [input slots, ...]
    gradients: Tree  # [gradient slots, ...]
    loss: Array
    aux: tuple[Array, Tree]
    stage_grads: Tree
    extra_grads: Tree


def run_pipeline(
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
    batch_axes: Sequence[Axis] = (),
    has_aux: bool = False,
    uniform_ends: bool = True,
) -> PipelineResult:
    """The mean loss of M microbatches through a pipeline, and its gradients.

      loss = mean over i of  last(extra, x_i, targets_i) + sum over k of aux_ki
      x_i = stage_{V-1}( ... stage_0(first(extra, inputs_i)))

    Args:
      stage_fn: `(chunk_params, x) -> x`, or with `has_aux` `(x, aux)`: aux is a scalar such as a router's loss, or
        `(scalar, counts)` with a tree of numbers that are only added up, such as dropped tokens. x is
        any tree of floating-point arrays, of one type from `first` to `last`. It may hold collectives over other axes,
        and `nested.nested_shard_map` (in place of a `jax.shard_map`) over automatic ones.
      stage_params: this stage's chunks, a leading dim of v on every leaf: chunk c is virtual stage c S + s
        (`layout.layer_order` and `layout.split_chunks` bring a stack of layers to this form).
      extra_params: what `first` and `last` use, the same on all stages; one leaf may serve both (tied embeddings).
      inputs, targets: trees with a leading dim of M on every leaf, the same on all stages.
      first: `(extra_params, microbatch of inputs) -> x`; last: `(extra_params, x, microbatch of targets) -> loss`.
      batch_axes: other manual axes along which devices see different data: loss and gradients are their mean.
      uniform_ends: True: every stage computes `first` in each slot and `last` in each B, and masks it; so they may hold
        collectives, and every tick pays for the output layer. False: only the stages that need them do, by `lax.cond`;
        then neither they nor what XLA makes of them for automatic axes may hold a collective (devices would wait for
        each other forever). Use False where the vocabulary is large and not sharded. Either way each B adds gradients
        of the size of `extra_params`, zeros where a stage has none.

    A batch that is split along an automatic axis is right too, but XLA then sums over that axis in every B.

    Gradients are summed in `accumulator(dtype of the parameter)`, and reduced once after the last tick: those of
    `extra_params` over stages and `batch_axes`, those of `stage_params` over `batch_axes`.

    With `check_vma` off, `stage_fn` must not hold collectives, whose gradients would then be wrong.

    >>> from functools import partial
    >>> from jax.sharding import PartitionSpec
    >>> from gcompute.config.mesh import MeshShape
    >>> from gcompute.parallel.mesh import build_mesh
    >>> from gcompute.parallel.pipeline.schedule import one_f_one_b
    >>> replicated, split = PartitionSpec(), PartitionSpec(Axis.STAGE)
    >>> pipeline = jax.shard_map(
    ...     partial(
    ...         run_pipeline,
    ...         lambda weight, x: weight * x,
    ...         schedule=one_f_one_b(2, 4),
    ...         first=lambda extra, x: x,
    ...         last=lambda extra, x, y: (extra * x - y) ** 2,
    ...     ),
    ...     mesh=build_mesh(MeshShape(stage=2)),
    ...     in_specs=(split, replicated, replicated, replicated),
    ...     out_specs=PipelineResult(replicated, replicated, split, replicated),
    ... )
    >>> x = jnp.arange(4.0)
    >>> result = jax.jit(pipeline)(jnp.array([2.0, 3.0]), jnp.array(1.0), x, x)  # mean of (1 * 3 * 2 * x - x)^2
    >>> print(result.loss, result.stage_grads, result.extra_grads)
    87.5 [105.  70.] 210.0

    Raises:
      ValueError: the schedule is not valid or is for another number of stages, chunks or microbatches; or a stage does
        not return what it takes.

    Source: Huang et al. 2019, "GPipe", section 2; Narayanan et al. 2021, section 2.2; Qi et al. 2023, section 2.
    """
    check_sizes(schedule, stage_params, inputs, targets, axis)
    program = lower(schedule)
    free = (axis, *batch_axes)
    # Typed as varying before any gradient is taken: gradients then stay on their device until the one sum at the end.
    stage_params, extra_params, inputs, targets = varying((stage_params, extra_params, inputs, targets), free)
    x_type = activation_type(
        lambda: first(extra_params, at(inputs, 0)),
        lambda x: stage_fn(at(stage_params, 0), x)[0] if has_aux else stage_fn(at(stage_params, 0), x),
        frozenset(free),
    )
    entrance = Entrance(
        first=first,
        extra_params=extra_params,
        inputs=inputs,
        x_type=x_type,
        uniform=uniform_ends,
    )

    def run_stage(chunk: Tree, x: Tree) -> tuple[Tree, tuple[Array, Tree]]:
        y, aux = stage_fn(chunk, x) if has_aux else (stage_fn(chunk, x), jnp.zeros((), jnp.float32))
        aux, counts = aux if isinstance(aux, tuple) else (aux, ())
        counts = jax.lax.stop_gradient(jax.tree.map(_as_float, counts))
        return cast(y, x_type), varying((_widen(aux), counts), free)

    def run_last(extra: Tree, y: Tree, microbatch: Array | int) -> Array:
        return varying(_widen(last(extra, y, at(targets, microbatch))), free)

    def output_gradient(y: Tree, arrived: Tree, entry: Entry) -> tuple[Array, Tree, Tree]:
        """Loss, gradient of the extra parameters, gradient of y: of `last`, or zero, zero and what arrived."""

        def of_last() -> tuple[Array, Tree, Tree]:
            loss, (extra_grads, dy) = jax.value_and_grad(run_last, argnums=(0, 1))(extra_params, y, entry.microbatch)
            return loss, extra_grads, dy

        def of_next_stage() -> tuple[Array, Tree, Tree]:
            loss, extra_grads, _ = zeros(types_of(of_last))
            return loss, extra_grads, arrived

        return select(entry.is_last, of_last, of_next_stage, uniform=uniform_ends)

    def backward(carry: _Carry, entry: Entry) -> tuple[_Carry, Tree]:
        chunk, x = at(stage_params, entry.chunk), entrance.enter(entry, carry.inputs)
        if schedule.splits_backward:
            (y, aux), pull = jax.vjp(lambda x: run_stage(chunk, x), x)
        else:
            (y, aux), pull = jax.vjp(run_stage, chunk, x)
        loss, extra_grads, dy = output_gradient(y, at(carry.gradients, entry.gradient_slot), entry)
        *chunk_grads, dx = pull((dy, _ones_like(aux)))
        sums = _accumulate((carry.loss, carry.aux, carry.extra_grads), (loss, aux, extra_grads), entry)
        carry = carry._replace(loss=sums[0], aux=sums[1])
        carry = carry._replace(extra_grads=_accumulate(sums[2], entrance.enter_gradient(entry, dx), entry))
        if schedule.splits_backward:
            # W reads this gradient in its slot: the last virtual stage finds it here, the others received it there.
            kept = jnp.where(entry.active & entry.is_last, entry.gradient_slot, NOTHING)
            return carry._replace(gradients=store(carry.gradients, kept, dy)), dx
        return carry._replace(stage_grads=_accumulate_chunk(carry.stage_grads, chunk_grads[0], entry)), dx

    def weight(carry: _Carry, entry: Entry) -> _Carry:
        x = entrance.enter(entry, carry.inputs)
        (_, aux), pull = jax.vjp(lambda chunk: run_stage(chunk, x), at(stage_params, entry.chunk))
        (chunk_grads,) = pull((at(carry.gradients, entry.gradient_slot), _ones_like(aux)))
        return carry._replace(stage_grads=_accumulate_chunk(carry.stage_grads, chunk_grads, entry))

    def tick(carry: _Carry, row: Rows) -> tuple[_Carry, None]:
        arrived_x = arrived_gradient = None
        # Where nothing arrives, as over a single stage, nobody would read what F makes.
        if row.forward is not None and row.input_arrival is not None:
            x = entrance.enter(row.forward, carry.inputs)
            arrived_x = to_neighbour(run_stage(at(stage_params, row.forward.chunk), x)[0], axis, 1)
        if row.backward is not None:
            carry, dx = backward(carry, row.backward)
            if row.gradient_arrival is not None:
                arrived_gradient = to_neighbour(dx, axis, -1)
        if row.weight is not None:
            carry = weight(carry, row.weight)
        # Stored last: a slot may pass from a value that this tick reads to one that arrives in it.
        if row.input_arrival is not None:
            carry = carry._replace(inputs=store(carry.inputs, row.input_arrival, arrived_x))
        if row.gradient_arrival is not None:
            carry = carry._replace(gradients=store(carry.gradients, row.gradient_arrival, arrived_gradient))
        return carry, None

    carry = _Carry(
        inputs=empty_buffer(x_type, program.num_input_slots),
        gradients=empty_buffer(x_type, program.num_gradient_slots),
        loss=zeros(types_of(lambda: run_last(extra_params, zeros(x_type), 0))),
        aux=zeros(types_of(lambda: run_stage(at(stage_params, 0), zeros(x_type))[1])),
        stage_grads=_zero_sums(stage_params),
        extra_grads=_zero_sums(extra_params),
    )
    for segment in program.segments:
        carry, _ = jax.lax.scan(tick, carry, own_rows(segment, axis))
    return _means(carry, schedule.num_microbatches, axis, tuple(batch_axes))


def check_sizes(schedule: Schedule, stage_params: Tree, inputs: Tree, targets: Tree, axis: Axis) -> None:
    """Hold a schedule against the mesh and the arrays.

    Raises:
      ValueError: they are of different sizes.
    """
    size = jax.lax.axis_size(axis)
    if schedule.num_stages != size:
        raise ValueError(
            f"schedule {schedule.name} is for {schedule.num_stages} stages and mesh axis {axis.value!r} has {size}."
        )
    for name, tree, expected, of in (
        ("stage_params", stage_params, schedule.num_chunks, "chunks"),
        ("inputs", inputs, schedule.num_microbatches, "microbatches"),
        ("targets", targets, schedule.num_microbatches, "microbatches"),
    ):
        for path, leaf in jax.tree_util.tree_flatten_with_path(tree)[0]:
            if leaf.ndim == 0 or leaf.shape[0] != expected:
                raise ValueError(
                    f"{name}{jax.tree_util.keystr(path)} has shape {tuple(leaf.shape)}; its first dim is {expected},"
                    f" the {of} of schedule {schedule.name}."
                )


def _as_float(x: Array) -> Array:
    return x.astype(jnp.promote_types(x.dtype, jnp.float32))


def _widen(x: Array) -> Array:
    return x.astype(accumulator(x.dtype))


def _ones_like(tree: Tree) -> Tree:
    return jax.tree.map(lambda x: varying(jnp.ones_like(x), tuple(type_of(x).varying)), tree)


def _zero_sums(params: Tree) -> Tree:
    """Where gradients are summed: wide, and of the same type otherwise."""
    return zeros(types_of(lambda: jax.tree.map(_widen, params)))


def _accumulate(sums: Tree, new: Tree, entry: Entry) -> Tree:
    # Left to fuse, the TPU compiler selects between the whole gradient of a large output layer and a shard of it, and
    # fails (libtpu 0.0.52, llama3-8b on stage=4,fsdp=4).
    new = jax.tree.map(jax.lax.optimization_barrier, new)
    return jax.tree.map(lambda sum_, leaf: sum_ + jnp.where(entry.active, leaf, 0).astype(sum_.dtype), sums, new)


def _accumulate_chunk(sums: Tree, new: Tree, entry: Entry) -> Tree:
    added = _accumulate(at(sums, entry.chunk), new, entry)
    return store(sums, entry.chunk, added)


def _means(carry: _Carry, num_microbatches: int, axis: Axis, batch_axes: tuple[Axis, ...]) -> PipelineResult:
    """The one reduction: sums over microbatches and devices, divided by how many there are."""
    shared = jax.lax.psum((carry.loss, carry.aux, carry.extra_grads), (axis, *batch_axes))
    stage_grads = jax.lax.psum(carry.stage_grads, batch_axes) if batch_axes else carry.stage_grads
    count = num_microbatches * math.prod(jax.lax.axis_size(name) for name in batch_axes)
    loss, (aux, counts), extra_grads = shared
    loss, aux, extra_grads, stage_grads = jax.tree.map(lambda leaf: leaf / count, (loss, aux, extra_grads, stage_grads))
    return PipelineResult(loss=loss + aux, aux=aux, stage_grads=stage_grads, extra_grads=extra_grads, counts=counts)
