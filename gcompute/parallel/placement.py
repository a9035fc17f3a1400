"""What a model needs to know of the mesh it runs on: constraints on activations, and islands of per-device code.

A model names dims, never axes. `Placement` turns "BTD" into a sharding constraint, and runs a function of local shards
("an island") over the whole mesh where the compiler cannot split the work by itself: ring attention, expert dispatch,
kernels. Inside a region that is already manual over some axes (data, stage), those are left out of both.
"""

from collections.abc import Callable, Collection
from dataclasses import dataclass
from typing import Any

import jax
from jax.sharding import Mesh, PartitionSpec

from gcompute.config.mesh import Axis, MeshShape
from gcompute.parallel.load_balance import Layout
from gcompute.parallel.mesh import check_automatic
from gcompute.parallel.rules import ACTIVATION_RULES, Rules, partition_spec


def manual_axes() -> frozenset[str]:
    """The mesh axes over which the code being traced is per-device code."""
    return frozenset(jax.sharding.get_abstract_mesh().manual_axes)


def without_axes(spec: PartitionSpec, axes: frozenset[str]) -> PartitionSpec:
    """`spec` with no mention of `axes`.

    >>> [str(axes) for axes in without_axes(PartitionSpec(("data", "fsdp"), "data"), frozenset({"data"}))]
    ['fsdp', 'None']
    """
    entries: list[Any] = []
    for entry in spec:
        names = (entry,) if isinstance(entry, str) else tuple(entry or ())
        left = tuple(name for name in names if name not in axes)
        entries.append(None if not left else left[0] if len(left) == 1 else left)
    return PartitionSpec(*entries)


def constrain_automatic(x: jax.Array, spec: PartitionSpec) -> jax.Array:
    """`x`, laid out by `spec` over the axes of the mesh in use that are still automatic.

    Raises:
      ValueError: the mesh in use has explicit axes.
    """
    check_automatic(jax.sharding.get_abstract_mesh())
    return jax.lax.with_sharding_constraint(x, without_axes(spec, manual_axes()))


@dataclass(frozen=True, slots=True, kw_only=True)
class Placement:
    """The mesh under a model's forward pass, and how its context and tensor axes are used.

    context_attention: "ring" or "ulysses". layout: how a sequence lies over the context axis, see `load_balance`.
    sequence_parallel: whether the stream between blocks is split over the tensor axis too.

    Raises:
      ValueError: the mesh has explicit axes.
    """

    mesh: Mesh
    shape: MeshShape
    context_attention: str = "ring"
    sequence_parallel: bool = False

    def __post_init__(self) -> None:
        check_automatic(self.mesh)

    @property
    def layout(self) -> Layout:
        return "zigzag" if self.context_attention == "ring" else "contiguous"

    @property
    def is_local(self) -> bool:
        """Whether nothing is left to split where this is asked: on one device, or inside code per device of them."""
        return all(self.shape.size(axis) == 1 or axis in manual_axes() for axis in Axis)

    def spec(self, dims: str, rules: Rules = ACTIVATION_RULES) -> PartitionSpec:
        """The spec of an activation; without sequence parallelism R means T."""
        return partition_spec(dims if self.sequence_parallel else dims.replace("R", "T"), self.shape, rules)

    def constrain(self, x: jax.Array, dims: str, rules: Rules = ACTIVATION_RULES) -> jax.Array:
        """`x`, laid out by the rules of its dims over the axes that are still automatic.

        It names no mesh: trace it under `gcompute.parallel.mesh.use_mesh`.
        """
        if self.shape.num_devices == 1:
            return x
        return constrain_automatic(x, self.spec(dims, rules))

    def manual(self, fn: Callable[..., Any], axes: Collection[Axis], in_specs: Any, out_specs: Any) -> Any:
        """`fn`, per-device code over `axes` alone: within it the compiler still splits the work over the others."""
        names = {axis.value for axis in axes}
        return jax.shard_map(
            fn, mesh=self.mesh, in_specs=in_specs, out_specs=out_specs, axis_names=names, check_vma=False
        )

    def island(self, fn: Callable[..., Any], in_dims: Any, out_dims: Any, *, check_vma: bool = True) -> Any:
        """`fn`, per-device code, as a function of whole arrays whose dims are given as pytrees of letters.

        A dims string of "" is a value that every device has whole.
        """
        outer = manual_axes()

        def specs(dims: Any) -> Any:
            return jax.tree.map(lambda letters: without_axes(self.spec(letters), outer), dims)

        # Nested, JAX 0.10 lays what autodiff keeps of a checked region out over the outer axes too, and fails to lower.
        check_vma = check_vma and not outer
        where = {} if outer else {"mesh": self.mesh}
        rest = {axis.value for axis in Axis} - outer
        return jax.shard_map(
            fn, in_specs=specs(in_dims), out_specs=specs(out_dims), axis_names=rest, check_vma=check_vma, **where
        )


def constrain(placement: Placement | None, x: jax.Array, dims: str) -> jax.Array:
    """`placement.constrain`, or `x` where there is no mesh."""
    return x if placement is None else placement.constrain(x, dims)
