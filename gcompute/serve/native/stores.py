"""New cells of a dispatch, written where they belong, on CPU."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from gcompute.serve.native.build import target


def store(
    cells_BKCH: Float[Array, "b k c h"],
    new_BTKH: Float[Array, "b t k h"],
    first_B: Int[Array, "b"],
    suffix: str = "",
) -> Float[Array, "b k c h"]:
    """The cells, with `first` to `first + T` of each row from `new`, in place; what lies outside is dropped."""
    result = jax.ShapeDtypeStruct(cells_BKCH.shape, jnp.float32)
    call = jax.ffi.ffi_call(target("cells_store", suffix), result, input_output_aliases={0: 0})
    return call(cells_BKCH, new_BTKH.astype(jnp.float32), first_B.astype(jnp.int32))
