"""The device side of the engine: its state, the few programs that change it, and their compilation ahead of time.

prefill[bucket] reads one prompt into one slot; decode[bucket] takes up to `num_steps` steps for all slots, attending to
the first `bucket` cells of each. Whatever belongs to a request is data, so these and `init` are all the programs.
"""

import re
from collections.abc import Callable
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
from gcompute.serve.request import Request, seed_words
from gcompute.serve.sampler import SamplingRows, sample
from gcompute.serve.scheduler import make_buckets

NO_TOKEN = -1
MATMUL_WEIGHT = re.compile(r"(q|k|v|o|up|gate|down|head|embedding)_[A-Z]+")


@jax.tree_util.register_dataclass
@dataclass(frozen=True, slots=True, kw_only=True)
class EngineState:
    """All that lives on the device between dispatches; B is the slots. A slot that is not active holds leftovers.

    length: cells of the cache in use. token: chosen last, not in the cache yet. remaining: tokens still to choose.
    end: the token that ends the row, or NO_TOKEN.
    """

    cache: KVCache
    length: Int[Array, "b"]
    token: Int[Array, "b"]
    active: Bool[Array, "b"]
    remaining: Int[Array, "b"]
    end: Int[Array, "b"]
    rows: SamplingRows


@jax.tree_util.register_dataclass
@dataclass(frozen=True, slots=True, kw_only=True)
class Admission:
    """One request on its way into a slot: its prompt, padded at the end to the bucket, and its settings."""

    tokens: Int[Array, "1 t"]
    num_tokens: Int[Array, ""]
    slot: Int[Array, ""]
    max_tokens: Int[Array, ""]
    end: Int[Array, ""]
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
        length=jnp.zeros(b, jnp.int32),
        token=jnp.zeros(b, jnp.int32),
        active=jnp.zeros(b, bool),
        remaining=jnp.zeros(b, jnp.int32),
        end=jnp.full(b, NO_TOKEN, jnp.int32),
        rows=SamplingRows(
            temperature=jnp.zeros(b, jnp.float32),
            top_k=jnp.zeros(b, jnp.int32),
            top_p=jnp.ones(b, jnp.float32),
            min_p=jnp.zeros(b, jnp.float32),
            seed=jnp.zeros((b, 2), jnp.uint32),
        ),
    )


def admission(request: Request, *, slot: int, bucket: int, end: int, seed: int) -> Admission:
    """The host's arrays for one request, ready for prefill[bucket]; making them compiles nothing."""

    def host(values: Any, dtype: Any) -> Any:
        return np.asarray(values, dtype)

    sampling, prompt = request.sampling, request.prompt
    return Admission(
        tokens=host([prompt + (0,) * (bucket - len(prompt))], np.int32),
        num_tokens=host(len(prompt), np.int32),
        slot=host(slot, np.int32),
        max_tokens=host(sampling.max_tokens, np.int32),
        end=host(end, np.int32),
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
) -> tuple[EngineState, Int[Array, ""]]:
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
    token = sample(logits_1V, new.rows, new.num_tokens[None])[0]

    def insert(whole: Array, row: Array) -> Array:
        return jax.lax.dynamic_update_slice(whole, row, (new.slot,) + (0,) * (whole.ndim - 1))

    state = EngineState(
        cache=jax.tree.map(insert, state.cache, small),
        length=state.length.at[new.slot].set(new.num_tokens),
        token=state.token.at[new.slot].set(token),
        active=state.active.at[new.slot].set((new.max_tokens > 1) & (token != new.end)),
        remaining=state.remaining.at[new.slot].set(new.max_tokens - 1),
        end=state.end.at[new.slot].set(new.end),
        rows=jax.tree.map(insert, state.rows, new.rows),
    )
    return state, token


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
) -> tuple[EngineState, Int[Array, "b n"]]:
    """Up to `num_steps` tokens for each active row that the host still calls running; NO_TOKEN where none was chosen.

    A step writes the row's last token at position `length` and chooses the one at `length + 1`. The loop ends early
    when no row is active, and with `until_free` as soon as one ends. The steps work on the first `bucket` cells, which
    are copied out before the loop and back after it, and not once a step.
    """
    whole = state.cache
    state = replace(state, cache=jax.tree.map(lambda leaf: leaf[:, :bucket], whole), active=state.active & running_B)
    first_active_B = state.active

    def more(carry: tuple[Array, EngineState, Array]) -> Array:
        step, state, _ = carry
        one_ended = jnp.any(first_active_B & ~state.active)
        return (step < num_steps) & jnp.any(state.active) & ~(until_free & one_ended)

    def take_step(carry: tuple[Array, EngineState, Array]) -> tuple[Array, EngineState, Array]:
        step, state, chosen_BN = carry
        logits_BV, cache = forward(
            params,
            state.token[:, None],
            config=model,
            execution=execution,
            # A row that is not active may be longer than the bucket; it must only stay inside the model's positions.
            positions_BT=jnp.minimum(state.length, bucket - 1)[:, None],
            cache=state.cache,
            logits_at_B=jnp.zeros_like(state.length),
        )
        token_B = sample(logits_BV, state.rows, state.length + 1)
        active_B = state.active
        remaining_B = state.remaining - active_B
        chosen_BN = chosen_BN.at[:, step].set(jnp.where(active_B, token_B, NO_TOKEN))
        state = replace(
            state,
            cache=cache,
            length=state.length + active_B,
            token=jnp.where(active_B, token_B, state.token),
            active=active_B & (token_B != state.end) & (remaining_B > 0),
            remaining=remaining_B,
        )
        return step + 1, state, chosen_BN

    chosen_BN = jnp.full((running_B.shape[0], decode_steps), NO_TOKEN, jnp.int32)
    _, state, chosen_BN = jax.lax.while_loop(more, take_step, (jnp.int32(0), state, chosen_BN))

    def put_back(whole: Array, part: Array) -> Array:
        return jax.lax.dynamic_update_slice(whole, part, (0,) * whole.ndim)

    return replace(state, cache=jax.tree.map(put_back, whole, state.cache)), chosen_BN


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
