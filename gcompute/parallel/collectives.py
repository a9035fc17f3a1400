"""Collectives in per-device code: typed wrappers, and the rings that they are made of, written out with `ppermute`.

Every function here is called inside `jax.shard_map`, on the shard that this device holds, and names a mesh axis (or a
tuple of axes, taken as one: the first is the slowest to change). n is the number of devices along it, i the place of
this device, s the bytes of one shard and S = n s those of the whole array. W is the bandwidth of a link in one
direction. All are linear or piecewise linear, and JAX differentiates them exactly:

  all_gather <-> reduce_scatter        all_to_all <-> all_to_all with its dims swapped
  shift by k <-> shift by -k           all_reduce sum <-> `varying` (the gradient is the same on every device)

Ask for `jax.lax.axis_index` outside loops and close over it: JAX 0.7.2 aborts on CPU where a `scan` body asks for it.
"""

from functools import partial
from typing import Literal, TypeVar

import jax
import jax.numpy as jnp
from jaxtyping import Array, Shaped

Axes = str | tuple[str, ...]
Op = Literal["sum", "mean", "max"]
Tree = TypeVar("Tree")

# From here on `pcast` and all_gather(to=...) exist; before it `pvary` and `all_gather_invariant`.
HAS_PCAST = (0, 8, 2)
# From here on the type of an array keeps what varies in `mat`, before it in `vma`.
HAS_MAT = (0, 10, 0)


def varying_axes(x: Array) -> frozenset[str]:
    """The mesh axes along which the type of `x` allows devices to hold different values."""
    kind = jax.typeof(x)
    return kind.mat.varying if jax.__version_info__ >= HAS_MAT else kind.vma


def varying(tree: Tree, axes: Axes) -> Tree:
    """The same values, typed as free to differ between the devices along `axes`.

    A loop needs this for a carry that starts the same everywhere (zeros, say) and differs after the first step. So does
    a gradient that is to stay local: the gradient of `varying` is the sum over `axes`, so what it is applied to decides
    where that sum is made. What already varies stays as it is; under `check_vma=False` nothing happens.

    Source: JAX documentation, "Manual parallelism with shard_map", on tracking what varies over manual mesh axes.
    """
    names = (axes,) if isinstance(axes, str) else tuple(axes)

    def cast(x: Array) -> Array:
        missing = tuple(name for name in names if name not in varying_axes(x))
        if not missing:
            return x
        if jax.__version_info__ < HAS_PCAST:
            # Under check_vma=False no type varies, not even that of a device's place, but `pvary` would still sum.
            if not jax.eval_shape(lambda: jax.lax.axis_index(missing)).vma:
                return x
            return jax.lax.pvary(x, missing)  # pyright: ignore[reportAttributeAccessIssue]
        return jax.lax.pcast(x, missing, to="varying")

    return jax.tree.map(cast, tree)


def axis_index(axis: str) -> Array:
    """The place of this device along `axis`, counted from 0."""
    if jax.__version_info__ < HAS_PCAST:
        # 0.7.2 cannot lower `jax.lax.axis_index` in a region nested in another that is manual over further axes, and
        # aborts where a `scan` body asks for it. Adding up 0, 1, ... and keeping a piece gives n i on device i.
        size = jax.lax.axis_size(axis)
        return jax.lax.psum_scatter(jnp.arange(size), axis, tiled=True)[0] // size
    return jax.lax.axis_index(axis)


def all_gather(x: Shaped[Array, "..."], axis: Axes, dim: int = 0, *, invariant: bool = False) -> Shaped[Array, "..."]:
    """The shards of all devices, put together along `dim`: each device sends (n - 1) s bytes round a ring.

    y[j d : (j + 1) d] = x of device j, where d = x.shape[dim]

    Args:
      invariant: type the result as the same on every device, so that `out_specs` may leave `axis` out under
        `check_vma=True`. Its gradient is then this device's slice of the one gradient that all share; without it, the
        reduce-scatter of them all.

    Raises:
      ValueError: `x` has no dim `dim`.
    """
    dim = _known_dim(x, dim, "all_gather")
    if not invariant:
        return jax.lax.all_gather(varying(x, axis), axis, axis=dim, tiled=True)
    if jax.__version_info__ < HAS_PCAST:
        return jax.lax.all_gather_invariant(x, axis, axis=dim, tiled=True)  # pyright: ignore[reportAttributeAccessIssue]
    return jax.lax.all_gather(x, axis, axis=dim, tiled=True, to="invarying")


def all_reduce(tree: Tree, axis: Axes, op: Op = "sum") -> Tree:
    """The sum, mean or maximum over the devices along `axis` of every array of a tree, the same on all of them.

    A ring sends 2 (n - 1) s bytes for a sum of S = n s bytes: a reduce-scatter and an all-gather. The gradient of a
    maximum goes to where the maximum is, in equal parts where several devices have it, as `jnp.max` does.

    Raises:
      ValueError: `op` is none of the three.
    """
    if op == "sum":
        return jax.lax.psum(tree, axis)
    if op == "mean":
        return jax.lax.pmean(tree, axis)
    if op == "max":
        return jax.tree.map(lambda x: _maximum(varying(x, axis), axis), tree)
    raise ValueError(f"all_reduce has no op {op!r}: use sum, mean or max.")


@partial(jax.custom_jvp, nondiff_argnums=(1,))
def _maximum(x: Array, axis: Axes) -> Array:
    return jax.lax.pmax(x, axis)


@_maximum.defjvp
def _maximum_jvp(axis: Axes, primals: tuple[Array], tangents: tuple[Array]) -> tuple[Array, Array]:
    (x,), (tangent,) = primals, tangents
    largest = jax.lax.pmax(x, axis)
    here = (x == largest).astype(x.dtype)
    return largest, jax.lax.psum(here * tangent, axis) / jax.lax.psum(here, axis)


def reduce_scatter(x: Shaped[Array, "..."], axis: Axes, dim: int = 0) -> Shaped[Array, "..."]:
    """This device's block, of n along `dim`, of the sum over devices: each sends (n - 1) s bytes, s that of a block.

    y = sum over devices of x[i d : (i + 1) d], where d = x.shape[dim] / n

    Raises:
      ValueError: `x` has no dim `dim`, or n does not divide it.
    """
    dim = _divided_dim(x, dim, axis, "reduce_scatter")
    return jax.lax.psum_scatter(varying(x, axis), axis, scatter_dimension=dim, tiled=True)


def all_to_all(x: Shaped[Array, "..."], axis: Axes, split_dim: int, concat_dim: int) -> Shaped[Array, "..."]:
    """Cut `x` into n blocks along `split_dim`, send block j to device j, join those received along `concat_dim`.

    It moves the split of a global array from `concat_dim` to `split_dim`; each device sends (n - 1) / n of its shard.

    Raises:
      ValueError: `x` lacks one of the dims, or n does not divide `split_dim`.
    """
    split_dim = _divided_dim(x, split_dim, axis, "all_to_all")
    concat_dim = _known_dim(x, concat_dim, "all_to_all")
    return jax.lax.all_to_all(varying(x, axis), axis, split_dim, concat_dim, tiled=True)


def shift(x: Shaped[Array, "..."], axis: Axes, by: int = 1) -> Shaped[Array, "..."]:
    """The shard of the device `by` places before this one on the ring: y of device i = x of device (i - by) mod n.

    >>> import jax, jax.numpy as jnp
    >>> from jax.sharding import PartitionSpec
    >>> from gcompute.config.mesh import Axis, MeshShape
    >>> from gcompute.parallel.mesh import build_mesh
    >>> mesh, spec = build_mesh(MeshShape(context=4)), PartitionSpec(Axis.CONTEXT)
    >>> turn = jax.shard_map(lambda x: shift(x, Axis.CONTEXT), mesh=mesh, in_specs=spec, out_specs=spec)
    >>> print(jax.jit(turn)(jnp.arange(4)))
    [3 0 1 2]
    """
    size = jax.lax.axis_size(axis)
    return jax.lax.ppermute(varying(x, axis), axis, [(place, (place + by) % size) for place in range(size)])


def ring_all_gather(
    x: Shaped[Array, "..."], axis: Axes, dim: int = 0, *, bidirectional: bool = False
) -> Shaped[Array, "..."]:
    """`all_gather` as hops to the next device: what arrives is kept, and sent on.

    After hop h a device holds the shard of the device h places before it. One way round takes n - 1 hops; both ways at
    once, half the shards come from either side.

      one direction:   n - 1 hops,      (n - 1) s bytes a device,   (n - 1) s / W seconds
      two directions:  floor(n / 2) hops,  the same bytes,         floor(n / 2) s / W seconds

    The values are the same on every device, which a ring cannot say in its type: the result varies along `axis`.

    Raises:
      ValueError: `x` has no dim `dim`.

    Source: Patarasuk and Yuan 2009, "Bandwidth optimal all-reduce algorithms for clusters of workstations".
    """
    dim = _known_dim(x, dim, "ring_all_gather")
    size, place = jax.lax.axis_size(axis), jax.lax.axis_index(axis)
    up_hops, down_hops = _hops(size, bidirectional)
    x = varying(x, axis)

    def both_ways(shards: tuple[Array, Array], _: None):
        above, below = shift(shards[0], axis, 1), shift(shards[1], axis, -1)
        return (above, below), (above, below)

    def one_way(shard: Array, _: None):
        shard = shift(shard, axis, 1)
        return shard, shard

    (last, _), (near, below) = jax.lax.scan(both_ways, (x, x), None, length=down_hops)
    _, far = jax.lax.scan(one_way, last, None, length=up_hops - down_hops)
    # Row k of `shards` is from device place - up_hops + k, so one turn puts row 0 first.
    before = jnp.concatenate([near, far])[::-1]
    shards = jnp.concatenate([before, x[None], below])
    return _join(jnp.roll(shards, place - up_hops, axis=0), dim)


def ring_reduce_scatter(
    x: Shaped[Array, "..."], axis: Axes, dim: int = 0, *, bidirectional: bool = False
) -> Shaped[Array, "..."]:
    """`reduce_scatter` as hops to the next device: a partial sum travels to its owner, and each device adds its block.

    The sum for device j sets out at device j + 1 (mod n), and is at home after n - 1 hops; both ways at once, two
    partial sums set out from the devices farthest from j. It is the transpose of the ring all-gather: with s the bytes
    of one block, as many hops, bytes and seconds. Floating-point sums are made in the order of the ring.

    Raises:
      ValueError: `x` has no dim `dim`, or n does not divide it.

    Source: Patarasuk and Yuan 2009, as `ring_all_gather`.
    """
    dim = _divided_dim(x, dim, axis, "ring_reduce_scatter")
    size, place = jax.lax.axis_size(axis), jax.lax.axis_index(axis)
    up_hops, down_hops = _hops(size, bidirectional)
    # Row k is this device's block for the device k places after it; row 0 is its own.
    blocks = jnp.roll(_cut(varying(x, axis), dim, size), -place, axis=0)
    going_up, going_down = blocks[up_hops:0:-1], blocks[size - down_hops :]
    ahead = up_hops - down_hops

    def one_way(partial_sum: Array, block: Array):
        return shift(partial_sum + block, axis, 1), None

    def both_ways(sums: tuple[Array, Array], pair: tuple[Array, Array]):
        return (shift(sums[0] + pair[0], axis, 1), shift(sums[1] + pair[1], axis, -1)), None

    nothing = jnp.zeros_like(blocks[0])
    up, _ = jax.lax.scan(one_way, nothing, going_up[:ahead])
    (up, down), _ = jax.lax.scan(both_ways, (up, nothing), (going_up[ahead:], going_down))
    return up + down + blocks[0]


def ring_all_reduce(
    x: Shaped[Array, "..."], axis: Axes, dim: int = 0, *, bidirectional: bool = False
) -> Shaped[Array, "..."]:
    """The sum over devices as a ring reduce-scatter along `dim`, then a ring all-gather.

    With s = S / n the bytes of a block: 2 (n - 1) hops and 2 (n - 1) s = 2 S (n - 1) / n bytes a device, the fewest
    possible; two directions halve the time. As with `ring_all_gather` the type of the result varies along `axis`, so
    its gradient is the sum over devices of theirs: that of `varying(all_reduce(x, axis), axis)`.

    Raises:
      ValueError: `x` has no dim `dim`, or n does not divide it.

    Source: Patarasuk and Yuan 2009, as `ring_all_gather`: the bound, and the ring that meets it.
    """
    mine = ring_reduce_scatter(x, axis, dim, bidirectional=bidirectional)
    return ring_all_gather(mine, axis, dim, bidirectional=bidirectional)


def _hops(size: int, bidirectional: bool) -> tuple[int, int]:
    """How many devices each device hears from upwards and downwards: together all the others."""
    return (size // 2, (size - 1) // 2) if bidirectional else (size - 1, 0)


def _join(shards: Array, dim: int) -> Array:
    """Rows of the leading dim, side by side along `dim` of what they hold."""
    moved = jnp.moveaxis(shards, 0, dim)
    return moved.reshape(*moved.shape[:dim], moved.shape[dim] * moved.shape[dim + 1], *moved.shape[dim + 2 :])


def _cut(x: Array, dim: int, size: int) -> Array:
    """The inverse of `_join`: `size` blocks along `dim`, as rows of a new leading dim."""
    return jnp.moveaxis(x.reshape(*x.shape[:dim], size, x.shape[dim] // size, *x.shape[dim + 1 :]), dim, 0)


def _known_dim(x: Array, dim: int, what: str) -> int:
    if not -x.ndim <= dim < x.ndim:
        legal = f"has shape {x.shape}, so use 0 to {x.ndim - 1}" if x.ndim else "is a scalar, so reshape it first"
        raise ValueError(f"{what} has no dim {dim}: the shard {legal}.")
    return dim % x.ndim


def _divided_dim(x: Array, dim: int, axis: Axes, what: str) -> int:
    dim, size = _known_dim(x, dim, what), jax.lax.axis_size(axis)
    if x.shape[dim] % size:
        raise ValueError(
            f"{what} cannot cut dim {dim} of shape {x.shape} into {size} equal blocks, one a device of mesh axis"
            f" {axis!r}: use a multiple of {size}."
        )
    return dim
