"""The explicit strategies of `gcompute.parallel`, each on 8 devices: programs, and what the textbook has them send.

What stands in every layer of a model is run as `LAYERS` of them in a scan, forward and backward: then the two passes
are loops of their own, as in a model, and the compiler cannot keep for the second what the first one brought.
"""

import math
from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import optax
import textbook
from account import Axes, Program, Reason
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from gcompute.config.mesh import Axis, MeshShape
from gcompute.parallel import collective_matmul, sequence, tensor
from gcompute.parallel.collectives import ring_all_reduce
from gcompute.parallel.data import shard_map_step
from gcompute.parallel.expert import ExpertAxes, mixture
from gcompute.parallel.pipeline.executor import PipelineResult, run_pipeline
from gcompute.parallel.pipeline.schedule import Schedule, gpipe, interleaved, one_f_one_b, zero_bubble
from gcompute.parallel.ring_attention import ring_attention
from gcompute.parallel.ulysses import gathered_attention, ulysses_attention
from gcompute.parallel.vocabulary import vocab_parallel_cross_entropy, vocab_parallel_embedding, vocabulary_specs
from gcompute.parallel.zero import gather, zero_step
from gcompute.parallel.zero_layout import layer_specs, placements, shard_specs

N, LAYERS, MICROBATCHES = 8, 2, 16
# Nothing runs, so sizes may be real: small ones make compilers trade bytes for fewer messages, and pad.
B, T, D, F, V = 16, 2048, 1024, 4096, 32768
HEADS, KV_HEADS, H = 8, 4, 128
EXPERTS, CAPACITY, CHOICES = 8, 640, 2
FLOAT = 4
LOCKSTEP = "in lockstep a stage also sends in the S - 1 ticks in which it has no work of that kind"
FOR_BOTH_PASSES = "the loss asks for all parameters at once: XLA gathers them once for both passes of a microbatch"
FOR_ALL = "... and XLA:CPU once for all microbatches"
Specs = Any


def programs() -> list[Program]:
    """One for each strategy and variant."""
    return [*_data(), *_zero(), *_tensor(), *_vocabulary(), *_context(), *_experts(), *_pipelines()]


def arrays(mesh: Mesh, shapes: Any, specs: Specs, dtype: Any = jnp.float32) -> Any:
    """Float32 arrays of `shapes`, laid out by a tree of specs or one for all, without values."""
    specs = jax.tree.map(lambda _: specs, shapes, is_leaf=_is_shape) if isinstance(specs, P) else specs

    def described(shape: tuple[int, ...], spec: P) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(shape, dtype, sharding=NamedSharding(mesh, spec))

    return jax.tree.map(described, shapes, specs, is_leaf=_is_shape)


def _is_shape(x: Any) -> bool:
    return isinstance(x, tuple) and all(isinstance(size, int) for size in x)


def passes(function: Callable[..., Any]) -> Callable[..., Any]:
    """(dy, *arguments) -> output and gradients."""

    def run(dy: Any, *arguments: Any) -> Any:
        y, pull = jax.vjp(function, *arguments)
        return y, pull(dy)

    return run


def _stack(block: Callable[..., Any], x: tuple[int, ...], x_spec: P, weights: Any, specs: Any) -> Any:
    """How to lower both passes of `LAYERS` blocks; `block(x, weights) -> x` is per-device code."""

    def lower(mesh: Mesh) -> jax.stages.Lowered:
        stacked = jax.tree.map(lambda shape: (LAYERS, *shape), weights, is_leaf=_is_shape)
        stacked_specs = jax.tree.map(lambda spec: P(None, *spec), specs)

        def per_device(x: Any, stacked: Any) -> Any:
            return jax.lax.scan(lambda x, weights: (block(x, weights), None), x, stacked)[0]

        layers = jax.shard_map(per_device, mesh=mesh, in_specs=(x_spec, stacked_specs), out_specs=x_spec)
        ends = arrays(mesh, x, x_spec)
        return jax.jit(passes(layers)).lower(ends, ends, arrays(mesh, stacked, stacked_specs))

    return lower


def _bytes(*shapes: tuple[int, ...]) -> int:
    return sum(FLOAT * math.prod(shape) for shape in shapes)


def _program(
    name: str, axis: Axis, lower: Any, sends: textbook.Bytes, *reasons: Reason, scalars: Any = None
) -> Program:
    axes: Axes = (axis.value,)
    return Program(
        name=name,
        mesh=MeshShape(**{axis.value: N}),
        lower=lower,
        textbook={axes: sends},
        reasons=reasons,
        scalars={axes: scalars} if scalars else None,
    )


# A small network whose layers are alike, for train steps.
LAYER = {"up": (LAYERS, D, F), "down": (LAYERS, F, D)}
OPTIMIZER = optax.adamw(1e-3)
LOSS = (1, "the loss")


def _apply(x: Any, layer: Any) -> Any:
    return x + jax.nn.relu(x @ layer["up"]) @ layer["down"]


def _mean_loss(x: Any, batch: Any) -> Any:
    return jnp.mean((x - batch["y"]) ** 2)


def _loss(params: Any, batch: Any) -> Any:
    return _mean_loss(jax.lax.scan(lambda x, layer: (_apply(x, layer), None), batch["x"], params)[0], batch)


def _lower_step(step: Any, mesh: Mesh, axis: Axis, placed: tuple[Any, Any]) -> jax.stages.Lowered:
    state = jax.eval_shape(OPTIMIZER.init, arrays(mesh, LAYER, P()))
    described = (
        jax.tree.map(lambda leaf, at: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=at), tree, where)
        for tree, where in zip((arrays(mesh, LAYER, P()), state), placed, strict=True)
    )
    batch = arrays(mesh, {"x": (N * B, D), "y": (N * B, D)}, P(axis))
    return jax.jit(step, donate_argnums=(0, 1)).lower(*described, batch)


def _data() -> list[Program]:
    def lower(mesh: Mesh, accumulation: int) -> jax.stages.Lowered:
        params = arrays(mesh, LAYER, P())
        placed = placements(params, OPTIMIZER, mesh, jax.tree.map(lambda _: P(), params), 0)
        step = shard_map_step(_loss, OPTIMIZER, mesh, accumulation=accumulation)
        return _lower_step(step, mesh, Axis.DATA, placed)

    size = _bytes(*LAYER.values())
    return [
        _program(
            f"data parallel, {accumulation} microbatch{'es' if accumulation > 1 else ''}",
            Axis.DATA,
            partial(lower, accumulation=accumulation),
            textbook.data_parallel(size, N),
            scalars=LOSS,
        )
        for accumulation in (1, 4)
    ]


def _zero() -> list[Program]:
    def lower(mesh: Mesh, stage: int, accumulation: int, by_layer: bool) -> jax.stages.Lowered:
        params = arrays(mesh, LAYER, P())
        specs = shard_specs(params, mesh, keep=1)

        def gathering(shards: Any, batch: Any) -> Any:
            @jax.checkpoint
            def block(x: Any, shard: Any) -> Any:
                return _apply(x, gather(shard, layer_specs(specs), Axis.FSDP)), None

            return _mean_loss(jax.lax.scan(block, batch["x"], shards)[0], batch)

        step = zero_step(
            gathering if by_layer else _loss,
            OPTIMIZER,
            mesh,
            specs,
            stage=stage,
            accumulation=accumulation,
            loss_gathers=by_layer,
        )
        return _lower_step(step, mesh, Axis.FSDP, placements(params, OPTIMIZER, mesh, specs, stage))

    size = _bytes(*LAYER.values())

    def program(stage: int, accumulation: int, *reasons: Reason, by_layer: bool = False) -> Program:
        how = ", a layer at a time" if by_layer else ""
        return _program(
            f"ZeRO-{stage}, {accumulation} microbatch{'es' if accumulation > 1 else ''}{how}",
            Axis.FSDP,
            partial(lower, stage=stage, accumulation=accumulation, by_layer=by_layer),
            textbook.zero(stage, size, N, accumulation),
            *reasons,
            scalars=LOSS,
        )

    def saved(times: int, why: str, backend: str | None = None) -> Reason:
        fewer = -times * textbook.gathered(size, N)
        return Reason(axes=(Axis.FSDP.value,), kind=textbook.ALL_GATHER, sent_bytes=fewer, why=why, backend=backend)

    return [
        *(program(1, accumulation) for accumulation in (1, 4)),
        program(2, 4),
        *(program(3, accumulation, by_layer=True) for accumulation in (1, 4)),
        program(3, 4, saved(4, FOR_BOTH_PASSES), saved(3, FOR_ALL, "cpu")),
    ]


def _tensor() -> list[Program]:
    axis, x = Axis.TENSOR, (B, T, D)
    weights, specs = {"up": (D, F), "down": (F, D)}, {"up": P(None, axis), "down": P(axis, None)}
    whole, pieces = P(), P(None, axis)
    by_piece = partial(tensor.feed_forward, column=sequence.gather_column_parallel, row=sequence.row_parallel_scatter)

    def program(name: str, function: Any, x_spec: P, sends: textbook.Bytes) -> Program:
        def block(x: Any, weights: Any) -> Any:
            return function(x, weights["up"], weights["down"], axis)

        return _program(name, axis, _stack(block, x, x_spec, weights, specs), textbook.total(sends, times=LAYERS))

    rings = textbook.collective_matmul_block(_bytes(x), N)
    both_ways = partial(collective_matmul.feed_forward, bidirectional=True)
    return [
        program("tensor parallel MLP", tensor.feed_forward, whole, textbook.tensor_block(_bytes(x), N)),
        program("sequence parallel MLP", by_piece, pieces, textbook.sequence_block(_bytes(x), N, gathers_again=True)),
        program("collective matmul MLP, one way", collective_matmul.feed_forward, pieces, rings),
        program("collective matmul MLP, both ways", both_ways, pieces, rings),
    ]


def _vocabulary() -> list[Program]:
    axis, activation = Axis.TENSOR, _bytes((B, T, D))
    pieces = P(None, axis)

    def lower_embedding(mesh: Mesh, scatters: bool) -> jax.stages.Lowered:
        table, out = vocabulary_specs(mesh, vocab=V)["embedding_vD"], pieces if scatters else P()
        embed = jax.shard_map(
            partial(vocab_parallel_embedding, axis=axis, scatter_sequence=scatters),
            mesh=mesh,
            in_specs=(P(), table),
            out_specs=out,
        )

        def run(dy: Any, tokens: Any, table: Any) -> Any:
            return passes(partial(embed, tokens))(dy, table)

        tokens = arrays(mesh, (B, T), P(), jnp.int32)
        return jax.jit(run).lower(arrays(mesh, (B, T, D), out), tokens, arrays(mesh, (V, D), table))

    def lower_cross_entropy(mesh: Mesh) -> jax.stages.Lowered:
        logits = vocabulary_specs(mesh, vocab=V)["logits_BTv"]
        losses = jax.shard_map(
            partial(vocab_parallel_cross_entropy, axis=axis), mesh=mesh, in_specs=(logits, P()), out_specs=P()
        )

        def run(dy: Any, logits: Any, targets: Any) -> Any:
            return passes(lambda logits: losses(logits, targets))(dy, logits)

        targets = arrays(mesh, (B, T), P(), jnp.int32)
        return jax.jit(run).lower(arrays(mesh, (B, T), P()), arrays(mesh, (B, T, V), logits), targets)

    def embedding(name: str, scatters: bool) -> Program:
        sends = textbook.vocab_embedding(activation, N, scatters=scatters)
        return _program(name, axis, partial(lower_embedding, scatters=scatters), sends)

    return [
        embedding("vocab parallel embedding", False),
        embedding("vocab parallel embedding, scattered", True),
        _program(
            "vocab parallel cross-entropy", axis, lower_cross_entropy, textbook.vocab_cross_entropy(B * T, N, FLOAT)
        ),
    ]


def _context() -> list[Program]:
    axis = Axis.CONTEXT
    pieces = P(None, axis)

    def attend(q: Any, k: Any, v: Any, visible: Any = None) -> Any:
        if visible is None:
            return jax.nn.dot_product_attention(q, k, v, is_causal=True)
        return jax.nn.dot_product_attention(q, k, v, mask=visible[:, None])

    def program(name: str, function: Any, kv_heads: int, sends: textbook.Bytes, *reasons: Reason) -> Program:
        def block(q: Any, kv: Any) -> Any:
            return function(q, kv["k"], kv["v"], axis=axis)

        kv = dict.fromkeys("kv", (B, T, kv_heads, H))
        lower = _stack(block, (B, T, HEADS, H), pieces, kv, dict.fromkeys(kv, pieces))
        return _program(name, axis, lower, textbook.total(sends, times=LAYERS), *reasons)

    q, kv = _bytes((B, T, HEADS, H)), 2 * _bytes((B, T, KV_HEADS, H))
    repeated = textbook.ulysses_attention(0, kv, N)[textbook.ALL_TO_ALL] * LAYERS
    why = f"{KV_HEADS} key/value heads over {N} devices: each is sent to the {N // KV_HEADS} that share it"
    ulysses = partial(ulysses_attention, layout="zigzag", attend=attend)
    return [
        program(
            "ring attention, zigzag", partial(ring_attention, layout="zigzag"), KV_HEADS, textbook.ring_attention(kv, N)
        ),
        program(
            "ring attention, contiguous",
            partial(ring_attention, layout="contiguous"),
            KV_HEADS,
            textbook.ring_attention(kv, N),
        ),
        program("Ulysses attention", ulysses, HEADS, textbook.ulysses_attention(q, 2 * q, N)),
        program(
            "Ulysses attention, grouped heads",
            ulysses,
            KV_HEADS,
            textbook.ulysses_attention(q, kv, N),
            Reason(axes=(axis.value,), kind=textbook.ALL_TO_ALL, sent_bytes=repeated, why=why),
        ),
        program(
            "gathered attention",
            partial(gathered_attention, layout="zigzag", attend=attend),
            KV_HEADS,
            textbook.gathered_attention(kv, N),
        ),
        *(_ring(axis, bidirectional) for bidirectional in (False, True)),
    ]


def _ring(axis: Axis, bidirectional: bool) -> Program:
    def lower(mesh: Mesh) -> jax.stages.Lowered:
        reduce = partial(ring_all_reduce, axis=axis, bidirectional=bidirectional)
        run = jax.shard_map(reduce, mesh=mesh, in_specs=P(None, axis), out_specs=P(None, axis))
        return jax.jit(run).lower(arrays(mesh, (V, N * D), P(None, axis)))

    name = f"ring all-reduce, {'both ways' if bidirectional else 'one way'}"
    return _program(name, axis, lower, textbook.ring_all_reduce(_bytes((V, D)), N))


def _experts() -> list[Program]:
    axis = Axis.EXPERT
    weights = {"router": (D, EXPERTS), "up": (EXPERTS, D, F), "down": (EXPERTS, F, D)}
    specs = {"router": P(), "up": P(axis), "down": P(axis)}

    def block(x: Any, weights: Any) -> Any:
        def ffn(x_ebCD: Any) -> Any:
            hidden = jax.nn.relu(jnp.einsum("ebcd,edf->ebcf", x_ebCD, weights["up"]))
            return jnp.einsum("ebcf,efd->ebcd", hidden, weights["down"])

        axes = ExpertAxes(expert=axis, batch=(axis,))
        y, stats = mixture(x, weights["router"], ffn, k=CHOICES, capacity=CAPACITY, compute=x.dtype, axes=axes)
        return y + stats.balance

    sends = textbook.total(
        textbook.experts(_bytes((B // N, EXPERTS, CAPACITY, D)), N),
        # The router is whole on every device: its gradient is that of data parallelism.
        textbook.data_parallel(_bytes(weights["router"]), N),
        times=LAYERS,
    )
    return [
        _program(
            "expert dispatch",
            axis,
            _stack(block, (B, T, D), P(axis), weights, specs),
            sends,
            scalars=(2 * LAYERS, "the balance loss of each layer, and its gradient"),
        )
    ]


def _pipelines() -> list[Program]:
    schedules = (
        gpipe(N, MICROBATCHES),
        one_f_one_b(N, MICROBATCHES),
        zero_bubble(N, MICROBATCHES),
        interleaved(N, MICROBATCHES, 2),
    )
    return [_pipeline(schedule) for schedule in schedules]


def _pipeline(schedule: Schedule) -> Program:
    axis, x = Axis.STAGE, (B, T, D)
    split = P(axis)

    def lower(mesh: Mesh) -> jax.stages.Lowered:
        run = jax.shard_map(
            partial(
                run_pipeline,
                lambda weight, x: jnp.tanh(x @ weight),
                schedule=schedule,
                first=lambda extra, x: x,
                last=lambda extra, x, y: jnp.mean((extra * x - y) ** 2),
            ),
            mesh=mesh,
            in_specs=(split, P(), P(), P()),
            out_specs=PipelineResult(P(), P(), split, P()),
        )
        weights = arrays(mesh, (N * schedule.num_chunks, D, D), split)
        batch = arrays(mesh, (MICROBATCHES, *x), P())
        return jax.jit(run).lower(weights, arrays(mesh, (), P()), batch, batch)

    idle = Reason(axes=(axis.value,), kind=textbook.PERMUTE, sent_bytes=2 * (N - 1) * _bytes(x), why=LOCKSTEP)
    return _program(
        f"pipeline, {schedule.name}",
        axis,
        lower,
        textbook.pipeline(_bytes(x), MICROBATCHES, schedule.num_chunks),
        idle,
        scalars=(3, "the loss, its auxiliary part, and the gradient of the one parameter that all stages share"),
    )
