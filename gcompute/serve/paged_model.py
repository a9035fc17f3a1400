"""The whole decoder over pages, as two programs: a mixed step of flat tokens, and several steps of decoding.

A mixed step takes chunks of prompts and single steps of decoding side by side, whatever their sizes, in one program of
T tokens. Decoding takes one token a row and step, in a loop on the device. Both choose each row's next token.
"""

from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Self

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from gcompute.config.model import ModelConfig
from gcompute.model.transformer import Execution, Params, ends, run_blocks
from gcompute.serve.adjustments import NO_TOKEN
from gcompute.serve.paged_attention import (
    Kernel,
    PoolLayer,
    attend_paged,
    attend_ragged,
    empty_pool,
    pool_heads,
    positions_of_tokens,
)
from gcompute.serve.sampler import SamplingRows, quiet, sample

Pools = tuple[PoolLayer, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class PagedShape:
    """What fixes the shapes of both programs: rows at most, pages of a row at most, pages of the pool, cells of a page.

    With rows split over data, `num_pages` is of all shares, and each share has a page 0 of its own.
    """

    model: ModelConfig
    execution: Execution
    kernel: Kernel
    rows: int
    pages_per_row: int
    num_pages: int
    page: int


@jax.tree_util.register_dataclass
@dataclass(frozen=True, slots=True, kw_only=True)
class MixedRows:
    """B rows of flat tokens, as `attend_ragged` has them; those from `num_rows` on stand for no request."""

    tables: Int[Array, "b pages"]
    lengths: Int[Array, "b"]
    cu_q_lens: Int[Array, "b+1"]
    num_rows: Int[Array, ""]
    sampling: SamplingRows


@jax.tree_util.register_dataclass
@dataclass(frozen=True, slots=True, kw_only=True)
class DecodeRows:
    """B rows of decoding; token: chosen last, not in the pages yet. lengths: cells in use. A row may stand for none."""

    tables: Int[Array, "b pages"]
    lengths: Int[Array, "b"]
    token: Int[Array, "b"]
    running: Bool[Array, "b"]
    sampling: SamplingRows


@dataclass(frozen=True, slots=True, kw_only=True)
class MixedLayer:
    """One layer's pages under a batch [1, T] of flat tokens."""

    pool: PoolLayer
    rows: MixedRows
    kernel: Kernel
    execution: Execution

    def update_and_attend(self, q_BTNH: Array, k_BTKH: Array, v_BTKH: Array) -> tuple[Array, Self]:
        o_TNH, pool = attend_ragged(
            *(q_BTNH[0], k_BTKH[0], v_BTKH[0], self.pool),
            *(self.rows.tables, self.rows.lengths, self.rows.cu_q_lens, self.rows.num_rows),
            kernel=self.kernel,
            compute=self.execution.compute,
            placement=self.execution.placement,
        )
        return o_TNH[None], replace(self, pool=pool)


@dataclass(frozen=True, slots=True, kw_only=True)
class DecodeLayer:
    """One layer's pages under a batch [B, 1] of a token a row; lengths count it."""

    pool: PoolLayer
    tables_BN: Int[Array, "b pages"]
    lengths_B: Int[Array, "b"]
    kernel: Kernel
    execution: Execution

    def update_and_attend(self, q_BTNH: Array, k_BTKH: Array, v_BTKH: Array) -> tuple[Array, Self]:
        o_BTNH, pool = attend_paged(
            *(q_BTNH, k_BTKH, v_BTKH, self.pool, self.tables_BN, self.lengths_B),
            kernel=self.kernel,
            compute=self.execution.compute,
            placement=self.execution.placement,
        )
        return o_BTNH, replace(self, pool=pool)


def empty_pools(shape: PagedShape) -> Pools:
    """Every layer's pool: a leaf a layer, as a stacked pool would be copied whole."""
    placement = shape.execution.placement
    layer = partial(
        empty_pool,
        shape.kernel,
        num_pages=shape.num_pages,
        page=shape.page,
        kv_heads=pool_heads(shape.model.num_kv_heads, placement.shape.tensor if placement is not None else 1),
        head_size=shape.model.head_size,
        dtype=shape.execution.compute,
    )
    return tuple(layer() for _ in range(shape.model.layers))


def no_rows(shape: PagedShape, kind: type[MixedRows] | type[DecodeRows]) -> MixedRows | DecodeRows:
    """Rows that stand for no request."""
    b = shape.rows
    shared = {
        "tables": jnp.zeros((b, shape.pages_per_row), jnp.int32),
        "lengths": jnp.zeros(b, jnp.int32),
        "sampling": SamplingRows(
            temperature=jnp.zeros(b, jnp.float32),
            top_k=jnp.zeros(b, jnp.int32),
            top_p=jnp.ones(b, jnp.float32),
            min_p=jnp.zeros(b, jnp.float32),
            seed=jnp.zeros((b, 2), jnp.uint32),
        ),
    }
    if kind is MixedRows:
        return MixedRows(cu_q_lens=jnp.zeros(b + 1, jnp.int32), num_rows=jnp.int32(0), **shared)
    return DecodeRows(token=jnp.zeros(b, jnp.int32), running=jnp.zeros(b, bool), **shared)


def mixed_step(
    params: Params, pools: Pools, tokens_T: Int[Array, "t"], rows: MixedRows, *, shape: PagedShape
) -> tuple[Pools, Int[Array, "b"], Float[Array, "b v"]]:
    """Read T flat tokens into their rows' pages; the pools, each row's next token and the logits that it comes from.

    The next token of a row whose prompt goes on after this chunk means nothing.
    """
    positions_T = jnp.maximum(positions_of_tokens(rows.lengths, rows.cu_q_lens, tokens_T.shape[0]), 0)
    caches = tuple(MixedLayer(pool=pool, rows=rows, kernel=shape.kernel, execution=shape.execution) for pool in pools)
    last_B = jnp.clip(rows.cu_q_lens[1:] - 1, 0)
    logits_1BV, caches = _forward(params, tokens_T[None], positions_T[None], caches, last_B, shape)
    logits_BV = logits_1BV[0]
    token_B = sample(logits_BV, rows.sampling, rows.lengths)
    real_B = jnp.arange(token_B.shape[0]) < rows.num_rows
    return tuple(cache.pool for cache in caches), jnp.where(real_B, token_B, NO_TOKEN), logits_BV


def decode_steps(
    params: Params, pools: Pools, rows: DecodeRows, num_steps: Int[Array, ""], *, shape: PagedShape, most_steps: int
) -> tuple[Pools, Int[Array, "b steps"]]:
    """`num_steps` tokens for each running row, at most `most_steps`; NO_TOKEN for the others.

    The tables of a row have a page for each cell that the steps write.
    """
    sampling = quiet(rows.sampling, rows.running)

    def take_step(step: Array, carry: tuple[Pools, Array, Array]) -> tuple[Pools, Array, Array]:
        pools, token_B, chosen_BS = carry
        at_B = rows.lengths + step
        lengths_B = jnp.where(rows.running, at_B + 1, 0)
        caches = tuple(
            DecodeLayer(
                pool=pool, tables_BN=rows.tables, lengths_B=lengths_B, kernel=shape.kernel, execution=shape.execution
            )
            for pool in pools
        )
        positions_B1 = jnp.where(rows.running, at_B, 0)[:, None]
        logits_BV, caches = _forward(params, token_B[:, None], positions_B1, caches, jnp.zeros(1, jnp.int32), shape)
        token_B = jnp.where(rows.running, sample(logits_BV[:, 0], sampling, at_B + 1), token_B)
        shown_B1 = jnp.where(rows.running, token_B, NO_TOKEN)[:, None]
        chosen_BS = jax.lax.dynamic_update_slice(chosen_BS, shown_B1, (0, step))
        return tuple(cache.pool for cache in caches), token_B, chosen_BS

    chosen_BS = jnp.full((rows.token.shape[0], most_steps), NO_TOKEN, jnp.int32)
    start = (pools, rows.token, chosen_BS)
    pools, _, chosen_BS = jax.lax.fori_loop(0, jnp.minimum(num_steps, most_steps), take_step, start)
    return pools, chosen_BS


def _forward(
    params: Params, tokens_BT: Array, positions_BT: Array, caches: tuple[Any, ...], at: Array, shape: PagedShape
) -> tuple[Array, tuple[Any, ...]]:
    """Logits at the indices `at` of T, the same of each row, and the layers' pages with the new cells."""
    model = ends(params, shape.model, shape.execution.placement)
    x_BTD, caches, _ = run_blocks(
        params["blocks"],
        model.embed(tokens_BT, positions_BT, shape.execution),
        positions_BT,
        config=shape.model,
        execution=shape.execution,
        cache=caches,
    )
    return model.unembed(jnp.take(x_BTD, at, axis=1), shape.execution), caches
