"""A product in per-device code whose gradients are products of the same kind."""

from functools import partial

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from gcompute.parallel.collectives import varying, varying_axes
from gcompute.parallel.einsum import einsum


@partial(jax.custom_vjp, nondiff_argnums=(0, 3))
def _product(spec: str, x: Array, w: Array, compute: jnp.dtype) -> Array:
    return einsum(spec, x, w, compute)


def _product_forward(spec: str, x: Array, w: Array, compute: jnp.dtype) -> tuple[Array, tuple[Array, Array]]:
    return _product(spec, x, w, compute), (x, w)


def _product_backward(spec: str, compute: jnp.dtype, saved: tuple[Array, Array], dy: Array) -> tuple[Array, Array]:
    x, w = saved
    of_x, of_w, of_y = spec.replace("->", ",").split(",")
    dx = einsum(f"{of_y},{of_w}->{of_x}", dy, w, compute)
    dw = einsum(f"{of_x},{of_y}->{of_w}", x, dy, compute)
    return dx.astype(x.dtype), dw.astype(w.dtype)


_product.defvjp(_product_forward, _product_backward)


def product(
    spec: str, x: Float[Array, "..."], w: Float[Array, "..."], compute: jnp.dtype | None = None
) -> Float[Array, "..."]:
    """einsum in `compute` (None: the dtype of x) with sums in the wider dtype of `accumulator`, gradients too.

    Autodiff of a bfloat16 product rounds each partial gradient to bfloat16, before devices add theirs up. Here the
    cotangent is rounded to `compute` as an operand and the sums stay wide. Each letter of `spec` is in two of the
    three arrays.

    >>> gradient = jax.grad(lambda x: product("td,df->tf", x, jnp.ones((3, 4)), jnp.bfloat16).sum())
    >>> gradient(jnp.ones((2, 3)))[0].tolist()
    [4.0, 4.0, 4.0]
    """
    x, w = alike(x, w)
    return _product(spec, x, w, jnp.dtype(x.dtype if compute is None else compute))


def alike(*arrays: Array, axis: str | None = None) -> tuple[Array, ...]:
    """The arrays, each typed as varying along every mesh axis along which one of them varies, and along `axis`.

    A function with a gradient of its own must return gradients that vary as its arguments do. Arguments that vary
    alike settle that, and the sums over the axes that were added happen outside it.
    """
    axes = frozenset().union(*(varying_axes(array) for array in arrays), () if axis is None else (axis,))
    return tuple(varying(array, tuple(sorted(axes))) for array in arrays)
