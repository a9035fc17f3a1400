"""How many parameters any decoder has, how many a token is multiplied by, and what its cache keeps.

For a model that this library trains, `params.count_params` says the same from the arrays that the trainer makes.
"""

from dataclasses import dataclass

from gcompute.config.architecture import Architecture, Attention, FeedForward


@dataclass(frozen=True, slots=True, kw_only=True)
class Sizes:
    """total: all parameters. active: those that one token uses. matmul: those that it is multiplied by."""

    total: int
    active: int
    matmul: int


def sizes(model: Architecture) -> Sizes:
    """Count the parameters of `model`.

    >>> from gcompute.config.architecture import architecture
    >>> from gcompute.config.presets import PRESETS
    >>> counted = sizes(architecture(PRESETS["mixtral-8x7b"]))
    >>> f"{counted.total / 1e9:.1f}e9, active {counted.active / 1e9:.1f}e9"
    '46.7e9, active 12.9e9'
    """
    norm = model.dim * (2 if model.norm_bias else 1)
    matmul = rest = idle = 0
    for group in model.layers:
        matrices, vectors = attention_params(group.attention, model.dim)
        fed, unused, fed_vectors = feed_forward_params(group.feed_forward, model.dim)
        matmul += group.num * (matrices + fed)
        idle += group.num * unused
        rest += group.num * (vectors + fed_vectors + model.norms_per_layer * norm)
    head = model.vocab * model.dim
    rest += head + norm + (model.context * model.dim if model.learned_positions else 0)
    rest += model.vocab if model.head_bias else 0
    total = matmul + rest + (0 if model.tied else head)
    return Sizes(total=total, active=total - idle, matmul=matmul - idle + head)


def attention_params(attention: Attention, dim: int) -> tuple[int, int]:
    """(values of the matrices, of biases and norms) of one layer's attention.

    Latent attention goes through vectors of q_rank and kv_rank, each with a norm, and one rotated key of rope_dim.

    Source: DeepSeek-AI 2024 (DeepSeek-V2), arXiv:2405.04434, section 2.1.
    """
    heads, head, value = attention.heads, attention.head_dim, attention.value_size
    output = heads * value * dim
    vectors = dim if attention.output_bias else 0
    if attention.kv_rank is not None:
        rank, rope = attention.kv_rank, attention.rope_dim
        down = dim * (rank + rope)
        up = rank * heads * (head - rope + value)
        query = dim * heads * head
        vectors += rank
        if attention.q_rank is not None:
            query = attention.q_rank * (dim + heads * head)
            vectors += attention.q_rank
        return query + down + up + output, vectors
    keys_values = attention.kv_heads * (head + value)
    vectors += heads * head + keys_values if attention.bias else 0
    vectors += 2 * head if attention.qk_norm else 0
    return dim * (heads * head + keys_values) + output, vectors


def feed_forward_params(feed_forward: FeedForward, dim: int) -> tuple[int, int, int]:
    """(values of the matrices, those of them that one token does not use, of biases) of one feed-forward layer.

    A router of D x E chooses among experts; a gate counts as a matrix of its own.
    """
    each = (feed_forward.num_up + 1) * dim * feed_forward.width
    shared = (feed_forward.num_up + 1) * dim * feed_forward.shared_width
    if feed_forward.experts is None:
        return each + shared, 0, feed_forward.num_up * feed_forward.width + dim if feed_forward.bias else 0
    experts = feed_forward.experts
    return experts * (each + dim) + shared, (experts - feed_forward.experts_per_token) * each, 0


def cache_bytes(model: Architecture, tokens: int, *, value_bytes: float) -> float:
    """Bytes that the caches of all layers keep of one sequence of `tokens`, `value_bytes` a value.

    A layer with a window keeps no more tokens than the window holds.

    >>> from gcompute.config.architecture import architecture
    >>> from gcompute.config.presets import PRESETS
    >>> cache_bytes(architecture(PRESETS["llama3-70b"]), 1, value_bytes=1)
    163840

    Raises:
      ValueError: a size is below 0.
    """
    if tokens < 0 or value_bytes <= 0:
        raise ValueError(f"tokens={tokens} must be at least 0 and value_bytes={value_bytes} above 0.")
    return value_bytes * sum(
        group.num * group.attention.cached_values_per_token * min(tokens, group.attention.window or tokens)
        for group in model.layers
    )
