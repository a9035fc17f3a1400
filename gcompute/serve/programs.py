"""The programs of the engine, each compiled once for each of its few sizes.

admit tells a slot of its request, and bind what its grammar allows next. prefill[chunk, bucket] reads a chunk of one
prompt; score[chunk, bucket] also tells how likely each of its tokens was. decode[rows, bucket] takes up to `num_steps`
steps for some rows, attending to `bucket` cells of each; speculate[rows, bucket] does so with drafts (see
`speculation`). swap_out[bucket] and swap_in[bucket] take pages to the host and back. Whatever belongs to a request is
data, so these and `init` are all the programs.
"""

from dataclasses import replace

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Int, UInt32

from gcompute.config.model import ModelConfig
from gcompute.model.transformer import Params
from gcompute.serve.adjustments import NO_TOKEN, hold_unused, is_end
from gcompute.serve.choices import Choices
from gcompute.serve.decoder import forward
from gcompute.serve.kv_pool import KVPool, RowCache
from gcompute.serve.next_token import choose
from gcompute.serve.page_cache import PageCache
from gcompute.serve.placement import one_row
from gcompute.serve.shares import gather, put_back
from gcompute.serve.state import (
    EngineShape,
    EngineState,
    Rows,
    Weights,
    put_progress,
    put_rows,
    take_rows,
    with_masks,
    with_tokens,
)

Carry = tuple[Array, Rows, RowCache | PageCache, Choices]


def admit(state: EngineState, slot: Int[Array, ""], row: Rows) -> EngineState:
    """Put a request's row into its slot."""
    return replace(state, rows=put_rows(state.rows, slot[None], row))


def bind(state: EngineState, slots_B: Int[Array, "b"], allowed_BW: UInt32[Array, "b w"]) -> EngineState:
    """Tell slots which tokens their grammars allow next."""
    return replace(state, rows=with_masks(state.rows, slots_B, allowed_BW))


def prefill(
    weights: Weights,
    state: EngineState,
    slot: Int[Array, ""],
    table_N: Int[Array, "n"],
    start: Int[Array, ""],
    num_tokens: Int[Array, ""],
    last: Bool[Array, ""],
    *,
    shape: EngineShape,
    chunk: int,
) -> tuple[EngineState, Choices]:
    """Read a chunk of a row's tokens into its pages and, if it is the last, choose the next token.

    The chunk is padded with what lies behind it; the padding's keys and values are not put back.
    """
    end_1 = num_tokens[None] - 1
    logits_1V, state = _read(weights, state, slot, table_N, start, num_tokens, end_1, shape=shape, chunk=chunk)
    return _choose_next(state, slot, start + num_tokens, last, logits_1V, shape=shape)


def score(
    weights: Weights,
    state: EngineState,
    slot: Int[Array, ""],
    table_N: Int[Array, "n"],
    start: Int[Array, ""],
    num_tokens: Int[Array, ""],
    last: Bool[Array, ""],
    *,
    shape: EngineShape,
    chunk: int,
) -> tuple[EngineState, tuple[Choices, Choices]]:
    """`prefill`, and in a row of `chunk` places how likely the model held each token of the prompt that comes next."""
    logits_1TV, state = _read(weights, state, slot, table_N, start, num_tokens, None, shape=shape, chunk=chunk)
    row, at_T = take_rows(state.rows, slot[None]), jnp.arange(chunk, dtype=jnp.int32)
    next_T = start + at_T + 1
    known_T = (at_T < num_tokens) & (next_T < row.adjustments.num_prompt)
    scored = Choices.empty(1, chunk, shape.model.vocab).put(
        jnp.zeros_like(at_T),
        at_T,
        jnp.where(known_T, row.history.at[0, next_T].get(mode="fill", fill_value=0), NO_TOKEN),
        logits_1TV[0],
        known_T,
    )
    logits_1V = jnp.take_along_axis(logits_1TV, num_tokens[None, None, None] - 1, axis=1)[:, 0]
    state, choices = _choose_next(state, slot, start + num_tokens, last, logits_1V, shape=shape)
    return state, (choices, scored)


def _read(
    weights: Weights,
    state: EngineState,
    slot: Array,
    table_N: Array,
    start: Array,
    num_tokens: Array,
    logits_at_1: Array | None,
    *,
    shape: EngineShape,
    chunk: int,
) -> tuple[Array, EngineState]:
    """The logits of one place of a chunk, or of all, and the state with the chunk's keys and values."""
    slot_1, table_1N, execution = slot[None], table_N[None], one_row(shape.execution)
    row = take_rows(state.rows, slot_1)
    positions_1T = (start + jnp.arange(chunk, dtype=jnp.int32))[None]
    tokens_1T = row.history.at[0, positions_1T].get(mode="fill", fill_value=0)

    def read(params: Params, config: ModelConfig, pool: KVPool, at_1: Array | None) -> tuple[Array, KVPool]:
        logits, cache = forward(
            params,
            tokens_1T,
            config=config,
            execution=execution,
            positions_BT=positions_1T,
            cache=gather(pool, table_1N, chunk, execution=execution, layout=shape.layout, shares=1),
            logits_at_B=at_1,
            kept_B=num_tokens[None],
        )
        logits = hold_unused(logits, shape.unused)
        return logits, put_back(
            pool,
            cache,
            tables_BN=table_1N,
            start_B=start[None],
            count_B=num_tokens[None],
            num_cells=chunk,
            shares=1,
            after=jnp.argmax(logits, axis=-1),
        )

    logits, pool = read(weights.model, shape.model, state.pool, logits_at_1)
    draft_pool = state.draft_pool
    if shape.draft is not None:
        assert weights.draft is not None
        assert draft_pool is not None
        _, draft_pool = read(weights.draft, shape.draft, draft_pool, num_tokens[None] - 1)
    return logits, replace(state, pool=pool, draft_pool=draft_pool)


def _choose_next(
    state: EngineState, slot: Array, length: Array, last: Array, logits_1V: Array, *, shape: EngineShape
) -> tuple[EngineState, Choices]:
    """The token after what was read of a row, if that was the last of it; NO_TOKEN if not."""
    slot_1, length_1, last_1 = slot[None], length[None], last[None]
    row = take_rows(state.rows, slot_1)
    token_1 = choose(logits_1V, row, row.history, length_1, last_1, native=shape.layout.native)
    zero_1 = jnp.zeros(1, jnp.int32)
    choices = Choices.empty(1, 1, shape.model.vocab).put(
        zero_1, zero_1, jnp.where(last_1, token_1, NO_TOKEN), logits_1V, row.reported & last_1
    )
    # One cell less than what was read, as if the token were chosen by a step: `advance` counts it.
    row = advance(replace(row, length=length_1 - last_1, active=last_1), token_1[:, None], last_1.astype(jnp.int32))
    return replace(state, rows=put_progress(state.rows, slot_1, row)), choices


def decode(
    weights: Weights,
    state: EngineState,
    slots_B: Int[Array, "b"],
    tables_BN: Int[Array, "b n"],
    num_steps: Int[Array, ""],
    until_free: Bool[Array, ""],
    *,
    shape: EngineShape,
) -> tuple[EngineState, Choices]:
    """Up to `num_steps` tokens for the active rows of some slots; NO_TOKEN where none was chosen.

    A step reads the row's last token, at position `length`, and chooses the one at `length + 1`. The loop ends early
    when no row is active, and with `until_free` as soon as one ends. The steps work on a copy of the rows' pages, and
    what they wrote is put back at the end, or on the pages themselves.
    """
    rows = take_rows(state.rows, slots_B)
    execution, shares, steps = shape.execution, shape.limits.shares, shape.limits.decode_steps
    cache = gather(state.pool, tables_BN, steps, execution=execution, layout=shape.layout, shares=shares)
    bucket, first = cache.length, rows

    def more(carry: Carry) -> Array:
        step, rows, _, _ = carry
        one_ended = jnp.any(first.active & ~rows.active)
        return (step < num_steps) & jnp.any(rows.active) & ~(until_free & one_ended)

    def take_step(carry: Carry) -> Carry:
        step, rows, cache, choices = carry
        active_B = rows.active
        # A row that is not active may be longer than the bucket; it must only stay inside the model's positions.
        at_B1 = jnp.minimum(rows.length, bucket - 1)[:, None]
        logits_BV, cache = forward(
            weights.model,
            jnp.take_along_axis(rows.history, at_B1, axis=1),
            config=shape.model,
            execution=execution,
            positions_BT=at_B1,
            cache=cache,
            logits_at_B=jnp.zeros_like(rows.length),
            ordered=shape.limits.deterministic,
            kept_B=active_B,
        )
        logits_BV = hold_unused(logits_BV, shape.unused)
        position_B = rows.length + 1
        tokens_BS = rows.history[:, :bucket]
        token_B = choose(logits_BV, rows, tokens_BS, position_B, active_B, native=shape.layout.native)
        shown_B = jnp.where(active_B, token_B, NO_TOKEN)
        which_B, at_B = jnp.arange(slots_B.shape[0]), jnp.full_like(position_B, step)
        choices = choices.put(which_B, at_B, shown_B, logits_BV, rows.reported & active_B)
        return step + 1, advance(rows, token_B[:, None], active_B.astype(jnp.int32)), cache, choices

    choices = Choices.empty(slots_B.shape[0], steps, shape.model.vocab)
    taken, rows, cache, choices = jax.lax.while_loop(more, take_step, (jnp.int32(0), rows, cache, choices))
    count_B = jnp.where(first.active, rows.length - first.length, 0)
    pool = put_back(
        state.pool,
        cache,
        tables_BN=tables_BN,
        start_B=first.length,
        count_B=count_B,
        num_cells=steps,
        shares=shares,
    )
    return replace(state, pool=pool, rows=put_progress(state.rows, slots_B, rows)), replace(choices, steps=taken)


def advance(rows: Rows, tokens_BT: Int[Array, "b t"], count_B: Int[Array, "b"]) -> Rows:
    """The rows after the first `count` of their new tokens; the last of those may end a row, no other does."""
    steps_1T = jnp.arange(tokens_BT.shape[1])[None]
    new_BT = steps_1T < count_B[:, None]
    at_BT = jnp.where(new_BT, rows.length[:, None] + 1 + steps_1T, rows.history.shape[1])
    last_B = jnp.take_along_axis(tokens_BT, jnp.maximum(count_B - 1, 0)[:, None], axis=1)[:, 0]
    remaining_B = rows.remaining - count_B
    ended_B = (count_B > 0) & (is_end(last_B, rows.adjustments) | (remaining_B <= 0))
    return replace(
        rows,
        history=with_tokens(rows.history, at_BT, tokens_BT),
        length=rows.length + count_B,
        active=rows.active & ~ended_B,
        remaining=remaining_B,
    )


Saved = tuple[KVPool, KVPool | None]


def swap_out(state: EngineState, table_N: Int[Array, "n"]) -> Saved:
    """The contents of some pages."""
    pools = (state.pool, state.draft_pool)
    return jax.tree.map(lambda leaf: jnp.take(leaf, table_N, axis=0, mode="clip"), pools)


def swap_in(state: EngineState, table_N: Int[Array, "n"], saved: Saved) -> EngineState:
    """The pools with those contents in other pages."""
    pools = (state.pool, state.draft_pool)
    pool, draft_pool = jax.tree.map(lambda leaf, part: leaf.at[table_N].set(part), pools, saved)
    return replace(state, pool=pool, draft_pool=draft_pool)
