"""What lives on the device between dispatches, and how a request's settings get into it.

Settings and the text of a request have a row of their own, its slot; its keys and values have pages of a shared pool.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Int, UInt32

from gcompute.config.model import ModelConfig
from gcompute.model.transformer import Execution, Params
from gcompute.serve.adjustments import NO_TOKEN, AdjustmentRows
from gcompute.serve.grammar import mask_words
from gcompute.serve.kv_pool import KVPool, empty_pool
from gcompute.serve.limits import Limits
from gcompute.serve.request import MAX_BIASES, MAX_STOP_TOKENS, Sampling, seed_words
from gcompute.serve.sampler import SamplingRows
from gcompute.serve.weights import Layout


@jax.tree_util.register_dataclass
@dataclass(frozen=True, slots=True, kw_only=True)
class Rows:
    """What belongs to one request each. A row that is not active holds leftovers.

    history: its tokens, up to and with the one chosen last. length: cells that its keys and values fill, which lack
    those of the token chosen last. remaining: tokens still to choose. reported: log-probabilities are asked for.
    """

    history: Int[Array, "b s"]
    length: Int[Array, "b"]
    active: Bool[Array, "b"]
    remaining: Int[Array, "b"]
    reported: Bool[Array, "b"]
    adjustments: AdjustmentRows
    sampling: SamplingRows


@jax.tree_util.register_dataclass
@dataclass(frozen=True, slots=True, kw_only=True)
class EngineState:
    """The pool of pages, that of the draft model if there is one, and a row for each slot."""

    pool: KVPool
    draft_pool: KVPool | None
    rows: Rows


@jax.tree_util.register_dataclass
@dataclass(frozen=True, slots=True, kw_only=True)
class Weights:
    """The parameters of the model and of its draft model, as programs take them."""

    model: Params
    draft: Params | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineShape:
    """What fixes the shapes of every program.

    draft: the model that proposes tokens, if one does. kv: dtype of the pool. layout, int8: of weights. unused: token
    ids that the tokenizer does not have, which are never chosen.
    """

    model: ModelConfig
    draft: ModelConfig | None = None
    execution: Execution
    limits: Limits
    kv: Any
    layout: Layout
    int8: bool = False
    unused: tuple[range, ...] = ()

    @property
    def num_cells(self) -> int:
        """Tokens that a row's history has room for."""
        return self.limits.buckets[-1]


def empty_rows(num: int, num_cells: int, num_words: int) -> Rows:
    """Rows of which none is active; num_words: of a mask over the vocabulary."""
    return Rows(
        history=jnp.zeros((num, num_cells), jnp.int32),
        length=jnp.zeros(num, jnp.int32),
        active=jnp.zeros(num, bool),
        remaining=jnp.zeros(num, jnp.int32),
        reported=jnp.zeros(num, bool),
        adjustments=AdjustmentRows(
            presence=jnp.zeros(num, jnp.float32),
            frequency=jnp.zeros(num, jnp.float32),
            repetition=jnp.ones(num, jnp.float32),
            bias_ids=jnp.full((num, MAX_BIASES), NO_TOKEN, jnp.int32),
            bias=jnp.zeros((num, MAX_BIASES), jnp.float32),
            ends=jnp.full((num, 1 + MAX_STOP_TOKENS), NO_TOKEN, jnp.int32),
            num_prompt=jnp.zeros(num, jnp.int32),
            min_tokens=jnp.zeros(num, jnp.int32),
            constrained=jnp.zeros(num, bool),
            allowed=jnp.zeros((num, num_words), jnp.uint32),
        ),
        sampling=SamplingRows(
            temperature=jnp.zeros(num, jnp.float32),
            top_k=jnp.zeros(num, jnp.int32),
            top_p=jnp.ones(num, jnp.float32),
            min_p=jnp.zeros(num, jnp.float32),
            seed=jnp.zeros((num, 2), jnp.uint32),
        ),
    )


def empty_state(shape: EngineShape) -> EngineState:
    """All slots and pages free."""
    limits = shape.limits
    pages = {"num_pages": limits.num_pages + limits.shares, "page": limits.page, "dtype": shape.kv}
    return EngineState(
        pool=empty_pool(shape.model, **pages),
        draft_pool=empty_pool(shape.draft, **pages) if shape.draft else None,
        rows=empty_rows(limits.slots, shape.num_cells, mask_words(shape.model.vocab)),
    )


def new_row(
    sampling: Sampling,
    tokens: Sequence[int],
    *,
    num_prompt: int,
    num_cells: int,
    num_words: int,
    length: int,
    end: int,
    seed: int,
    allowed: np.ndarray | None = None,
) -> Rows:
    """The host's arrays of one row, [1, ...]; making them compiles nothing.

    tokens: the prompt and what was chosen. length: how many are in the pool; the row is active where it lacks one
    alone. end: the token that ends the output beside the request's own stop ids, or NO_TOKEN. allowed: the mask, in
    `num_words` words, of the next token, where a grammar binds it.
    """

    def host(values: Any, dtype: Any) -> Any:
        return np.asarray(values, dtype)

    def filled(values: Sequence[float], size: int, fill: int) -> list[list[float]]:
        return [[*values, *[fill] * (size - len(values))]]

    bias_ids, bias = [token for token, _ in sampling.logit_bias], [amount for _, amount in sampling.logit_bias]
    num_output = len(tokens) - num_prompt
    return Rows(
        history=host(filled(tokens, num_cells, 0), np.int32),
        length=host([length], np.int32),
        active=host([num_output > 0 and length == len(tokens) - 1], bool),
        remaining=host([sampling.max_tokens - num_output], np.int32),
        reported=host([sampling.logprobs is not None], bool),
        adjustments=AdjustmentRows(
            presence=host([sampling.presence_penalty], np.float32),
            frequency=host([sampling.frequency_penalty], np.float32),
            repetition=host([sampling.repetition_penalty], np.float32),
            bias_ids=host(filled(bias_ids, MAX_BIASES, NO_TOKEN), np.int32),
            bias=host(filled(bias, MAX_BIASES, 0), np.float32),
            ends=host(filled([end, *sampling.stop_token_ids], 1 + MAX_STOP_TOKENS, NO_TOKEN), np.int32),
            num_prompt=host([num_prompt], np.int32),
            min_tokens=host([sampling.min_tokens], np.int32),
            constrained=host([allowed is not None], bool),
            allowed=host([np.zeros(num_words) if allowed is None else allowed], np.uint32),
        ),
        sampling=SamplingRows(
            temperature=host([sampling.temperature], np.float32),
            top_k=host([sampling.top_k], np.int32),
            top_p=host([sampling.top_p], np.float32),
            min_p=host([sampling.min_p], np.float32),
            seed=host([seed_words(seed)], np.uint32),
        ),
    )


def with_masks(rows: Rows, slots_B: Int[Array, "b"], allowed_BW: UInt32[Array, "b w"]) -> Rows:
    """The rows with the masks of the next token of some; a slot that does not exist is passed over."""
    masks = rows.adjustments.allowed.at[slots_B].set(allowed_BW, mode="drop")
    return replace(rows, adjustments=replace(rows.adjustments, allowed=masks))


def with_tokens(
    history_BS: Int[Array, "b s"], at_BT: Int[Array, "b t"], tokens_BT: Int[Array, "b t"]
) -> Int[Array, "b s"]:
    """The history with tokens at some places of each row; places past its end are dropped."""
    return jax.vmap(lambda row_S, at_T, tokens_T: row_S.at[at_T].set(tokens_T, mode="drop"))(
        history_BS, at_BT, tokens_BT
    )


def take_rows(rows: Rows, slots_B: Int[Array, "b"]) -> Rows:
    """The rows of some slots; a slot that does not exist gives one that is not active."""
    return jax.tree.map(lambda leaf: leaf.at[slots_B].get(mode="fill", fill_value=0), rows)


def put_rows(rows: Rows, slots_B: Int[Array, "b"], new: Rows) -> Rows:
    """The rows with `new` in the place of some; a slot that does not exist is passed over."""
    return jax.tree.map(lambda leaf, part: leaf.at[slots_B].set(part, mode="drop"), rows, new)


def put_progress(rows: Rows, slots_B: Int[Array, "b"], new: Rows) -> Rows:
    """As `put_rows`, of what a step changes: what was asked for stays where it is, and on a mesh is not sent."""

    def put(name: str) -> Array:
        return getattr(rows, name).at[slots_B].set(getattr(new, name), mode="drop")

    return replace(rows, **{name: put(name) for name in ("history", "length", "active", "remaining")})
