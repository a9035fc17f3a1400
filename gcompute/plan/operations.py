"""The operations of one decoder on one device: floating-point operations, and bytes to and from its memory.

Predictions from formulae. Every operation is counted for one layer and one pass; `times` says how often a step runs it.
A sweep is what a compiler makes of elementwise work between two matrix products: it multiplies nothing worth counting.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace

from gcompute.config.architecture import Architecture, Attention, FeedForward, Layers

# Differentiating attention block by block: scores again, and four products of its gradients, against two forward.
# Source: Dao 2023 (FlashAttention-2), arXiv:2307.08691, section 3.1.2 (5 products in the backward pass).
ATTENTION_BACKWARD = 2.5
LOGIT_BYTES = 4


@dataclass(frozen=True, slots=True, kw_only=True)
class Operation:
    """`times` runs of one operation on one device, each of `flops` operations and `moved_bytes` of device memory.

    kind: "matmul", "attention" or "sweep". part: what of a block it is, for rematerialisation. depth: of an attention
    product, the head dim that fills a matrix unit. ragged: products of experts that get rows of any number.
    """

    name: str
    kind: str
    part: str
    flops: float
    moved_bytes: float
    times: float = 1.0
    depth: int | None = None
    ragged: bool = False

    @property
    def intensity(self) -> float:
        """Operations a byte; infinite where nothing is moved."""
        return self.flops / self.moved_bytes if self.moved_bytes else float("inf")

    def repeated(self, times: float, suffix: str = "") -> "Operation":
        return replace(self, name=self.name + suffix, times=self.times * times)


@dataclass(frozen=True, slots=True, kw_only=True)
class Rows:
    """What one device works on in one pass: `tokens` of queries, each seeing `keys` of the sequence on average.

    tensor, expert: in how many shares heads, feed-forward and vocabulary, or experts, are split. scattered: whether the
    stream between blocks is split over the tensor axis too. activation_bytes, weight_bytes, cache_bytes: of one value.
    reads_cache: `sequences` whose keys come from a cache of that many tokens rather than from this pass.
    dropless: experts multiply no empty places.
    """

    tokens: float
    keys: float
    tensor: int = 1
    expert: int = 1
    scattered: bool = False
    activation_bytes: float = 2.0
    weight_bytes: float = 2.0
    cache_bytes: float = 2.0
    reads_cache: bool = False
    sequences: float = 0.0
    dropless: bool = False

    @property
    def stream_tokens(self) -> float:
        return self.tokens / self.tensor if self.scattered else self.tokens


def matmul(
    name: str, part: str, rows: float, depth: float, width: float, *, on: Rows, weight_bytes: float | None = None
):
    """[rows, depth] by a weight of [depth, width]."""
    weights = on.weight_bytes if weight_bytes is None else weight_bytes
    moved = weights * depth * width + on.activation_bytes * rows * (depth + width)
    return Operation(name=name, kind="matmul", part=part, flops=2 * rows * depth * width, moved_bytes=moved)


def sweep(name: str, part: str, values: float, bytes_each: float) -> Operation:
    return Operation(name=name, kind="sweep", part=part, flops=0.0, moved_bytes=values * bytes_each)


def block_forward(model: Architecture, group: Layers, rows: Rows) -> tuple[Operation, ...]:
    """One layer of `group`, forwards."""
    each = [
        sweep("norms", "norms", rows.stream_tokens * model.dim, model.norms_per_layer * 2 * rows.activation_bytes),
        *_attention(group.attention, model.dim, rows),
        sweep("residual adds", "residual", rows.stream_tokens * model.dim, 2 * 3 * rows.activation_bytes),
        *_feed_forward(group.feed_forward, model.dim, rows),
    ]
    return tuple(each)


def _attention(attention: Attention, dim: int, rows: Rows) -> Iterator[Operation]:
    heads, head, value = attention.heads / rows.tensor, attention.head_dim, attention.value_size
    kv_heads = max(attention.kv_heads / rows.tensor, 1.0)
    keys = min(rows.keys, attention.window or rows.keys)
    t, act = rows.tokens, rows.activation_bytes
    latent = attention.kv_rank is not None and rows.reads_cache
    if attention.kv_rank is None:
        yield matmul("q, k, v", "qkv", t, dim, heads * head + kv_heads * (head + value), on=rows)
    else:
        rank = attention.kv_rank
        yield matmul("keys and values down", "qkv", t, dim, rank + attention.rope_dim, on=rows)
        if attention.q_rank is None:
            yield matmul("q", "qkv", t, dim, heads * head, on=rows)
        else:
            yield matmul("queries down", "qkv", t, dim, attention.q_rank, on=rows)
            yield matmul("queries up", "qkv", t, attention.q_rank, heads * head, on=rows)
        # Decoding, the queries and results are brought into the latent space instead of every cached key out of it.
        yield matmul("keys and values up", "qkv", t, rank, heads * (head - attention.rope_dim + value), on=rows)
    yield sweep("rotation", "qkv", t * (heads + kv_heads) * head, 2 * act)
    if latent:
        rank = attention.kv_rank or 0
        flops = 2 * t * keys * heads * (2 * rank + attention.rope_dim)
        cached = rows.sequences * keys * (rank + attention.rope_dim)
        depth = rank
    else:
        flops = 2 * t * keys * heads * (head + value)
        cached = rows.sequences * keys * kv_heads * (head + value)
        depth = head
    moved = act * t * (heads * (head + value))
    moved += rows.cache_bytes * cached if rows.reads_cache else act * t * kv_heads * (head + value)
    yield Operation(name="attention", kind="attention", part="attention", flops=flops, moved_bytes=moved, depth=depth)
    yield matmul("attention out", "out", t, heads * value, dim, on=rows)


def _feed_forward(fed: FeedForward, dim: int, rows: Rows) -> Iterator[Operation]:
    t, act = rows.tokens, rows.activation_bytes
    if fed.experts is None:
        width = fed.width / rows.tensor
        yield matmul("up", "up", t, dim, fed.num_up * width, on=rows)
        yield sweep("activation", "up", t * width, (fed.num_up + 1) * act)
        yield matmul("down", "down", t, width, dim, on=rows)
        return
    yield matmul("router", "router", t, dim, fed.experts, on=rows, weight_bytes=4.0)
    multiplied = t * (fed.experts_per_token if rows.dropless else fed.rows_per_token)
    here = fed.experts / rows.expert
    ragged = rows.dropless or fed.capacity_factor == 1
    # A step with few tokens reads only the experts that they are sent to; each device gets its share of them.
    used = min(here, multiplied) if rows.reads_cache else here
    width = fed.width / rows.tensor
    for name, part, depth, wide in (
        ("experts up", "up", dim, fed.num_up * width),
        ("experts down", "down", width, dim),
    ):
        moved = rows.weight_bytes * used * depth * wide + act * multiplied * (depth + wide)
        flops = 2 * multiplied * depth * wide
        yield Operation(name=name, kind="matmul", part=part, flops=flops, moved_bytes=moved, ragged=ragged)
    yield sweep("experts' activation", "up", multiplied * width, (fed.num_up + 1) * act)
    yield sweep("dispatch and combine", "dispatch", multiplied * dim, 2 * 2 * act)
    if fed.shared_width:
        shared = fed.shared_width / rows.tensor
        yield matmul("shared up", "up", t, dim, fed.num_up * shared, on=rows)
        yield matmul("shared down", "down", t, shared, dim, on=rows)


def output_forward(model: Architecture, rows: Rows, *, logits_of: float | None = None) -> tuple[Operation, ...]:
    """The embedding, and the output layer for `logits_of` tokens (all of them unless given)."""
    scored = rows.tokens if logits_of is None else logits_of
    vocab = model.vocab / rows.tensor
    product = matmul("output layer", "output", scored, model.dim, vocab, on=rows)
    return (
        sweep("embedding", "output", rows.stream_tokens * model.dim, 2 * rows.activation_bytes),
        product,
        sweep("softmax of logits", "output", scored * vocab, 3 * LOGIT_BYTES),
    )


def backward(operations: Iterable[Operation]) -> tuple[Operation, ...]:
    """What differentiates `operations`: two products for each one, attention as `ATTENTION_BACKWARD`, sweeps twice."""
    found = []
    for one in operations:
        if one.kind == "attention":
            moved = 2 * one.moved_bytes
            found.append(
                replace(one, name="attention gradient", flops=ATTENTION_BACKWARD * one.flops, moved_bytes=moved)
            )
        else:
            found.append(one.repeated(2.0, " gradient"))
    return tuple(found)
