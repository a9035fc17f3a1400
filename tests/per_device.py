"""Per-device functions run on a mesh with their gradients, and one-device references of the same shape."""

from collections import Counter
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, Mesh

from gcompute.aot.hlo import Collective, read_collectives
from gcompute.config.mesh import Axis


def tensor_mesh(tensor: int, data: int = 1) -> Mesh:
    """data x tensor over the first devices."""
    devices = jax.devices()[: data * tensor]
    return jax.make_mesh((data, tensor), (Axis.DATA, Axis.TENSOR), axis_types=(AxisType.Auto,) * 2, devices=devices)


def small_integers(seed: int, *shape: int, most: int = 2, dtype: Any = np.float32) -> np.ndarray:
    """Whole numbers from -most to most: in float32 their products and sums are exact in any order."""
    return np.random.default_rng(seed).integers(-most, most + 1, shape).astype(dtype)


@dataclass(frozen=True, slots=True, kw_only=True)
class Ran:
    """What one compiled program gave: the output and, under the cotangent `dy`, each argument's gradient."""

    dy: Any
    y: Any
    gradients: tuple[Any, ...]
    collectives: dict[str, int]
    compiled: Any


def pulled_back(function, dy, arguments):
    """(y, gradients): the output, and dy pulled back to every argument that is not of integers.

    As with a real loss, dy cannot be had before y: else the compiler would join collectives of both passes.
    """
    real = [jnp.issubdtype(jax.tree.leaves(one)[0].dtype, jnp.floating) for one in arguments]

    def of_real(*given):
        left = iter(given)
        return function(*(next(left) if is_real else one for one, is_real in zip(arguments, real, strict=True)))

    y, pull = jax.vjp(of_real, *(one for one, is_real in zip(arguments, real, strict=True) if is_real))
    return y, pull(jax.tree.map(lambda y, dy: jnp.where(jnp.isfinite(y), dy, 0), y, dy))


def one_device(reference, dy, *arguments):
    """(y, gradients) of one device's program."""
    return jax.jit(lambda dy, *arguments: pulled_back(reference, dy, arguments))(dy, *arguments)


def sent(compiled, mesh: Mesh | None = None) -> list[Collective]:
    """The collectives of real numbers between two devices or more.

    An axis of size 1 leaves empty ones behind, and on JAX 0.7.2 a device's place on an axis is made by one of integers.
    """
    return [one for one in read_collectives(compiled, mesh) if one.group_size > 1 and one.dtype not in ("s32", "s64")]


def count_sent(compiled) -> dict[str, int]:
    """How many of each kind."""
    return dict(Counter(one.kind for one in sent(compiled)))


def integers_like(shapes: Any) -> Any:
    """A cotangent of small integers for a tree of shapes."""
    return jax.tree.map(lambda shape: small_integers(99, *shape.shape, dtype=shape.dtype), shapes)


def run(function, mesh: Mesh, in_specs, out_specs, *arguments, check_vma: bool = True, **options) -> Ran:
    """`function` in shard_map on `mesh`, forward and backward in one program."""
    sharded = jax.shard_map(function, mesh=mesh, in_specs=in_specs, out_specs=out_specs, check_vma=check_vma, **options)
    dy = integers_like(jax.eval_shape(sharded, *arguments))
    compiled = jax.jit(lambda dy, *arguments: pulled_back(sharded, dy, arguments)).lower(dy, *arguments).compile()
    y, gradients = compiled(dy, *arguments)
    return Ran(dy=dy, y=y, gradients=gradients, collectives=count_sent(compiled), compiled=compiled)


def forward_collectives(function, mesh: Mesh, in_specs, out_specs, *arguments) -> dict[str, int]:
    """The collectives of the forward pass alone."""
    sharded = jax.shard_map(function, mesh=mesh, in_specs=in_specs, out_specs=out_specs)
    return count_sent(jax.jit(sharded).lower(*arguments).compile())


def assert_same_bits(ran: Ran, reference, *arguments) -> None:
    """Output and all gradients are those of `reference`, one device's program, to the last bit."""
    y, gradients = one_device(reference, ran.dy, *arguments)
    jax.tree.map(np.testing.assert_array_equal, ran.y, y)
    for number, (got, expected) in enumerate(zip(ran.gradients, gradients, strict=True)):
        jax.tree.map(lambda a, b: np.testing.assert_array_equal(a, b, err_msg=f"argument {number}"), got, expected)  # noqa: B023


def detected(ran_or_raises, reference, *arguments) -> bool:
    """Whether a wrong function is seen to be wrong: it does not trace, or a bit of its result or gradients differs."""
    try:
        assert_same_bits(ran_or_raises(), reference, *arguments)
    except (AssertionError, ValueError, TypeError):
        return True
    return False
