"""Shim."""

from dataclasses import replace

from gcompute.model.kv_cache import KVCache
from gcompute.model.transformer import forward as model_forward


def forward(params, tokens_BT, *, config, execution, positions_BT, cache, logits_at_B=None):
    turn = lambda leaves: tuple(leaf.swapaxes(1, 2) for leaf in leaves)
    logits, new = model_forward(
        params,
        tokens_BT,
        config=config,
        execution=execution,
        positions_BT=positions_BT,
        cache=KVCache(k=turn(cache.k), v=turn(cache.v)),
        logits_at_B=logits_at_B,
    )
    return logits, replace(cache, k=turn(new.k), v=turn(new.v))
