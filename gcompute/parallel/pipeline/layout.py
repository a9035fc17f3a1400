"""How a stack of layers lies on the stages: which layer each stage holds, and the order in which to store them."""

from typing import TypeVar

import jax
import numpy as np
from jaxtyping import Int

Tree = TypeVar("Tree")


def layer_order(num_layers: int, num_stages: int, num_chunks: int = 1) -> Int[np.ndarray, "layers"]:
    """The model's layers in the order in which stages hold them: stage by stage, and in a stage chunk by chunk.

    `stacked[layer_order(...)]`, split over the stage axis on its first dim, gives stage s the layers of virtual stages
    s, S + s, 2 S + s, ...; `np.argsort` of the order leads back. With one chunk it changes nothing.

    >>> layer_order(8, 2, 2)
    array([0, 1, 4, 5, 2, 3, 6, 7])

    Raises:
      ValueError: the layers cannot be divided evenly.
    """
    pieces = num_stages * num_chunks
    if num_layers % pieces:
        chunks = f" of {num_chunks} chunks each" if num_chunks > 1 else ""
        legal = [size for size in range(1, num_layers // num_chunks + 1) if num_layers % (size * num_chunks) == 0]
        advice = f"Use {_choices(legal)} stages" if legal else f"Use fewer chunks than {num_chunks}"
        raise ValueError(f"{num_layers} layers cannot be divided over {num_stages} stages{chunks}. {advice}.")
    layers = np.arange(num_layers).reshape(num_chunks, num_stages, num_layers // pieces)
    return layers.swapaxes(0, 1).reshape(-1)


def split_chunks(local_params: Tree, num_chunks: int) -> Tree:
    """A stage's own layers, [v n, ...], as its v chunks, [v, n, ...]: what `run_pipeline` takes."""
    return jax.tree.map(lambda leaf: leaf.reshape(num_chunks, -1, *leaf.shape[1:]), local_params)


def join_chunks(chunks: Tree) -> Tree:
    """The inverse of `split_chunks`, for gradients."""
    return jax.tree.map(lambda leaf: leaf.reshape(-1, *leaf.shape[2:]), chunks)


def _choices(sizes: list[int]) -> str:
    return " or ".join(filter(None, [", ".join(map(str, sizes[:-1])), str(sizes[-1])]))
