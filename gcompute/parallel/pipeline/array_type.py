"""The full type of an array in per-device code: shape, dtype, and the mesh axes along which it may differ.

A loop's carry must start with the type that it has after a step. These find that type without computing anything.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array

from gcompute.parallel.collectives import varying, varying_axes

Tree = Any


class ArrayType(NamedTuple):
    """`varying` is empty outside of manual axes, and everywhere with `check_vma` off."""

    shape: tuple[int, ...]
    dtype: Any
    varying: frozenset[str]

    def __str__(self) -> str:
        return f"{jnp.dtype(self.dtype).name}[{','.join(map(str, self.shape))}]"


def type_of(x: Array) -> ArrayType:
    return ArrayType(x.shape, x.dtype, varying_axes(x))


def is_type(node: Any) -> bool:
    return isinstance(node, ArrayType)


def types_of(compute: Callable[[], Tree]) -> Tree:
    """The types of what `compute()` returns."""
    seen: list[Tree] = []

    def probe() -> Tree:
        out = jax.tree.map(jnp.asarray, compute())
        seen.append(jax.tree.map(type_of, out))
        return out

    jax.eval_shape(probe)
    return seen[0]


def zeros(types: Tree, *, leading: tuple[int, ...] = ()) -> Tree:
    """Zeros of the given types, with more dims in front if asked for."""

    def make(kind: ArrayType) -> Array:
        return varying(jnp.zeros((*leading, *kind.shape), kind.dtype), tuple(kind.varying))

    return jax.tree.map(make, types, is_leaf=is_type)


def cast(x: Tree, types: Tree) -> Tree:
    """`x`, typed as free to differ along the axes of `types`.

    Raises:
      ValueError: shapes, dtypes or structure are others.
    """
    found = jax.tree.map(type_of, x)
    described = jax.tree.map(str, types, is_leaf=is_type)
    if jax.tree.map(str, found, is_leaf=is_type) != described:
        found_text = jax.tree.map(str, found, is_leaf=is_type)
        raise ValueError(f"stage_fn returns {found_text} where it is given {described}: stages pass on one type.")
    return jax.tree.map(lambda kind, leaf: varying(leaf, tuple(kind.varying)), types, x, is_leaf=is_type)
