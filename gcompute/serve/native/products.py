"""Products with packed weights: a panel is 32 output channels, whose words of the same inputs lie side by side.

A word is 32 bits of a row: 2 bfloat16, 4 int8 or 1 float32, the first in its lowest bits.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, UInt32

from gcompute.serve.native.build import target

PANEL = 32
# Pages, the tables of rows, and how many of each row's cells lie in them; or nothing.
Later = tuple[Array, Array, Array] | tuple[()]
# dtype of x and w -> dtype of y.
RESULTS = {"float32": jnp.float32, "bfloat16": jnp.float32, "int8": jnp.int32}


def packable(num_inputs: int, dtype: jnp.dtype) -> bool:
    """Whether rows of so many numbers are whole words of a dtype that there is a kernel for."""
    dtype = jnp.dtype(dtype)
    return dtype.name in RESULTS and num_inputs * dtype.itemsize % 4 == 0


def pack(w_OI: Array) -> UInt32[Array, "p w 32"]:
    """The panels of a matrix; the last is filled up with zeros."""
    o, i = w_OI.shape
    a_word = 4 // w_OI.dtype.itemsize
    padded_OI = jnp.pad(w_OI, ((0, -o % PANEL), (0, 0)))
    words_OWN = padded_OI.reshape(-1, i // a_word, *([a_word] if a_word > 1 else []))
    words_OW = jax.lax.bitcast_convert_type(words_OWN, jnp.uint32)
    return words_OW.reshape(-1, PANEL, words_OW.shape[1]).swapaxes(1, 2)


def product(
    x_MI: Array, panels_PWN: UInt32[Array, "p w 32"], num_outputs: int, suffix: str = "", *, later: Later = ()
) -> Array:
    """x @ w^T of x in the dtype that w was packed from: float32, or int32 of int8.

    The sum of a row runs in the order of its inputs, whatever the number of rows. later: what attention reads soon.
    """
    kernel = target(f"product_{x_MI.dtype.name}", suffix)
    result = jax.ShapeDtypeStruct((x_MI.shape[0], num_outputs), RESULTS[x_MI.dtype.name])
    return jax.ffi.ffi_call(kernel, result)(x_MI, panels_PWN, *later)


def gated_product(
    x_MI: Array, panels_PWN: UInt32[Array, "p w 32"], num_outputs: int, suffix: str = "", *, later: Later = ()
) -> Array:
    """silu(first half of x @ w^T) * second half, in x's dtype, float32 or bfloat16; halves are whole panels."""
    kernel = target(f"gated_product_{x_MI.dtype.name}", suffix)
    result = jax.ShapeDtypeStruct((x_MI.shape[0], num_outputs // 2), x_MI.dtype)
    return jax.ffi.ffi_call(kernel, result)(x_MI, panels_PWN, *later)


def unpack_rows(
    panels_PWN: UInt32[Array, "p w 32"], rows: Int[Array, "..."], dtype: jnp.dtype
) -> Float[Array, "... i"]:
    """Some rows of the matrix that was packed."""
    words_W = panels_PWN[rows // PANEL, :, rows % PANEL]
    numbers = jax.lax.bitcast_convert_type(words_W, dtype)
    return numbers.reshape(*words_W.shape[:-1], -1)
