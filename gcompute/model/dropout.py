"""Dropout of the stream: where it is applied, and masks that depend on the seed, the step and the place alone.

It is applied where nanoGPT applies it to activations: to the sum of the embeddings, to the output projection of
attention and to the output of the feed-forward layer (or the mixture of experts), the last two before they join the
stream. nanoGPT also drops attention weights; this trainer does not: no kernel here would give them the same mask.

The key of a token is derived from (seed, step, place in the decoder, row of the batch, position in the sequence). So
the masks are the same whatever the mesh, the microbatches, the layout of the sequence, remat and the moment of a
resume; each device draws those of its own elements, and nothing is sent.

Source: Srivastava et al. 2014, section 4, in its inverted form; Radford et al. 2018, section 4.1 (the places).
"""

from dataclasses import dataclass
from functools import partial

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from gcompute.parallel.placement import Placement, constrain

# The generator is named, so that no default of the environment's changes the masks.
GENERATOR = "threefry2x32"
# Parts the keys of dropout from those of the initial values, which come from the same seed.
DOMAIN = 0xD50
EMBEDDING = 0


def attention_site(layer: int | Array) -> int | Array:
    """The place of a layer's attention output."""
    return 1 + 2 * layer


def feed_forward_site(layer: int | Array) -> int | Array:
    """The place of a layer's feed-forward output."""
    return 2 + 2 * layer


@partial(jax.tree_util.register_dataclass, data_fields=("key", "rows_B"), meta_fields=("rate",))
@dataclass(frozen=True, slots=True, kw_only=True)
class Dropout:
    """The dropout of one step. rate: probability of zero; key: of the step; rows_B: place of each row in the batch."""

    rate: float
    key: Array
    rows_B: Int[Array, "b"]

    def __call__(
        self,
        x_BTD: Float[Array, "b t d"],
        positions_BT: Int[Array, "#b t"],
        site: int | Array,
        placement: Placement | None = None,
    ) -> Float[Array, "b t d"]:
        """x times 1 / (1 - rate) where a draw keeps it, 0 elsewhere; the product is of at least float32."""
        wide = jnp.promote_types(x_BTD.dtype, jnp.float32)
        scaled_BTD = (x_BTD.astype(wide) * (1 / (1 - self.rate))).astype(x_BTD.dtype)
        dropped_BTD = jnp.where(self.kept(positions_BT, site, x_BTD.shape[-1], placement), scaled_BTD, 0)
        return constrain(placement, dropped_BTD, "BRD")

    def kept(
        self, positions_BT: Int[Array, "#b t"], site: int | Array, dim: int, placement: Placement | None = None
    ) -> Array:
        """Which elements stay, bool [b, t, dim]: those whose 32 random bits are at least rate 2^32."""
        key = jax.random.fold_in(self.key, site)
        positions_BT = jnp.broadcast_to(positions_BT, (self.rows_B.shape[0], positions_BT.shape[1]))

        def of_token(key: Array, position: Array) -> Array:
            return jax.random.bits(jax.random.fold_in(key, position), (dim,), jnp.uint32)

        def of_row(row: Array, positions_T: Array) -> Array:
            return jax.vmap(partial(of_token, jax.random.fold_in(key, row)))(positions_T)

        bits_BTD = constrain(placement, jax.vmap(of_row)(self.rows_B, positions_BT), "BRD")
        return bits_BTD >= jnp.uint32(min(round(self.rate * 2**32), 2**32 - 1))


def dropout_of_step(rate: float, seed: int, step: Int[Array, ""] | int, batch: int) -> Dropout | None:
    """The dropout of optimizer step `step`, counted from 0, for a whole batch; None where the rate is 0."""
    if not rate:
        return None
    key = jax.random.fold_in(jax.random.key(seed, impl=GENERATOR), DOMAIN)
    return Dropout(rate=rate, key=jax.random.fold_in(key, step), rows_B=jnp.arange(batch, dtype=jnp.int32))
