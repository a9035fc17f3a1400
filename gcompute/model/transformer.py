"""The decoder: embedding, a stack of blocks, a norm and an output layer, as pure functions of (params, inputs).

`params` is a nested dict of float32 arrays. Its `blocks` are stacked, a leading dim of L on every leaf, and run by one
`lax.scan`; `unstack` turns them into one dict a layer, which is faster for small models on CPU and is the form that
keeps a key/value cache in place. Flax holds the modules; nothing above this package sees it.
"""

from dataclasses import dataclass
from functools import cache
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from gcompute.config.model import ModelConfig
from gcompute.model.attention import Attention
from gcompute.model.kv_cache import KVCache
from gcompute.model.layers import FeedForward, make_norm, matrix, rotary_table
from gcompute.model.matmul import MATMUL, accumulator, linear, linear_transposed

Params = dict[str, Any]


@dataclass(frozen=True, slots=True, kw_only=True)
class Execution:
    """How a forward pass is carried out; it changes rounding, memory and speed, not the function.

    compute: dtype of matmul operands. residual: dtype of the stream between blocks. remat: what the backward pass
    recomputes: "none", "dots" (all but matmul results) or "full" (all but the inputs of blocks). unroll: layers a
    scan step; at least `layers` means no scan.
    """

    compute: Any = jnp.bfloat16
    residual: Any = jnp.float32
    remat: str = "none"
    unroll: int = 1


class Block(nnx.Module):
    """x + attention(norm(x)), then x + feed_forward(norm(x))."""

    def __init__(self, config: ModelConfig, *, rngs: nnx.Rngs):
        self.attention_norm = make_norm(config)
        self.attention = Attention(config, rngs=rngs)
        self.mlp_norm = make_norm(config)
        self.mlp = FeedForward(config, rngs=rngs)

    def __call__(
        self,
        x_BTD: Float[Array, "b t d"],
        *,
        positions_BT: Int[Array, "#b t"],
        rotary: Array | None,
        cache: tuple[Array, Array] | None,
        compute: jnp.dtype,
    ) -> tuple[Float[Array, "b t d"], tuple[Array, Array] | None]:
        mixed_BTD, cache = self.attention(
            self.attention_norm(x_BTD), positions_BT=positions_BT, rotary=rotary, cache=cache, compute=compute
        )
        x_BTD = x_BTD + mixed_BTD.astype(x_BTD.dtype)
        return x_BTD + self.mlp(self.mlp_norm(x_BTD), compute).astype(x_BTD.dtype), cache


class Transformer(nnx.Module):
    """The whole decoder. `stacked`: one Block whose parameters have a leading L dim, else a list of L Blocks."""

    def __init__(self, config: ModelConfig, *, rngs: nnx.Rngs, stacked: bool = True):
        self.config = config
        self.embedding_VD = matrix("VD", (config.vocab, config.dim), rngs)
        learned = config.positions == "learned"
        self.positions_TD = matrix("TD", (config.context, config.dim), rngs) if learned else None
        self.blocks: Any
        if stacked:
            keys = jax.random.split(rngs.params(), config.layers)
            self.blocks = nnx.vmap(lambda key: Block(config, rngs=nnx.Rngs(key)))(keys)
        else:
            self.blocks = nnx.List([Block(config, rngs=rngs) for _ in range(config.layers)])
        self.norm = make_norm(config)
        self.head_DV = None if config.tied else matrix("DV", (config.dim, config.vocab), rngs)

    def __call__(
        self,
        tokens_BT: Int[Array, "b t"],
        *,
        execution: Execution,
        positions_BT: Int[Array, "b t"] | None = None,
        cache: KVCache | None = None,
        logits_at_B: Int[Array, "b"] | None = None,
    ) -> tuple[Float[Array, "b t v"] | Float[Array, "b v"], KVCache | None]:
        config = self.config
        if positions_BT is None:
            positions_BT = jnp.arange(tokens_BT.shape[1])[None]
        x_BTD = self.embedding_VD[...][tokens_BT]
        if self.positions_TD is not None:
            x_BTD = x_BTD + self.positions_TD[...][positions_BT]
        x_BTD = x_BTD.astype(execution.residual)
        rotary = None
        if config.positions == "rope":
            rotary = rotary_table(positions_BT, config.head_size, config.rope_theta, accumulator(execution.compute))
        if isinstance(self.blocks, nnx.List):
            x_BTD, cache = self._loop(x_BTD, execution, positions_BT, rotary, cache)
        elif cache is None:
            x_BTD = self._scan(x_BTD, execution, positions_BT, rotary)
        else:
            raise ValueError("a key/value cache needs unstacked blocks: pass params through unstack() first.")
        if logits_at_B is not None:
            x_BTD = jnp.take_along_axis(x_BTD, logits_at_B[:, None, None], axis=1)
        x_BTD = self.norm(x_BTD)
        if self.head_DV is None:
            logits_BTV = linear_transposed(x_BTD, self.embedding_VD[...], execution.compute)
        else:
            logits_BTV = linear(x_BTD, self.head_DV[...], execution.compute)
        return logits_BTV if logits_at_B is None else logits_BTV[:, 0], cache

    def _loop(
        self, x_BTD: Array, execution: Execution, positions_BT: Array, rotary: Array | None, cache: KVCache | None
    ) -> tuple[Array, KVCache | None]:
        caches = []
        for layer, block in enumerate(self.blocks):
            graphdef, state = nnx.split(block)
            run = _run_block(graphdef, execution)
            layer_cache = None if cache is None else (cache.k[layer], cache.v[layer])
            x_BTD, layer_cache = run(state, x_BTD, positions_BT, rotary, layer_cache)
            caches.append(layer_cache)
        if cache is not None:
            cache = KVCache(k=tuple(k for k, _ in caches), v=tuple(v for _, v in caches))
        return x_BTD, cache

    def _scan(self, x_BTD: Array, execution: Execution, positions_BT: Array, rotary: Array | None) -> Array:
        graphdef, states = nnx.split(self.blocks)
        run = _run_block(graphdef, execution)

        def step(x_BTD: Array, state: nnx.State) -> tuple[Array, None]:
            return run(state, x_BTD, positions_BT, rotary, None)[0], None

        return jax.lax.scan(step, x_BTD, states, unroll=execution.unroll)[0]


def _run_block(graphdef: nnx.GraphDef, execution: Execution) -> Any:
    def run(state: nnx.State, x_BTD: Array, positions_BT: Array, rotary: Array | None, cache: Any) -> Any:
        block = nnx.merge(graphdef, state)
        return block(x_BTD, positions_BT=positions_BT, rotary=rotary, cache=cache, compute=execution.compute)

    if execution.remat == "full":
        return jax.checkpoint(run)
    if execution.remat == "dots":
        return jax.checkpoint(run, policy=jax.checkpoint_policies.save_only_these_names(MATMUL))
    return run


@cache
def _split(config: ModelConfig, stacked: bool) -> tuple[nnx.GraphDef, nnx.State]:
    """The module's structure and its abstract state, without computing a value."""
    abstract = nnx.eval_shape(lambda: Transformer(config, rngs=nnx.Rngs(0), stacked=stacked))
    return nnx.split(abstract)


def init(config: ModelConfig, key: Array) -> Params:
    """Initial parameters, float32, blocks stacked."""
    return nnx.to_pure_dict(nnx.state(Transformer(config, rngs=nnx.Rngs(key))))


def abstract_params(config: ModelConfig) -> Params:
    """The tree of `init` with a jax.ShapeDtypeStruct for each array."""
    return nnx.to_pure_dict(_split(config, True)[1])


def param_dims(config: ModelConfig) -> Params:
    """The tree of `init` with each array's dims as letters: "LDNH", "VD", ..."""

    def dims(path: Any, variable: Any) -> str:
        own = variable.get_metadata()["dims"]
        return "L" + own if path[0] == "blocks" else own

    flat: dict[Any, str] = {path: dims(path, variable) for path, variable in nnx.to_flat_state(_split(config, True)[1])}
    nested: Params = {}
    for path, value in flat.items():
        node = nested
        for key in path[:-1]:
            node = node.setdefault(key, {})
        node[path[-1]] = value
    return nested


def unstack(params: Params, config: ModelConfig) -> Params:
    """The same parameters with `blocks` as {0: layer 0, 1: layer 1, ...}.

    Splitting has a concatenation as its gradient; indexing would have L padded sums.
    """
    if 0 in params["blocks"]:
        return params
    leaves, structure = jax.tree.flatten(params["blocks"])
    pieces = [jax.lax.split(leaf, (1,) * config.layers) for leaf in leaves]
    layers = {
        layer: structure.unflatten([piece[layer].reshape(piece[layer].shape[1:]) for piece in pieces])
        for layer in range(config.layers)
    }
    return {**params, "blocks": layers}


def stack(params: Params, config: ModelConfig) -> Params:
    """The inverse of `unstack`."""
    if 0 not in params["blocks"]:
        return params
    layers = [params["blocks"][layer] for layer in range(config.layers)]
    return {**params, "blocks": jax.tree.map(lambda *leaves: jnp.stack(leaves), *layers)}


def forward(
    params: Params,
    tokens_BT: Int[Array, "b t"],
    *,
    config: ModelConfig,
    execution: Execution,
    positions_BT: Int[Array, "b t"] | None = None,
    cache: KVCache | None = None,
    logits_at_B: Int[Array, "b"] | None = None,
) -> tuple[Float[Array, "b t v"] | Float[Array, "b v"], KVCache | None]:
    """Logits of the next token at every position, and the cache with this input's keys and values in it.

    Without a cache, attention is causal over T. With one, the T new keys and values of each row are written at
    `positions_BT` and each query sees the cache's slots up to its own position. `logits_at_B` picks one index of T a
    row before the output layer, so that a prefill does not compute the logits of a whole prompt.
    """
    stacked = 0 not in params["blocks"]
    if stacked and cache is None and execution.unroll >= config.layers:
        params, stacked = unstack(params, config), False
    graphdef, _ = _split(config, stacked)
    model: Transformer = nnx.merge(graphdef, params)
    return model(tokens_BT, execution=execution, positions_BT=positions_BT, cache=cache, logits_at_B=logits_at_B)
