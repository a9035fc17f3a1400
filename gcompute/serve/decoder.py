"""The forward pass of serving: `model.transformer.forward` with a cache, on weights and caches in their fast layouts.

The function is the model's: norms, rotary positions, nonlinearities and experts are the model's own code, and the tests
hold the whole to the model's forward pass. What is other is how products and attention are carried out.
"""

from dataclasses import replace
from functools import cache as remember
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float, Int

from gcompute.config.model import ModelConfig
from gcompute.model.attention import MASKED
from gcompute.model.layers import RMSNorm, activation, make_norm, rotary_table, rotate
from gcompute.model.matmul import linear, linear_transposed, scores, weighted_sum
from gcompute.model.moe import MoE
from gcompute.model.transformer import Execution, Params
from gcompute.model.vocabulary import look_up
from gcompute.parallel.einsum import accumulator, einsum
from gcompute.parallel.placement import constrain
from gcompute.serve import few_rows
from gcompute.serve.int8 import int8_product, quantize
from gcompute.serve.kv_pool import RowCache, store
from gcompute.serve.weights import Matrix


def forward(
    params: Params,
    tokens_BT: Int[Array, "b t"],
    *,
    config: ModelConfig,
    execution: Execution,
    positions_BT: Int[Array, "b t"],
    cache: RowCache,
    logits_at_B: Int[Array, "b"] | None = None,
) -> tuple[Float[Array, "b t v"] | Float[Array, "b v"], RowCache]:
    """Logits of the next token at every position, and the cache with this input's keys and values in it.

    `params` are of `serving_weights`; with a placement, in the plain layout. The T new keys and values of each row are
    stored at `positions_BT`, and each query sees the cache's cells up to its own position. `logits_at_B` picks one
    index of T a row before the output layer.
    """
    placement = execution.placement
    x_BTD = look_up(params["embedding_VD"], tokens_BT, placement)
    if config.positions == "learned":
        x_BTD = x_BTD + params["positions_TD"][positions_BT]
    x_BTD = constrain(placement, x_BTD.astype(execution.residual), "BRD")
    rotary = None
    if config.positions == "rope":
        rotary = rotary_table(positions_BT, config.head_size, config.rope_theta, accumulator(execution.compute))
    visible_BTS = jnp.arange(cache.length) <= positions_BT[..., None]
    for layer in range(config.layers):
        weights = params["blocks"][layer]
        normed_BTD = constrain(placement, _norm(config, weights["attention_norm"], x_BTD), "BTD")
        q_BTNH, k_BTKH, v_BTKH = _queries_keys_values(weights, normed_BTD, rotary, config, execution)
        cache = _with_new_cells(cache, layer, k_BTKH, v_BTKH, positions_BT, execution)
        o_BTNH = attend(q_BTNH, cache.k[layer], cache.v[layer], visible_BTS, execution.compute)
        mixed_BTD = _attention_output(weights, o_BTNH, config, execution)
        x_BTD = constrain(placement, x_BTD + constrain(placement, mixed_BTD.astype(x_BTD.dtype), "BRD"), "BRD")
        normed_BTD = constrain(placement, _norm(config, weights["mlp_norm"], x_BTD), "BTD")
        fed_BTD = _feed_forward(weights, normed_BTD, config, execution)
        x_BTD = constrain(placement, x_BTD + constrain(placement, fed_BTD.astype(x_BTD.dtype), "BRD"), "BRD")
    if logits_at_B is not None:
        x_BTD = jnp.take_along_axis(x_BTD, logits_at_B[:, None, None], axis=1)
    x_BTD = constrain(placement, _norm(config, params["norm"], x_BTD), "BTD")
    logits_BTV = constrain(placement, _logits(params, x_BTD, execution.compute), "BTV")
    return logits_BTV if logits_at_B is None else logits_BTV[:, 0], cache


def attend(
    q_BTNH: Float[Array, "b t n h"],
    k_BKSH: Float[Array, "b k s h"],
    v_BKSH: Float[Array, "b k s h"],
    visible_BTS: Bool[Array, "b t s"],
    compute: jnp.dtype,
) -> Float[Array, "b t n h"]:
    """softmax(q k^T / sqrt(H)) v over the cells that each query may see, as `model.attention.attend` computes it.

    Cells come with their heads first, so nothing of the cache is moved.
    """
    b, t, n, h = q_BTNH.shape
    k = k_BKSH.shape[1]
    groups = n // k
    scaled_BTKGH = (q_BTNH * h**-0.5).reshape(b, t, k, groups, h)
    q_BKQH = scaled_BTKGH.transpose(0, 2, 3, 1, 4).reshape(b, k, groups * t, h)
    s_BKQS = scores(q_BKQH, k_BKSH, compute)
    visible_BKQS = jnp.tile(visible_BTS, (1, groups, 1))[:, None]
    p_BKQS = jax.nn.softmax(jnp.where(visible_BKQS, s_BKQS, MASKED), axis=-1)
    o_BKQH = weighted_sum(p_BKQS, v_BKSH, compute)
    return o_BKQH.reshape(b, k, groups, t, h).transpose(0, 3, 1, 2, 4).reshape(b, t, n, h)


def apply(matrix: Matrix, x_BTI: Float[Array, "b t i"], compute: jnp.dtype, w_OI: Array | None = None) -> Array:
    """y = x @ w^T + bias with a wide result; `w_OI` is that of a matrix which holds none."""
    b, t, i = x_BTI.shape
    w_OI = matrix.w_OI if matrix.w_OI is not None else w_OI
    assert w_OI is not None
    x_MI = x_BTI.reshape(b * t, i)
    words_OW = matrix.words_OW if b * t <= few_rows.MOST_ROWS else None
    if matrix.scale_O is not None:
        rounded_MI, scale_M = quantize(x_MI)
        if words_OW is None:
            whole_MO = int8_product(rounded_MI, w_OI)
        else:
            whole_MO = few_rows.quad_product(rounded_MI, words_OW)
        y_MO = whole_MO.astype(jnp.float32) * scale_M[:, None] * matrix.scale_O
    elif words_OW is not None:
        y_MO = few_rows.pair_product(x_MI, words_OW)
    else:
        # XLA on CPU converts the weights of a single row to float32; two rows it multiplies as they are.
        padded_MI = jnp.pad(x_MI, ((0, 1), (0, 0))) if b * t == 1 and compute == jnp.bfloat16 else x_MI
        y_MO = einsum("mi,oi->mo", padded_MI, w_OI, compute)[: b * t]
    if matrix.bias_O is not None:
        y_MO = y_MO + matrix.bias_O
    return y_MO.reshape(b, t, -1)


def _norm(config: ModelConfig, weights: Params, x_BTD: Array) -> Array:
    return nnx.merge(_norm_graphdef(config), weights)(x_BTD)


@remember
def _norm_graphdef(config: ModelConfig) -> nnx.GraphDef:
    return nnx.split(nnx.eval_shape(lambda: make_norm(config)))[0]


@remember
def _head_norm_graphdef(config: ModelConfig) -> nnx.GraphDef:
    return nnx.split(nnx.eval_shape(lambda: RMSNorm(config.head_size, config.norm_eps, dims="H")))[0]


@remember
def _experts_graphdef(config: ModelConfig) -> nnx.GraphDef:
    return nnx.split(nnx.eval_shape(lambda: MoE(config, rngs=nnx.Rngs(0))))[0]


def _queries_keys_values(
    weights: Params, x_BTD: Array, rotary: Array | None, config: ModelConfig, execution: Execution
) -> tuple[Array, Array, Array]:
    b, t, d = x_BTD.shape
    n, k, h = config.heads, config.num_kv_heads, config.head_size
    placement, own = execution.placement, weights
    if "qkv" in weights:
        joined_BTO = apply(weights["qkv"], x_BTD, execution.compute)
        parts = jnp.split(joined_BTO, (n * h, (n + k) * h), axis=-1)
        q_BTNH, k_BTKH, v_BTKH = (part.reshape(b, t, -1, h) for part in parts)
    else:
        own = weights["attention"]

        def project(name: str, dims: str) -> Array:
            w = own[f"{name}_D{dims}"]
            y = linear(x_BTD, w.reshape(d, -1), execution.compute).reshape(b, t, *w.shape[1:])
            return constrain(placement, y + own[f"{name}_bias_{dims}"] if config.bias else y, f"BT{dims}")

        q_BTNH, k_BTKH, v_BTKH = project("q", "NH"), project("k", "KH"), project("v", "KH")
    if config.qk_norm:
        graphdef = _head_norm_graphdef(config)
        q_BTNH, k_BTKH = nnx.merge(graphdef, own["q_norm"])(q_BTNH), nnx.merge(graphdef, own["k_norm"])(k_BTKH)
    if rotary is not None:
        q_BTNH, k_BTKH = rotate(q_BTNH, rotary), rotate(k_BTKH, rotary)
    return q_BTNH, k_BTKH, v_BTKH


def _with_new_cells(
    cache: RowCache, layer: int, k_BTKH: Array, v_BTKH: Array, positions_BT: Array, execution: Execution
) -> RowCache:
    (k_BKSH, v_BKSH), both_scales = store(cache, layer, k_BTKH, v_BTKH, positions_BT)
    # Left free, XLA may split whole heads for the product after them, and gather the cache to give it back.
    k_BKSH, v_BKSH = (constrain(execution.placement, cells, "BKSH") for cells in (k_BKSH, v_BKSH))

    def put(leaves: tuple[Array, ...], new: Array) -> tuple[Array, ...]:
        return (*leaves[:layer], new, *leaves[layer + 1 :])

    cache = replace(cache, k=put(cache.k, k_BKSH), v=put(cache.v, v_BKSH))
    if both_scales is None:
        return cache
    return replace(cache, k_scale=put(cache.k_scale, both_scales[0]), v_scale=put(cache.v_scale, both_scales[1]))


def _attention_output(weights: Params, o_BTNH: Array, config: ModelConfig, execution: Execution) -> Array:
    flat_BTI = o_BTNH.reshape(*o_BTNH.shape[:2], -1)
    if "o" in weights:
        return apply(weights["o"], flat_BTI, execution.compute)
    own = weights["attention"]
    out_BTD = linear(flat_BTI, own["o_NHD"].reshape(-1, config.dim), execution.compute)
    return out_BTD + own["o_bias_D"] if config.bias else out_BTD


def _feed_forward(weights: Params, x_BTD: Array, config: ModelConfig, execution: Execution) -> Array:
    compute, placement = execution.compute, execution.placement
    if config.experts:
        experts = weights["experts"] if "experts" in weights else weights["mlp"]
        return nnx.merge(_experts_graphdef(config), experts)(x_BTD, compute, placement)[0]
    act = activation(config.activation)
    if "into" in weights:
        into_BTO = apply(weights["into"], x_BTD, compute)
        if config.gated:
            gate_BTF, up_BTF = jnp.split(into_BTO, 2, axis=-1)
            return apply(weights["down"], act(gate_BTF) * up_BTF, compute)
        return apply(weights["down"], act(into_BTO), compute)
    own: dict[str, Any] = weights["mlp"]

    def with_bias(y: Array, name: str) -> Array:
        return y + own[name] if config.bias else y

    up_BTF = with_bias(linear(x_BTD, own["up_DF"], compute), "up_bias_F")
    if config.gated:
        gate_BTF = with_bias(linear(x_BTD, own["gate_DF"], compute), "gate_bias_F")
        hidden_BTF = act(gate_BTF) * up_BTF
    else:
        hidden_BTF = act(up_BTF)
    return with_bias(linear(constrain(placement, hidden_BTF, "BTF"), own["down_FD"], compute), "down_bias_D")


def _logits(params: Params, x_BTD: Array, compute: jnp.dtype) -> Array:
    if "head" in params:
        return apply(params["head"], x_BTD, compute, params["embedding_VD"])
    if "head_DV" in params:
        return linear(x_BTD, params["head_DV"], compute)
    return linear_transposed(x_BTD, params["embedding_VD"], compute)
