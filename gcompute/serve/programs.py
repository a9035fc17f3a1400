"""The programs of the engine, each compiled once for each of its few sizes.

admit tells a slot of its request. prefill[chunk, bucket] reads a chunk of one prompt. decode[rows, bucket] takes up to
`num_steps` steps for some rows, attending to `bucket` cells of each. swap_out[bucket] and swap_in[bucket] take pages to
the host and back. Whatever belongs to a request is data, so these and `init` are all the programs.
"""

from dataclasses import replace

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Int

from gcompute.model.transformer import Params
from gcompute.serve.adjustments import NO_TOKEN, adjust, is_end
from gcompute.serve.choices import Choices
from gcompute.serve.decoder import forward
from gcompute.serve.kv_pool import KVPool, RowCache, gather, put_back
from gcompute.serve.sampler import quiet, sample
from gcompute.serve.state import EngineShape, EngineState, Rows, put_rows, take_rows


def admit(state: EngineState, slot: Int[Array, ""], row: Rows) -> EngineState:
    """Put a request's row into its slot."""
    return replace(state, rows=put_rows(state.rows, slot[None], row))


def prefill(
    params: Params,
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
    slot_1 = slot[None]
    row = take_rows(state.rows, slot_1)
    positions_1T = (start + jnp.arange(chunk, dtype=jnp.int32))[None]
    tokens_1T = row.history.at[0, positions_1T].get(mode="fill", fill_value=0)
    logits_1V, cache = forward(
        params,
        tokens_1T,
        config=shape.model,
        execution=shape.execution,
        positions_BT=positions_1T,
        cache=gather(state.pool, table_N[None], shape.execution.compute),
        logits_at_B=num_tokens[None] - 1,
    )
    pool = put_back(state.pool, cache, table_N[None], start[None], num_tokens[None], num_cells=chunk)
    length_1 = (start + num_tokens)[None]
    last_1 = last[None]
    adjusted_1V = adjust(logits_1V, row.adjustments, row.history, length_1, last_1)
    token_1 = sample(adjusted_1V, quiet(row.sampling, last_1), length_1)
    choices = Choices.empty(1, 1, shape.model.vocab).put(
        jnp.zeros(1, jnp.int32), jnp.where(last_1, token_1, NO_TOKEN), logits_1V, row.reported & last_1
    )
    read = replace(
        row,
        history=row.history.at[0, jnp.where(last_1, length_1, row.history.shape[1])].set(token_1, mode="drop"),
        length=length_1,
        active=last_1 & (row.remaining > 1) & ~is_end(token_1, row.adjustments),
        remaining=row.remaining - last_1,
    )
    return EngineState(pool=pool, rows=put_rows(state.rows, slot_1, read)), choices


def decode(
    params: Params,
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
    what they wrote is put back at the end.
    """
    rows = take_rows(state.rows, slots_B)
    cache = gather(state.pool, tables_BN, shape.execution.compute)
    bucket, first, steps = cache.length, rows, shape.limits.decode_steps

    def more(carry: tuple[Array, Rows, RowCache, Choices]) -> Array:
        step, rows, _, _ = carry
        one_ended = jnp.any(first.active & ~rows.active)
        return (step < num_steps) & jnp.any(rows.active) & ~(until_free & one_ended)

    def take_step(carry: tuple[Array, Rows, RowCache, Choices]) -> tuple[Array, Rows, RowCache, Choices]:
        step, rows, cache, choices = carry
        active_B = rows.active
        # A row that is not active may be longer than the bucket; it must only stay inside the model's positions.
        at_B1 = jnp.minimum(rows.length, bucket - 1)[:, None]
        logits_BV, cache = forward(
            params,
            jnp.take_along_axis(rows.history, at_B1, axis=1),
            config=shape.model,
            execution=shape.execution,
            positions_BT=at_B1,
            cache=cache,
            logits_at_B=jnp.zeros_like(rows.length),
        )
        position_B = rows.length + 1
        adjusted_BV = adjust(logits_BV, rows.adjustments, rows.history[:, :bucket], position_B, active_B)
        token_B = sample(adjusted_BV, quiet(rows.sampling, active_B), position_B)
        shown_B = jnp.where(active_B, token_B, NO_TOKEN)
        choices = choices.put(jnp.full_like(position_B, step), shown_B, logits_BV, rows.reported & active_B)
        return step + 1, advance(rows, token_B[:, None], active_B.astype(jnp.int32)), cache, choices

    choices = Choices.empty(slots_B.shape[0], steps, shape.model.vocab)
    _, rows, cache, choices = jax.lax.while_loop(more, take_step, (jnp.int32(0), rows, cache, choices))
    count_B = jnp.where(first.active, rows.length - first.length, 0)
    pool = put_back(state.pool, cache, tables_BN, first.length, count_B, num_cells=steps)
    return EngineState(pool=pool, rows=put_rows(state.rows, slots_B, rows)), choices


def advance(rows: Rows, tokens_BT: Int[Array, "b t"], count_B: Int[Array, "b"]) -> Rows:
    """The rows after the first `count` of their new tokens; the last of those may end a row, no other does."""
    steps_1T = jnp.arange(tokens_BT.shape[1])[None]
    new_BT = steps_1T < count_B[:, None]
    at_BT = jnp.where(new_BT, rows.length[:, None] + 1 + steps_1T, rows.history.shape[1])
    history_BS = jax.vmap(lambda row_S, at_T, tokens_T: row_S.at[at_T].set(tokens_T, mode="drop"))(
        rows.history, at_BT, tokens_BT
    )
    last_B = jnp.take_along_axis(tokens_BT, jnp.maximum(count_B - 1, 0)[:, None], axis=1)[:, 0]
    remaining_B = rows.remaining - count_B
    ended_B = (count_B > 0) & (is_end(last_B, rows.adjustments) | (remaining_B <= 0))
    return replace(
        rows,
        history=history_BS,
        length=rows.length + count_B,
        active=rows.active & ~ended_B,
        remaining=remaining_B,
    )


def swap_out(state: EngineState, table_N: Int[Array, "n"]) -> KVPool:
    """The contents of some pages."""
    return jax.tree.map(lambda leaf: jnp.take(leaf, table_N, axis=0, mode="clip"), state.pool)


def swap_in(state: EngineState, table_N: Int[Array, "n"], saved: KVPool) -> EngineState:
    """The pool with those contents in other pages."""
    return replace(state, pool=jax.tree.map(lambda leaf, part: leaf.at[table_N].set(part), state.pool, saved))
