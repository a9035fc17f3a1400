"""Which optimizers may update shards alone, and the one sum over all shards that training needs: the norm."""

from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, PyTree

from gcompute.parallel.collectives import Axes, all_reduce
from gcompute.parallel.einsum import accumulator
from gcompute.parallel.zero_layout import split_dim

NORM = "sharded_global_norm"
# Primitives that mix elements of an array, by how their names begin.
MIXING = ("reduce_", "arg", "cum", "dot_", "conv_", "sort", "top_k", "fft", "cholesky", "qr", "svd", "eig", "lu")
NOT_MIXING = ("reduce_precision",)


def global_norm(tree: PyTree, specs: PyTree, axis: Axes) -> Float[Array, ""]:
    """Per-device code: the norm of all elements of a tree of shards, each counted once; the same on every device.

    sqrt( sum over devices and split leaves of x^2  +  sum over whole leaves of x^2 )
    """

    def sharded_global_norm(tree: PyTree) -> Array:
        def squares(leaf: Array) -> Array:
            return jnp.sum(jnp.square(leaf.astype(accumulator(leaf.dtype))))

        parts = zip(jax.tree.leaves(tree), jax.tree.leaves(specs), strict=True)
        split, whole = [], []
        for leaf, spec in parts:
            (whole if split_dim(spec, axis) is None else split).append(squares(leaf))
        return jnp.sqrt(sum(whole, start=all_reduce(sum(split), axis) if split else 0.0))

    # As a function with a name in the program, by which `check_elementwise` knows that this is over all shards.
    assert sharded_global_norm.__name__ == NORM
    return jax.jit(sharded_global_norm)(tree)


def clip_by_global_norm(max_norm: float, specs: PyTree, axis: Axes) -> optax.GradientTransformation:
    """`optax.clip_by_global_norm` for the shards of `zero_step`: g min(1, max_norm / |g|), |g| over all devices.

    Raises:
      ValueError: `max_norm` is not above 0.
    """
    if not max_norm > 0:
        raise ValueError(f"max_norm={max_norm} must be above 0.")

    def clip(updates: PyTree, state: Any, params: PyTree | None = None) -> tuple[PyTree, Any]:
        del params
        norm = global_norm(updates, specs, axis)
        factor = max_norm / jnp.maximum(norm, max_norm)
        return jax.tree.map(lambda leaf: leaf * factor.astype(leaf.dtype), updates), state

    return optax.GradientTransformation(lambda params: optax.EmptyState(), clip)


def check_elementwise(
    optimizer: optax.GradientTransformation, gradients: PyTree, opt_state: PyTree, params: PyTree
) -> None:
    """Refuse an optimizer whose update of an element depends on others: on shards it would be another update.

    Raises:
      ValueError: the update sums, sorts or multiplies elements together, outside `global_norm` of this module.
    """
    traced = jax.make_jaxpr(lambda: optimizer.update(gradients, opt_state, params))()
    found = sorted(set(_mixing(traced.jaxpr)))
    if found:
        raise ValueError(
            f"this optimizer mixes the elements of an array ({', '.join(found)}), so it cannot update shards alone: use"
            " zero_update.clip_by_global_norm for clipping, an elementwise optimizer, or automatic_zero_step."
        )


def _mixing(jaxpr: Any) -> Iterator[str]:
    """Primitives of a program and its inner programs that mix elements."""
    for equation in jaxpr.eqns:
        name = equation.primitive.name
        if equation.params.get("name") == NORM:
            continue
        if name.startswith(MIXING) and name not in NOT_MIXING:
            yield name
        for inner in jax.tree.leaves(list(equation.params.values()), is_leaf=lambda value: hasattr(value, "eqns")):
            inner = getattr(inner, "jaxpr", inner)
            if hasattr(inner, "eqns"):
                yield from _mixing(inner)
