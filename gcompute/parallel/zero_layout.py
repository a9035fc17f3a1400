"""ZeRO's layouts: where every leaf is cut, where each stage keeps what, and the bytes that leaves on a device."""

import math
from dataclasses import dataclass
from typing import Any

import jax
import optax
from jax.sharding import AbstractMesh, Mesh, NamedSharding, PartitionSpec
from jaxtyping import PyTree

from gcompute.config.mesh import Axis
from gcompute.parallel.collectives import Axes
from gcompute.parallel.data import num_shards
from gcompute.parallel.rules import state_shardings


def shard_specs(params: PyTree, mesh: Mesh | AbstractMesh, axis: Axes = Axis.FSDP, *, keep: int = 0) -> PyTree:
    """Where to cut every leaf: the largest dim that the devices along `axis` divide, the first of equals; else nowhere.

    Args:
      keep: leading dims never to cut, 1 for layers stacked for a scan.

    Raises:
      ValueError: the mesh has no such axis.

    >>> from gcompute.config.mesh import MeshShape
    >>> from gcompute.parallel.mesh import abstract_mesh
    >>> params = {"w": jax.ShapeDtypeStruct((6, 8), "float32"), "scale": jax.ShapeDtypeStruct((6,), "float32")}
    >>> specs = shard_specs(params, abstract_mesh(MeshShape(fsdp=4)))
    >>> specs == {"w": PartitionSpec(None, Axis.FSDP), "scale": PartitionSpec()}
    True
    """
    size = num_shards(mesh, axis)

    def cut(leaf: Any) -> PartitionSpec:
        legal = [dim for dim in range(keep, len(leaf.shape)) if leaf.shape[dim] % size == 0 and leaf.shape[dim]]
        if not legal:
            return PartitionSpec()
        return PartitionSpec(*[None] * max(legal, key=lambda dim: leaf.shape[dim]), axis)

    return jax.tree.map(cut, params)


def layer_specs(specs: PyTree) -> PyTree:
    """The specs of one layer of leaves that stack them along their first dim."""
    return jax.tree.map(lambda spec: PartitionSpec(*spec[1:]), specs)


def replicated_leaves(params: PyTree, specs: PyTree) -> tuple[str, ...]:
    """Paths and shapes of the leaves that every device holds whole: their dims do not divide."""
    whole = jax.tree.map(lambda leaf, spec: leaf.shape if not any(spec) else None, params, specs)
    paths = jax.tree_util.tree_leaves_with_path(whole, is_leaf=lambda shape: isinstance(shape, tuple))
    return tuple(f"{jax.tree_util.keystr(path)} {shape}" for path, shape in paths)


def placements(
    params: PyTree, optimizer: optax.GradientTransformation, mesh: Mesh | AbstractMesh, specs: PyTree, stage: int
) -> tuple[PyTree, PyTree]:
    """Shardings of the parameters and of the optimizer's state between steps of a stage (0: plain data parallelism)."""
    split = jax.tree.map(lambda spec: NamedSharding(mesh, spec), specs)
    whole = jax.tree.map(lambda spec: NamedSharding(mesh, PartitionSpec()), specs)
    state = jax.eval_shape(optimizer.init, params)
    at = state_shardings(state, params, split if stage else whole, mesh)  # pyright: ignore[reportArgumentType]
    return split if stage == 3 else whole, at


def place(
    params: PyTree, optimizer: optax.GradientTransformation, mesh: Mesh, specs: PyTree, stage: int
) -> tuple[PyTree, PyTree]:
    """Parameters and a new optimizer state in their places for a stage; the state is made where it stays.

    Raises:
      ValueError: the stage is unknown, or a spec does not fit its leaf.
    """
    check_stage(stage)
    params_at, state_at = placements(params, optimizer, mesh, specs, stage)
    return jax.device_put(params, params_at), jax.jit(optimizer.init, out_shardings=state_at)(params)


@dataclass(frozen=True, slots=True, kw_only=True)
class DeviceBytes:
    """What one device holds between the backward pass and the update."""

    params_bytes: int
    gradients_bytes: int
    optimizer_bytes: int

    @property
    def total_bytes(self) -> int:
        return self.params_bytes + self.gradients_bytes + self.optimizer_bytes


def zero_bytes(
    params: PyTree, optimizer: optax.GradientTransformation, mesh: Mesh | AbstractMesh, specs: PyTree
) -> tuple[DeviceBytes, DeviceBytes, DeviceBytes, DeviceBytes]:
    """Bytes a device of each stage, 0 to 3, of `params` (arrays or shapes) under an optax optimizer.

    Exact for what is kept: leaves that are not split count whole. Activations, and the one gradient or parameter that
    is whole while it is made or used, come on top.

    Source: Rajbhandari et al. 2020, section 5, figure 1.

    >>> from gcompute.config.mesh import MeshShape
    >>> from gcompute.parallel.mesh import abstract_mesh
    >>> mesh, params = abstract_mesh(MeshShape(fsdp=64)), {"w": jax.ShapeDtypeStruct((1_000_000, 64), "float32")}
    >>> for held in zero_bytes(params, optax.adam(1e-3), mesh, shard_specs(params, mesh)):
    ...     print(held.total_bytes // 1_000_000, "MB")
    1024 MB
    520 MB
    268 MB
    16 MB
    """
    state = jax.eval_shape(optimizer.init, params)

    def held(stage: int) -> DeviceBytes:
        params_at, state_at = placements(params, optimizer, mesh, specs, stage)
        gradients_at, _ = placements(params, optimizer, mesh, specs, 3 if stage >= 2 else 0)
        return DeviceBytes(
            params_bytes=_shard_bytes(params, params_at),
            gradients_bytes=_shard_bytes(params, gradients_at),
            optimizer_bytes=_shard_bytes(state, state_at),
        )

    return held(0), held(1), held(2), held(3)


def split_dim(spec: PartitionSpec, axis: Axes) -> int | None:
    """The dim that a spec splits over `axis`, None where it splits none."""
    dims = [dim for dim, entry in enumerate(spec) if entry is not None]
    if not dims:
        return None
    if len(dims) > 1 or spec[dims[0]] != axis:
        raise ValueError(f"spec {spec} splits over more than {axis!r}: build specs by shard_specs(params, mesh, axis).")
    return dims[0]


def check_stage(stage: int, least: int = 0) -> None:
    if stage not in range(least, 4):
        raise ValueError(f"ZeRO has no stage {stage!r}: use {', '.join(map(str, range(least, 4)))}.")


def check_specs(params: PyTree, specs: PyTree, axis: Axes, mesh: Mesh) -> None:
    if jax.tree.structure(params) != jax.tree.structure(specs):
        raise ValueError("specs are not of these parameters: build them by shard_specs(params, mesh, axis).")
    size = num_shards(mesh, axis)
    for (path, leaf), spec in zip(jax.tree_util.tree_leaves_with_path(params), jax.tree.leaves(specs), strict=True):
        dim = split_dim(spec, axis)
        if dim is not None and (dim >= leaf.ndim or leaf.shape[dim] % size):
            raise ValueError(
                f"params{jax.tree_util.keystr(path)} of shape {leaf.shape} cannot be split by {spec} into {size}: build"
                " specs by shard_specs(params, mesh, axis)."
            )


def _shard_bytes(tree: PyTree, shardings: PyTree) -> int:
    """Bytes of one device's shards of a tree."""
    sizes = jax.tree.map(
        lambda leaf, sharding: math.prod(sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize, tree, shardings
    )
    return sum(jax.tree.leaves(sizes))
