"""Speculative decoding: propose the next few tokens cheaply, let the model judge all of them at once.

The token of every position is a function of its logits and its key alone (see `sampler`), so a draft is accepted if
and only if it is the token that plain decoding would have chosen there, greedy or sampled. The output is that of plain
decoding, not only its distribution. A draft model draws with the same keys, so that it proposes what the model would
draw wherever their distributions agree.

Source: Leviathan et al. 2023 (speculative decoding); Saxena 2023 (n-gram lookup). Keys in common are a Gumbel coupling:
Daliri et al. 2024, "Coupling without communication".
"""

from dataclasses import replace
from functools import partial

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Int

from gcompute.serve.adjustments import NO_TOKEN, hold_unused, is_end
from gcompute.serve.choices import Choices
from gcompute.serve.decoder import forward
from gcompute.serve.kv_pool import RowCache
from gcompute.serve.next_token import choose
from gcompute.serve.page_cache import PageCache
from gcompute.serve.programs import advance
from gcompute.serve.shares import gather, put_back
from gcompute.serve.state import EngineShape, EngineState, Rows, Weights, put_progress, take_rows, with_tokens

# A proposal follows the latest place where so many of the last tokens, or fewer, stood before.
LONGEST_NGRAM = 3

Cache = RowCache | PageCache
Carry = tuple[Array, Rows, Cache, Cache | None, Choices, Array]


def propose_by_ngram(history_BS: Int[Array, "b s"], length_B: Int[Array, "b"], num: int) -> Int[Array, "b k"]:
    """What followed the last tokens when they stood in the text before: the longest match, and the latest of those.

    history[length] is the last token. Without a match the proposal is whatever stands at the beginning.
    """
    cells_1S = jnp.arange(history_BS.shape[1])[None]
    matched_BS = cells_1S < length_B[:, None]
    score_BS = jnp.zeros(history_BS.shape, jnp.int32)
    for back in range(LONGEST_NGRAM):
        wanted_B1 = jnp.take_along_axis(history_BS, jnp.maximum(length_B - back, 0)[:, None], axis=1)
        before_BS = jnp.pad(history_BS, ((0, 0), (back, 0)), constant_values=NO_TOKEN)[:, : history_BS.shape[1]]
        matched_BS &= before_BS == wanted_B1
        score_BS += matched_BS
    at_B = jnp.argmax(jnp.where(score_BS > 0, score_BS * history_BS.shape[1] + cells_1S, -1), axis=1)
    following_BK = at_B[:, None] + 1 + jnp.arange(num)[None]
    # A match close to the end goes on with itself, as a repeating text does.
    period_B1 = jnp.maximum(length_B - at_B, 1)[:, None]
    over_BK = jnp.maximum(following_BK - length_B[:, None] - 1, 0) // period_B1 + 1
    following_BK = jnp.where(following_BK > length_B[:, None], following_BK - over_BK * period_B1, following_BK)
    return jnp.take_along_axis(history_BS, jnp.maximum(following_BK, 0), axis=1)


def speculate(
    weights: Weights,
    state: EngineState,
    slots_B: Int[Array, "b"],
    tables_BN: Int[Array, "b n"],
    num_rounds: Int[Array, ""],
    until_free: Bool[Array, ""],
    *,
    shape: EngineShape,
) -> tuple[EngineState, Choices]:
    """As `programs.decode`, but a step, here a round, gives a row up to `drafts` + 1 tokens.

    A round reads the last token and its drafts, and keeps what it would have chosen one by one. Cells that rejected
    drafts wrote lie behind `length`. A row whose next round would not fit the bucket rests.
    """
    k, rounds = shape.limits.drafts, shape.limits.decode_steps
    b, t = slots_B.shape[0], shape.limits.drafts + 1
    execution, shares = shape.execution, shape.limits.shares
    read = partial(
        gather,
        tables_BN=tables_BN,
        num_cells=rounds * t,
        execution=execution,
        layout=shape.layout,
        shares=shares,
    )
    rows = take_rows(state.rows, slots_B)
    cache = read(state.pool)
    draft_cache = None if state.draft_pool is None else read(state.draft_pool)
    bucket, first = cache.length, rows
    steps_1T = jnp.arange(t, dtype=jnp.int32)[None]

    def awake(rows: Rows) -> Array:
        return rows.active & (rows.length + t <= bucket)

    def more(carry: Carry) -> Array:
        step, rows, *_ = carry
        one_ended = jnp.any(first.active & ~rows.active)
        return (step < num_rounds) & jnp.any(awake(rows)) & ~(until_free & one_ended)

    def take_round(carry: Carry) -> Carry:
        step, rows, cache, draft_cache, choices, num_B = carry
        awake_B = awake(rows)
        # A row that rests writes past the end, where nothing is kept.
        at_BT = jnp.where(awake_B[:, None], rows.length[:, None] + steps_1T, bucket)
        if draft_cache is None:
            drafts_BK = propose_by_ngram(rows.history, rows.length, k)
        else:
            drafts_BK, draft_cache = _propose_by_model(weights, rows, draft_cache, at_BT, awake_B, shape=shape)
        token_B1 = jnp.take_along_axis(rows.history, rows.length[:, None], axis=1)
        tokens_BT = jnp.concatenate([token_B1, drafts_BK], axis=1)
        logits_BTV, cache = forward(
            weights.model,
            tokens_BT,
            config=shape.model,
            execution=execution,
            positions_BT=at_BT,
            cache=cache,
        )
        logits_BTV = hold_unused(logits_BTV, shape.unused)
        rows = replace(rows, history=_with_drafts(rows, drafts_BK))
        # Each position is judged as a row of its own, in the light of the drafts before it.
        each = jax.tree.map(lambda leaf: jnp.repeat(leaf, t, axis=0), rows)
        logits_MV, awake_M = logits_BTV.reshape(b * t, -1), jnp.repeat(awake_B, t)
        position_M = (rows.length[:, None] + 1 + steps_1T).reshape(-1)
        chosen_M = choose(logits_MV, each, each.history, position_M, awake_M, native=shape.layout.native)
        chosen_BT = chosen_M.reshape(b, t)
        agreed_B = jnp.sum(jnp.cumprod(chosen_BT[:, :k] == drafts_BK, axis=1), axis=1)
        ends_BT = is_end(chosen_M, each.adjustments).reshape(b, t)
        to_end_B = jnp.where(jnp.any(ends_BT, axis=1), jnp.argmax(ends_BT, axis=1), t) + 1
        count_B = jnp.minimum(jnp.minimum(agreed_B + 1, rows.remaining), to_end_B)
        count_B = jnp.where(awake_B, count_B, 0).astype(jnp.int32)
        kept_BT = steps_1T < count_B[:, None]
        choices = choices.put(
            jnp.repeat(jnp.arange(b), t),
            jnp.where(kept_BT, num_B[:, None] + steps_1T, rounds * t).reshape(-1),
            chosen_M,
            logits_MV,
            each.reported & kept_BT.reshape(-1),
        )
        choices = replace(
            choices,
            drafted=choices.drafted + k * jnp.sum(awake_B, dtype=jnp.int32),
            accepted=choices.accepted + jnp.sum(jnp.maximum(count_B - 1, 0)),
        )
        return step + 1, advance(rows, chosen_BT, count_B), cache, draft_cache, choices, num_B + count_B

    choices = Choices.empty(b, rounds * t, shape.model.vocab)
    carry = (jnp.int32(0), rows, cache, draft_cache, choices, jnp.zeros(b, jnp.int32))
    taken, rows, cache, draft_cache, choices, _ = jax.lax.while_loop(more, take_round, carry)
    count_B = jnp.where(first.active, rows.length - first.length, 0)
    back = partial(
        put_back,
        tables_BN=tables_BN,
        start_B=first.length,
        count_B=count_B,
        num_cells=rounds * t,
        shares=shares,
    )
    draft_pool = state.draft_pool
    if draft_pool is not None:
        assert draft_cache is not None
        draft_pool = back(draft_pool, draft_cache)
    rows = put_progress(state.rows, slots_B, rows)
    state = EngineState(pool=back(state.pool, cache), draft_pool=draft_pool, rows=rows)
    return state, replace(choices, steps=taken)


def _with_drafts(rows: Rows, drafts_BK: Array) -> Array:
    """The history with drafts after the last token."""
    at_BK = rows.length[:, None] + 1 + jnp.arange(drafts_BK.shape[1])[None]
    return with_tokens(rows.history, at_BK, drafts_BK)


def _propose_by_model(
    weights: Weights, rows: Rows, cache: Cache, at_BT: Array, awake_B: Array, *, shape: EngineShape
) -> tuple[Array, Cache]:
    """Tokens that the draft model chooses one by one, as the request asks; the last is read too, for its keys."""
    assert shape.draft is not None
    assert weights.draft is not None
    k = shape.limits.drafts
    token_B = jnp.take_along_axis(rows.history, rows.length[:, None], axis=1)[:, 0]
    tokens = []
    for step in range(k + 1):
        logits_BV, cache = forward(
            weights.draft,
            token_B[:, None],
            config=shape.draft,
            execution=shape.execution,
            positions_BT=at_BT[:, step : step + 1],
            cache=cache,
            logits_at_B=jnp.zeros_like(token_B),
        )
        if step == k:
            break
        position_B = rows.length + 1 + step
        logits_BV = hold_unused(logits_BV, shape.unused)
        token_B = choose(logits_BV, rows, rows.history, position_B, awake_B, native=shape.layout.native)
        tokens.append(token_B)
        rows = replace(rows, history=with_tokens(rows.history, position_B[:, None], token_B[:, None]))
    return jnp.stack(tokens, axis=1), cache
