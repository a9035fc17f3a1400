"""What the engine's programs keep and work with on one device, as the TPU compiler lays it out.

Weights follow from shapes and are exact. Temporaries were read from the compiler's own lists of buffers: which arrays
there are follows from shapes and tiles, and the few shares and constants below were set once. Memory is in tiles of 128
values of the last dim by 8 of the one before.

Source: libtpu 0.0.52; `gcompute/exam/compiled_serve.json` has the programs that the constants were set by.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from types import MappingProxyType

from gcompute.config.architecture import Architecture, Attention, FeedForward, Layers
from gcompute.config.mesh import MeshShape
from gcompute.hardware.chip import Chip
from gcompute.plan.sizes import attention_params

WIDE, NARROW = 4, 2
LANES, SUBLANES = 128, 8
MIB = 2**20
# How often a layer's scores lie in memory while their softmax is computed, by the sides of the chip's matrix units: for
# at most FUSED_KEYS keys, and for more. For a v6e (256) the compiler fuses all of the first; of the second it keeps
# product and result, a constant as large as they are to mask with, and a mask of one byte a score.
SCORE_ARRAYS = MappingProxyType({128: (2.0, 2.0), 256: (1.0, 3.25)})
FUSED_KEYS = 2048
USUAL_MATRIX_DIM = 128
# They lie there once where VMEM has room for the other, and where a device has one key/value head: a product without a
# batch of heads is fused with all of its softmax.
SHARE_OF_VMEM = 0.5
# The stream in float32, before and after a sum over devices.
STREAMS = 2.0
# Logits as they are, scaled, and with noise.
LOGIT_ARRAYS = 3.0
# The program itself lies in device memory, layer after layer, and small arrays beside it; that of a prefill grows with
# its tokens, up to so many.
DECODE_CODE_BYTES, PREFILL_CODE_BYTES = 2.6 * MIB, 6.5 * MIB
TOKENS_IN_CODE = 1024
SMALLEST_BUCKET = 16


@dataclass(frozen=True, slots=True, kw_only=True)
class Weights:
    """Values on one device: those of matrices, kept in the weights' dtype, and the rest, in float32."""

    matrices: float
    rest: float

    def num_bytes(self, matrix_bytes: float) -> float:
        return self.matrices * matrix_bytes + self.rest * WIDE


def split_heads(kv_heads: int, tensor: int) -> int:
    """Key/value heads on one device: whole where tensor does not divide them.

    >>> split_heads(8, 4), split_heads(4, 8)
    (2, 4)
    """
    return kv_heads // tensor if kv_heads % tensor == 0 else kv_heads


def weights_here(model: Architecture, mesh: MeshShape) -> Weights:
    """The weights that one device serves with: heads, F and V over tensor, experts over both axes, the rest whole."""
    dim, tensor = model.dim, mesh.tensor
    norm = dim * (2 if model.norm_bias else 1)
    matrices = model.vocab * dim * (1 if model.tied else 2) / tensor
    rest = norm + (model.context * dim if model.learned_positions else 0)
    rest += model.vocab / tensor if model.head_bias else 0
    for group in model.layers:
        attention, vectors = _attention(group.attention, dim, tensor)
        fed, fed_rest = _feed_forward(group.feed_forward, dim, mesh)
        matrices += group.num * (attention + fed)
        rest += group.num * (vectors + fed_rest + model.norms_per_layer * norm)
    return Weights(matrices=matrices, rest=rest)


def _attention(attention: Attention, dim: int, tensor: int) -> tuple[float, float]:
    """(values of matrices, of vectors) of one layer's attention on one device."""
    whole, vectors = attention_params(attention, dim)
    if attention.kv_rank is not None:
        # What makes the latent vectors is whole on every device.
        down = dim * (attention.kv_rank + attention.rope_dim + (attention.q_rank or 0))
        return down + (whole - down) / tensor, vectors
    head, value = attention.head_dim, attention.value_size
    heads, kv_heads = attention.heads / tensor, split_heads(attention.kv_heads, tensor)
    keys_values = kv_heads * (head + value)
    vectors = heads * head + keys_values if attention.bias else 0
    vectors += (dim if attention.output_bias else 0) + (2 * head if attention.qk_norm else 0)
    return dim * (heads * (head + value) + keys_values), vectors


def _feed_forward(fed: FeedForward, dim: int, mesh: MeshShape) -> tuple[float, float]:
    """(values of matrices, of biases and router) of one feed-forward layer on one device."""
    each = (fed.num_up + 1) * dim / mesh.tensor
    if fed.experts is None:
        biases = fed.num_up * fed.width / mesh.tensor + dim if fed.bias else 0
        return each * (fed.width + fed.shared_width), biases
    return each * (fed.experts / mesh.expert * fed.width + fed.shared_width), fed.experts * dim / mesh.expert


def bucket_of(prompt: int, room: int) -> int:
    """The tokens that a prefill of `prompt` is padded to: a power of 2, at least 16, at most `room`.

    >>> bucket_of(500, 4096), bucket_of(3000, 4000)
    (512, 4000)
    """
    return min(room, max(SMALLEST_BUCKET, 1 << (prompt - 1).bit_length()))


def decode_workspace(
    model: Architecture, mesh: MeshShape, *, rows: int, cells: int, weight_bytes: float, cache_bytes: float
) -> float:
    """Bytes beside weights and cache while `rows` requests on this device decode, each attending to `cells`.

    - The cache again, where H does not fill the lanes: at rest S is the last dim and nothing is padded; in the loop H
      is, padded to 128, and K to its tile.
    - The projections to q, k and v, where H does: their [D, N, H] is turned to [D, N H] once a dispatch.
    - The embedding, where D does not fill the lanes: it is turned too. Logits, and the program.
    """
    copies = sum(group.num * _copied_cache(group, mesh.tensor, rows * cells, cache_bytes) for group in model.layers)
    turned = sum(group.num * _turned(group.attention, model.dim, mesh.tensor) for group in model.layers)
    embedding = model.vocab / mesh.tensor * padded(model.dim, LANES) if model.dim % LANES else 0.0
    logits = LOGIT_ARRAYS * WIDE * rows * model.vocab / mesh.tensor
    code = DECODE_CODE_BYTES * model.num_layers
    return copies + weight_bytes * (turned + embedding) + logits + code


def prefill_workspace(
    model: Architecture, mesh: MeshShape, *, tokens: int, cache_bytes: float, chip: Chip | None
) -> float:
    """Bytes beside weights and cache while one prompt, padded to `tokens`, is read on a device of `chip`.

    - The scores of one layer's heads, [N, T, T] in float32, and a mask; or what the feed-forward layer makes of all
      tokens, whichever is more; the stream in float32.
    - New keys and values of all layers: XLA puts off writing them into the cache.
    """
    widest = max(_layer(group, model.dim, mesh, tokens, chip) for group in model.layers)
    kept = sum(group.num * _padded_cache(group.attention, mesh.tensor, tokens, cache_bytes) for group in model.layers)
    streams = STREAMS * WIDE * tokens * model.dim
    code = PREFILL_CODE_BYTES * min(1.0, tokens / TOKENS_IN_CODE) * model.num_layers
    return widest + kept + streams + code


def _layer(group: Layers, dim: int, mesh: MeshShape, tokens: int, chip: Chip | None) -> float:
    attention, fed = group.attention, group.feed_forward
    one = WIDE * attention.heads / mesh.tensor * tokens**2
    vmem_bytes = (chip.vmem_bytes if chip is not None else None) or 0.0
    side = (chip.matrix_dim if chip is not None else None) or USUAL_MATRIX_DIM
    short, long = SCORE_ARRAYS.get(side, SCORE_ARRAYS[USUAL_MATRIX_DIM])
    once = one <= SHARE_OF_VMEM * vmem_bytes or split_heads(attention.kv_heads, mesh.tensor) == 1
    arrays = 1.0 if once else long if tokens > FUSED_KEYS else short
    mask = attention.heads / attention.kv_heads * tokens**2
    width = fed.num_up * (fed.width * fed.rows_per_token / mesh.expert + fed.shared_width) / mesh.tensor
    # What experts are given, and what they give, of all experts on every device.
    exchanged = 2 * NARROW * fed.rows_per_token * dim if fed.experts else 0.0
    return max(arrays * one + mask, tokens * (WIDE * width + exchanged))


def _copied_cache(group: Layers, tensor: int, tokens: int, cache_bytes: float) -> float:
    fills_lanes = group.attention.head_dim % LANES == 0 or group.attention.kv_rank is not None
    return 0.0 if fills_lanes else _padded_cache(group.attention, tensor, tokens, cache_bytes)


def _padded_cache(attention: Attention, tensor: int, tokens: int, cache_bytes: float) -> float:
    """Bytes of one layer's keys and values with H last, in whole tiles."""
    if attention.kv_rank is not None:
        return cache_bytes * tokens * padded(attention.kv_rank + attention.rope_dim, LANES)
    kv_heads = split_heads(attention.kv_heads, tensor)
    # A tile has 1, 2, 4 or 8 rows.
    rows = padded(kv_heads, min(SUBLANES, 1 << (kv_heads - 1).bit_length()))
    window = attention.window or tokens
    return cache_bytes * min(tokens, window) * rows * sum(_lanes(attention))


def _lanes(attention: Attention) -> Iterator[int]:
    yield padded(attention.head_dim, LANES)
    yield padded(attention.value_size, LANES)


def _turned(attention: Attention, dim: int, tensor: int) -> float:
    """Values of the projections of one layer that are turned; with one head there is nothing to turn."""
    if attention.head_dim % LANES or attention.kv_rank is not None:
        return 0.0
    heads, kv_heads = attention.heads // tensor, split_heads(attention.kv_heads, tensor)
    turned = heads * attention.head_dim if heads > 1 else 0
    turned += kv_heads * (attention.head_dim + attention.value_size) if kv_heads > 1 else 0
    return float(dim * turned)


def padded(size: int, tile: int) -> int:
    """`size` in whole tiles.

    >>> padded(1600, 128)
    1664
    """
    return -(-size // tile) * tile
