"""The largest of each row on CPU."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from gcompute.serve.native.build import target


def largest(x_BV: Float[Array, "b v"], suffix: str = "") -> Int[Array, "b"]:
    """argmax of float32, the first of equals; of a row with a NaN the last."""
    return jax.ffi.ffi_call(target("choice_largest", suffix), jax.ShapeDtypeStruct(x_BV.shape[:1], jnp.int32))(x_BV)
