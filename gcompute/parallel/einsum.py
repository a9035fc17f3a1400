"""The one product that everything here is made of: operands in a compute dtype, sums in a wider one."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

# Tried: XLA:CPU of jaxlib 0.10.2 has a bfloat16 product of its own, that of 0.7.2 has not.
FAST_BFLOAT16_CPU = (0, 10, 0)


def accumulator(compute: jnp.dtype) -> jnp.dtype:
    """The dtype of results: float32, or float64 where the operands are float64."""
    return jnp.promote_types(compute, jnp.float32)


def _has_bfloat16() -> bool:
    """Whether a product of bfloat16 operands runs; where it does not, they are rounded and multiplied wide.

    XLA on CPU has products for some layouts only and fails at run time for others ("Unsupported element type for
    DotThunk"): those of older versions, and those that splitting a program over several fake devices makes.
    """
    if jax.__version_info__ < FAST_BFLOAT16_CPU:
        return jax.default_backend() != "cpu"
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or mesh.abstract_device is None:
        return True
    # A program may be for devices that are not here.
    return mesh.abstract_device.platform != "cpu" or mesh.size == 1


def einsum(spec: str, x: Float[Array, "..."], y: Float[Array, "..."], compute: jnp.dtype) -> Float[Array, "..."]:
    """jnp.einsum of two arrays cast to `compute`, with a result in `accumulator(compute)`.

    >>> einsum("btf,fd->btd", jnp.ones((1, 2, 3)), jnp.ones((3, 4)), jnp.bfloat16).dtype
    dtype('float32')
    """
    # float32 operands mean float32 arithmetic: TPUs and recent GPUs would otherwise round them to fewer bits.
    precision = None if compute == jnp.bfloat16 else jax.lax.Precision.HIGHEST
    x, y, wide = x.astype(compute), y.astype(compute), accumulator(compute)
    if compute == jnp.bfloat16 and not _has_bfloat16():
        x, y = x.astype(wide), y.astype(wide)
    return jnp.einsum(spec, x, y, precision=precision, preferred_element_type=wide)
