"""What int8 costs in quality: the validation loss that a server's own numbers give, teacher-forced.

Windows of a text go through `decoder.forward` a chunk at a time, with keys and values put into pages and gathered from
them between chunks, as an engine does. So the loss is that of the weights, cells and products that requests get.
"""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from gcompute.config.model import ModelConfig
from gcompute.model.transformer import Execution, Params
from gcompute.serve.decoder import forward
from gcompute.serve.kv_pool import empty_pool
from gcompute.serve.shares import gather, put_back
from gcompute.serve.weights import Layout, choose_layout, serving_weights

# Cells of a page, and tokens read at once: few, so that most of what is attended to has been through the pool.
PAGE = 16
FORMATS = ("float32", "bfloat16", "int8")


def validation_loss(
    params: Params,
    config: ModelConfig,
    tokens: Int[np.ndarray, "n"],
    *,
    weights: str = "bfloat16",
    kv: str = "bfloat16",
    context: int | None = None,
    batch: int = 16,
) -> float:
    """Mean cross-entropy in nats a token, over windows of `context` tokens that do not overlap.

    weights, kv: "float32", "bfloat16" or "int8". Products are in bfloat16, or float32 where weights are float32.
    A last piece of the text that fills no window is left out.

    Raises:
      ValueError: an unknown format, or a text shorter than one window.
    """
    for name, value in (("weights", weights), ("kv", kv)):
        if value not in FORMATS:
            raise ValueError(f"{name}={value!r} is not a format of serving. Legal: {', '.join(FORMATS)}.")
    context = (context or config.context) // PAGE * PAGE
    num = (len(tokens) - 1) // context if context else 0
    if num < 1:
        raise ValueError(f"{len(tokens)} tokens fill no window of {max(context, PAGE)} and the token after it.")
    compute = jnp.float32 if weights == "float32" else jnp.bfloat16
    layout = choose_layout(None, jax.default_backend(), compute)
    prepare = partial(serving_weights, config=config, compute=compute, layout=layout, int8=weights == "int8")
    laid = jax.jit(prepare)(params)
    losses = jax.jit(partial(_losses, config=config, compute=compute, kv=kv, layout=layout))
    inputs = np.asarray(tokens[: num * context], np.int32).reshape(num, context)
    targets = np.asarray(tokens[1 : num * context + 1], np.int32).reshape(num, context)
    batch = min(batch, num)
    total = 0.0
    for first in range(0, num, batch):
        # The last batch begins early, so that one program serves all; what was counted is not counted again.
        begin = min(first, num - batch)
        loss_BT = losses(laid, inputs[begin : begin + batch], targets[begin : begin + batch])
        total += float(jnp.sum(loss_BT[first - begin :]))
    return total / (num * context)


def _losses(
    weights: Params,
    tokens_BT: Int[Array, "b t"],
    targets_BT: Int[Array, "b t"],
    *,
    config: ModelConfig,
    compute: Any,
    kv: str,
    layout: Layout,
) -> Float[Array, "b t"]:
    """Cross-entropy of each target, one page of tokens after another."""
    b, t = tokens_BT.shape
    pages = t // PAGE
    tables_BN = 1 + jnp.arange(b * pages, dtype=jnp.int32).reshape(b, pages)
    execution = Execution(compute=compute)
    pool = empty_pool(config, num_pages=1 + b * pages, page=PAGE, dtype=kv)

    def read_page(pool: Any, page: tuple[Array, Array, Array]) -> tuple[Any, Array]:
        tokens_BC, targets_BC, start = page
        positions_BC = jnp.broadcast_to(start + jnp.arange(PAGE), (b, PAGE))
        cache = gather(pool, tables_BN, PAGE, execution=execution, layout=layout, shares=1)
        logits_BCV, cache = forward(
            weights, tokens_BC, config=config, execution=execution, positions_BT=positions_BC, cache=cache
        )
        counts_B = jnp.full(b, PAGE)
        written = {"tables_BN": tables_BN, "start_B": positions_BC[:, 0], "count_B": counts_B, "num_cells": PAGE}
        pool = put_back(pool, cache, **written, shares=1)
        chosen_BC = jnp.take_along_axis(logits_BCV, targets_BC[..., None], axis=-1)[..., 0]
        return pool, jax.nn.logsumexp(logits_BCV, axis=-1) - chosen_BC

    def by_page(x_BT: Array) -> Array:
        return x_BT.reshape(b, pages, PAGE).swapaxes(0, 1)

    starts = PAGE * jnp.arange(pages, dtype=jnp.int32)
    _, losses_NBC = jax.lax.scan(read_page, pool, (by_page(tokens_BT), by_page(targets_BT), starts))
    return losses_NBC.swapaxes(0, 1).reshape(b, t)
