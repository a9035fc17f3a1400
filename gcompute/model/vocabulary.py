"""The decoder's two ends, which hold arrays of the size of the vocabulary: looking tokens up, and the loss of logits.

On a mesh both are islands of per-device code. The compiler left to itself gathers the whole table to look a few rows
up, reduces its gradient whole, and keeps the logits of every token.
"""

from functools import partial

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from gcompute.config.mesh import Axis
from gcompute.model.matmul import linear, linear_transposed
from gcompute.parallel.placement import Placement
from gcompute.parallel.product import alike
from gcompute.parallel.vocabulary import vocab_parallel_cross_entropy, vocab_parallel_embedding
from gcompute.plan.memory import loss_chunks


def look_up(
    table_VD: Float[Array, "v d"], tokens_BT: Int[Array, "b t"], placement: Placement | None
) -> Float[Array, "b t d"]:
    """Row `token` of the table for each token.

    With D split over fsdp, each device looks up its columns for the tokens of all, and an all-to-all gives everyone
    its own tokens' whole rows: B T D numbers travel in place of the table's V D, both ways.
    """
    if placement is None or placement.is_local:
        return table_VD[tokens_BT]
    mesh = placement.shape

    def per_device(table_vd: Array, tokens_bt: Array) -> Array:
        if mesh.fsdp > 1:
            tokens_bt = jax.lax.all_gather(tokens_bt, Axis.FSDP, axis=0, tiled=True)
        if mesh.tensor > 1:
            rows_btd = vocab_parallel_embedding(
                tokens_bt, table_vd, Axis.TENSOR, scatter_sequence=placement.sequence_parallel
            )
        else:
            rows_btd = table_vd[tokens_bt]
        if mesh.fsdp > 1:
            rows_btd = jax.lax.all_to_all(rows_btd, Axis.FSDP, split_axis=0, concat_axis=2, tiled=True)
        return rows_btd

    return placement.island(per_device, ("VW", "BT"), "BRD")(table_VD, tokens_BT)


def token_losses(logits_BTV: Float[Array, "b t v"], targets_BT: Int[Array, "b t"]) -> Float[Array, "b t"]:
    """Cross-entropy of each target in nats: logsumexp(logits) - logits[target]."""
    chosen_BT = jnp.take_along_axis(logits_BTV, targets_BT[..., None], axis=-1)[..., 0]
    return jax.nn.logsumexp(logits_BTV, axis=-1) - chosen_BT


def output_losses(
    x_BTD: Float[Array, "b t d"],
    weight: Float[Array, "d v"] | Float[Array, "v d"],
    targets_BT: Int[Array, "b t"],
    *,
    tied: bool,
    compute: jnp.dtype,
    placement: Placement | None,
) -> Float[Array, "b t"]:
    """Cross-entropy of each target under logits = x @ weight (transposed where tied), the logits never whole.

    Each device takes its tokens in as many chunks as keep one chunk's logits small (`loss_chunks`), and computes a
    chunk's logits again for its gradient. On a mesh the weight is gathered over fsdp once, its gradient reduced once.
    """
    if placement is None or placement.is_local:
        return _chunked(x_BTD, weight, targets_BT, tied=tied, compute=compute, split=False)
    mesh = placement.shape

    def per_device(x_btD: Array, weight: Array, targets_bt: Array) -> Array:
        if mesh.fsdp > 1:
            weight = _gathered(weight, int(tied), compute)
        # Typed alike before the loop over chunks, or each of them would reduce its own part of the gradients.
        x_btD, weight = alike(x_btD, weight)
        return _chunked(x_btD, weight, targets_bt, tied=tied, compute=compute, split=mesh.tensor > 1)

    dims = ("BTD", "VW" if tied else "WV", "BT")
    return placement.island(per_device, dims, "BT")(x_BTD, weight, targets_BT)


def _chunked(x_BTD: Array, weight: Array, targets_BT: Array, *, tied: bool, compute: jnp.dtype, split: bool) -> Array:
    product = linear_transposed if tied else linear

    def losses(x_BTD: Array, targets_BT: Array) -> Array:
        logits_BTV = product(x_BTD, weight, compute)
        if split:
            return vocab_parallel_cross_entropy(logits_BTV, targets_BT, Axis.TENSOR)
        return token_losses(logits_BTV, targets_BT)

    b, t, dim = x_BTD.shape
    chunks = loss_chunks(b * t, weight.shape[0 if tied else 1])
    if chunks == 1:
        return losses(x_BTD, targets_BT)
    # Inside the loop a chunk's logits are not kept for the backward pass.
    recomputed = jax.checkpoint(losses)
    pieces = (x_BTD.reshape(chunks, 1, -1, dim), targets_BT.reshape(chunks, 1, -1))
    return jax.lax.map(lambda piece: recomputed(*piece), pieces).reshape(b, t)


@partial(jax.custom_vjp, nondiff_argnums=(1, 2))
def _gathered(weight: Array, dim: int, compute: jnp.dtype) -> Array:
    """The whole of a weight split over fsdp: rounded to `compute` to travel, its gradient reduced wide."""
    return jax.lax.all_gather(weight.astype(compute), Axis.FSDP, axis=dim, tiled=True).astype(weight.dtype)


def _gathered_forward(weight: Array, dim: int, compute: jnp.dtype) -> tuple[Array, None]:
    return _gathered(weight, dim, compute), None


def _gathered_backward(dim: int, compute: jnp.dtype, saved: None, gradient: Array) -> tuple[Array]:
    return (jax.lax.psum_scatter(gradient, Axis.FSDP, scatter_dimension=dim, tiled=True),)


_gathered.defvjp(_gathered_forward, _gathered_backward)
