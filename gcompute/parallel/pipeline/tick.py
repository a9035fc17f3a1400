"""What the ticks of a pipeline are made of, in per-device code: slots, neighbours on the ring, and where it begins."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Int

from gcompute.config.mesh import Axis
from gcompute.parallel.pipeline.array_type import ArrayType, cast, is_type, types_of, zeros
from gcompute.parallel.pipeline.lowering import NOTHING, Entry, Rows

Tree = Any


def at(tree: Tree, index: Int[Array, ""] | int) -> Tree:
    """Every leaf's slice at `index` of its first dim."""
    return jax.tree.map(
        lambda leaf: leaf[0] if leaf.shape[0] == 1 else jax.lax.dynamic_index_in_dim(leaf, index, keepdims=False), tree
    )


def empty_buffer(x_type: Tree, num_slots: int) -> Tree:
    """Zeros for `num_slots` values; at least one, since idle entries read slot 0."""
    return zeros(x_type, leading=(max(1, num_slots),))


def store(buffer: Tree, slot: Int[Array, ""], value: Tree) -> Tree:
    """The buffer with `value` in `slot`, unchanged where `slot` is NOTHING."""
    index = jnp.maximum(slot, 0)

    def write(slots: Array, new: Array) -> Array:
        old = jax.lax.dynamic_index_in_dim(slots, index, keepdims=False)
        return jax.lax.dynamic_update_index_in_dim(slots, jnp.where(slot == NOTHING, old, new), index, 0)

    return jax.tree.map(write, buffer, value)


def to_neighbour(tree: Tree, axis: Axis, step: int) -> Tree:
    """What the stage `step` before on the ring has."""
    size = jax.lax.axis_size(axis)
    ring = [(stage, (stage + step) % size) for stage in range(size)]
    return jax.tree.map(lambda leaf: jax.lax.ppermute(leaf, axis, ring), tree)


def select(
    condition: Bool[Array, ""], on_true: Callable[[], Tree], on_false: Callable[[], Tree], *, uniform: bool
) -> Tree:
    """One of two trees of the same types: both computed and one taken (`uniform`), or only that one computed."""
    if uniform:
        return jax.tree.map(lambda true, false: jnp.where(condition, true, false), on_true(), on_false())
    return jax.lax.cond(condition, on_true, on_false)


def own_rows(segment: Rows, axis: Axis) -> Rows:
    """A segment's tables, [ticks, stages], as this stage's columns, [ticks]."""
    stage = jax.lax.axis_index(axis)
    return jax.tree.map(
        lambda table: jax.lax.dynamic_index_in_dim(jnp.asarray(table), stage, axis=1, keepdims=False), segment
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class Entrance:
    """Where a pipeline begins: `first` makes x of a microbatch on virtual stage 0."""

    first: Callable[[Tree, Tree], Tree]
    extra_params: Tree
    inputs: Tree
    x_type: Tree
    uniform: bool

    def enter(self, entry: Entry, buffer: Tree) -> Tree:
        """The input of a chunk: of its slot, or made of the microbatch."""
        return select(
            entry.is_first,
            lambda: self._first(self.extra_params, entry),
            lambda: at(buffer, entry.input_slot),
            uniform=self.uniform,
        )

    def enter_gradient(self, entry: Entry, dx: Tree) -> Tree:
        """The gradient of the extra parameters in `first`, from that of its result."""

        def pull() -> Tree:
            return jax.vjp(lambda extra: self._first(extra, entry), self.extra_params)[1](dx)[0]

        return select(entry.is_first, pull, lambda: zeros(types_of(pull)), uniform=self.uniform)

    def _first(self, extra_params: Tree, entry: Entry) -> Tree:
        return cast(self.first(extra_params, at(self.inputs, entry.microbatch)), self.x_type)


def activation_type(first: Callable[[], Tree], stage: Callable[[Tree], Tree], free: frozenset[str]) -> Tree:
    """The type that x has all along the pipeline: it differs along `free` and along whatever a stage makes it differ.

    Raises:
      ValueError: a stage does not return what it takes.
    """
    types = types_of(first)
    while True:
        wider = _widened(types, free)
        returned = types_of(lambda wider=wider: cast(stage(zeros(wider)), wider))
        axes = frozenset().union(*(kind.varying for kind in jax.tree.leaves(returned, is_leaf=is_type)))
        if axes <= free:
            return wider
        free |= axes


def _widened(types: Tree, axes: frozenset[str]) -> Tree:
    def widen(kind: ArrayType) -> ArrayType:
        return kind._replace(varying=kind.varying | axes)

    return jax.tree.map(widen, types, is_leaf=is_type)
