"""The attention kernels over pages that JAX ships for TPUs: what they take, and how they are called.

Both read keys and values where they lie in the pool, page by page through fast memory. "ragged" takes rows of any
number of queries, "paged" one query a row. They are the same in JAX 0.7.2 to 0.10.

Source: Kwon et al. 2023 (PagedAttention); jax.experimental.pallas.ops.tpu.{ragged_paged_attention,paged_attention}.
"""

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

# Both kernels work on whole registers of this many lanes; a smaller head is padded to it with zeros.
LANES = 128
SUBLANES = 8
WORD_BYTES = 4
# Queries a block, and pages a block by the length of a table: JAX's own tables for v5 and v6, whose lookup needs a TPU.
QUERIES = 32
FEWEST_PAGES, MOST_PAGES, CELLS_PER_PAGE_OF_A_BLOCK = 4, 16, 256


def padded_head(head_size: int) -> int:
    """H as the kernels have it in the pool.

    >>> padded_head(64), padded_head(128), padded_head(192)
    (128, 128, 256)
    """
    return -(-head_size // LANES) * LANES


def check_ragged(*, heads: int, kv_heads: int, head_size: int, dtype: jnp.dtype) -> None:
    """Refuse what the ragged kernel does not take, `heads` and `kv_heads` being those of one device.

    Raises:
      ValueError: the head is too large, or the heads do not fill registers.
    """
    other = "Use xla attention, or paged for decoding"
    if head_size > LANES:
        raise ValueError(
            f"the ragged kernel takes heads of up to {LANES} numbers, and these have {head_size}. {other}."
        )
    packing = WORD_BYTES // jnp.dtype(dtype).itemsize
    rows = 2 * kv_heads / packing
    if not (rows in (1, 2, 4) or rows % SUBLANES == 0):
        legal = ", ".join(str(n * packing // 2) for n in (1, 2, 4, 8) if n * packing % 2 == 0)
        raise ValueError(
            f"the ragged kernel does not take kv_heads={kv_heads} of {jnp.dtype(dtype)} on a device."
            f" Legal: {legal} or a multiple of {SUBLANES * packing // 2}. Use another tensor size. {other}."
        )
    # It takes a register's worth of key/value heads at a time, and then the queries of these must fill whole ones too.
    at_a_time = SUBLANES * packing // 2
    if kv_heads > at_a_time and at_a_time * (heads // kv_heads) % SUBLANES:
        raise ValueError(
            f"the ragged kernel does not take heads={heads} over kv_heads={kv_heads} of {jnp.dtype(dtype)} on a device:"
            f" {at_a_time * (heads // kv_heads)} at a time, which is no multiple of {SUBLANES}. {other}."
        )


def check_paged(dtype: jnp.dtype) -> None:
    """Refuse what the paged kernel would round.

    Raises:
      ValueError: keys and values are wider than bfloat16.
    """
    if jnp.dtype(dtype) != jnp.bfloat16:
        raise ValueError(f"the paged kernel rounds keys and values to bfloat16, and these are {jnp.dtype(dtype)}.")


def pages_of_a_block(pages: int, page: int) -> int:
    """Pages that the ragged kernel reads at a time, of tables of `pages` of `page` cells.

    >>> [pages_of_a_block(pages, 16) for pages in (2, 64, 128, 1024)]
    [2, 4, 8, 16]
    """
    return min(pages, max(FEWEST_PAGES, min(MOST_PAGES, pages * page // CELLS_PER_PAGE_OF_A_BLOCK)))


def ragged(
    q_TNH: Float[Array, "t n h"],
    pages: Float[Array, "p s two_k lanes"],
    tables_BN: Int[Array, "b pages"],
    lengths_B: Int[Array, "b"],
    cu_q_lens: Int[Array, "b+1"],
    num_rows: Int[Array, ""],
    compute: jnp.dtype,
) -> Float[Array, "t n h"]:
    """Attention of flat queries to their rows' cells; key head i lies at 2 i of a cell and value head i after it.

    Every row below `num_rows` has a query and a cell at least: the kernel would wait forever for the pages of another.
    """
    from jax.experimental.pallas.ops.tpu.ragged_paged_attention import ragged_paged_attention

    t, _, h = q_TNH.shape
    padded = jnp.pad(q_TNH.astype(compute), ((0, 0), (0, 0), (0, pages.shape[-1] - h)))
    o = ragged_paged_attention(
        padded,
        pages,
        lengths_B,
        tables_BN,
        cu_q_lens,
        num_rows[None],
        sm_scale=h**-0.5,
        num_kv_pages_per_block=pages_of_a_block(tables_BN.shape[1], pages.shape[1]),
        num_queries_per_block=min(QUERIES, t),
    )
    return o[..., :h]


def paged(
    q_BNH: Float[Array, "b n h"],
    k_pages: Float[Array, "k p s lanes"],
    v_pages: Float[Array, "k p s lanes"],
    tables_BN: Int[Array, "b pages"],
    lengths_B: Int[Array, "b"],
) -> Float[Array, "b n h"]:
    """Attention of one query a row, kept in float32, to the cells of its row."""
    from jax.experimental.pallas.ops.tpu.paged_attention import paged_attention

    h, (_, _, page, lanes), num = q_BNH.shape[-1], k_pages.shape, tables_BN.shape[1]
    wanted = pages_of_a_block(num, page)
    scaled = jnp.pad(q_BNH.astype(jnp.float32) * h**-0.5, ((0, 0), (0, 0), (0, lanes - h)))
    block = max(size for size in range(1, wanted + 1) if num % size == 0)
    return paged_attention(scaled, k_pages, v_pages, lengths_B, tables_BN, pages_per_compute_block=block)[..., :h]
