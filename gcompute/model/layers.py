"""Norms, rotary positions and the feed-forward layer.

Initial values: matrices and embeddings N(0, 0.02^2); the two matrices that end a residual branch are divided by
sqrt(2 L); norms 1; biases 0. Source: Radford et al. 2019 (GPT-2), section 2.3.
"""

import math
from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from gcompute.config.model import ModelConfig
from gcompute.model.matmul import linear
from gcompute.parallel.einsum import accumulator
from gcompute.parallel.placement import Placement, constrain

INIT_STD = 0.02


def matrix(dims: str, shape: tuple[int, ...], rngs: nnx.Rngs, *, std: float = INIT_STD) -> nnx.Param:
    """A float32 parameter with normal initial values, whose `dims` name each array dim by its letter."""
    return nnx.Param(std * jax.random.normal(rngs.params(), shape, jnp.float32), dims=dims)


def constant(dims: str, shape: tuple[int, ...], value: float) -> nnx.Param:
    """A float32 parameter that starts at one value."""
    return nnx.Param(jnp.full(shape, value, jnp.float32), dims=dims)


class RMSNorm(nnx.Module):
    """y = x / sqrt(mean(x^2) + eps) * scale. Source: Zhang and Sennrich 2019, equation 4."""

    def __init__(self, dim: int, eps: float, *, dims: str = "D"):
        self.scale = constant(dims, (dim,), 1.0)
        self.eps = eps

    def __call__(self, x: Float[Array, "... d"]) -> Float[Array, "... d"]:
        x = x.astype(self.scale.dtype)
        return x * jax.lax.rsqrt(jnp.mean(x * x, axis=-1, keepdims=True) + self.eps) * self.scale[...]


class LayerNorm(nnx.Module):
    """y = (x - mean) / sqrt(var + eps) * scale + bias. Source: Ba et al. 2016, equation 4."""

    def __init__(self, dim: int, eps: float, *, bias: bool):
        self.scale = constant("D", (dim,), 1.0)
        self.bias = constant("D", (dim,), 0.0) if bias else None
        self.eps = eps

    def __call__(self, x: Float[Array, "... d"]) -> Float[Array, "... d"]:
        x = x.astype(self.scale.dtype)
        centred = x - jnp.mean(x, axis=-1, keepdims=True)
        y = centred * jax.lax.rsqrt(jnp.mean(centred * centred, axis=-1, keepdims=True) + self.eps) * self.scale[...]
        return y if self.bias is None else y + self.bias[...]


def make_norm(config: ModelConfig) -> nnx.Module:
    """The norm over the model dim that `config` asks for."""
    if config.norm == "rmsnorm":
        return RMSNorm(config.dim, config.norm_eps)
    return LayerNorm(config.dim, config.norm_eps, bias=config.bias)


def rotary_table(
    positions_BT: Int[Array, "b t"], head_size: int, theta: float, dtype: jnp.dtype
) -> Float[Array, "2 b t half"]:
    """cos and sin of position / theta^(2i/H), i below H/2. Source: Su et al. 2021 (RoFormer), equation 15."""
    frequencies = theta ** (-jnp.arange(0, head_size, 2, dtype=dtype) / head_size)
    angles = positions_BT[..., None].astype(dtype) * frequencies
    return jnp.stack([jnp.cos(angles), jnp.sin(angles)])


def rotate(x_BTNH: Float[Array, "b t n h"], table: Float[Array, "2 b t half"]) -> Float[Array, "b t n h"]:
    """Turn each pair (x[i], x[i + H/2]) by its angle: the half-split layout of the released Llama weights."""
    cos, sin = table[:, :, :, None, :].astype(x_BTNH.dtype)
    first, second = jnp.split(x_BTNH, 2, axis=-1)
    return jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)


@jax.custom_vjp
def gelu(x: Float[Array, "..."]) -> Float[Array, "..."]:
    """x Phi(x), Phi the normal distribution function. Source: Hendrycks and Gimpel 2016, section 2.

    The forward pass keeps the derivative, Phi(x) + x phi(x), so that the error function is evaluated once.
    """
    return _gelu_forward(x)[0]


def _gelu_forward(x: Array) -> tuple[Array, Array]:
    below = 0.5 * (1 + jax.lax.erf(x * 0.5**0.5))
    density = jnp.exp(-0.5 * x * x) * (2 * math.pi) ** -0.5
    return x * below, below + x * density


def _gelu_backward(derivative: Array, dy: Array) -> tuple[Array]:
    return (derivative * dy,)


gelu.defvjp(_gelu_forward, _gelu_backward)


def activation(name: str) -> Callable[[Array], Array]:
    """The nonlinearity of the feed-forward layer."""
    return {"swiglu": jax.nn.silu, "gelu": gelu, "gelu_tanh": partial(jax.nn.gelu, approximate=True)}[name]


class FeedForward(nnx.Module):
    """down(act(up(x))), or down(act(gate(x)) * up(x)) when gated. Source: Shazeer 2020, equation 6 (SwiGLU)."""

    def __init__(self, config: ModelConfig, *, rngs: nnx.Rngs):
        d, f = config.dim, config.ffn_size
        self.up_DF = matrix("DF", (d, f), rngs)
        self.gate_DF = matrix("DF", (d, f), rngs) if config.gated else None
        self.down_FD = matrix("FD", (f, d), rngs, std=INIT_STD / (2 * config.layers) ** 0.5)
        self.up_bias_F = constant("F", (f,), 0.0) if config.bias else None
        self.gate_bias_F = constant("F", (f,), 0.0) if config.bias and config.gated else None
        self.down_bias_D = constant("D", (d,), 0.0) if config.bias else None
        self.act = activation(config.activation)

    def __call__(
        self,
        x_BTD: Float[Array, "b t d"],
        compute: jnp.dtype,
        placement: Placement | None = None,
        residual: jnp.dtype | None = None,
    ) -> Float[Array, "b t d"]:
        """`residual`: as in Execution; arrays of F are kept in it, and the nonlinearity is computed wide."""

        def kept(x_BTF: Array) -> Array:
            return x_BTF if residual is None else x_BTF.astype(residual)

        up_BTF = kept(_with_bias(linear(x_BTD, self.up_DF[...], compute), self.up_bias_F))
        wide = accumulator(compute)
        if self.gate_DF is None:
            hidden_BTF = self.act(up_BTF.astype(wide))
        else:
            gate_BTF = kept(_with_bias(linear(x_BTD, self.gate_DF[...], compute), self.gate_bias_F))
            hidden_BTF = self.act(gate_BTF.astype(wide)) * up_BTF.astype(wide)
        hidden_BTF = constrain(placement, kept(hidden_BTF), "BTF")
        return _with_bias(linear(hidden_BTF, self.down_FD[...], compute), self.down_bias_D)


def _with_bias(x: Array, bias: nnx.Param | None) -> Array:
    return x if bias is None else x + bias[...]
