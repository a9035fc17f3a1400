"""Weights laid out for serving, chosen once when they are loaded: what reads them fastest on the device that is here.

PLAIN keeps the model's own names and dims, so that the rules of `parallel/` can lay them out on a mesh. FUSED has one
matrix for q, k and v and one for gate and up, and every matrix output-major. PACKED is that in panels for the kernels
of `gcompute.serve.native`, on CPU. PAIRED is for a CPU without a compiler: it adds, for products of few rows, the same
numbers again as 32-bit words (`gcompute.serve.few_rows`), at the price of their memory.

int8: each output channel has a scale, the largest of its numbers / 127, and products round each row of activations to
int8 by its own scale too. So the products are whole numbers on every backend: on TPU they run at twice the rate of
bfloat16, on CPU they stream half the bytes, while int8 weights with wide activations are converted one by one on CPU,
which costs more than it saves. It also keeps results the same whatever the number of rows.
"""

from dataclasses import dataclass, field, replace
from enum import StrEnum
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, UInt32

from gcompute.config.model import ModelConfig
from gcompute.model.transformer import Params, unstack
from gcompute.parallel.placement import Placement
from gcompute.serve.few_rows import PACKABLE, pack
from gcompute.serve.int8 import quantize
from gcompute.serve.native import build
from gcompute.serve.native.products import pack as pack_panels
from gcompute.serve.native.products import packable

# Leaves that are operands of matrix products, whose dtype is that of the product.
MATRICES = frozenset(
    (
        *("q_DNH", "k_DKH", "v_DKH", "o_NHD", "up_DF", "gate_DF", "down_FD", "up_EDF", "gate_EDF", "down_EFD"),
        *("embedding_VD", "head_DV"),
    )
)


class Layout(StrEnum):
    PLAIN = "plain"
    FUSED = "fused"
    PACKED = "packed"
    PAIRED = "paired"

    @property
    def native(self) -> bool:
        """Whether the CPU kernels go with it: attention that reads a pool's pages where they lie, and the others."""
        return self is Layout.PACKED


def choose_layout(placement: Placement | None, backend: str, compute: jnp.dtype) -> Layout:
    """The fastest layout: on a mesh only PLAIN can be split by rules; the first call on CPU compiles the kernels."""
    if placement is not None:
        return Layout.PLAIN
    if backend != "cpu":
        return Layout.FUSED
    if compute in (jnp.float32, jnp.bfloat16) and build.available():
        return Layout.PACKED
    return Layout.PAIRED if compute == jnp.bfloat16 else Layout.FUSED


@jax.tree_util.register_dataclass
@dataclass(frozen=True, slots=True, kw_only=True)
class Matrix:
    """y = x @ w^T + bias, with w output-major: as it is, in panels, or also in words for few rows.

    All three are None for an output layer tied to the embedding. scale_O is of int8 weights.
    """

    w_OI: Array | None = None
    panels_PWN: UInt32[Array, "p w 32"] | None = None
    words_OW: UInt32[Array, "o w"] | None = None
    scale_O: Float[Array, "o"] | None = None
    bias_O: Float[Array, "o"] | None = None
    num_outputs: int = field(metadata={"static": True})


def serving_weights(
    params: Params, config: ModelConfig, *, compute: jnp.dtype, layout: Layout, int8: bool = False
) -> Params:
    """One dict of weights a layer, matrices in the compute dtype or int8, laid out as `layout` says.

    The embedding, norms, biases, routers and experts are never int8.

    Raises:
      ValueError: int8 with the plain layout, which has no place for scales.
    """
    params = jax.tree_util.tree_map_with_path(
        lambda path, leaf: leaf.astype(compute) if path[-1].key in MATRICES and not int8 else leaf,
        unstack(params, config),
    )
    if layout is Layout.PLAIN:
        if int8:
            raise ValueError("int8 weights are served on one device, not on a mesh: use bfloat16 weights there.")
        return params

    def matrix(w_OI: Array, bias_O: Array | None = None) -> Matrix:
        w_OI, scale_O = quantize(w_OI) if int8 else (w_OI, None)
        made = Matrix(w_OI=w_OI, scale_O=scale_O, bias_O=bias_O, num_outputs=w_OI.shape[0])
        if layout is Layout.PACKED and packable(w_OI.shape[1], w_OI.dtype):
            return replace(made, w_OI=None, panels_PWN=pack_panels(w_OI))
        if layout is Layout.PAIRED and w_OI.shape[1] % PACKABLE.get(w_OI.dtype.itemsize, w_OI.size + 1) == 0:
            return replace(made, words_OW=pack(w_OI))
        return made

    ends = {name: value for name, value in params.items() if name not in ("blocks", "head_DV", "embedding_VD")}
    embedding_VD = params["embedding_VD"].astype(compute)
    # To look up rows of bfloat16, XLA on CPU would convert the whole table to float32.
    in_panels = layout is Layout.PACKED and packable(config.dim, compute)
    in_words = layout is Layout.PAIRED and compute == jnp.bfloat16 and config.dim % PACKABLE[2] == 0
    if in_panels:
        ends["embedding_PWN"] = pack_panels(embedding_VD)
    elif in_words:
        ends["embedding_VW"] = pack(embedding_VD)
    if config.tied and not int8:
        # Output-major in the compute dtype, the embedding itself is the output layer: it is not kept twice.
        head = Matrix(num_outputs=config.vocab)
    else:
        head = matrix(params["embedding_VD"] if config.tied else params["head_DV"].T)
    if not in_panels and (head.w_OI is None or not in_words):
        ends["embedding_VD"] = embedding_VD
    blocks = {layer: _block(params["blocks"][layer], config, compute, matrix) for layer in range(config.layers)}
    return {**ends, "head": head, "blocks": blocks}


def _block(block: Params, config: ModelConfig, compute: jnp.dtype, matrix: Any) -> Params:
    attention, mlp = block["attention"], block["mlp"]
    d = config.dim

    def out_in(w_DNH: Array) -> Array:
        return w_DNH.reshape(d, -1).T

    def joined(biases: list[Array]) -> Array | None:
        return jnp.concatenate([bias.reshape(-1) for bias in biases]) if config.bias else None

    qkv_OD = jnp.concatenate([out_in(attention[name]) for name in ("q_DNH", "k_DKH", "v_DKH")])
    biases = [attention[name] for name in ("q_bias_NH", "k_bias_KH", "v_bias_KH") if config.bias]
    laid = {
        "attention_norm": block["attention_norm"],
        "mlp_norm": block["mlp_norm"],
        "qkv": matrix(qkv_OD, joined(biases)),
        "o": matrix(attention["o_NHD"].reshape(-1, d).T, attention["o_bias_D"] if config.bias else None),
        **{name: attention[name] for name in ("q_norm", "k_norm") if config.qk_norm},
    }
    if config.experts:
        cast = {name: leaf.astype(compute) if name in MATRICES else leaf for name, leaf in mlp.items()}
        return {**laid, "experts": cast}
    names = ("gate", "up") if config.gated else ("up",)
    into_OD = jnp.concatenate([mlp[f"{name}_DF"].T for name in names])
    return {
        **laid,
        "into": matrix(into_OD, joined([mlp[f"{name}_bias_F"] for name in names if config.bias])),
        "down": matrix(mlp["down_FD"].T, mlp["down_bias_D"] if config.bias else None),
    }
