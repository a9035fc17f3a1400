"""Causal attention over whole sequences by the kernel that JAX ships for TPUs."""

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

# Tiles of queries and keys, in tokens: those of MaxText's published TPU configurations, bounded by the sequence.
BLOCK = 512
# The kernel works on whole registers of this many lanes.
LANES = 128


def _kernel(heads: int, seq: int, interpret: bool) -> Any:
    # Imported where it is used: it needs Pallas for TPU, which some installations lack.
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as splash
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask as masks

    block = next(size for size in (BLOCK, 256, LANES) if seq % size == 0)
    sizes = splash.BlockSizes(
        block_q=block,
        block_kv=block,
        block_kv_compute=block,
        block_q_dkv=block,
        block_kv_dkv=block,
        block_kv_dkv_compute=block,
        block_q_dq=block,
        block_kv_dq=block,
    )
    mask = masks.MultiHeadMask([masks.CausalMask((seq, seq))] * heads)
    return splash.make_splash_mha(
        mask=mask, block_sizes=sizes, head_shards=1, q_seq_shards=1, is_mqa=False, interpret=interpret
    )


def fits_splash(seq: int) -> bool:
    """Whether the kernel takes sequences of this many tokens.

    >>> fits_splash(2048), fits_splash(100)
    (True, False)
    """
    return seq % LANES == 0


def splash_attention(
    q_BTNH: Float[Array, "b t n h"],
    k_BTKH: Float[Array, "b t k h"],
    v_BTKH: Float[Array, "b t k h"],
    compute: jnp.dtype,
    *,
    interpret: bool = False,
) -> Float[Array, "b t n h"]:
    """softmax(q k^T / sqrt(H)) v over the keys up to each query, no array of scores ever whole.

    Per-device code: a kernel is not partitioned, so on a mesh this runs inside an island.

    Args:
      interpret: run the kernel's steps without a TPU, to test it.

    Source: Dao et al. 2022 (FlashAttention), algorithm 1; jax.experimental.pallas.ops.tpu.splash_attention.
    """
    _, seq, heads, head = q_BTNH.shape
    kernel = _kernel(heads, seq, interpret)
    q, k, v = ((x.astype(compute)).swapaxes(1, 2) for x in (q_BTNH * head**-0.5, k_BTKH, v_BTKH))
    return jax.vmap(kernel)(q, k, v).swapaxes(1, 2).astype(q_BTNH.dtype)
