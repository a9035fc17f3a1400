"""Choose the next token of every row on the device: greedy, temperature, top-k, top-p and min-p, each row its own.

A row's token depends on its logits, its settings, its seed and its position alone: neither on its slot nor on its
neighbours. The key is fold_in(key(seed), position), and the token is argmax(log p + Gumbel noise), which is a draw
from p (the Gumbel-max trick: Gumbel 1954; Maddison et al. 2014).
"""

from collections.abc import Callable
from dataclasses import dataclass, replace

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, UInt32

from gcompute.serve.native import choices as native_choices

# Below this a temperature only rounds: differences of logits are already far beyond what exp can hold.
SMALLEST_TEMPERATURE = 1e-6


@jax.tree_util.register_dataclass
@dataclass(frozen=True, slots=True, kw_only=True)
class SamplingRows:
    """The settings of each row, as in `Sampling`; seed holds the high and low words of a 64-bit seed."""

    temperature: Float[Array, "b"]
    top_k: Int[Array, "b"]
    top_p: Float[Array, "b"]
    min_p: Float[Array, "b"]
    seed: UInt32[Array, "b 2"]


def sample(
    logits_BV: Float[Array, "b v"], rows: SamplingRows, positions_B: Int[Array, "b"], *, native: bool = False
) -> Int[Array, "b"]:
    """The token chosen for each row to stand at `positions`; `native`: with the CPU kernel, which chooses the same.

    What no row asks for is not computed; that changes no bit of a row, for a filter that is off keeps every token.
    """
    greedy_B = greedy(logits_BV, native=native)

    def draw() -> Array:
        filtered = jnp.any((rows.temperature > 0) & ((rows.top_k > 0) | (rows.top_p < 1) | (rows.min_p > 0)))
        scaled_BV = scale(logits_BV, rows.temperature)
        kept_BV = jax.lax.cond(filtered, lambda: keep(scaled_BV, rows), lambda: jnp.ones(scaled_BV.shape, bool))
        noise_BV = jax.vmap(_gumbel, (0, 0, None))(rows.seed, positions_B, logits_BV.shape[-1])
        return greedy(jnp.where(kept_BV, scaled_BV + noise_BV, -jnp.inf), native=native)

    drawn_B = jax.lax.cond(jnp.any(rows.temperature > 0), draw, lambda: greedy_B)
    return jnp.where(rows.temperature > 0, drawn_B, greedy_B)


def greedy(x_BV: Float[Array, "b v"], *, native: bool = False) -> Int[Array, "b"]:
    """argmax, the first of equals; XLA on CPU gives `jnp.argmax` one core, and these two reductions all."""
    if native:
        return native_choices.largest(x_BV)
    ids_V = jnp.arange(x_BV.shape[-1], dtype=jnp.int32)
    is_largest_BV = x_BV == jnp.max(x_BV, axis=-1, keepdims=True)
    # A row with a NaN has no largest: its last token, as some id there must be.
    return jnp.min(jnp.where(is_largest_BV, ids_V, ids_V[-1]), axis=-1)


def quiet(rows: SamplingRows, live_B: Bool[Array, "b"]) -> SamplingRows:
    """Rows that are not live made greedy, so that what they ask for is not computed."""
    return replace(rows, temperature=jnp.where(live_B, rows.temperature, 0.0))


def scale(logits_BV: Float[Array, "b v"], temperature_B: Float[Array, "b"]) -> Float[Array, "b v"]:
    """(logits - max) / temperature: the largest is 0 whatever the temperature, so nothing overflows upward."""
    centred_BV = logits_BV - jnp.max(logits_BV, axis=-1, keepdims=True)
    return centred_BV / jnp.maximum(temperature_B, SMALLEST_TEMPERATURE)[:, None]


def keep(scaled_BV: Float[Array, "b v"], rows: SamplingRows) -> Bool[Array, "b v"]:
    """Which tokens survive top-k, then top-p of what top-k left, then min-p. Tokens tied with the last kept stay.

    The most likely token always stays.
    """
    top_k_B1 = rows.top_k[:, None]
    kth_B1 = _largest_bound(scaled_BV, lambda in_BV: jnp.sum(in_BV, axis=-1, keepdims=True) >= top_k_B1)
    kept_BV = (top_k_B1 <= 0) | (_ordered(scaled_BV) >= kth_B1)

    weight_BV = jnp.where(kept_BV, jnp.exp(scaled_BV), 0.0)
    enough_B1 = rows.top_p[:, None] * jnp.sum(weight_BV, axis=-1, keepdims=True)

    def reaches(in_BV: Array) -> Array:
        return jnp.sum(jnp.where(in_BV, weight_BV, 0.0), axis=-1, keepdims=True) >= enough_B1

    nucleus_BV = (rows.top_p[:, None] >= 1) | (_ordered(scaled_BV) >= _largest_bound(scaled_BV, reaches))
    likely_BV = scaled_BV >= jnp.log(rows.min_p)[:, None]
    return (kept_BV & nucleus_BV & likely_BV) | (scaled_BV >= 0)


def _ordered(x: Float[Array, "b v"]) -> UInt32[Array, "b v"]:
    """Unsigned integers in the same order as the floats."""
    bits = jax.lax.bitcast_convert_type(x.astype(jnp.float32), jnp.uint32)
    sign = jnp.uint32(1 << 31)
    return jnp.where(bits >= sign, ~bits, bits | sign)


def _largest_bound(x_BV: Float[Array, "b v"], enough: Callable[[Array], Array]) -> UInt32[Array, "b 1"]:
    """The largest bound for which `enough` holds of {x >= bound}, one bit at a time: 32 sweeps, exact, and no sort.

    `enough` may only turn from false to true as the set grows. Bounds are in the order of `_ordered`.
    """
    ordered_BV = _ordered(x_BV)

    def try_bit(step: Array, bound_B1: Array) -> Array:
        higher_B1 = bound_B1 | (jnp.uint32(1) << (jnp.uint32(31) - step.astype(jnp.uint32)))
        return jnp.where(enough(ordered_BV >= higher_B1), higher_B1, bound_B1)

    return jax.lax.fori_loop(0, 32, try_bit, jnp.zeros((x_BV.shape[0], 1), jnp.uint32))


def _gumbel(seed_2: UInt32[Array, "2"], position: Int[Array, ""], vocab: int) -> Float[Array, "v"]:
    # The implementation is named so that a seed means the same tokens whatever jax_default_prng_impl says.
    key = jax.random.fold_in(jax.random.wrap_key_data(seed_2, impl="threefry2x32"), position)
    return jax.random.gumbel(key, (vocab,))
