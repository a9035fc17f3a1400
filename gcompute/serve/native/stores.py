"""New cells written to their pages, on CPU, in place.

Tables [B, N] name the pages of B rows; of T new cells a row, at `positions`, the first `count` are stored. A cell whose
position is past its table, or whose page is 0 or none, is dropped.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from gcompute.serve.native.build import target


def store(
    pages: Array,
    new_cells: Array,
    tables_BN: Int[Array, "b n"],
    positions_BT: Int[Array, "b t"],
    count_B: Int[Array, "b"],
    suffix: str = "",
) -> Array:
    """Pages [P, S, ...] with new cells [B, T, ...] of their dtype in them."""
    result = jax.ShapeDtypeStruct(pages.shape, pages.dtype)
    call = jax.ffi.ffi_call(target("cells_store", suffix), result, input_output_aliases={0: 0})
    return call(pages, new_cells.astype(pages.dtype), *_int32(tables_BN, positions_BT, count_B))


def place(
    joined_BTO: Float[Array, "b t o"],
    rotary: Float[Array, "2 b t half"] | None,
    k_PSKH: Array,
    v_PSKH: Array,
    tables_BN: Int[Array, "b n"],
    positions_BT: Int[Array, "b t"],
    count_B: Int[Array, "b"],
    *,
    heads: int,
    compute: jnp.dtype,
    suffix: str = "",
) -> tuple[Float[Array, "b t n h"], Array, Array]:
    """Queries, and pages of float32 or bfloat16's bits with new keys and values as by `store`.

    joined: the product that has all heads side by side. Queries and keys are turned as by `model.layers.rotate`; keys
    and values are rounded to `compute`.
    """
    b, t, _ = joined_BTO.shape
    queries = jax.ShapeDtypeStruct((b, t, heads, k_PSKH.shape[-1]), jnp.float32)
    results = (queries, *(jax.ShapeDtypeStruct(pages.shape, pages.dtype) for pages in (k_PSKH, v_PSKH)))
    call = jax.ffi.ffi_call(target("cells_place", suffix), results, input_output_aliases={2: 1, 3: 2})
    table = jnp.zeros(0, jnp.float32) if rotary is None else rotary.astype(jnp.float32)
    to = _int32(tables_BN, positions_BT, count_B)
    q_BTNH, k_PSKH, v_PSKH = call(joined_BTO, table, k_PSKH, v_PSKH, *to, rounded=compute == jnp.bfloat16)
    return q_BTNH, k_PSKH, v_PSKH


def _int32(*arrays: Array) -> tuple[Array, ...]:
    return tuple(array.astype(jnp.int32) for array in arrays)
