"""The next token of every row: what its request asks to be done to the logits, then the choice."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from gcompute.serve.adjustments import adjust, asked
from gcompute.serve.sampler import greedy, quiet, sample
from gcompute.serve.state import Rows


def choose(
    logits_BV: Float[Array, "b v"],
    rows: Rows,
    tokens_BS: Int[Array, "b s"],
    positions_B: Int[Array, "b"],
    live_B: Bool[Array, "b"],
    *,
    native: bool,
) -> Int[Array, "b"]:
    """The token for `positions` of each row, given its tokens before them; `native` as for `sample`.

    Where all that live ask for is the likeliest token, nothing else is computed, and nothing is copied. Rows that are
    not live get some token.
    """
    sampling = quiet(rows.sampling, live_B)

    def as_asked() -> Array:
        adjusted_BV = adjust(logits_BV, rows.adjustments, tokens_BS, positions_B, live_B)
        return sample(adjusted_BV, sampling, positions_B, native=native)

    asked_B = asked(rows.adjustments, positions_B, live_B) | (sampling.temperature > 0)
    return jax.lax.cond(jnp.any(asked_B), as_asked, lambda: greedy(logits_BV, native=native))
