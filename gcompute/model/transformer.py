"""The decoder: embedding, a stack of blocks, a norm and an output layer, as pure functions of (params, inputs).

`params` is a nested dict of float32 arrays. Its `blocks` are stacked, a leading dim of L on every leaf, and run by one
`lax.scan`; `unstack` turns them into one dict a layer, which is faster for small models on CPU and is the form that
keeps a key/value cache in place. Flax holds the modules; nothing above this package sees it.
"""

from dataclasses import dataclass
from functools import cache, partial
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from gcompute.config.model import ModelConfig
from gcompute.model.attention import Attention
from gcompute.model.dropout import EMBEDDING, Dropout, attention_site, feed_forward_site
from gcompute.model.kv_cache import KVCache, LayerCache
from gcompute.model.layers import FeedForward, make_norm, matrix, rotary_table
from gcompute.model.matmul import MATMUL, linear, linear_transposed
from gcompute.model.moe import MoE
from gcompute.model.vocabulary import look_up, output_losses
from gcompute.parallel.einsum import accumulator
from gcompute.parallel.expert import RouterStats
from gcompute.parallel.placement import Placement, constrain
from gcompute.parallel.ring_attention import RING_ATTENTION
from gcompute.parallel.rules import RULES

Params = dict[str, Any]


@dataclass(frozen=True, slots=True, kw_only=True)
class Execution:
    """How a forward pass is carried out; it changes rounding, memory and speed, not the function.

    compute: dtype of matmul operands. residual: dtype of the stream between blocks and of feed-forward activations.
    remat: what the backward pass recomputes: "none", "dots" (all but matmul results) or "full" (all but the inputs of
    blocks). unroll: layers a scan step; at least `layers` means no scan. kernel: what computes attention over whole
    sequences, "xla" or "splash". query_blocks: blocks of queries that "xla" takes one after another, each over the keys
    up to its own end; they divide T. one_projection: whether q, k and v come of one product. output_major:
    whether layers that are not scanned take gradients of [F, D] as [D, F]. placement: the mesh, or None on one device.
    """

    compute: Any = jnp.bfloat16
    residual: Any = jnp.float32
    remat: str = "none"
    unroll: int = 1
    kernel: str = "xla"
    query_blocks: int = 1
    one_projection: bool = False
    output_major: bool = False
    placement: Placement | None = None


class Block(nnx.Module):
    """x + attention(norm(x)), then x + feed_forward(norm(x)); in training with dropout, of what joins x."""

    def __init__(self, config: ModelConfig, *, rngs: nnx.Rngs):
        self.attention_norm = make_norm(config)
        self.attention = Attention(config, rngs=rngs)
        self.mlp_norm = make_norm(config)
        self.mlp = MoE(config, rngs=rngs) if config.experts else FeedForward(config, rngs=rngs)

    def __call__(
        self,
        x_BTD: Float[Array, "b t d"],
        *,
        positions_BT: Int[Array, "#b t"],
        rotary: Array | None,
        cache: tuple[Array, Array] | LayerCache | None,
        execution: Execution,
        dropout: Dropout | None = None,
        layer: int | Array = 0,
    ) -> tuple[Float[Array, "b t d"], tuple[Array, Array] | LayerCache | None, RouterStats | None]:
        compute, placement = execution.compute, execution.placement

        def branch_input(norm: Any, branch: Any) -> Array:
            # Norms run on shards of the stream; the products after them see the whole sequence of a context shard.
            if placement is None or not placement.sequence_parallel or isinstance(branch, MoE):
                return constrain(placement, norm(x_BTD), "BTD")
            return _whole_sequence(norm(x_BTD), placement, compute)

        def joined(y_BTD: Array, site: int | Array) -> Array:
            y_BTD = constrain(placement, y_BTD.astype(x_BTD.dtype), "BRD")
            if dropout is not None:
                y_BTD = dropout(y_BTD, positions_BT, site, placement)
            return constrain(placement, x_BTD + y_BTD, "BRD")

        mixed_BTD, cache = self.attention(
            branch_input(self.attention_norm, self.attention),
            positions_BT=positions_BT,
            rotary=rotary,
            cache=cache,
            compute=compute,
            kernel=execution.kernel,
            query_blocks=execution.query_blocks,
            one_projection=execution.one_projection,
            placement=placement,
        )
        x_BTD = joined(mixed_BTD, attention_site(layer))
        fed_BTD, stats = branch_input(self.mlp_norm, self.mlp), None
        if isinstance(self.mlp, MoE):
            fed_BTD, stats = self.mlp(fed_BTD, compute, placement)
        else:
            fed_BTD = self.mlp(fed_BTD, compute, placement, execution.residual)
        return joined(fed_BTD, feed_forward_site(layer)), cache, stats


@partial(jax.custom_vjp, nondiff_argnums=(1, 2))
def _whole_sequence(x_BTD: Array, placement: Placement, compute: jnp.dtype) -> Array:
    """The shards of a sequence gathered for products in `compute`: rounded to it to travel, which they would be anyway.

    Not for a router, whose product is wider. Gradients are summed wide.
    """
    return placement.constrain(placement.constrain(x_BTD.astype(compute), "BRD"), "BTD").astype(x_BTD.dtype)


def _whole_sequence_forward(x_BTD: Array, placement: Placement, compute: jnp.dtype) -> tuple[Array, None]:
    return _whole_sequence(x_BTD, placement, compute), None


def _whole_sequence_backward(placement: Placement, compute: jnp.dtype, saved: None, dy_BTD: Array) -> tuple[Array]:
    return (placement.constrain(dy_BTD, "BRD"),)


_whole_sequence.defvjp(_whole_sequence_forward, _whole_sequence_backward)


class Transformer(nnx.Module):
    """The parameters of the whole decoder, and its two ends; `run_blocks` runs what lies between.

    blocks: "stacked", one Block whose parameters have a leading L dim, or "none", for the ends alone.
    """

    def __init__(self, config: ModelConfig, *, rngs: nnx.Rngs, blocks: str = "stacked"):
        self.config = config
        self.embedding_VD = matrix("VD", (config.vocab, config.dim), rngs)
        learned = config.positions == "learned"
        self.positions_TD = matrix("TD", (config.context, config.dim), rngs) if learned else None
        if blocks == "stacked":
            keys = jax.random.split(rngs.params(), config.layers)
            self.blocks = nnx.vmap(lambda key: Block(config, rngs=nnx.Rngs(key)))(keys)
        self.norm = make_norm(config)
        self.head_DV = None if config.tied else matrix("DV", (config.dim, config.vocab), rngs)

    def embed(self, tokens_BT: Int[Array, "b t"], positions_BT: Int[Array, "#b t"], execution: Execution) -> Array:
        x_BTD = look_up(self.embedding_VD[...], tokens_BT, execution.placement)
        if self.positions_TD is not None:
            x_BTD = x_BTD + self.positions_TD[...][positions_BT]
        return constrain(execution.placement, x_BTD.astype(execution.residual), "BRD")

    def unembed(self, x_BTD: Float[Array, "b t d"], execution: Execution) -> Float[Array, "b t v"]:
        x_BTD = constrain(execution.placement, self.norm(x_BTD), "BTD")
        if self.head_DV is None:
            logits_BTV = linear_transposed(x_BTD, self.embedding_VD[...], execution.compute)
        else:
            logits_BTV = linear(x_BTD, self.head_DV[...], execution.compute)
        return constrain(execution.placement, logits_BTV, "BTV")

    def losses(
        self, x_BTD: Float[Array, "b t d"], targets_BT: Int[Array, "b t"], execution: Execution
    ) -> Float[Array, "b t"]:
        """Cross-entropy of each target in nats under the logits that `unembed` gives."""
        weight = self.embedding_VD if self.head_DV is None else self.head_DV
        return output_losses(
            constrain(execution.placement, self.norm(x_BTD), "BTD"),
            weight[...],
            targets_BT,
            tied=self.head_DV is None,
            compute=execution.compute,
            placement=execution.placement,
        )


def run_blocks(
    blocks: dict[Any, Any],
    x_BTD: Float[Array, "b t d"],
    positions_BT: Int[Array, "#b t"],
    *,
    config: ModelConfig,
    execution: Execution,
    cache: KVCache | tuple[LayerCache, ...] | None = None,
    dropout: Dropout | None = None,
) -> tuple[Float[Array, "b t d"], Any, RouterStats | None]:
    """The stream after all of `blocks`, the cache with the new keys and values, and what the routers did, summed.

    `blocks` are stacked, any number of them (a pipeline stage has some), or one dict a layer. With `dropout` they are
    all of the model's.
    """
    rotary = None
    if config.positions == "rope":
        rotary = rotary_table(positions_BT, config.head_size, config.rope_theta, accumulator(execution.compute))
    graphdef = _block_graphdef(config)

    def run(
        params: Params, x_BTD: Array, positions_BT: Array, rotary: Array | None, cache: Any, dropping: Any = None
    ) -> Any:
        block = nnx.merge(graphdef, pinned(execution.placement, params, _block_dims(config)))
        dropout, layer = dropping or (None, 0)
        return block(
            x_BTD,
            positions_BT=positions_BT,
            rotary=rotary,
            cache=cache,
            execution=execution,
            dropout=dropout,
            layer=layer,
        )

    if execution.remat == "full":
        run = jax.checkpoint(run)
    elif execution.remat == "dots":
        run = jax.checkpoint(run, policy=jax.checkpoint_policies.save_only_these_names(MATMUL, RING_ATTENTION))

    if 0 not in blocks:
        if cache is not None:
            raise ValueError("a key/value cache needs unstacked blocks: pass params through unstack() first.")

        def step(x_BTD: Array, of_layer: tuple[Params, Array | None]) -> tuple[Array, RouterStats | None]:
            params, layer = of_layer
            dropping = None if dropout is None else (dropout, layer)
            x_BTD, _, stats = run(params, x_BTD, positions_BT, rotary, None, dropping)
            return x_BTD, stats

        num_layers = jax.tree.leaves(blocks)[0].shape[0]
        layers = None if dropout is None else jnp.arange(num_layers)
        x_BTD, stats = jax.lax.scan(step, x_BTD, (blocks, layers), unroll=min(execution.unroll, num_layers))
        return x_BTD, None, jax.tree.map(lambda a: a.sum(axis=0), stats)
    caches, all_stats = [], []
    for layer in range(len(blocks)):
        layer_cache = (cache.k[layer], cache.v[layer]) if isinstance(cache, KVCache) else cache and cache[layer]
        dropping = None if dropout is None else (dropout, layer)
        x_BTD, layer_cache, stats = run(blocks[layer], x_BTD, positions_BT, rotary, layer_cache, dropping)
        caches.append(layer_cache)
        all_stats.append(stats)
    if isinstance(cache, KVCache):
        cache = KVCache(k=tuple(k for k, _ in caches), v=tuple(v for _, v in caches))
    elif cache is not None:
        cache = tuple(caches)
    return x_BTD, cache, jax.tree.map(lambda *several: sum(several), *all_stats)


def pinned(placement: Placement | None, params: Params, dims: Params) -> Params:
    """The same parameters, held to the layout of their rules where they are used, and with them their gradients.

    Left free, XLA may sum a gradient whole on every device before it keeps a shard of it.
    """
    if placement is None:
        return params
    return jax.tree.map(lambda leaf, letters: placement.constrain(leaf, letters, RULES), params, dims)


@cache
def _block_dims(config: ModelConfig) -> Params:
    """The dims of one block's parameters."""
    return jax.tree.map(lambda dims: dims.removeprefix("L"), param_dims(config)["blocks"])


@cache
def _block_graphdef(config: ModelConfig) -> nnx.GraphDef:
    return nnx.split(nnx.eval_shape(lambda: Block(config, rngs=nnx.Rngs(0))))[0]


@cache
def _split(config: ModelConfig, blocks: str = "stacked") -> tuple[nnx.GraphDef, nnx.State]:
    """The module's structure and its abstract state, without computing a value."""
    abstract = nnx.eval_shape(lambda: Transformer(config, rngs=nnx.Rngs(0), blocks=blocks))
    return nnx.split(abstract)


def without_blocks(params: Params) -> Params:
    """What the two ends of the decoder have of its parameters."""
    return {name: value for name, value in params.items() if name != "blocks"}


def ends(params: Params, config: ModelConfig, placement: Placement | None = None) -> Transformer:
    """The decoder's two ends, to `embed` and `unembed` with; `params` may be without blocks."""
    graphdef, _ = _split(config, "none")
    return nnx.merge(graphdef, pinned(placement, without_blocks(params), without_blocks(param_dims(config))))


def init(config: ModelConfig, key: Array) -> Params:
    """Initial parameters, float32, blocks stacked."""
    return nnx.to_pure_dict(nnx.state(Transformer(config, rngs=nnx.Rngs(key))))


def abstract_params(config: ModelConfig) -> Params:
    """The tree of `init` with a jax.ShapeDtypeStruct for each array."""
    return nnx.to_pure_dict(_split(config)[1])


def param_dims(config: ModelConfig) -> Params:
    """The tree of `init` with each array's dims as letters: "LDNH", "VD", ..."""

    def dims(path: Any, variable: Any) -> str:
        own = variable.get_metadata()["dims"]
        return "L" + own if path[0] == "blocks" else own

    flat: dict[Any, str] = {path: dims(path, variable) for path, variable in nnx.to_flat_state(_split(config)[1])}
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
    if cache is None and execution.unroll >= config.layers:
        params = unstack(params, config)
    if positions_BT is None:
        positions_BT = jnp.arange(tokens_BT.shape[1])[None]
    model = ends(params, config, execution.placement)
    x_BTD, cache, _ = run_blocks(
        params["blocks"],
        model.embed(tokens_BT, positions_BT, execution),
        positions_BT,
        config=config,
        execution=execution,
        cache=cache,
    )
    if logits_at_B is not None:
        x_BTD = jnp.take_along_axis(x_BTD, logits_at_B[:, None, None], axis=1)
    logits_BTV = model.unembed(x_BTD, execution)
    return logits_BTV if logits_at_B is None else logits_BTV[:, 0], cache


def forward_losses(
    params: Params,
    tokens_BT: Int[Array, "b t"],
    targets_BT: Int[Array, "b t"],
    *,
    config: ModelConfig,
    execution: Execution,
    positions_BT: Int[Array, "#b t"] | None = None,
    dropout: Dropout | None = None,
) -> tuple[Float[Array, "b t"], RouterStats | None]:
    """Cross-entropy of each target in nats, and what the routers of a mixture of experts did, summed over layers.

    `dropout`: in training alone, never in evaluation.
    """
    if execution.unroll >= config.layers:
        params = unstack(params, config)
    if positions_BT is None:
        positions_BT = jnp.arange(tokens_BT.shape[1])[None]
    if dropout is not None:
        # The masks take a piece of the sequence each, and without this the angles of RoPE would, to be gathered again.
        positions_BT = constrain(execution.placement, positions_BT, "_T")
    model = ends(params, config, execution.placement)
    x_BTD = model.embed(tokens_BT, positions_BT, execution)
    if dropout is not None:
        x_BTD = dropout(x_BTD, positions_BT, EMBEDDING, execution.placement)
    x_BTD, _, stats = run_blocks(
        params["blocks"], x_BTD, positions_BT, config=config, execution=execution, dropout=dropout
    )
    return model.losses(x_BTD, targets_BT, execution), stats
