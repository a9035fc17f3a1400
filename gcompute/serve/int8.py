"""int8 for products: whole numbers times one scale for each output channel, or for each row of activations."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int8

LARGEST_INT8 = 127


def scales(x: Float[Array, "... n"]) -> Float[Array, "..."]:
    """The scale that makes the largest of N numbers 127; 1 where all are 0."""
    largest = jnp.max(jnp.abs(x.astype(jnp.float32)), axis=-1)
    return jnp.where(largest > 0, largest / LARGEST_INT8, 1.0)


def round_to(x: Float[Array, "... n"], scale: Float[Array, "..."]) -> Int8[Array, "... n"]:
    """int8 of x / scale."""
    rounded = jnp.round(x.astype(jnp.float32) / scale[..., None])
    return jnp.clip(rounded, -LARGEST_INT8, LARGEST_INT8).astype(jnp.int8)


def quantize(x: Float[Array, "... n"]) -> tuple[Int8[Array, "... n"], Float[Array, "..."]]:
    """int8 and scales of each group of N numbers."""
    scale = scales(x)
    return round_to(x, scale), scale


def dequantize(x: Int8[Array, "... n"], scale: Float[Array, "..."], dtype: jnp.dtype) -> Float[Array, "... n"]:
    return (x.astype(jnp.float32) * scale[..., None]).astype(dtype)


def int8_product(x_MI: Int8[Array, "m i"], w_OI: Int8[Array, "o i"]) -> Array:
    """x @ w^T as int32, which holds every sum of up to 2^17 products."""
    return jax.lax.dot_general(x_MI, w_OI, (((1,), (1,)), ((), ())), preferred_element_type=jnp.int32)
