"""The forward pass of serving: `model.transformer.forward` with a cache, on weights and caches in their fast layouts.

The function is the model's: norms, rotary positions, nonlinearities and experts are the model's own code, and the tests
hold the whole to the model's forward pass. What is other is how products and attention are carried out.
"""

from collections.abc import Callable
from dataclasses import replace
from functools import cache as remember
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float, Int, UInt32

from gcompute.config.model import ModelConfig
from gcompute.model.attention import MASKED
from gcompute.model.attention import attend as model_attend
from gcompute.model.layers import RMSNorm, activation, make_norm, rotary_table, rotate
from gcompute.model.matmul import linear, linear_transposed, scores, weighted_sum
from gcompute.model.moe import MoE
from gcompute.model.transformer import Execution, Params
from gcompute.model.vocabulary import look_up
from gcompute.parallel.einsum import accumulator, einsum
from gcompute.parallel.placement import constrain
from gcompute.serve import few_rows, page_cache
from gcompute.serve.int8 import int8_product, quantize
from gcompute.serve.kv_pool import RowCache, in_order, started, store
from gcompute.serve.native import attention as native_attention
from gcompute.serve.native import norms as norm_kernels
from gcompute.serve.native import products as native_products
from gcompute.serve.native.products import Later
from gcompute.serve.page_cache import PageCache
from gcompute.serve.weights import Matrix

Product = Callable[..., Array]
Cache = RowCache | PageCache


def forward(
    params: Params,
    tokens_BT: Int[Array, "b t"],
    *,
    config: ModelConfig,
    execution: Execution,
    positions_BT: Int[Array, "b t"],
    cache: Cache,
    logits_at_B: Int[Array, "b"] | None = None,
    ordered: bool = False,
    kept_B: Int[Array, "b"] | None = None,
) -> tuple[Float[Array, "b t v"] | Float[Array, "b v"], Cache]:
    """Logits of the next token at every position, and the cache with this input's keys and values in it.

    `params` are of `serving_weights`; with a placement, in the plain layout. The T new keys and values of each row are
    stored at `positions_BT`, which follow each other, and each query sees the cells up to its own position.
    `logits_at_B` picks one index of T a row before the output layer. `ordered`: sums over cells run in their order,
    whichever of them are new, so that no bit depends on where a dispatch began; it costs a copy of all cells, unless
    attention reads pages where they lie. `kept_B`: how many of a row's T a `PageCache` keeps, if not all; of a
    `RowCache` that is said when they are put back.
    """
    placement, zero = execution.placement, few_rows.unknown_zero(positions_BT)
    if "embedding_PWN" in params:
        x_BTD = native_products.unpack_rows(params["embedding_PWN"], tokens_BT, execution.compute)
    elif "embedding_VW" in params:
        x_BTD = few_rows.unpack_pairs(params["embedding_VW"][tokens_BT])
    else:
        x_BTD = look_up(params["embedding_VD"], tokens_BT, placement)
    if config.positions == "learned":
        x_BTD = x_BTD + params["positions_TD"][positions_BT]
    x_BTD = constrain(placement, x_BTD.astype(execution.residual), "BRD")
    rotary = None
    if config.positions == "rope":
        rotary = rotary_table(positions_BT, config.head_size, config.rope_theta, accumulator(execution.compute))
        if isinstance(cache, PageCache):
            # Or XLA on CPU computes a cosine for every number of every layer.
            rotary = few_rows.settled(rotary, zero)
    few = tokens_BT.size <= few_rows.MOST_ROWS
    product = partial(apply, compute=execution.compute, zero=zero, few=few)
    keep: Callable[..., Cache]
    attention: Callable[..., Array]
    if isinstance(cache, PageCache):
        kept_B = jnp.full(tokens_BT.shape[0], tokens_BT.shape[1]) if kept_B is None else kept_B
        keep = partial(page_cache.store, positions_BT=positions_BT, count_B=kept_B)
        dtype = _operand(execution, params["blocks"][0].get("o"))
        attention = partial(native_attention.attend, positions_BT=positions_BT, dtype=dtype)
    else:
        cache = started(cache, positions_BT)
        keep = partial(store, positions_BT=positions_BT)
        attention = partial(attend, visible=visible_cells(cache, positions_BT), compute=execution.compute)
        if ordered:
            attention = partial(attend_ordered, positions_BT=positions_BT, compute=execution.compute)
    native_norms = _has_native_norms(config, cache, execution)
    add_norm = partial(_add_norm, config, execution, native=native_norms)
    fed_BTD = None
    for layer in range(config.layers):
        weights = params["blocks"][layer]
        x_BTD, normed_BTD = add_norm(weights["attention_norm"], x_BTD, fed_BTD, weights.get("qkv"))
        if isinstance(cache, PageCache) and _is_placed(config, cache, weights):
            joined_BTO = product(weights["qkv"], normed_BTD)
            of_cells = {"positions_BT": positions_BT, "count_B": kept_B, "heads": config.heads}
            q_BTNH, cache = page_cache.place(cache, layer, joined_BTO, rotary, **of_cells)
        else:
            q_BTNH, k_BTKH, v_BTKH = _queries_keys_values(weights, normed_BTD, rotary, product, config, execution)
            cache = keep(cache, layer, k_BTKH, v_BTKH)
        o_BTNH = attention(q_BTNH, cache, layer)
        # Left free, XLA may split whole heads for the product after it, and gather the cells to give it back.
        o_BTNH = constrain(placement, o_BTNH, "BTNH")
        mixed_BTD = _attention_output(weights, o_BTNH, product, config, execution)
        x_BTD, normed_BTD = add_norm(weights["mlp_norm"], x_BTD, mixed_BTD, weights.get("into"))
        fed_BTD = _feed_forward(
            weights, normed_BTD, product, config, execution, *_later(cache, layer + 1, positions_BT)
        )
    if not native_norms:
        # On a mesh, what is added up may lie in parts: it is added up before anything is picked from it.
        x_BTD, fed_BTD = _sum(execution, x_BTD, fed_BTD), None
    if logits_at_B is not None:
        at_B11 = logits_at_B[:, None, None]
        x_BTD, fed_BTD = (part if part is None else jnp.take_along_axis(part, at_B11, 1) for part in (x_BTD, fed_BTD))
    x_BTD = add_norm(params["norm"], x_BTD, fed_BTD, params.get("head"))[1]
    logits_BTV = constrain(placement, _logits(params, x_BTD, product, execution.compute), "BTV")
    if placement is None and not _is_packed(params):
        # Or it fuses the output layer with what is chosen from the logits, into one loop on one core.
        logits_BTV = few_rows.settled(logits_BTV, zero)
    return logits_BTV if logits_at_B is None else logits_BTV[:, 0], cache


def attend(
    q_BTNH: Float[Array, "b t n h"],
    cache: RowCache,
    layer: int,
    visible: tuple[Bool[Array, "b t s"], Bool[Array, "b t c"]],
    compute: jnp.dtype,
) -> Float[Array, "b t n h"]:
    """softmax(q k^T / sqrt(H)) v over the old and the new cells that each query may see.

    As `model.attention.attend`, but cells come with their heads first, so nothing of the cache is moved.
    """
    b, t, n, h = q_BTNH.shape
    old_k, old_v, new_k, new_v = (part[layer] for part in (cache.k, cache.v, cache.new_k, cache.new_v))
    k = old_k.shape[1]
    groups = n // k
    scaled_BTKGH = (q_BTNH * h**-0.5).reshape(b, t, k, groups, h)
    q_BKQH = scaled_BTKGH.transpose(0, 2, 3, 1, 4).reshape(b, k, groups * t, h)

    def masked(k_BKSH: Array, visible_BTS: Array) -> Array:
        visible_BKQS = jnp.tile(visible_BTS, (1, groups, 1))[:, None]
        return jnp.where(visible_BKQS, scores(q_BKQH, k_BKSH, compute), MASKED)

    s_BKQS = jnp.concatenate([masked(old_k, visible[0]), masked(new_k, visible[1])], axis=-1)
    old_p, new_p = jnp.split(jax.nn.softmax(s_BKQS, axis=-1), (cache.length,), axis=-1)
    o_BKQH = weighted_sum(old_p, old_v, compute) + weighted_sum(new_p, new_v, compute)
    return o_BKQH.reshape(b, k, groups, t, h).transpose(0, 3, 1, 2, 4).reshape(b, t, n, h)


def attend_ordered(
    q_BTNH: Float[Array, "b t n h"],
    cache: RowCache,
    layer: int,
    positions_BT: Int[Array, "b t"],
    compute: jnp.dtype,
) -> Float[Array, "b t n h"]:
    """As `attend`, over the cells in their order."""
    k_BSKH, v_BSKH = (cells.swapaxes(1, 2) for cells in in_order(cache, layer))
    return model_attend(q_BTNH, k_BSKH, v_BSKH, jnp.arange(cache.length) <= positions_BT[..., None], compute)


def apply(
    matrix: Matrix,
    x_BTI: Float[Array, "b t i"],
    *,
    compute: jnp.dtype,
    zero: UInt32[Array, ""],
    few: bool,
    later: Later = (),
) -> Float[Array, "b t o"]:
    """y = x @ w^T + bias with a wide result; `few`: this is a program of few rows, compiled with their options.

    later: what the CPU kernels may fetch meanwhile.
    """
    b, t, i = x_BTI.shape
    x_MI = x_BTI.reshape(b * t, i)
    words_OW = matrix.words_OW if few else None
    if matrix.scale_O is not None:
        rounded_MI, scale_M = quantize(x_MI)
        if matrix.panels_PWN is not None:
            whole_MO = native_products.product(rounded_MI, matrix.panels_PWN, matrix.num_outputs, later=later)
        elif words_OW is not None:
            whole_MO = few_rows.quad_product(rounded_MI, words_OW, zero)
        else:
            whole_MO = int8_product(rounded_MI, _whole(matrix))
        y_MO = whole_MO.astype(jnp.float32) * scale_M[:, None] * matrix.scale_O
    elif matrix.panels_PWN is not None:
        y_MO = native_products.product(x_MI.astype(compute), matrix.panels_PWN, matrix.num_outputs, later=later)
    elif words_OW is not None:
        y_MO = few_rows.pair_product(x_MI, words_OW, zero)
    else:
        # XLA on CPU converts the weights of a single row to float32; two rows it multiplies as they are.
        padded_MI = jnp.pad(x_MI, ((0, 1), (0, 0))) if b * t == 1 and compute == jnp.bfloat16 else x_MI
        y_MO = einsum("mi,oi->mo", padded_MI, _whole(matrix), compute)[: b * t]
    if matrix.bias_O is not None:
        y_MO = y_MO + matrix.bias_O
    return y_MO.reshape(b, t, -1)


def _whole(matrix: Matrix) -> Array:
    assert matrix.w_OI is not None
    return matrix.w_OI


def visible_cells(cache: RowCache, positions_BT: Array) -> tuple[Array, Array]:
    """Which old and which new cells each query sees: old ones end where new ones begin, and both at its position."""
    start_B11 = cache.start_B[:, None, None]
    old_S, new_C = jnp.arange(cache.length), jnp.arange(cache.num_new)
    at_BT1 = positions_BT[..., None]
    return (old_S < start_B11) & (old_S <= at_BT1), start_B11 + new_C <= at_BT1


def _sum(execution: Execution, x_BTD: Array, y_BTD: Array | None) -> Array:
    """The stream with a layer's output added to it."""
    if y_BTD is None:
        return x_BTD
    placement = execution.placement
    return constrain(placement, x_BTD + constrain(placement, y_BTD.astype(x_BTD.dtype), "BRD"), "BRD")


def _has_native_norms(config: ModelConfig, cache: Cache, execution: Execution) -> bool:
    return isinstance(cache, PageCache) and config.norm == "rmsnorm" and execution.residual == jnp.float32


def _is_placed(config: ModelConfig, cache: PageCache, weights: Params) -> bool:
    """Whether queries, keys and values go from their product to their places at once."""
    return "qkv" in weights and not config.qk_norm and not cache.pool.quantized


def _operand(execution: Execution, matrix: Matrix | None) -> jnp.dtype:
    """The dtype of what `matrix` alone, if there is one, multiplies: rounded early if the product rounds it anyway."""
    rounds = matrix is not None and matrix.scale_O is None
    return execution.compute if rounds else jnp.dtype(jnp.float32)


def _add_norm(
    config: ModelConfig,
    execution: Execution,
    weights: Params,
    x_BTD: Array,
    y_BTD: Array | None,
    matrix: Matrix | None,
    *,
    native: bool,
) -> tuple[Array, Array]:
    """The sum of the stream and a layer's output, and its norm, which `matrix`, if there is one, alone multiplies."""
    if not native or y_BTD is None:
        x_BTD = _sum(execution, x_BTD, y_BTD)
        return x_BTD, constrain(execution.placement, _norm(config, weights, x_BTD), "BTD")
    flat_MD, added_MD = (part.reshape(-1, config.dim).astype(jnp.float32) for part in (x_BTD, y_BTD))
    both = norm_kernels.add_rms_norm(flat_MD, added_MD, weights["scale"], config.norm_eps, _operand(execution, matrix))
    x_BTD, normed_BTD = (part.reshape(x_BTD.shape) for part in both)
    return x_BTD, normed_BTD


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
    weights: Params, x_BTD: Array, rotary: Array | None, product: Product, config: ModelConfig, execution: Execution
) -> tuple[Array, Array, Array]:
    b, t, d = x_BTD.shape
    n, k, h = config.heads, config.num_kv_heads, config.head_size
    placement, own = execution.placement, weights
    if "qkv" in weights:
        joined_BTO = product(weights["qkv"], x_BTD)
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


def _attention_output(
    weights: Params, o_BTNH: Array, product: Product, config: ModelConfig, execution: Execution
) -> Array:
    flat_BTI = o_BTNH.reshape(*o_BTNH.shape[:2], -1)
    if "o" in weights:
        return product(weights["o"], flat_BTI)
    own = weights["attention"]
    out_BTD = linear(flat_BTI, own["o_NHD"].reshape(-1, config.dim), execution.compute)
    return out_BTD + own["o_bias_D"] if config.bias else out_BTD


def _later(cache: Cache, layer: int, positions_BT: Array) -> tuple[Later, Later]:
    """The keys and the values that the attention of a layer reads from the pool, to be fetched before."""
    if not isinstance(cache, PageCache) or layer == len(cache.pool.k):
        return (), ()
    of_rows = (cache.tables_BN.astype(jnp.int32), positions_BT[:, 0].astype(jnp.int32))
    return (cache.pool.k[layer], *of_rows), (cache.pool.v[layer], *of_rows)


def _feed_forward(
    weights: Params,
    x_BTD: Array,
    product: Product,
    config: ModelConfig,
    execution: Execution,
    keys: Later,
    values: Later,
) -> Array:
    compute, placement = execution.compute, execution.placement
    if config.experts:
        experts = weights["experts"] if "experts" in weights else weights["mlp"]
        return nnx.merge(_experts_graphdef(config), experts)(x_BTD, compute, placement)[0]
    act = activation(config.activation)
    if "into" in weights:
        if _is_gated_at_once(config, weights["into"]):
            hidden_BTF = _gated(weights["into"], x_BTD, compute, keys)
        else:
            into_BTO = product(weights["into"], x_BTD, later=keys)
            gate_BTF, *up = jnp.split(into_BTO, 2 if config.gated else 1, axis=-1)
            hidden_BTF = act(gate_BTF) * up[0] if up else act(gate_BTF)
        return product(weights["down"], hidden_BTF, later=values)
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


def _is_gated_at_once(config: ModelConfig, into: Matrix) -> bool:
    """Whether one kernel carries out the product and the gate."""
    packed = into.panels_PWN is not None and into.scale_O is None and into.bias_O is None
    return packed and config.gated and into.num_outputs % (2 * native_products.PANEL) == 0


def _gated(into: Matrix, x_BTD: Array, compute: jnp.dtype, later: Later) -> Array:
    assert into.panels_PWN is not None
    x_MD = x_BTD.reshape(-1, x_BTD.shape[-1]).astype(compute)
    y_MF = native_products.gated_product(x_MD, into.panels_PWN, into.num_outputs, later=later)
    return y_MF.reshape(*x_BTD.shape[:-1], -1)


def _is_packed(params: Params) -> bool:
    """Whether the output layer is a product that XLA fuses with nothing."""
    return "head" in params and (params["head"].panels_PWN is not None or "embedding_PWN" in params)


def _logits(params: Params, x_BTD: Array, product: Product, compute: jnp.dtype) -> Array:
    if "head" in params:
        head: Matrix = params["head"]
        if head.w_OI is None and head.panels_PWN is None:
            embedding = {"w_OI": "embedding_VD", "panels_PWN": "embedding_PWN", "words_OW": "embedding_VW"}
            head = replace(head, **{name: params.get(kept) for name, kept in embedding.items()})
        return product(head, x_BTD)
    if "head_DV" in params:
        return linear(x_BTD, params["head_DV"], compute)
    return linear_transposed(x_BTD, params["embedding_VD"], compute)
