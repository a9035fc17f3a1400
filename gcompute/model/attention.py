"""Causal grouped-query attention, with or without a key/value cache."""

from functools import partial

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float, Int

from gcompute.config.mesh import Axis
from gcompute.config.model import ModelConfig
from gcompute.model.kv_cache import LayerCache, write
from gcompute.model.layers import INIT_STD, RMSNorm, constant, matrix, rotate
from gcompute.model.matmul import linear, scores, weighted_sum
from gcompute.model.splash import splash_attention
from gcompute.parallel.placement import Placement, constrain
from gcompute.parallel.ring_attention import ring_attention
from gcompute.parallel.ulysses import ulysses_attention

# A projection's matrix and its bias.
Pairs = tuple[tuple[nnx.Param, nnx.Param | None], ...]

# Finite, so that a row with no visible key gives a uniform distribution and not NaN.
MASKED = -1e30


def attend(
    q_BTNH: Float[Array, "b t n h"],
    k_BSKH: Float[Array, "b s k h"],
    v_BSKH: Float[Array, "b s k h"],
    visible_BTS: Bool[Array, "#b t s"],
    compute: jnp.dtype,
) -> Float[Array, "b t n h"]:
    """softmax(q k^T / sqrt(H)) v, over the keys that each query may see; N / K queries share a key/value head.

    Heads come first and the G queries of a group are laid one after another, so both products are plain batched
    matmuls: on CPU they run faster than the four-index einsum over [B, T, N, H].
    Source: Vaswani et al. 2017, equation 1; Ainslie et al. 2023 (GQA).
    """
    q_BKGTH, k_BKSH, v_BKSH = _heads_first(q_BTNH, k_BSKH, v_BSKH)
    return _heads_last(_attend(q_BKGTH, k_BKSH, v_BKSH, visible_BTS, compute))


def attend_in_blocks(
    q_BTNH: Float[Array, "b t n h"],
    k_BTKH: Float[Array, "b t k h"],
    v_BTKH: Float[Array, "b t k h"],
    num_blocks: int,
    compute: jnp.dtype,
) -> Float[Array, "b t n h"]:
    """Causal attention of whole sequences, `num_blocks` blocks of queries each over the keys up to its own end.

    What causality hides from a whole block is neither multiplied nor kept: with n blocks (n + 1) / 2n of the scores
    remain. `num_blocks` divides T.
    """
    q_BKGTH, k_BKTH, v_BKTH = _heads_first(q_BTNH, k_BTKH, v_BTKH)
    t = q_BTNH.shape[1]
    size = t // num_blocks
    blocks = []
    for start in range(0, t, size):
        end = start + size
        visible_1QS = (jnp.arange(end) <= jnp.arange(start, end)[:, None])[None]
        q_BKGQH = q_BKGTH[:, :, :, start:end]
        blocks.append(_attend(q_BKGQH, k_BKTH[:, :, :end], v_BKTH[:, :, :end], visible_1QS, compute))
    return _heads_last(jnp.concatenate(blocks, axis=3))


def _heads_first(q_BTNH: Array, k_BSKH: Array, v_BSKH: Array) -> tuple[Array, Array, Array]:
    """q scaled by 1 / sqrt(H), [b, k, g, t, h]; k and v as [b, k, s, h]."""
    b, t, n, h = q_BTNH.shape
    k = k_BSKH.shape[2]
    scaled_BTKGH = (q_BTNH * h**-0.5).reshape(b, t, k, n // k, h)
    return scaled_BTKGH.transpose(0, 2, 3, 1, 4), k_BSKH.swapaxes(1, 2), v_BSKH.swapaxes(1, 2)


def _heads_last(o_BKGTH: Array) -> Array:
    b, k, groups, t, h = o_BKGTH.shape
    return o_BKGTH.transpose(0, 3, 1, 2, 4).reshape(b, t, k * groups, h)


def _attend(q_BKGTH: Array, k_BKSH: Array, v_BKSH: Array, visible_BTS: Array, compute: jnp.dtype) -> Array:
    b, k, groups, t, h = q_BKGTH.shape
    s_BKQS = scores(q_BKGTH.reshape(b, k, groups * t, h), k_BKSH, compute)
    visible_BKQS = jnp.tile(visible_BTS, (1, groups, 1))[:, None]
    p_BKQS = jax.nn.softmax(jnp.where(visible_BKQS, s_BKQS, MASKED), axis=-1)
    return weighted_sum(p_BKQS, v_BKSH, compute).reshape(b, k, groups, t, h)


def causal_attention(
    q_BTNH: Float[Array, "b t n h"],
    k_BTKH: Float[Array, "b t k h"],
    v_BTKH: Float[Array, "b t k h"],
    *,
    compute: jnp.dtype,
    kernel: str,
    query_blocks: int,
    placement: Placement | None,
) -> Float[Array, "b t n h"]:
    """Attention of whole sequences to themselves, by the means that the mesh and the backend call for.

    With a context axis, each device has a piece of every sequence and they attend by a ring or by all-to-all. The
    compiler splits plain attention over batch and heads by itself; a kernel it cannot split.
    """

    def whole(q_BTNH: Array, k_BTKH: Array, v_BTKH: Array) -> Array:
        if kernel == "splash":
            return splash_attention(q_BTNH, k_BTKH, v_BTKH, compute)
        if query_blocks > 1:
            return attend_in_blocks(q_BTNH, k_BTKH, v_BTKH, query_blocks, compute)
        slots_T = jnp.arange(q_BTNH.shape[1])
        return attend(q_BTNH, k_BTKH, v_BTKH, (slots_T <= slots_T[:, None])[None], compute)

    if placement is None or (kernel == "xla" and placement.shape.context == 1):
        return whole(q_BTNH, k_BTKH, v_BTKH)
    if placement.shape.context == 1:
        local = whole
    elif placement.context_attention == "ring":
        local = partial(ring_attention, axis=Axis.CONTEXT, layout=placement.layout, compute=compute)
    else:
        local = partial(ulysses_attention, axis=Axis.CONTEXT, layout=placement.layout, attend=whole)
    # A kernel's results carry no note of the axes that they vary over, so JAX cannot check them.
    island = placement.island(local, ("BTNH", "BTKH", "BTKH"), "BTNH", check_vma=kernel == "xla")
    return island(q_BTNH, k_BTKH, v_BTKH)


class Attention(nnx.Module):
    """Projections to q, k and v, positions, attention, and the projection back."""

    def __init__(self, config: ModelConfig, *, rngs: nnx.Rngs):
        d, n, k, h = config.dim, config.heads, config.num_kv_heads, config.head_size
        self.q_DNH = matrix("DNH", (d, n, h), rngs)
        self.k_DKH = matrix("DKH", (d, k, h), rngs)
        self.v_DKH = matrix("DKH", (d, k, h), rngs)
        self.o_NHD = matrix("NHD", (n, h, d), rngs, std=INIT_STD / (2 * config.layers) ** 0.5)
        self.q_bias_NH = constant("NH", (n, h), 0.0) if config.bias else None
        self.k_bias_KH = constant("KH", (k, h), 0.0) if config.bias else None
        self.v_bias_KH = constant("KH", (k, h), 0.0) if config.bias else None
        self.o_bias_D = constant("D", (d,), 0.0) if config.bias else None
        self.q_norm = RMSNorm(h, config.norm_eps, dims="H") if config.qk_norm else None
        self.k_norm = RMSNorm(h, config.norm_eps, dims="H") if config.qk_norm else None

    def __call__(
        self,
        x_BTD: Float[Array, "b t d"],
        *,
        positions_BT: Int[Array, "#b t"],
        rotary: Float[Array, "2 #b t half"] | None,
        cache: tuple[Array, Array] | LayerCache | None,
        compute: jnp.dtype,
        kernel: str = "xla",
        query_blocks: int = 1,
        one_projection: bool = False,
        placement: Placement | None = None,
    ) -> tuple[Float[Array, "b t d"], tuple[Array, Array] | LayerCache | None]:
        b, t, _ = x_BTD.shape
        pairs = ((self.q_DNH, self.q_bias_NH), (self.k_DKH, self.k_bias_KH), (self.v_DKH, self.v_bias_KH))
        project = self._project_at_once if one_projection else self._project
        q_BTNH, k_BTKH, v_BTKH = project(x_BTD, pairs, compute)
        q_BTNH, k_BTKH = constrain(placement, q_BTNH, "BTNH"), constrain(placement, k_BTKH, "BTKH")
        v_BTKH = constrain(placement, v_BTKH, "BTKH")
        if self.q_norm is not None and self.k_norm is not None:
            q_BTNH, k_BTKH = self.q_norm(q_BTNH), self.k_norm(k_BTKH)
        if rotary is not None:
            q_BTNH, k_BTKH = rotate(q_BTNH, rotary), rotate(k_BTKH, rotary)
        if cache is None:
            o_BTNH = causal_attention(
                q_BTNH,
                k_BTKH,
                v_BTKH,
                compute=compute,
                kernel=kernel,
                query_blocks=query_blocks,
                placement=placement,
            )
            # Its gradient too is split by heads: it arrives split by sequence.
            o_BTNH = constrain(placement, o_BTNH, "BTNH")
        elif not isinstance(cache, tuple):
            o_BTNH, cache = cache.update_and_attend(q_BTNH, k_BTKH, v_BTKH)
        else:
            # Left free, XLA may split whole heads for this product, and gather the cache to give it back.
            keys_BSKH, values_BSKH = cache = (
                constrain(placement, write(cache[0], k_BTKH, positions_BT), "BSKH"),
                constrain(placement, write(cache[1], v_BTKH, positions_BT), "BSKH"),
            )
            visible_BTS = jnp.arange(keys_BSKH.shape[1]) <= positions_BT[..., None]
            o_BTNH = attend(q_BTNH, keys_BSKH, values_BSKH, visible_BTS, compute)
        out_BTD = linear(o_BTNH.reshape(b, t, -1), self.o_NHD[...].reshape(-1, x_BTD.shape[-1]), compute)
        return out_BTD if self.o_bias_D is None else out_BTD + self.o_bias_D[...], cache

    def _project(self, x_BTD: Array, pairs: Pairs, compute: jnp.dtype) -> list[Array]:
        """x times each matrix, plus its bias, [b, t, heads, h] each."""
        return [_headed(linear(x_BTD, _flat(w), compute), w.shape[1], bias) for w, bias in pairs]

    def _project_at_once(self, x_BTD: Array, pairs: Pairs, compute: jnp.dtype) -> list[Array]:
        """The same by one product with the matrices side by side, and so one product for the gradient of x."""
        weights = [_flat(w) for w, _ in pairs]
        sizes = [w.shape[1] for w in weights]
        pieces = jax.lax.split(linear(x_BTD, jnp.concatenate(weights, axis=1), compute), sizes, axis=2)
        return [_headed(piece, w.shape[1], bias) for piece, (w, bias) in zip(pieces, pairs, strict=True)]


def _flat(w_DNH: nnx.Param) -> Array:
    return w_DNH[...].reshape(w_DNH.shape[0], -1)


def _headed(y: Array, heads: int, bias_NH: nnx.Param | None) -> Array:
    """[b, t, n h] as [b, t, n, h], plus the bias."""
    y_BTNH = y.reshape(*y.shape[:2], heads, -1)
    return y_BTNH if bias_NH is None else y_BTNH + bias_NH[...]
