"""Attention over keys and values in pages: new cells are written to their pages, then each query sees its row's cells.

One interface, three ways: "xla" gathers the pages of each row and is the reference; "ragged" and "paged" are kernels
for TPUs that read pages in place (see `paged_kernels`). A layer's pool is laid out as its kernel wants it. Rows find
their cells by tables of pages; cell i of a row lies in page table[i // page] at i % page. Page 0 belongs to nobody.
"""

from collections.abc import Callable
from functools import partial
from typing import Any, Literal

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from gcompute.model.attention import attend
from gcompute.parallel.placement import Placement
from gcompute.serve import paged_kernels

Kernel = Literal["xla", "ragged", "paged"]
KERNELS: tuple[Kernel, ...] = ("xla", "ragged", "paged")
# xla: keys and values [P, K, S, H]. ragged: one array [P, S, 2K, H]. paged: keys and values [K, P, S, H].
PoolLayer = tuple[Array, ...]
# The same as letters: pages go with the rows that use them, heads with the queries' heads.
POOL_DIMS: dict[Kernel, tuple[str, ...]] = {"xla": ("BNSH", "BNSH"), "ragged": ("BSNH",), "paged": ("NBSH", "NBSH")}


def pool_heads(kv_heads: int, tensor: int) -> int:
    """Key/value heads of a pool whose heads are split `tensor` ways: where there are too few, each is kept repeatedly.

    >>> pool_heads(8, 4), pool_heads(8, 16)
    (8, 16)

    Raises:
      ValueError: neither number divides the other.
    """
    if kv_heads % tensor and tensor % kv_heads:
        raise ValueError(f"mesh tensor={tensor} and kv_heads={kv_heads}: pages need one to divide the other.")
    return max(kv_heads, tensor)


def check_kernel(kernel: Kernel, *, heads: int, kv_heads: int, head_size: int, dtype: jnp.dtype, tensor: int) -> None:
    """Refuse a model whose attention on one device the kernel does not take.

    Raises:
      ValueError: as `pool_heads`, `paged_kernels.check_ragged` and `paged_kernels.check_paged`.
    """
    on_device = pool_heads(kv_heads, tensor) // tensor
    if kernel == "ragged":
        paged_kernels.check_ragged(heads=heads // tensor, kv_heads=on_device, head_size=head_size, dtype=dtype)
    elif kernel == "paged":
        paged_kernels.check_paged(dtype)


def empty_pool(
    kernel: Kernel, *, num_pages: int, page: int, kv_heads: int, head_size: int, dtype: jnp.dtype
) -> PoolLayer:
    """One layer's pool of zeros; for the kernels with heads of whole registers."""
    p, s, k, h = num_pages, page, kv_heads, head_size
    if kernel == "xla":
        return tuple(jnp.zeros((p, k, s, h), dtype) for _ in range(2))
    h = paged_kernels.padded_head(h)
    if kernel == "ragged":
        return (jnp.zeros((p, s, 2 * k, h), dtype),)
    return tuple(jnp.zeros((k, p, s, h), dtype) for _ in range(2))


def write_cells(
    pool: PoolLayer,
    k_TKH: Float[Array, "t k h"],
    v_TKH: Float[Array, "t k h"],
    page_T: Int[Array, "t"],
    offset_T: Int[Array, "t"],
    kernel: Kernel,
) -> PoolLayer:
    """The pool with one new cell a token; those whose page is past the end are dropped."""
    t, k, h = k_TKH.shape
    pad = ((0, 0), (0, 0), (0, pool[0].shape[-1] - h))
    new = [jnp.pad(x.astype(pool[0].dtype), pad) for x in (k_TKH, v_TKH)]
    if kernel == "ragged":
        (pages,) = pool
        both = jnp.stack(new, axis=2).reshape(t, 2 * k, -1)
        return (pages.at[page_T, offset_T].set(both, mode="drop"),)
    num_pages, page = _pages_and_cells(pool, kernel)
    heads_1K, page_T1, offset_T1 = jnp.arange(k)[None], page_T[:, None], offset_T[:, None]
    outer_TK = page_T1 * k + heads_1K if kernel == "xla" else heads_1K * num_pages + page_T1
    # Left to write a slice of heads at once, the TPU compiler lays the whole pool out for that, and back to read it.
    at_TK = jnp.where(page_T1 < num_pages, outer_TK * page + offset_T1, num_pages * k * page)
    return tuple(
        pages.reshape(-1, pages.shape[-1]).at[at_TK].set(x, mode="drop").reshape(pages.shape)
        for pages, x in zip(pool, new, strict=True)
    )


def rows_of_tokens(cu_q_lens: Int[Array, "b+1"], num_tokens: int) -> Int[Array, "t"]:
    """The row of each of `num_tokens` flat tokens; row i has those from cu_q_lens[i] to cu_q_lens[i + 1]."""
    tokens_T = jnp.arange(num_tokens, dtype=jnp.int32)
    found_T = jnp.searchsorted(cu_q_lens, tokens_T, side="right").astype(jnp.int32) - 1
    return jnp.clip(found_T, 0, cu_q_lens.shape[0] - 2)


def positions_of_tokens(lengths_B: Int[Array, "b"], cu_q_lens: Int[Array, "b+1"], num_tokens: int) -> Int[Array, "t"]:
    """Where in its row each flat token stands: the tokens of a row are its last cells."""
    row_T = rows_of_tokens(cu_q_lens, num_tokens)
    return (lengths_B - cu_q_lens[1:])[row_T] + jnp.arange(num_tokens, dtype=jnp.int32)


def attend_ragged(
    q_TNH: Float[Array, "t n h"],
    k_TKH: Float[Array, "t k h"],
    v_TKH: Float[Array, "t k h"],
    pool: PoolLayer,
    tables_BN: Int[Array, "b pages"],
    lengths_B: Int[Array, "b"],
    cu_q_lens: Int[Array, "b+1"],
    num_rows: Int[Array, ""],
    *,
    kernel: Kernel,
    compute: jnp.dtype,
    placement: Placement | None = None,
) -> tuple[Float[Array, "t n h"], PoolLayer]:
    """Write the flat tokens' keys and values to their rows' pages; each query sees its row up to its own position.

    Row i < num_rows has tokens cu_q_lens[i] to cu_q_lens[i + 1], one at least, which are the last of its `lengths`
    cells: chunks of prompts and single steps of decoding side by side. Tokens after the last row are padding: nothing
    of them is written, and they get zeros.

    Raises:
      ValueError: the kernel is "paged", which takes one query a row.
    """
    if kernel == "paged":
        raise ValueError("the paged kernel takes one query a row: use ragged or xla attention for mixed batches.")

    def local(q_TNH: Array, k_TKH: Array, v_TKH: Array, pool: PoolLayer, *rows: Array) -> tuple[Array, PoolLayer]:
        return _local_ragged(q_TNH, k_TKH, v_TKH, pool, *rows, kernel=kernel, compute=compute)

    tokens = (q_TNH, *_repeated(placement, k_TKH, v_TKH))
    rows = (tables_BN, lengths_B, cu_q_lens, num_rows)
    run = _on_mesh(local, placement, kernel, tokens="_NH", rows=("", "", "", ""), pages_with_rows=False)
    return run(*tokens, pool, *rows)


def _local_ragged(
    q_TNH: Array,
    k_TKH: Array,
    v_TKH: Array,
    pool: PoolLayer,
    tables_BN: Array,
    lengths_B: Array,
    cu_q_lens: Array,
    num_rows: Array,
    *,
    kernel: Kernel,
    compute: jnp.dtype,
) -> tuple[Array, PoolLayer]:
    t = q_TNH.shape[0]
    row_T = rows_of_tokens(cu_q_lens, t)
    position_T = positions_of_tokens(lengths_B, cu_q_lens, t)
    real_T = jnp.arange(t) < cu_q_lens[num_rows]
    page_T, offset_T = _place(tables_BN[row_T], position_T, real_T, pool, kernel)
    pool = write_cells(pool, k_TKH, v_TKH, page_T, offset_T, kernel)
    if kernel == "ragged":
        o_TNH = paged_kernels.ragged(q_TNH, pool[0], tables_BN, lengths_B, cu_q_lens, num_rows, compute)
    else:
        # Each token has its row's cells to itself: as large as it is plain.
        o_TNH = _attend_gathered(q_TNH[:, None], pool, tables_BN[row_T], position_T[:, None], compute)[:, 0]
    # What the kernel leaves of padding may be anything, NaN too.
    return jnp.where(real_T[:, None, None], o_TNH.astype(q_TNH.dtype), 0), pool


def attend_paged(
    q_BTNH: Float[Array, "b t n h"],
    k_BTKH: Float[Array, "b t k h"],
    v_BTKH: Float[Array, "b t k h"],
    pool: PoolLayer,
    tables_BN: Int[Array, "b pages"],
    lengths_B: Int[Array, "b"],
    *,
    kernel: Kernel,
    compute: jnp.dtype,
    placement: Placement | None = None,
) -> tuple[Float[Array, "b t n h"], PoolLayer]:
    """Write T new cells a row at lengths - T to lengths - 1; each query sees its row up to its own position.

    A row of length 0 stands for no request: its cells go nowhere, and its output means nothing. With pages split as
    the rows are, a table's numbers count from the first page of its own share.

    Raises:
      ValueError: the kernel is "paged" and T is not 1.
    """
    t = q_BTNH.shape[1]
    if kernel == "paged" and t > 1:
        raise ValueError(f"the paged kernel takes one query a row, got {t}: use ragged or xla attention.")
    local = partial(_local_paged, kernel=kernel, compute=compute)
    run = _on_mesh(local, placement, kernel, tokens="BTNH", rows=("BS", "B"), pages_with_rows=True)
    return run(q_BTNH, *_repeated(placement, k_BTKH, v_BTKH), pool, tables_BN, lengths_B)


def _local_paged(
    q_BTNH: Array,
    k_BTKH: Array,
    v_BTKH: Array,
    pool: PoolLayer,
    tables_BN: Array,
    lengths_B: Array,
    *,
    kernel: Kernel,
    compute: jnp.dtype,
) -> tuple[Array, PoolLayer]:
    b, t, n, h = q_BTNH.shape
    # No kernel may meet a row without a cell: such a row reads the page that belongs to nobody.
    shown_B = jnp.maximum(lengths_B, t)
    position_BT = shown_B[:, None] - t + jnp.arange(t, dtype=jnp.int32)
    real_BT = jnp.broadcast_to(lengths_B[:, None] > 0, (b, t))
    page_T, offset_T = _place(
        jnp.repeat(tables_BN, t, axis=0), position_BT.reshape(-1), real_BT.reshape(-1), pool, kernel
    )
    k_TKH, v_TKH = (x.reshape(b * t, -1, h) for x in (k_BTKH, v_BTKH))
    pool = write_cells(pool, k_TKH, v_TKH, page_T, offset_T, kernel)
    if kernel == "xla":
        o_BTNH = _attend_gathered(q_BTNH, pool, tables_BN, position_BT, compute)
    elif kernel == "paged":
        k_pages, v_pages = pool
        o_BTNH = paged_kernels.paged(q_BTNH[:, 0], k_pages, v_pages, tables_BN, shown_B)[:, None]
    else:
        cu_q_lens = t * jnp.arange(b + 1, dtype=jnp.int32)
        flat_TNH = q_BTNH.reshape(b * t, n, h)
        o_TNH = paged_kernels.ragged(flat_TNH, pool[0], tables_BN, shown_B, cu_q_lens, jnp.int32(b), compute)
        o_BTNH = o_TNH.reshape(b, t, n, h)
    return o_BTNH.astype(q_BTNH.dtype), pool


def _place(
    tables_TN: Array, position_T: Array, real_T: Bool[Array, "t"], pool: PoolLayer, kernel: Kernel
) -> tuple[Array, Array]:
    """The page and the offset of each token's cell; a page past the end for what is not to be written."""
    num_pages, page = _pages_and_cells(pool, kernel)
    index_T = position_T // page
    legal_T = real_T & (index_T < tables_TN.shape[1])
    page_T = jnp.take_along_axis(tables_TN, jnp.clip(index_T, 0, tables_TN.shape[1] - 1)[:, None], axis=1)[:, 0]
    return jnp.where(legal_T, page_T, num_pages), position_T % page


def _pages_and_cells(pool: PoolLayer, kernel: Kernel) -> tuple[int, int]:
    shape, dims = pool[0].shape, POOL_DIMS[kernel][0]
    return shape[dims.index("B")], shape[dims.index("S")]


def _attend_gathered(q_BTNH: Array, pool: PoolLayer, tables_BN: Array, position_BT: Array, compute: jnp.dtype) -> Array:
    """Plain attention over the pages of each row laid side by side."""

    def cells(pages: Array) -> Array:
        rows_BNSKH = pages[tables_BN].swapaxes(2, 3)
        return rows_BNSKH.reshape(rows_BNSKH.shape[0], -1, *rows_BNSKH.shape[3:])

    k_BSKH, v_BSKH = map(cells, pool)
    visible_BTS = jnp.arange(k_BSKH.shape[1]) <= position_BT[..., None]
    return attend(q_BTNH, k_BSKH, v_BSKH, visible_BTS, compute)


def _repeated(placement: Placement | None, *arrays: Array) -> tuple[Array, ...]:
    """Key/value heads as the pool has them."""
    if placement is None:
        return arrays
    heads = arrays[0].shape[-2]
    times = pool_heads(heads, placement.shape.tensor) // heads
    return tuple(jnp.repeat(x, times, axis=-2) if times > 1 else x for x in arrays)


def _on_mesh(
    local: Callable[..., Any],
    placement: Placement | None,
    kernel: Kernel,
    *,
    tokens: str,
    rows: tuple[str, ...],
    pages_with_rows: bool,
) -> Callable[..., Any]:
    """`local` on one device, or over the mesh with heads split by tensor and rows, if they are, by data."""
    if placement is None or placement.is_local:
        return local
    pool = tuple(dims if pages_with_rows else dims.replace("B", "_") for dims in POOL_DIMS[kernel])
    # A kernel's results carry no note of the axes that they vary over, so JAX cannot check them.
    return placement.island(local, (tokens, tokens, tokens, pool, *rows), (tokens, pool), check_vma=kernel == "xla")
