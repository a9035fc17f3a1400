"""The matrix products of the transformer: operands in a compute dtype, results and weight gradients in float32.

Autodiff of a dot with bfloat16 operands and a float32 result multiplies a float32 cotangent with a bfloat16 operand,
which backends carry out as a float32 product. The rules here cast the cotangent to the compute dtype instead, as every
mixed-precision trainer does, and spell each gradient product in a form that XLA:CPU keeps in the fast path: it upcasts
a bfloat16 dot that contracts one leading dim of both operands, and does not when two dims are contracted.
"""

from functools import partial

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Float

from gcompute.parallel.collectives import varying, varying_axes
from gcompute.parallel.einsum import einsum

# What a rematerialisation policy calls the results of these products: it cannot see inside a custom gradient.
MATMUL = "matmul"


@partial(jax.custom_vjp, nondiff_argnums=(2,))
def _linear(x_BTI: Float[Array, "b t i"], w_IO: Float[Array, "i o"], compute: jnp.dtype) -> Float[Array, "b t o"]:
    return einsum("bti,io->bto", x_BTI, w_IO, compute)


def _linear_forward(x_BTI: Array, w_IO: Array, compute: jnp.dtype) -> tuple[Array, tuple[Array, Array]]:
    return _linear(x_BTI, w_IO, compute), (x_BTI, w_IO)


def _linear_backward(compute: jnp.dtype, saved: tuple[Array, Array], dy_BTO: Array) -> tuple[Array, Array]:
    x_BTI, w_IO = saved
    dx_BTI = einsum("bto,io->bti", dy_BTO, w_IO, compute)
    if x_BTI.shape[-1] > dy_BTO.shape[-1] and compute != jnp.bfloat16:
        # XLA:CPU transposes the first operand, recomputing what produced it element by element: hand it the narrower.
        dw_IO = einsum("bto,bti->oi", dy_BTO, x_BTI, compute).T
    else:
        dw_IO = einsum("bti,bto->io", x_BTI, dy_BTO, compute)
    return dx_BTI.astype(x_BTI.dtype), dw_IO.astype(w_IO.dtype)


_linear.defvjp(_linear_forward, _linear_backward)


@partial(jax.custom_vjp, nondiff_argnums=(2,))
def _linear_transposed(
    x_BTI: Float[Array, "b t i"], w_OI: Float[Array, "o i"], compute: jnp.dtype
) -> Float[Array, "b t o"]:
    return einsum("bti,oi->bto", x_BTI, w_OI, compute)


def _linear_transposed_forward(x_BTI: Array, w_OI: Array, compute: jnp.dtype) -> tuple[Array, tuple[Array, Array]]:
    return _linear_transposed(x_BTI, w_OI, compute), (x_BTI, w_OI)


def _linear_transposed_backward(compute: jnp.dtype, saved: tuple[Array, Array], dy_BTO: Array) -> tuple[Array, Array]:
    x_BTI, w_OI = saved
    dx_BTI = einsum("bto,oi->bti", dy_BTO, w_OI, compute)
    dw_OI = einsum("bto,bti->oi", dy_BTO, x_BTI, compute)
    return dx_BTI.astype(x_BTI.dtype), dw_OI.astype(w_OI.dtype)


_linear_transposed.defvjp(_linear_transposed_forward, _linear_transposed_backward)


def _transposed_product(x_BKQS: Array, y_BKQH: Array, compute: jnp.dtype) -> Array:
    """x^T @ y for each batch and head, [b, k, s, h]."""
    b, k, q, s = x_BKQS.shape
    if q % 2 or compute != jnp.bfloat16:
        # In float32 the halves below only cost a transposition more.
        return einsum("bkqs,bkqh->bksh", x_BKQS, y_BKQH, compute)
    halves_x, halves_y = x_BKQS.reshape(b, k, 2, q // 2, s), y_BKQH.reshape(b, k, 2, q // 2, -1)
    return einsum("bkzqs,bkzqh->bkhs", halves_x, halves_y, compute).swapaxes(-1, -2)


@partial(jax.custom_vjp, nondiff_argnums=(2,))
def _scores(
    q_BKQH: Float[Array, "b k q h"], k_BKSH: Float[Array, "b k s h"], compute: jnp.dtype
) -> Float[Array, "b k q s"]:
    return einsum("bkqh,bksh->bkqs", q_BKQH, k_BKSH, compute)


def _scores_forward(q_BKQH: Array, k_BKSH: Array, compute: jnp.dtype) -> tuple[Array, tuple[Array, Array]]:
    return _scores(q_BKQH, k_BKSH, compute), (q_BKQH, k_BKSH)


def _scores_backward(compute: jnp.dtype, saved: tuple[Array, Array], ds_BKQS: Array) -> tuple[Array, Array]:
    q_BKQH, k_BKSH = saved
    dq_BKQH = einsum("bkqs,bksh->bkqh", ds_BKQS, k_BKSH, compute)
    dk_BKSH = _transposed_product(ds_BKQS, q_BKQH, compute)
    return dq_BKQH.astype(q_BKQH.dtype), dk_BKSH.astype(k_BKSH.dtype)


_scores.defvjp(_scores_forward, _scores_backward)


@partial(jax.custom_vjp, nondiff_argnums=(2,))
def _weighted_sum(
    p_BKQS: Float[Array, "b k q s"], v_BKSH: Float[Array, "b k s h"], compute: jnp.dtype
) -> Float[Array, "b k q h"]:
    return einsum("bkqs,bksh->bkqh", p_BKQS, v_BKSH, compute)


def _weighted_sum_forward(p_BKQS: Array, v_BKSH: Array, compute: jnp.dtype) -> tuple[Array, tuple[Array, Array]]:
    return _weighted_sum(p_BKQS, v_BKSH, compute), (p_BKQS, v_BKSH)


def _weighted_sum_backward(compute: jnp.dtype, saved: tuple[Array, Array], do_BKQH: Array) -> tuple[Array, Array]:
    p_BKQS, v_BKSH = saved
    dp_BKQS = einsum("bkqh,bksh->bkqs", do_BKQH, v_BKSH, compute)
    dv_BKSH = _transposed_product(p_BKQS, do_BKQH, compute)
    return dp_BKQS.astype(p_BKQS.dtype), dv_BKSH.astype(v_BKSH.dtype)


_weighted_sum.defvjp(_weighted_sum_forward, _weighted_sum_backward)


@partial(jax.custom_vjp, nondiff_argnums=(2,))
def _expert_linear(
    x_EBCI: Float[Array, "e b c i"], w_EIO: Float[Array, "e i o"], compute: jnp.dtype
) -> Float[Array, "e b c o"]:
    return einsum("ebci,eio->ebco", x_EBCI, w_EIO, compute)


def _expert_linear_forward(x_EBCI: Array, w_EIO: Array, compute: jnp.dtype) -> tuple[Array, tuple[Array, Array]]:
    return _expert_linear(x_EBCI, w_EIO, compute), (x_EBCI, w_EIO)


def _expert_linear_backward(compute: jnp.dtype, saved: tuple[Array, Array], dy_EBCO: Array) -> tuple[Array, Array]:
    x_EBCI, w_EIO = saved
    dx_EBCI = einsum("ebco,eio->ebci", dy_EBCO, w_EIO, compute)
    dw_EIO = einsum("ebci,ebco->eio", x_EBCI, dy_EBCO, compute)
    return dx_EBCI.astype(x_EBCI.dtype), dw_EIO.astype(w_EIO.dtype)


_expert_linear.defvjp(_expert_linear_forward, _expert_linear_backward)


def linear(x_BTI: Float[Array, "b t i"], w_IO: Float[Array, "i o"], compute: jnp.dtype) -> Float[Array, "b t o"]:
    """y = x @ w over the last dim of x."""
    return checkpoint_name(_linear(x_BTI, w_IO, compute), MATMUL)


def linear_transposed(
    x_BTI: Float[Array, "b t i"], w_OI: Float[Array, "o i"], compute: jnp.dtype
) -> Float[Array, "b t o"]:
    """y = x @ w^T, for weights kept output-major such as a tied embedding; their gradient comes out output-major too.

    Transposing a bfloat16 product instead fails on XLA:CPU at run time ("Unsupported element type for DotThunk").
    """
    return checkpoint_name(_linear_transposed(x_BTI, w_OI, compute), MATMUL)


def scores(
    q_BKQH: Float[Array, "b k q h"], k_BKSH: Float[Array, "b k s h"], compute: jnp.dtype
) -> Float[Array, "b k q s"]:
    """Attention scores q @ k^T for each batch and key/value head."""
    return checkpoint_name(_scores(q_BKQH, k_BKSH, compute), MATMUL)


def weighted_sum(
    p_BKQS: Float[Array, "b k q s"], v_BKSH: Float[Array, "b k s h"], compute: jnp.dtype
) -> Float[Array, "b k q h"]:
    """Attention output p @ v for each batch and key/value head."""
    return checkpoint_name(_weighted_sum(p_BKQS, v_BKSH, compute), MATMUL)


def expert_linear(
    x_EBCI: Float[Array, "e b c i"], w_EIO: Float[Array, "e i o"], compute: jnp.dtype
) -> Float[Array, "e b c o"]:
    """y = x @ w of each expert for its own rows; per-device code may pass its experts alone.

    Experts come first: with rows first, the same product in bfloat16 fails on XLA:CPU at run time.
    """
    # A gradient rule must be told that the weights, the same on devices with other tokens, get gradients that are not.
    w_EIO = varying(w_EIO, tuple(varying_axes(x_EBCI)))
    return checkpoint_name(_expert_linear(x_EBCI, w_EIO, compute), MATMUL)
