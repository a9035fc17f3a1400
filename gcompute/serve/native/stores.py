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


def place(
    joined_BTO: Float[Array, "b t o"],
    rotary: Float[Array, "2 b t half"] | None,
    k_BKCH: Float[Array, "b k c h"],
    v_BKCH: Float[Array, "b k c h"],
    first_B: Int[Array, "b"],
    *,
    heads: int,
    compute: jnp.dtype,
    suffix: str = "",
) -> tuple[Float[Array, "b t n h"], Float[Array, "b k c h"], Float[Array, "b k c h"]]:
    """Queries, and the cells with new keys and values as by `store`, of the product that has all heads side by side.

    Queries and keys are turned as by `model.layers.rotate`; keys and values are rounded to `compute`.
    """
    b, t, _ = joined_BTO.shape
    cells = jax.ShapeDtypeStruct(k_BKCH.shape, jnp.float32)
    results = (jax.ShapeDtypeStruct((b, t, heads, k_BKCH.shape[-1]), jnp.float32), cells, cells)
    call = jax.ffi.ffi_call(target("cells_place", suffix), results, input_output_aliases={2: 1, 3: 2})
    table = jnp.zeros(0, jnp.float32) if rotary is None else rotary.astype(jnp.float32)
    first_B = first_B.astype(jnp.int32)
    q_BTNH, k_BKCH, v_BKCH = call(joined_BTO, table, k_BKCH, v_BKCH, first_B, rounded=compute == jnp.bfloat16)
    return q_BTNH, k_BKCH, v_BKCH
