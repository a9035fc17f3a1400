"""What the engine's programs keep and work with on one device, as the TPU compiler lays it out.

Weights follow from shapes and are exact. Temporaries were read from the compiler's own lists of buffers: which arrays
there are follows from shapes and tiles, and the few shares and constants below were set once. Memory is in tiles of 128
values of the last dim by 8 of the one before.

Source: libtpu 0.0.52; `gcompute/exam/compiled_serve.json` has the programs that the constants were set by.
"""

from collections.abc import Iterator
from dataclasses import dataclass

from gcompute.config.architecture import Architecture, Attention, FeedForward, Layers
from gcompute.config.mesh import MeshShape
from gcompute.hardware.chip import Chip
from gcompute.plan.sizes import attention_params

WIDE, NARROW = 4, 2
LANES, SUBLANES = 128, 8
MIB = 2**20
# Cells of a page, and the steps of a dispatch, that the engine has by default.
PAGE, STEPS = 16, 8
# What a decode step tells of a token: itself and the 20 likeliest, each with its log-probability.
REPORT_BYTES = 4 * (2 + 2 * 20)
# A request's biases, their ids and its stop ids, in three tiles' rows; its tokens are int32.
SETTINGS_BYTES = 3 * LANES * WIDE
# Of one prefill's scores, [N, T, T] in float32, device memory holds those of old cells, those of new ones, the
# probabilities of both in two bytes, and masks; one alone where VMEM has room for the others.
SCORE_ARRAYS, SCORE_ARRAYS_IN_VMEM = 4.0, 1.0
# VMEM of a chip that is not known; a leaf of the pool that is larger than a share of it is gathered in device memory.
USUAL_VMEM_BYTES = 128.0 * MIB
SHARE_OF_VMEM = 0.5
# Chips with matrix units of this side leave large gathers to their sparse cores.
ASIDE_MATRIX_DIM = 256
# The stream in float32, before and after a sum over devices.
STREAMS = 2.0
# Logits as they are, scaled, and with noise; XLA on CPU has more of them at once.
LOGIT_ARRAYS, CPU_LOGIT_ARRAYS = 3.0, 8.0
# The program itself lies in device memory: so much a layer, and of a prefill so much more.
DECODE_CODE_BYTES, PREFILL_CODE_BYTES, PREFILL_START_BYTES = 4.2 * MIB, 7.6 * MIB, 5.0 * MIB
SMALLEST_BUCKET = 32


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
    """The tokens that a prefill of `prompt` is padded to: a power of 2, at least 32, at most `room`.

    >>> bucket_of(500, 4096), bucket_of(3000, 4000)
    (512, 4000)
    """
    return min(room, max(SMALLEST_BUCKET, 1 << (prompt - 1).bit_length()))


def pool_bytes(model: Architecture, mesh: MeshShape, *, rows: int, cells: int, cache_bytes: float) -> float:
    """Bytes of the pages of `rows` requests of `cells` on one device at rest, with the page that belongs to nobody.

    Where H does not fill the lanes, pages are the last dim, in whole tiles: nothing else is padded.
    """
    total = 0.0
    for group in model.layers:
        pages = rows * -(-_windowed(group.attention, cells) // PAGE) + 1
        at_rest = pages if _fills_lanes(group.attention) else padded(pages, LANES)
        total += group.num * cache_bytes * at_rest * PAGE * _values_of_cell(group.attention, mesh.tensor)
    return total


def request_bytes(requests: int, cells: int) -> float:
    """Bytes of the tokens and settings of all requests, which are whole on every device."""
    return requests * (WIDE * cells + SETTINGS_BYTES)


def decode_workspace(
    model: Architecture,
    mesh: MeshShape,
    *,
    rows: int,
    cells: int,
    weight_bytes: float,
    cache_bytes: float,
    chip: Chip | None = None,
) -> float:
    """Bytes beside weights and pool while `rows` requests on this device decode, each attending to `cells`.

    - What a dispatch gathers: a copy of all cells of its rows in all layers, and new cells of their own in float32.
    - One leaf of it as its pages lie, before heads go first, where VMEM has no room for it or another core gathers.
    - Where H does not fill the lanes and each head has keys of its own: H is padded in that copy, and the whole pool is
      there a second time, padded, from reading it to writing it: its layout at rest is good for neither. Where heads
      share keys, that is there when the copy no longer is, less what VMEM holds; or not yet if another core gathers.
    - The projections to q, k and v, where H fills the lanes: their [D, N, H] is turned to [D, N H] once a dispatch.
    - The embedding, where D does not fill the lanes: it is turned too. Logits, one layer's scores, and the program.
    """
    leaves = [_copied(group.attention, mesh.tensor, rows, cells, cache_bytes) for group in model.layers]
    copies = sum(group.num * both for group, both in zip(model.layers, leaves, strict=True))
    one_leaf = max(leaves) / 2
    gathered = one_leaf if _gathers_aside(chip) or one_leaf > SHARE_OF_VMEM * _vmem_bytes(chip) else 0.0
    new = sum(group.num * _new_cells(group.attention, mesh.tensor, rows * STEPS) for group in model.layers)
    pools = held_pools(model, mesh, rows=rows, cells=cells, cache_bytes=cache_bytes)
    if pools == 0.0:
        tiled, largest = _turned_pools(model, mesh, rows=rows, cells=cells, cache_bytes=cache_bytes)
        turned_pools = tiled + largest / 2 if _gathers_aside(chip) else tiled - SHARE_OF_VMEM * _vmem_bytes(chip)
        copies, gathered = max(copies + gathered, turned_pools), 0.0
    turned = sum(group.num * _turned(group.attention, model.dim, mesh.tensor) for group in model.layers)
    embedding = model.vocab / mesh.tensor * padded(model.dim, LANES) if model.dim % LANES else 0.0
    logits = LOGIT_ARRAYS * WIDE * rows * model.vocab / mesh.tensor
    scores = max(WIDE * rows * cells * group.attention.heads / mesh.tensor for group in model.layers)
    code = DECODE_CODE_BYTES * model.num_layers
    return copies + gathered + new + pools + weight_bytes * (turned + embedding) + logits + scores + code


def prefill_workspace(
    model: Architecture,
    mesh: MeshShape,
    *,
    tokens: int,
    cache_bytes: float,
    chip: Chip | None,
    rows: int,
    cells: int,
) -> float:
    """Bytes beside weights and pool while a chunk of `tokens` of one prompt is read on a device of `chip`, attending to
    as many cells; its pool has room for `rows` requests of `cells`.

    - The scores of one layer's heads, [N, T, T] in float32, several times; or what the feed-forward layer makes of all
      tokens, whichever is more; the stream in float32.
    - The row's cells as they are gathered, and new keys and values of all layers, which are put back when the token is
      chosen.
    - Where H does not fill the lanes, keys and values of one layer of the pool, padded: to read them in pages; of all
      layers where each head has keys of its own, as in `decode_workspace`.
    - The embedding, where D does not fill the lanes, turned.
    """
    widest = max(_layer(group, model.dim, mesh, tokens, chip) for group in model.layers)
    kept = sum(
        group.num
        * (
            _copied(group.attention, mesh.tensor, 1, tokens, cache_bytes)
            + _new_cells(group.attention, mesh.tensor, tokens)
        )
        for group in model.layers
    )
    one_read = max(
        0.0 if _fills_lanes(group.attention) else _tiled_pool(group.attention, mesh.tensor, rows, cells, cache_bytes)
        for group in model.layers
    )
    read = held_pools(model, mesh, rows=rows, cells=cells, cache_bytes=cache_bytes) or one_read
    embedding = NARROW * model.vocab / mesh.tensor * padded(model.dim, LANES) if model.dim % LANES else 0.0
    streams = STREAMS * WIDE * tokens * model.dim
    code = PREFILL_START_BYTES + PREFILL_CODE_BYTES * model.num_layers
    return widest + kept + read + embedding + streams + code


def in_place_workspace(model: Architecture, *, rows: int, tokens: int) -> float:
    """Bytes beside weights and pool on a CPU whose kernels work on pages where they lie, at most, while logits of
    `rows` tokens are chosen from or a chunk of `tokens` is read: logits and what settings make of them, what is told of
    each token, the widest layer's rows before and after its activation, and the stream. What the kernels unfold of a
    product's rows, 4 bytes a number, needs less than the former, which is gone by then. Nothing of the pool is
    gathered, and new cells go to it at once. Held to compiled programs of dense models; of mixtures it is a count of
    shapes alone.
    """
    logits = CPU_LOGIT_ARRAYS * WIDE * rows * model.vocab
    feds = [group.feed_forward for group in model.layers]
    width = max(fed.num_up * (fed.width * fed.rows_per_token + fed.shared_width) for fed in feds)
    widest = 2 * WIDE * max(rows, tokens) * width
    reports = REPORT_BYTES * rows * STEPS
    return logits + reports + widest + STREAMS * WIDE * max(rows, tokens) * model.dim


def held_pools(model: Architecture, mesh: MeshShape, *, rows: int, cells: int, cache_bytes: float) -> float:
    """Bytes of the pool of those layers that XLA keeps a second time, padded, while a program runs."""
    return sum(
        group.num * _tiled_pool(group.attention, mesh.tensor, rows, cells, cache_bytes)
        for group in model.layers
        if _one_query_a_key(group.attention)
    )


def _turned_pools(
    model: Architecture, mesh: MeshShape, *, rows: int, cells: int, cache_bytes: float
) -> tuple[float, float]:
    """Bytes of the pool in whole tiles where H does not fill the lanes: of all layers, and of one."""
    each = [
        (group.num, _tiled_pool(group.attention, mesh.tensor, rows, cells, cache_bytes))
        for group in model.layers
        if not _fills_lanes(group.attention)
    ]
    return sum(num * both for num, both in each), max((both for _, both in each), default=0.0)


def _gathers_aside(chip: Chip | None) -> bool:
    """Whether XLA leaves large gathers to the sparse cores, which read and write device memory: on v6e it does."""
    return chip is not None and chip.matrix_dim == ASIDE_MATRIX_DIM


def _vmem_bytes(chip: Chip | None) -> float:
    return (chip.vmem_bytes if chip is not None else None) or USUAL_VMEM_BYTES


def _layer(group: Layers, dim: int, mesh: MeshShape, tokens: int, chip: Chip | None) -> float:
    attention, fed = group.attention, group.feed_forward
    one = WIDE * attention.heads / mesh.tensor * tokens**2
    arrays = SCORE_ARRAYS_IN_VMEM if one < _vmem_bytes(chip) else SCORE_ARRAYS
    width = fed.num_up * (fed.width * fed.rows_per_token / mesh.expert + fed.shared_width) / mesh.tensor
    # What experts are given, and what they give, of all experts on every device.
    exchanged = 2 * NARROW * fed.rows_per_token * dim if fed.experts else 0.0
    return max(arrays * one, tokens * (WIDE * width + exchanged))


def _fills_lanes(attention: Attention) -> bool:
    return attention.head_dim % LANES == 0 or attention.kv_rank is not None


def _one_query_a_key(attention: Attention) -> bool:
    return not _fills_lanes(attention) and attention.heads == attention.kv_heads


def _values_of_cell(attention: Attention, tensor: int) -> float:
    """Values of one layer's keys and values of one token on one device."""
    if attention.kv_rank is not None:
        return attention.kv_rank + attention.rope_dim
    return split_heads(attention.kv_heads, tensor) * (attention.head_dim + attention.value_size)


def _windowed(attention: Attention, tokens: int) -> int:
    return min(tokens, attention.window or tokens)


def _copied(attention: Attention, tensor: int, rows: int, cells: int, cache_bytes: float) -> float:
    """Bytes of one layer's keys and values in a gathered copy. With several queries a key, S is the last dim."""
    tokens = rows * _windowed(attention, cells)
    if attention.kv_rank is not None:
        return cache_bytes * tokens * padded(attention.kv_rank + attention.rope_dim, LANES)
    values = _values_of_cell(attention, tensor)
    if _one_query_a_key(attention):
        values = split_heads(attention.kv_heads, tensor) * sum(_lanes(attention))
    return cache_bytes * tokens * values


def _new_cells(attention: Attention, tensor: int, tokens: int) -> float:
    """Bytes of one layer's new cells: float32."""
    return WIDE * tokens * _values_of_cell(attention, tensor)


def _tiled_pool(attention: Attention, tensor: int, rows: int, cells: int, cache_bytes: float) -> float:
    """Bytes of one layer's pages with [K, H] last, in whole tiles of 1, 2, 4 or 8 rows."""
    kv_heads = split_heads(attention.kv_heads, tensor)
    tiled = padded(kv_heads, min(SUBLANES, 1 << (kv_heads - 1).bit_length()))
    return cache_bytes * rows * _windowed(attention, cells) * tiled * sum(_lanes(attention))


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
