"""What a request asks to be done to its logits before the choice: bias, penalties, and the end held back.

    x += bias
    x  = x / r where x > 0 else x * r      for tokens of prompt or output    (repetition penalty r)
    x -= count * f + (count > 0) * p       count: times in the output        (frequency f and presence p)
    x  = HELD                              for ends, until min_tokens are chosen
    x  = HELD                              for tokens that the row's grammar does not allow

A row depends on itself alone, and a step in which no row asks for anything computes nothing.

Source: Keskar et al. 2019, CTRL, section 4.1 (repetition, in the form of transformers and vLLM, which do not reward
negative logits); OpenAI API reference (frequency and presence). Read July 2025.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, UInt32

NO_TOKEN = -1
# Finite, so that a row whose every token is held still has a maximum to subtract.
HELD = -1e30


@jax.tree_util.register_dataclass
@dataclass(frozen=True, slots=True, kw_only=True)
class AdjustmentRows:
    """The settings of each row. bias_ids and ends are filled up with NO_TOKEN; num_prompt: tokens of the prompt.

    allowed: a bit for each token, lowest first, which says where the row is `constrained` that it may come next.
    """

    presence: Float[Array, "b"]
    frequency: Float[Array, "b"]
    repetition: Float[Array, "b"]
    bias_ids: Int[Array, "b n"]
    bias: Float[Array, "b n"]
    ends: Int[Array, "b e"]
    num_prompt: Int[Array, "b"]
    min_tokens: Int[Array, "b"]
    constrained: Bool[Array, "b"]
    allowed: UInt32[Array, "b w"]


def adjust(
    logits_BV: Float[Array, "b v"],
    rows: AdjustmentRows,
    tokens_BS: Int[Array, "b s"],
    positions_B: Int[Array, "b"],
    live_B: Bool[Array, "b"],
) -> Float[Array, "b v"]:
    """The logits to choose from for the token at `positions`, given the tokens before it.

    tokens: the row's own at each position below `positions`, anything from there on. Rows that are not live hold
    leftovers: what they ask for is not computed.
    """
    biased_B, penalised_B, held_B = _asked(rows, positions_B, live_B)

    def change(x_BV: Array) -> Array:
        x_BV = _add(x_BV, rows.bias_ids, rows.bias)
        x_BV = jax.lax.cond(
            jnp.any(penalised_B), lambda x: _penalise(x, rows, tokens_BS, positions_B), lambda x: x, x_BV
        )
        x_BV = _set(x_BV, jnp.where(held_B[:, None], rows.ends, NO_TOKEN), HELD)
        return jnp.where((biased_B | penalised_B | held_B)[:, None], x_BV, logits_BV)

    changed_BV = jax.lax.cond(jnp.any(biased_B | penalised_B | held_B), change, lambda x: x, logits_BV)
    bound_B = live_B & rows.constrained
    return jax.lax.cond(jnp.any(bound_B), lambda x: _bind(x, bound_B, rows.allowed), lambda x: x, changed_BV)


def hold_unused(logits_BTV: Float[Array, "*b v"], unused: Sequence[range]) -> Float[Array, "*b v"]:
    """The logits with tokens that stand for nothing held down: rows of an embedding that was padded, for instance."""
    if not unused:
        return logits_BTV
    held_V = np.zeros(logits_BTV.shape[-1], bool)
    for ids in unused:
        held_V[ids.start : ids.stop] = True
    return jnp.where(held_V, HELD, logits_BTV)


def asked(rows: AdjustmentRows, positions_B: Int[Array, "b"], live_B: Bool[Array, "b"]) -> Bool[Array, "b"]:
    """Which rows `adjust` changes."""
    biased_B, penalised_B, held_B = _asked(rows, positions_B, live_B)
    return biased_B | penalised_B | held_B | (live_B & rows.constrained)


def is_end(token_B: Int[Array, "b"], rows: AdjustmentRows) -> Bool[Array, "b"]:
    """Whether a token ends its row."""
    return jnp.any(token_B[:, None] == rows.ends, axis=1)


def _asked(rows: AdjustmentRows, positions_B: Array, live_B: Array) -> tuple[Array, Array, Array]:
    """Which rows ask for a bias, for a penalty, for their end to be held back."""
    biased_B = live_B & jnp.any(rows.bias_ids != NO_TOKEN, axis=1)
    penalised_B = live_B & ((rows.presence != 0) | (rows.frequency != 0) | (rows.repetition != 1))
    return biased_B, penalised_B, live_B & (positions_B < rows.num_prompt + rows.min_tokens)


def _bind(x_BV: Array, bound_B: Array, allowed_BW: Array) -> Array:
    ids_V = jnp.arange(x_BV.shape[1], dtype=jnp.uint32)
    bits_BV = (allowed_BW[:, ids_V // 32] >> (ids_V % 32)) & 1
    return jnp.where(bound_B[:, None] & (bits_BV == 0), HELD, x_BV)


def _penalise(x_BV: Array, rows: AdjustmentRows, tokens_BS: Array, positions_B: Array) -> Array:
    cells_1S = jnp.arange(tokens_BS.shape[1])[None]
    before_BS = cells_1S < positions_B[:, None]
    output_BS = before_BS & (cells_1S >= rows.num_prompt[:, None])
    zeros_BV = jnp.zeros(x_BV.shape, x_BV.dtype)
    seen_BV = _set(zeros_BV, jnp.where(before_BS, tokens_BS, NO_TOKEN), 1.0)
    count_BV = _add(zeros_BV, tokens_BS, output_BS.astype(x_BV.dtype))
    repetition_B1 = rows.repetition[:, None]
    x_BV = jnp.where(seen_BV > 0, jnp.where(x_BV > 0, x_BV / repetition_B1, x_BV * repetition_B1), x_BV)
    return x_BV - (rows.frequency[:, None] * count_BV + jnp.where(count_BV > 0, rows.presence[:, None], 0))


# Mapped over rows, so that a mesh which splits the rows need not gather them. JAX counts negative ids from the end:
# NO_TOKEN is sent beyond it, where it is dropped.
@jax.vmap
def _add(x_V: Array, ids_N: Array, amounts_N: Array) -> Array:
    return x_V.at[jnp.where(ids_N == NO_TOKEN, x_V.shape[0], ids_N)].add(amounts_N, mode="drop")


@partial(jax.vmap, in_axes=(0, 0, None))
def _set(x_V: Array, ids_N: Array, value: float) -> Array:
    return x_V.at[jnp.where(ids_N == NO_TOKEN, x_V.shape[0], ids_N)].set(value, mode="drop")
