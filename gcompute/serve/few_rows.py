"""Products of few rows on a CPU without a C++ compiler: one fused loop over 32-bit words of the weights.

XLA's products repack their weights on every call, which for one row takes longer than the product. Here a word holds
two bfloat16 (or four int8) numbers of one output channel, from as many equal parts of its row; shifts take them out in
registers, and sums run over lanes of neighbouring words, so that the compiler makes vectors of them.
The words must be stored, for XLA would make them of the whole matrix first. And taking the numbers out must look as if
it could change from step to step (`zero`), or XLA does it once for all steps of a loop, and reads twice the bytes.
"""

import operator
from collections.abc import Callable
from functools import cache, reduce

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, Int8, UInt32

from gcompute.aot.xla_flags import known_options

# Words of a row are added up in this many lanes.
LANES = 32
MOST_TERMS = 12
# Bytes of a number -> what the length of a row must be a multiple of.
PACKABLE = {2: 2 * LANES, 1: 4 * LANES}
HIGH_HALF = np.uint32(0xFFFF0000)
# More rows than this are faster in XLA's own products.
MOST_ROWS = 4

# Leave sums over lanes to the compiler: the library that XLA would give them to takes the fused loop apart. Before 0.10
# jaxlib has neither the library nor the option.
COMPILER_OPTIONS = {
    "xla_cpu_prefer_vector_width": "512",
    "xla_cpu_experimental_ynn_fusion_type": "LIBRARY_FUSION_TYPE_DOT",
}


@cache
def compiler_options() -> dict[str, str | bool]:
    """Those of COMPILER_OPTIONS that jaxlib knows."""
    return known_options(COMPILER_OPTIONS, jax.devices("cpu")[0])


def pack(w_OI: Array) -> UInt32[Array, "o w"]:
    """Words of 2 bfloat16 or 4 int8: word i holds numbers i, i + I/n, ... of its row, the first in its lowest bits."""
    bits = 8 * w_OI.dtype.itemsize
    whole = jax.lax.bitcast_convert_type(w_OI, jnp.uint16 if bits == 16 else jnp.uint8).astype(jnp.uint32)
    parts = jnp.split(whole, 32 // bits, axis=1)
    words = parts[0]
    for n, part in enumerate(parts[1:], start=1):
        words = words | (part << (bits * n))
    return words


def unpack_pairs(words: UInt32[Array, "... w"]) -> Float[Array, "... d"]:
    """The bfloat16 numbers of `pack`, as float32."""
    low, high = words << 16, words & HIGH_HALF
    return jax.lax.bitcast_convert_type(jnp.concatenate([low, high], axis=-1), jnp.float32)


def unknown_zero(positions_BT: Int[Array, "b t"]) -> UInt32[Array, ""]:
    """0, which no compiler can know: positions are not negative."""
    return jnp.where(positions_BT[0, 0] < 0, jnp.uint32(1), jnp.uint32(0))


def settled(x: Array, zero: UInt32[Array, ""]) -> Array:
    """The same array, across which XLA moves and fuses nothing: it went through a branch."""
    return jax.lax.cond(zero == 0, lambda x: x, lambda x: -x, x)


def pair_product(
    x_MI: Float[Array, "m i"], words_OW: UInt32[Array, "o w"], zero: UInt32[Array, ""]
) -> Float[Array, "m o"]:
    """x @ w^T, x rounded to bfloat16, summed in float32."""
    x_MI = x_MI.astype(jnp.bfloat16).astype(jnp.float32)

    def take_out(words: Array, first: Array, second: Array) -> Array:
        low = jax.lax.bitcast_convert_type(words << 16, jnp.float32)
        high = jax.lax.bitcast_convert_type(words & HIGH_HALF, jnp.float32)
        return low * first + high * second

    return _sum_of_lanes(take_out, words_OW, jnp.split(x_MI, 2, axis=1), zero)


def quad_product(
    x_MI: Int8[Array, "m i"], words_OW: UInt32[Array, "o w"], zero: UInt32[Array, ""]
) -> Int[Array, "m o"]:
    """x @ w^T of int8 numbers, as int32."""

    def take_out(words: Array, *parts: Array) -> Array:
        signed = jax.lax.bitcast_convert_type(words, jnp.int32)
        return _total([((signed << (24 - 8 * n)) >> 24) * part for n, part in enumerate(parts)])

    return _sum_of_lanes(take_out, words_OW, jnp.split(x_MI.astype(jnp.int32), 4, axis=1), zero)


def _sum_of_lanes(take_out: Callable[..., Array], words_OW: Array, x_MW: list[Array], zero: Array) -> Array:
    """The sum over words of what `take_out` makes of each and of the numbers of x that go with it."""
    o, w = words_OW.shape
    # Rows fall into P pieces of at most MOST_TERMS terms: more take the compiler long, and its registers run out.
    pieces = next(n for n in range(1, w + 1) if w % (n * LANES) == 0 and w // (n * LANES) <= MOST_TERMS)
    words_OPW = words_OW.reshape(o, pieces, -1)
    x_MPW = [x.reshape(x.shape[0], pieces, -1) for x in x_MW]
    lanes = [slice(start, start + LANES) for start in range(0, w // pieces, LANES)]
    total_OMPL = _total(
        [take_out(words_OPW[:, None, :, part] | zero, *(x[None, :, :, part] for x in x_MPW)) for part in lanes]
    )
    return jnp.sum(total_OMPL, axis=(2, 3)).T


def _total(terms: list[Array]) -> Array:
    return reduce(operator.add, terms)
