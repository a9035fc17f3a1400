"""What one dispatch chose, and how likely the model held it: tokens, their log-probabilities and the likeliest others.

Log-probabilities are log_softmax of the logits as the model gave them, before any setting acts, as OpenAI reports them.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Self

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from gcompute.serve.adjustments import NO_TOKEN
from gcompute.serve.request import MAX_TOP_LOGPROBS
from gcompute.serve.stream import TokenLogprobs


@jax.tree_util.register_dataclass
@dataclass(frozen=True, slots=True, kw_only=True)
class Choices:
    """N tokens of each row, NO_TOKEN where none was chosen; log-probabilities are zero where no row asked for them.

    steps: how often the model's weights were read to decode. drafted, accepted: how many tokens were proposed by
    speculation, and how many of those were chosen.
    """

    token: Int[Array, "b n"]
    logprob: Float[Array, "b n"]
    top_ids: Int[Array, "b n k"]
    top_logprobs: Float[Array, "b n k"]
    steps: Int[Array, ""]
    drafted: Int[Array, ""]
    accepted: Int[Array, ""]

    @classmethod
    def empty(cls, rows: int, steps: int, vocab: int) -> Self:
        k = min(MAX_TOP_LOGPROBS, vocab)
        return cls(
            token=jnp.full((rows, steps), NO_TOKEN, jnp.int32),
            logprob=jnp.zeros((rows, steps), jnp.float32),
            top_ids=jnp.zeros((rows, steps, k), jnp.int32),
            top_logprobs=jnp.zeros((rows, steps, k), jnp.float32),
            steps=jnp.int32(0),
            drafted=jnp.int32(0),
            accepted=jnp.int32(0),
        )

    def put(
        self,
        rows_M: Int[Array, "m"],
        at_M: Int[Array, "m"],
        token_M: Int[Array, "m"],
        logits_MV: Float[Array, "m v"],
        reported_M: Bool[Array, "m"],
    ) -> Self:
        """With M tokens in their rows and places, dropped past the end; log-probabilities if any is asked for."""
        logprob_M, top_ids_MK, top_logprobs_MK = _measure(logits_MV, token_M, reported_M, self.top_ids.shape[-1])
        return replace(
            self,
            token=self.token.at[rows_M, at_M].set(token_M, mode="drop"),
            logprob=self.logprob.at[rows_M, at_M].set(logprob_M, mode="drop"),
            top_ids=self.top_ids.at[rows_M, at_M].set(top_ids_MK, mode="drop"),
            top_logprobs=self.top_logprobs.at[rows_M, at_M].set(top_logprobs_MK, mode="drop"),
        )


def _measure(
    logits_BV: Float[Array, "b v"], token_B: Int[Array, "b"], reported_B: Bool[Array, "b"], k: int
) -> tuple[Array, Array, Array]:
    def compute() -> tuple[Array, Array, Array]:
        logprobs_BV = jax.nn.log_softmax(logits_BV.astype(jnp.float32), axis=-1)
        top_BK, ids_BK = jax.lax.top_k(logprobs_BV, k)
        # A row in which no token is chosen holds NO_TOKEN.
        own_B1 = jnp.take_along_axis(logprobs_BV, jnp.maximum(token_B, 0)[:, None], axis=1)
        return own_B1[:, 0], ids_BK.astype(jnp.int32), top_BK

    b = logits_BV.shape[0]
    nothing = (jnp.zeros(b, jnp.float32), jnp.zeros((b, k), jnp.int32), jnp.zeros((b, k), jnp.float32))
    return jax.lax.cond(jnp.any(reported_B), compute, lambda: nothing)


def read_row(choices: Choices, row: int, num_top: int | None) -> tuple[list[int], Sequence[TokenLogprobs]]:
    """One row of choices: its tokens, and what to report of each, which is nothing where num_top is None."""
    tokens = [token for token in np.asarray(choices.token)[row].tolist() if token != NO_TOKEN]
    if num_top is None:
        return tokens, ()
    logprob, ids, tops = (np.asarray(x)[row] for x in (choices.logprob, choices.top_ids, choices.top_logprobs))
    return tokens, [
        TokenLogprobs(
            token=token,
            logprob=float(logprob[n]),
            top=tuple(zip(ids[n, :num_top].tolist(), tops[n, :num_top].tolist(), strict=True)),
        )
        for n, token in enumerate(tokens)
    ]
