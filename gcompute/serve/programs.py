"""The device side of the engine: its state, the few programs that change it, and their compilation ahead of time.

prefill[bucket] reads one prompt into one slot; decode[bucket] takes up to `num_steps` steps for all slots, attending to
the first `bucket` cells of each. Whatever belongs to a request is data, so these and `init` are all the programs.
"""

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Int

from gcompute.config.model import ModelConfig
from gcompute.model.kv_cache import KVCache, init_cache
from gcompute.model.transformer import Execution, Params, forward, unstack
from gcompute.serve.adjustments import NO_TOKEN, AdjustmentRows, adjust, is_end
from gcompute.serve.choices import Choices
from gcompute.serve.request import MAX_BIASES, MAX_STOP_TOKENS, Request, seed_words
from gcompute.serve.sampler import SamplingRows, quiet, sample
from gcompute.serve.scheduler import make_buckets

MATMUL_WEIGHT = re.compile(r"(q|k|v|o|up|gate|down|head|embedding)_[A-Z]+")


@jax.tree_util.register_dataclass
@dataclass(frozen=True, slots=True, kw_only=True)
class EngineState:
    """All that lives on the device between dispatches; B is the slots. A slot that is not active holds leftovers.

    history: the token of each cell of the cache. length: cells in use. token: chosen last, not in the cache yet.
    remaining: tokens still to choose. reported: log-probabilities are asked for.
    """

    cache: KVCache
    history: Int[Array, "b s"]
    length: Int[Array, "b"]
    token: Int[Array, "b"]
    active: Bool[Array, "b"]
    remaining: Int[Array, "b"]
    reported: Bool[Array, "b"]
    adjustments: AdjustmentRows
    rows: SamplingRows


@jax.tree_util.register_dataclass
@dataclass(frozen=True, slots=True, kw_only=True)
class Admission:
    """One request on its way into a slot: its prompt, padded at the end to the bucket, and its settings."""

    tokens: Int[Array, "1 t"]
    num_tokens: Int[Array, ""]
    slot: Int[Array, ""]
    max_tokens: Int[Array, ""]
    reported: Bool[Array, "1"]
    adjustments: AdjustmentRows
    rows: SamplingRows


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineShape:
    """What fixes the shapes of every program."""

    model: ModelConfig
    execution: Execution
    slots: int
    max_context: int
    decode_steps: int


@dataclass(frozen=True, slots=True)
class Program:
    """The name of one compiled program."""

    kind: str
    bucket: int

    def __str__(self) -> str:
        return f"{self.kind}[{self.bucket}]"


def list_programs(max_context: int) -> tuple[Program, ...]:
    """Every program that the engine can run."""
    buckets = make_buckets(max_context)
    return (
        Program("init", max_context),
        *(Program("prefill", bucket) for bucket in buckets),
        *(Program("decode", bucket) for bucket in buckets),
    )


def serving_params(params: Params, config: ModelConfig, compute: Any) -> Params:
    """One dict of parameters a layer, with matmul weights in the compute dtype, so that no step converts them again."""

    def cast(path: tuple[Any, ...], leaf: Array) -> Array:
        return leaf.astype(compute) if MATMUL_WEIGHT.fullmatch(path[-1].key) else leaf

    return jax.tree_util.tree_map_with_path(cast, unstack(params, config))


def empty_state(shape: EngineShape) -> EngineState:
    """All slots free."""
    b = shape.slots
    return EngineState(
        cache=init_cache(shape.model, batch=b, length=shape.max_context, dtype=shape.execution.compute),
        history=jnp.zeros((b, shape.max_context), jnp.int32),
        length=jnp.zeros(b, jnp.int32),
        token=jnp.zeros(b, jnp.int32),
        active=jnp.zeros(b, bool),
        remaining=jnp.zeros(b, jnp.int32),
        reported=jnp.zeros(b, bool),
        adjustments=AdjustmentRows(
            presence=jnp.zeros(b, jnp.float32),
            frequency=jnp.zeros(b, jnp.float32),
            repetition=jnp.ones(b, jnp.float32),
            bias_ids=jnp.full((b, MAX_BIASES), NO_TOKEN, jnp.int32),
            bias=jnp.zeros((b, MAX_BIASES), jnp.float32),
            ends=jnp.full((b, 1 + MAX_STOP_TOKENS), NO_TOKEN, jnp.int32),
            num_prompt=jnp.zeros(b, jnp.int32),
            min_tokens=jnp.zeros(b, jnp.int32),
        ),
        rows=SamplingRows(
            temperature=jnp.zeros(b, jnp.float32),
            top_k=jnp.zeros(b, jnp.int32),
            top_p=jnp.ones(b, jnp.float32),
            min_p=jnp.zeros(b, jnp.float32),
            seed=jnp.zeros((b, 2), jnp.uint32),
        ),
    )


def admission(request: Request, *, slot: int, bucket: int, end: int, seed: int) -> Admission:
    """The host's arrays for one request, ready for prefill[bucket]; making them compiles nothing.

    end: the token that ends the output beside the request's own stop ids, or NO_TOKEN.
    """

    def host(values: Any, dtype: Any) -> Any:
        return np.asarray(values, dtype)

    def filled(values: Sequence[float], size: int, fill: int) -> list[list[float]]:
        return [[*values, *[fill] * (size - len(values))]]

    sampling, prompt = request.sampling, request.prompt
    bias_ids, bias = [token for token, _ in sampling.logit_bias], [amount for _, amount in sampling.logit_bias]
    return Admission(
        tokens=host([prompt + (0,) * (bucket - len(prompt))], np.int32),
        num_tokens=host(len(prompt), np.int32),
        slot=host(slot, np.int32),
        max_tokens=host(sampling.max_tokens, np.int32),
        reported=host([sampling.logprobs is not None], bool),
        adjustments=AdjustmentRows(
            presence=host([sampling.presence_penalty], np.float32),
            frequency=host([sampling.frequency_penalty], np.float32),
            repetition=host([sampling.repetition_penalty], np.float32),
            bias_ids=host(filled(bias_ids, MAX_BIASES, NO_TOKEN), np.int32),
            bias=host(filled(bias, MAX_BIASES, 0), np.float32),
            ends=host(filled([end, *sampling.stop_token_ids], 1 + MAX_STOP_TOKENS, NO_TOKEN), np.int32),
            num_prompt=host([len(prompt)], np.int32),
            min_tokens=host([sampling.min_tokens], np.int32),
        ),
        rows=SamplingRows(
            temperature=host([sampling.temperature], np.float32),
            top_k=host([sampling.top_k], np.int32),
            top_p=host([sampling.top_p], np.float32),
            min_p=host([sampling.min_p], np.float32),
            seed=host([seed_words(seed)], np.uint32),
        ),
    )


def prefill(
    params: Params, state: EngineState, new: Admission, *, model: ModelConfig, execution: Execution
) -> tuple[EngineState, Choices]:
    """Read a prompt into its slot and choose its first token.

    The padding's keys and values go into the slot too: each cell is written again before any query can see it.
    """
    bucket = new.tokens.shape[1]
    logits_1V, small = forward(
        params,
        new.tokens,
        config=model,
        execution=execution,
        positions_BT=jnp.arange(bucket, dtype=jnp.int32)[None],
        cache=init_cache(model, batch=1, length=bucket, dtype=execution.compute),
        logits_at_B=new.num_tokens[None] - 1,
    )
    position_1 = new.num_tokens[None]
    adjusted_1V = adjust(logits_1V, new.adjustments, new.tokens, position_1, jnp.ones(1, bool))
    token_1 = sample(adjusted_1V, new.rows, position_1)
    choices = Choices.empty(1, 1, model.vocab).put(jnp.int32(0), token_1, logits_1V, new.reported)
    token, ended = token_1[0], is_end(token_1, new.adjustments)[0]

    def insert(whole: Array, row: Array) -> Array:
        return jax.lax.dynamic_update_slice(whole, row, (new.slot,) + (0,) * (whole.ndim - 1))

    state = EngineState(
        cache=jax.tree.map(insert, state.cache, small),
        history=insert(state.history, new.tokens),
        length=state.length.at[new.slot].set(new.num_tokens),
        token=state.token.at[new.slot].set(token),
        active=state.active.at[new.slot].set((new.max_tokens > 1) & ~ended),
        remaining=state.remaining.at[new.slot].set(new.max_tokens - 1),
        reported=insert(state.reported, new.reported),
        adjustments=jax.tree.map(insert, state.adjustments, new.adjustments),
        rows=jax.tree.map(insert, state.rows, new.rows),
    )
    return state, choices


def decode(
    params: Params,
    state: EngineState,
    running_B: Bool[Array, "b"],
    num_steps: Int[Array, ""],
    until_free: Bool[Array, ""],
    *,
    model: ModelConfig,
    execution: Execution,
    bucket: int,
    decode_steps: int,
) -> tuple[EngineState, Choices]:
    """Up to `num_steps` tokens for each active row that the host still calls running; NO_TOKEN where none was chosen.

    A step writes the row's last token at position `length` and chooses the one at `length + 1`. The loop ends early
    when no row is active, and with `until_free` as soon as one ends. The steps work on the first `bucket` cells, which
    are copied out before the loop and back after it, and not once a step.
    """
    whole = (state.cache, state.history)
    cache, history_BS = jax.tree.map(lambda leaf: leaf[:, :bucket], whole)
    state = replace(state, cache=cache, history=history_BS, active=state.active & running_B)
    first_active_B = state.active
    # Leftovers of free slots ask for nothing.
    rows = quiet(state.rows, first_active_B)

    def more(carry: tuple[Array, EngineState, Choices]) -> Array:
        step, state, _ = carry
        one_ended = jnp.any(first_active_B & ~state.active)
        return (step < num_steps) & jnp.any(state.active) & ~(until_free & one_ended)

    def take_step(carry: tuple[Array, EngineState, Choices]) -> tuple[Array, EngineState, Choices]:
        step, state, choices = carry
        # A row that is not active may be longer than the bucket; it must only stay inside the model's positions.
        at_B = jnp.minimum(state.length, bucket - 1)
        logits_BV, cache = forward(
            params,
            state.token[:, None],
            config=model,
            execution=execution,
            positions_BT=at_B[:, None],
            cache=state.cache,
            logits_at_B=jnp.zeros_like(state.length),
        )
        active_B = state.active
        history_BS = jax.vmap(lambda row_S, at, token: row_S.at[at].set(token))(state.history, at_B, state.token)
        position_B = state.length + 1
        token_B = sample(adjust(logits_BV, state.adjustments, history_BS, position_B, active_B), rows, position_B)
        remaining_B = state.remaining - active_B
        shown_B = jnp.where(active_B, token_B, NO_TOKEN)
        choices = choices.put(step, shown_B, logits_BV, state.reported & active_B)
        state = replace(
            state,
            cache=cache,
            history=history_BS,
            length=state.length + active_B,
            token=jnp.where(active_B, token_B, state.token),
            active=active_B & ~is_end(token_B, state.adjustments) & (remaining_B > 0),
            remaining=remaining_B,
        )
        return step + 1, state, choices

    choices = Choices.empty(running_B.shape[0], decode_steps, model.vocab)
    _, state, choices = jax.lax.while_loop(more, take_step, (jnp.int32(0), state, choices))

    def put_back(whole: Array, part: Array) -> Array:
        return jax.lax.dynamic_update_slice(whole, part, (0,) * whole.ndim)

    cache, history_BS = jax.tree.map(put_back, whole, (state.cache, state.history))
    return replace(state, cache=cache, history=history_BS), choices


def compile_program(program: Program, params: Params, shape: EngineShape) -> Callable[..., Any]:
    """Compile one program for concrete or abstract `params`; the state that it takes is donated."""
    state = jax.eval_shape(partial(empty_state, shape))
    scalar = jax.ShapeDtypeStruct((), jnp.int32)
    static = {"model": shape.model, "execution": shape.execution}
    if program.kind == "init":
        return jax.jit(partial(empty_state, shape)).lower().compile()
    if program.kind == "prefill":
        new = jax.eval_shape(
            lambda: admission(Request(prompt=(0,)), slot=0, bucket=program.bucket, end=NO_TOKEN, seed=0)
        )
        return jax.jit(partial(prefill, **static), donate_argnums=1).lower(params, state, new).compile()
    block = partial(decode, **static, bucket=program.bucket, decode_steps=shape.decode_steps)
    running_B, flag = jax.ShapeDtypeStruct((shape.slots,), bool), jax.ShapeDtypeStruct((), bool)
    return jax.jit(block, donate_argnums=1).lower(params, state, running_B, scalar, flag).compile()
