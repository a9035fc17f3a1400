"""The model alone: no cache, no slots, no neighbours' programs; and the noise of a seed, by its published definition.

The engine's own output is read once: `logits` gives, for every place of a finished text, what the model says comes
next after exactly the tokens before it. That checks each token as decoding one by one would. Suppose decoding alone has
chosen the engine's first n tokens. Its next step computes the logits after prompt and those n tokens, which is row
n of the one pass, since attention is causal and padding comes after. If the choice from them is the engine's token
n + 1, then decoding alone has chosen the first n + 1. With n = 0, nothing, it holds; so where every token agrees, the
whole text is what decoding alone writes. Where one differs by less than rounding, the tie went the other way, and what
follows is held to the text that the engine did write.
"""

from collections.abc import Callable, Iterator, Sequence
from copy import copy
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from gcompute.config.model import ModelConfig
from gcompute.model.transformer import Execution, Params, forward

SHORTEST = 32
MOST_ROWS = 16
# Logits of one pass: 128 MiB in float32.
MOST_LOGITS = 2**25
POSITIONS = 64
DTYPES = {"float32": jnp.float32, "bfloat16": jnp.bfloat16}


class Reference:
    """One model in one precision, compiled once for each of a few lengths."""

    def __init__(self, params: Params, config: ModelConfig, precision: str):
        self.params = _as_served(params) if precision == "bfloat16" else params
        self.config, self.precision = config, precision
        self._runs = {wide: _compiled(config, "float32" if wide else precision) for wide in (False, True)}
        self._wide = False

    def of(self, params: Params, *, wide: bool) -> "Reference":
        """The same with other parameters, which are taken as they are; `wide`: products of float32."""
        other = copy(self)
        other.params, other._wide = params, wide
        return other

    def logits(self, texts: Sequence[Sequence[int]]) -> Iterator[tuple[int, Float[np.ndarray, "t v"]]]:
        """(which text, its logits at every place) in an order that fills batches."""
        by_length: dict[int, list[int]] = {}
        for index, text in enumerate(texts):
            by_length.setdefault(self._padded(len(text)), []).append(index)
        for length, indices in sorted(by_length.items()):
            rows = max(1, min(MOST_ROWS, MOST_LOGITS // (length * self.config.vocab)))
            for start in range(0, len(indices), rows):
                some = indices[start : start + rows]
                tokens_BT = np.zeros((rows, length), np.int32)
                for row, index in enumerate(some):
                    tokens_BT[row, : len(texts[index])] = texts[index]
                logits_BTV = np.asarray(self._runs[self._wide](self.params, tokens_BT), np.float32)
                for row, index in enumerate(some):
                    yield index, logits_BTV[row, : len(texts[index])]

    def _padded(self, length: int) -> int:
        size = SHORTEST
        while size < length:
            size *= 2
        return min(size, max(length, self.config.context))


def _as_served(params: Params) -> Params:
    """What products multiply with, and the embedding, rounded to bfloat16: the weights that a bfloat16 engine has."""

    def rounded(path: tuple[Any, ...], leaf: Array) -> Array:
        name = path[-1].key
        wide = leaf.ndim < 2 or "bias" in name or name in ("scale", "router_DE", "positions_TD")
        return leaf if wide else leaf.astype(jnp.bfloat16).astype(leaf.dtype)

    return jax.tree_util.tree_map_with_path(rounded, params)


def _compiled(config: ModelConfig, precision: str) -> Callable[..., Any]:
    execution = Execution(compute=DTYPES[precision], unroll=config.layers)
    return jax.jit(lambda params, tokens_BT: forward(params, tokens_BT, config=config, execution=execution)[0])


def noise(seed: int, first: int, num: int, vocab: int) -> Float[np.ndarray, "n v"]:
    """The Gumbel noise of positions first, first + 1, ...: of key fold_in(threefry(seed), position)."""
    words = np.array(divmod(seed % 2**64, 2**32), np.uint32)
    blocks = [
        np.asarray(_noise(words, np.arange(at, at + POSITIONS, dtype=np.int32), vocab))
        for at in range(first, first + num, POSITIONS)
    ]
    return np.concatenate(blocks)[:num]


@partial(jax.jit, static_argnums=2)
def _noise(words_2: Array, positions_N: Int[Array, "n"], vocab: int) -> Float[Array, "n v"]:
    key = jax.random.wrap_key_data(words_2, impl="threefry2x32")
    return jax.vmap(lambda position: jax.random.gumbel(jax.random.fold_in(key, position), (vocab,)))(positions_N)
