"""Where every dim of every tensor goes: the one table that maps dims to mesh axes.

A dim is a letter of the model's "LDNH"; an axis is a name of the mesh. Rules are resolved once, outside the model.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import jax
from jax.sharding import AbstractMesh, Mesh, NamedSharding, PartitionSpec

from gcompute.config.mesh import Axis, MeshShape

Rules = Mapping[str, tuple[Axis, ...]]

# Heads, feed-forward and vocabulary are split by tensor parallelism; the model dim by FSDP, which gathers it for use.
RULES: Rules = {
    "B": (Axis.DATA, Axis.FSDP, Axis.EXPERT),
    "D": (Axis.FSDP,),
    "N": (Axis.TENSOR,),
    "K": (Axis.TENSOR,),
    "F": (Axis.TENSOR,),
    "V": (Axis.TENSOR,),
    "L": (Axis.STAGE,),
    "E": (Axis.EXPERT,),
}
# Activations have the model dim whole and the sequence split. R is the sequence of the stream between blocks, which
# sequence parallelism splits over the tensor axis too. W is the model dim of a weight that an island takes in shards.
# Source: Korthikanti et al. 2022, section 4.2.2.
ACTIVATION_RULES: Rules = {
    **{dim: axes for dim, axes in RULES.items() if dim not in "DL"},
    "T": (Axis.CONTEXT,),
    "R": (Axis.CONTEXT, Axis.TENSOR),
    "W": RULES["D"],
}


def partition_spec(
    dims: str,
    mesh: MeshShape,
    rules: Rules = RULES,
    *,
    shape: Sequence[int] | None = None,
    name: str | None = None,
) -> PartitionSpec:
    """The spec of an array whose dims are `dims`; axes of size 1 are left out.

    >>> [str(axes) for axes in partition_spec("LDNH", MeshShape(fsdp=4, tensor=2))]
    ['None', 'fsdp', 'tensor', 'None']

    Args:
      shape: the array's sizes, to check that the mesh divides them. name: what errors call the array.

    Raises:
      ValueError: two dims of the array claim one axis, or a size does not divide.
    """
    called = f"{name} ({dims})" if name else repr(dims)
    claimed: dict[Axis, str] = {}
    entries: list[tuple[str, ...] | str | None] = []
    for index, dim in enumerate(dims):
        axes = tuple(axis for axis in rules.get(dim, ()) if mesh.size(axis) > 1)
        for axis in axes:
            if axis in claimed:
                other = claimed[axis]
                raise ValueError(
                    f"{called}: dims {other!r} and {dim!r} both claim mesh axis {axis.value}={mesh.size(axis)}"
                    f" (rules {_rule(other, rules)} and {_rule(dim, rules)}). Use {axis.value}=1, or take the axis out"
                    " of one rule."
                )
            claimed[axis] = dim
        ways = math.prod(mesh.size(axis) for axis in axes)
        if shape is not None and shape[index] % ways:
            split = " x ".join(f"{axis.value}={mesh.size(axis)}" for axis in axes)
            raise ValueError(
                f"{called}: rule {_rule(dim, rules)} cuts size {shape[index]} into {ways} ({split}), which does not"
                f" divide it. Nearest legal: {nearest_divisor(shape[index], ways)}."
            )
        names = tuple(axis.value for axis in axes)
        entries.append(None if not names else names[0] if len(names) == 1 else names)
    return PartitionSpec(*entries)


def _rule(dim: str, rules: Rules) -> str:
    return f"{dim} -> {'+'.join(axis.value for axis in rules[dim])}"


def nearest_divisor(size: int, wanted: int) -> int:
    """The divisor of `size` nearest to `wanted`, the smaller of two.

    >>> nearest_divisor(8, 6)
    4
    """
    return min((n for n in range(1, size + 1) if size % n == 0), key=lambda n: (abs(n - wanted), n))


def dim_to_add(spec: PartitionSpec, shape: Sequence[int], axis: Axis, mesh: MeshShape) -> int | None:
    """Which dim of an array laid out by `spec` to split over `axis` as well; None where it divides none.

    The largest that is not split yet, else the largest piece; never one that is split over stages.
    """
    entries = _entries(spec, shape)
    pieces = [
        size // math.prod(mesh.size(Axis(name)) for name in names) for size, names in zip(shape, entries, strict=True)
    ]
    legal = [
        index
        for index, piece in enumerate(pieces)
        if piece % mesh.size(axis) == 0 and Axis.STAGE.value not in entries[index]
    ]
    return max(legal, key=lambda index: (not entries[index], pieces[index]), default=None)


def add_axis(spec: PartitionSpec, shape: Sequence[int], axis: Axis, mesh: MeshShape) -> PartitionSpec:
    """`spec` with `axis` splitting one dim more, the one of `dim_to_add`; unchanged where it divides none.

    >>> [str(axis) for axis in add_axis(PartitionSpec(None, "tensor"), (6, 8), Axis.DATA, MeshShape(data=2, tensor=2))]
    ['data', 'tensor']
    """
    chosen = dim_to_add(spec, shape, axis, mesh)
    if mesh.size(axis) == 1 or chosen is None:
        return spec
    entries = _entries(spec, shape)
    entries[chosen] = (axis.value, *entries[chosen])
    return PartitionSpec(*(None if not names else names[0] if len(names) == 1 else names for names in entries))


def _entries(spec: PartitionSpec, shape: Sequence[int]) -> list[tuple[str, ...]]:
    """The axes that split each dim, as tuples."""
    padded = [*spec, *[None] * (len(shape) - len(spec))]
    return [(entry,) if isinstance(entry, str) else tuple(entry or ()) for entry in padded]


def param_shardings(dims_tree: Any, mesh: Mesh | AbstractMesh, shape: MeshShape, *, abstract: Any = None) -> Any:
    """A NamedSharding for each array of a tree of dims strings.

    Args:
      abstract: the same tree of arrays or shapes, to check that the mesh divides them.

    Raises:
      ValueError: as `partition_spec`, naming the array.
    """

    def place(path: Any, dims: str, leaf: Any = None) -> NamedSharding:
        name = ".".join(str(getattr(key, "key", key)) for key in path)
        sizes = None if leaf is None else leaf.shape
        return NamedSharding(mesh, partition_spec(dims, shape, shape=sizes, name=name))

    trees = (dims_tree,) if abstract is None else (dims_tree, abstract)
    return jax.tree_util.tree_map_with_path(place, *trees)


def state_shardings(abstract_state: Any, abstract_params: Any, shardings: Any, mesh: Mesh | AbstractMesh) -> Any:
    """Shardings of an optimizer's state: a leaf that mirrors a parameter is placed like it, the rest is replicated.

    A leaf mirrors the parameter whose path ends its own path and whose shape it has.
    """
    by_path = {
        tuple(jax.tree_util.keystr((key,)) for key in path): (leaf.shape, sharding)
        for (path, leaf), sharding in zip(
            jax.tree_util.tree_flatten_with_path(abstract_params)[0], jax.tree.leaves(shardings), strict=True
        )
    }

    def place(path: tuple[Any, ...], leaf: Any) -> NamedSharding:
        keys = tuple(jax.tree_util.keystr((key,)) for key in path)
        for start in range(len(keys) + 1):
            shape, sharding = by_path.get(keys[start:], (None, None))
            if sharding is not None and shape == leaf.shape:
                return sharding
        return NamedSharding(mesh, PartitionSpec())

    return jax.tree_util.tree_map_with_path(place, abstract_state)


def with_axis(abstract: Any, shardings: Any, axis: Axis, mesh: MeshShape) -> Any:
    """Each sharding with `axis` splitting one dim more, as `add_axis` chooses it."""

    def place(leaf: Any, sharding: NamedSharding) -> NamedSharding:
        return NamedSharding(sharding.mesh, add_axis(sharding.spec, leaf.shape, axis, mesh))

    return jax.tree.map(place, abstract, shardings)
