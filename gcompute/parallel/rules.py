"""Where every dim of every tensor goes: the one table that maps dims to mesh axes.

A dim is a letter of the model's "LDNH"; an axis is a name of the mesh. Rules are resolved once, outside the model.
"""

from collections.abc import Mapping
from typing import Any

import jax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from gcompute.config.mesh import Axis, MeshShape
from gcompute.config.model import ModelConfig

Rules = Mapping[str, tuple[Axis, ...]]

# Heads, feed-forward and vocabulary are split by tensor parallelism; the model dim by FSDP, which gathers it for use.
RULES: Rules = {
    "B": (Axis.DATA, Axis.FSDP),
    "D": (Axis.FSDP,),
    "N": (Axis.TENSOR,),
    "K": (Axis.TENSOR,),
    "F": (Axis.TENSOR,),
    "V": (Axis.TENSOR,),
}

NOT_YET = (Axis.STAGE, Axis.EXPERT, Axis.CONTEXT)


def partition_spec(dims: str, mesh: MeshShape, rules: Rules = RULES) -> PartitionSpec:
    """The spec of an array whose dims are `dims`; axes of size 1 are left out.

    Raises:
      ValueError: two dims of the array claim one axis.
    """
    claimed: dict[Axis, str] = {}
    entries: list[tuple[str, ...] | str | None] = []
    for dim in dims:
        axes = tuple(axis for axis in rules.get(dim, ()) if mesh.size(axis) > 1)
        for axis in axes:
            if axis in claimed:
                raise ValueError(f"dims {claimed[axis]!r} and {dim!r} of {dims!r} both claim mesh axis {axis.value!r}.")
            claimed[axis] = dim
        names = tuple(axis.value for axis in axes)
        entries.append(None if not names else names[0] if len(names) == 1 else names)
    return PartitionSpec(*entries)


def param_shardings(dims_tree: Any, mesh: Mesh, shape: MeshShape) -> Any:
    """A NamedSharding for each array of a tree of dims strings."""
    return jax.tree.map(lambda dims: NamedSharding(mesh, partition_spec(dims, shape)), dims_tree)


def state_shardings(abstract_state: Any, abstract_params: Any, shardings: Any, mesh: Mesh) -> Any:
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
        for start in range(len(keys)):
            shape, sharding = by_path.get(keys[start:], (None, None))
            if sharding is not None and shape == leaf.shape:
                return sharding
        return NamedSharding(mesh, PartitionSpec())

    return jax.tree_util.tree_map_with_path(place, abstract_state)


def check_divisible(config: ModelConfig, mesh: MeshShape, *, batch: int, accumulation: int) -> None:
    """Refuse a mesh that this model or batch cannot be split over.

    Raises:
      ValueError: an axis that the trainer does not have, or a dim that the mesh does not divide, with legal sizes.
    """
    for axis in NOT_YET:
        if mesh.size(axis) > 1:
            raise ValueError(
                f"mesh axis {axis.value}={mesh.size(axis)} is not one the trainer can use: use data, fsdp, tensor."
            )
    tensor, fsdp = mesh.tensor, mesh.fsdp
    dims = {"heads": config.heads, "kv_heads": config.num_kv_heads, "ffn": config.ffn_size, "vocab": config.vocab}
    for name, size in dims.items():
        if size % tensor:
            raise ValueError(
                f"mesh tensor={tensor} does not divide {name}={size}: each device needs a whole share."
                f" Legal: tensor={_divisors(*dims.values())}."
            )
    if config.dim % fsdp:
        raise ValueError(f"mesh fsdp={fsdp} does not divide dim={config.dim}. Legal: fsdp={_divisors(config.dim)}.")
    shards = mesh.batch_shards * accumulation
    if batch % shards:
        raise ValueError(
            f"batch={batch} does not divide over data={mesh.data} x fsdp={fsdp} x accumulation={accumulation}:"
            f" use a multiple of {shards}."
        )


def _divisors(*sizes: int) -> str:
    return ", ".join(str(n) for n in range(1, min(sizes) + 1) if all(size % n == 0 for size in sizes))
