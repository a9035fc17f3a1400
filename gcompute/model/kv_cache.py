"""The key/value cache: an explicit pytree that goes into a forward pass and comes out of it."""

from dataclasses import dataclass
from typing import Protocol, Self

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from gcompute.config.model import ModelConfig


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class KVCache:
    """Keys and values of every layer, [B, S, K, H] each, S the cache's length.

    A leaf a layer: a stacked cache would be copied whole each time one layer is written.
    """

    k: tuple[Float[Array, "b s k h"], ...]
    v: tuple[Float[Array, "b s k h"], ...]


class LayerCache(Protocol):
    """One layer's keys and values, wherever they lie: it takes the new ones and attends."""

    def update_and_attend(
        self, q_BTNH: Float[Array, "b t n h"], k_BTKH: Float[Array, "b t k h"], v_BTKH: Float[Array, "b t k h"]
    ) -> tuple[Float[Array, "b t n h"], Self]:
        """What the queries find among the keys that they may see, the new ones too, and the cache with these."""
        ...


def init_cache(config: ModelConfig, *, batch: int, length: int, dtype: jnp.dtype) -> KVCache:
    """An empty cache for `batch` sequences of up to `length` tokens."""

    def zeros() -> tuple[Array, ...]:
        shape = (batch, length, config.num_kv_heads, config.head_size)
        return tuple(jnp.zeros(shape, dtype) for _ in range(config.layers))

    return KVCache(k=zeros(), v=zeros())


def write(
    cache_BSKH: Float[Array, "b s k h"], new_BTKH: Float[Array, "b t k h"], positions_BT: Int[Array, "b t"]
) -> Float[Array, "b s k h"]:
    """The cache with `new` at `positions` of each row; positions past its end are dropped, never clipped."""
    rows_B1 = jnp.arange(cache_BSKH.shape[0])[:, None]
    return cache_BSKH.at[rows_B1, positions_BT].set(new_BTKH.astype(cache_BSKH.dtype), mode="drop")
