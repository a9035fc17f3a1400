"""How far a kind of parallelism goes before what it sends takes longer than what it computes.

One feed-forward layer of two products stands for the model, D to F to D, as in the scaling-book: a gate or attention
changes both sides alike. `roof` is over the links that the axis runs on (`plan.roof`); with r its ridge C / W, V / W is
the time of an all-gather of V bytes.
"""

import math

from gcompute.plan.arguments import above_zero, at_least_zero
from gcompute.plan.roof import Roof
from gcompute.plan.rooflines import sparsity


def data_parallel_tokens(
    roof: Roof,
    *,
    experts: float = 1,
    experts_per_token: float = 1,
    groups: int | None = None,
    in_network: bool = False,
    value_bytes: float = 2.0,
) -> float:
    """Tokens a chip below which data parallelism, or FSDP, waits for its links: r E / k (X - 1) / X b / 2.

    Backwards 8 B D F / (X C) against the all-reduce of two matrices, 8 D F / W; FSDP halves both. Over a network
    between TPU slices, with the share of it that one chip has, the answer is tokens a slice.

    experts, experts_per_token: E / k times the weights are reduced for the same operations. groups: X, how many nodes
    the axis spans, where they are few; None is many. in_network: the switch adds up (SHARP), which halves what is sent.

    >>> round(data_parallel_tokens(Roof(flops_per_s=4.59e14, bytes_per_s=1.8e11)))
    2550

    Raises:
      ValueError: a size is not above 0, or groups below 2.
    Source: scaling-book, "training", data parallelism and FSDP; "gpus", data parallelism.
    """
    above_zero(value_bytes=value_bytes)
    if groups is not None and groups < 2:
        raise ValueError(f"groups={groups} exchange nothing: give 2 or more, or None for many.")
    tokens = roof.ridge * value_bytes / 2 * sparsity(experts, experts_per_token)
    tokens *= 1 if groups is None else (groups - 1) / groups
    return tokens / 2 if in_network else tokens


def tensor_parallel_ways(width: float, roof: Roof, *, node_chips: int = 0, value_bytes: float = 2.0) -> float:
    """The most ways to split a feed-forward width F before links bound it: Y < node + F / (r b / 2).

    4 B D F / (Y C) against an all-gather and a reduce-scatter of the stream, 4 B D / W; the batch does not matter.

    node_chips: for an axis that spans nodes, the chips of one; (Y - node) / Y of the array crosses between them.

    >>> round(tensor_parallel_ways(28672, Roof(flops_per_s=4.59e14, bytes_per_s=1.8e11)), 1)
    11.2

    Raises:
      ValueError: a size is not above 0.
    Source: scaling-book, "training", tensor parallelism; "gpus", tensor parallelism.
    """
    above_zero(width=width, value_bytes=value_bytes)
    at_least_zero(node_chips=node_chips)
    return node_chips + width / (roof.ridge * value_bytes / 2)


def tensor_parallel_width(ways: float, roof: Roof, *, node_chips: int = 0, value_bytes: float = 2.0) -> float:
    """The least feed-forward width that `ways` of tensor parallelism need; see `tensor_parallel_ways`.

    Raises:
      ValueError: a size is not above 0.
    """
    above_zero(ways=ways, value_bytes=value_bytes)
    at_least_zero(node_chips=node_chips)
    return max(0.0, ways - node_chips) * roof.ridge * value_bytes / 2


def decode_tensor_ways(
    width: float,
    batch: float,
    *,
    hbm_bytes_per_s: float,
    link_bytes_per_s: float,
    weight_bytes: float = 2.0,
    activation_bytes: float = 2.0,
) -> float:
    """The most ways to split a product of decoding before links take longer than weights: Y < F / (B beta) w / a.

    w D F / (Y W_hbm) against a B D / W_links, beta = W_hbm / W_links; `link_bytes_per_s` is the rate of a gather.

    >>> round(decode_tensor_ways(16384, 32, hbm_bytes_per_s=8, link_bytes_per_s=1))
    64

    Raises:
      ValueError: a size or rate is not above 0.
    Source: scaling-book, "inference", model parallelism when generating.
    """
    above_zero(width=width, batch=batch, hbm_bytes_per_s=hbm_bytes_per_s, link_bytes_per_s=link_bytes_per_s)
    above_zero(weight_bytes=weight_bytes, activation_bytes=activation_bytes)
    return width * weight_bytes * link_bytes_per_s / (batch * activation_bytes * hbm_bytes_per_s)


def mixed_tokens(width: float, roof: Roof, *, fsdp_axes: int = 1, tensor_axes: int = 1, at_once: bool = True) -> float:
    """Tokens a chip below which FSDP and tensor parallelism together, split at best, wait for links: r r / (M_X M_Y F).

    roof: over one axis of the torus. fsdp_axes, tensor_axes: how many each has. at_once: whether both send at the same
    time; one after the other, four times as many tokens are needed.

    >>> round(mixed_tokens(32768, Roof(flops_per_s=4.59e14, bytes_per_s=1.8e11), fsdp_axes=2))
    99

    Raises:
      ValueError: a size is not above 0.
    Source: scaling-book, "training", mixed FSDP and tensor parallelism; the edition of 2025 has both in turn.
    """
    above_zero(width=width, fsdp_axes=fsdp_axes, tensor_axes=tensor_axes)
    return (1 if at_once else 4) * roof.ridge**2 / (fsdp_axes * tensor_axes * width)


def mixed_headroom(
    tokens: float,
    width: float,
    num_chips: float,
    roof: Roof,
    *,
    fsdp_axes: int = 1,
    tensor_axes: int = 1,
    at_once: bool = True,
) -> float:
    """Computing time over communication time of the best mix: sqrt(B F M_X M_Y / N) / r; below 1 links bound it.

    Raises:
      ValueError: a size is not above 0.
    Source: scaling-book, "training", mixed FSDP and tensor parallelism.
    """
    above_zero(tokens=tokens, num_chips=num_chips)
    least = mixed_tokens(width, roof, fsdp_axes=fsdp_axes, tensor_axes=tensor_axes, at_once=at_once)
    return math.sqrt(tokens / num_chips / least)


def best_fsdp_ways(tokens: float, width: float, num_chips: float, *, fsdp_axes: int = 1, tensor_axes: int = 1) -> float:
    """Ways of FSDP that send least beside N / X ways of tensor parallelism: X = sqrt(B / F M_X / M_Y N).

    4 D F / (Y W M_X) equals 4 B D / (X W M_Y) there.

    >>> round(best_fsdp_ways(48_000, 32768, 64, fsdp_axes=2), 1)
    13.7

    Raises:
      ValueError: a size is not above 0.
    Source: scaling-book, "training", mixed FSDP and tensor parallelism.
    """
    above_zero(tokens=tokens, width=width, num_chips=num_chips, fsdp_axes=fsdp_axes, tensor_axes=tensor_axes)
    return math.sqrt(tokens / width * fsdp_axes / tensor_axes * num_chips)


def power_of_two_split(num_chips: int, ways: float) -> tuple[int, int]:
    """The powers of two nearest to `ways` of one kind, and to what is then left for the other, at most `num_chips`.

    >>> power_of_two_split(64, 13.7), power_of_two_split(8960, 1618)
    ((16, 4), (2048, 4))

    Raises:
      ValueError: a size is not above 0.
    """
    above_zero(num_chips=num_chips, ways=ways)
    whole = num_chips.bit_length() - 1
    first = min(max(0, round(math.log2(ways))), whole)
    return 2**first, 2 ** (whole - first)


def expert_parallel_width(ways: int, experts_per_token: int, roof: Roof, *, node_chips: int = 8) -> float:
    """The least width F of an expert for its all-to-alls to hide: F > r (Z - n) min(n k / Z, 1) / k.

    4 B k D F / (Z C) against 4 B D (Z - n) / (Z W) min(n k / Z, 1), Z ways over nodes of n chips: a token goes to a
    node once, however many of its k experts are there.

    >>> roof = Roof(flops_per_s=990e12, bytes_per_s=400e9)
    >>> round(expert_parallel_width(64, 8, roof))
    17325

    Raises:
      ValueError: a size is not above 0.
    Source: scaling-book, "gpus", expert parallelism.
    """
    above_zero(ways=ways, experts_per_token=experts_per_token, node_chips=node_chips)
    crossing = min(node_chips * experts_per_token / ways, 1.0)
    return roof.ridge * max(0, ways - node_chips) * crossing / experts_per_token


def contraction_depth(ways: int, roof: Roof, *, value_bytes: float = 2.0) -> float:
    """The depth D from which a contraction split `ways` hides the all-reduce of its partial sums: D > X r b.

    2 B D F / (X C) against an all-reduce of B F values, 2 b B F / W.

    >>> round(contraction_depth(2, Roof(flops_per_s=1.97e14, bytes_per_s=9e10)))
    8756

    Raises:
      ValueError: a size is not above 0.
    Source: scaling-book, "roofline", network communication rooflines; "sharding", question 4.
    """
    above_zero(ways=ways, value_bytes=value_bytes)
    return ways * roof.ridge * value_bytes


def pipeline_send_s(stream_bytes: float, *, bytes_per_s: float, microbatches: int, stages: int) -> float:
    """Seconds of sending between stages that stand in the way: V / (W M) (M + S - 2), V of the whole batch's stream.

    Raises:
      ValueError: a size is not above 0.
    Source: scaling-book, "gpus", pipeline parallelism.
    """
    above_zero(stream_bytes=stream_bytes, bytes_per_s=bytes_per_s, microbatches=microbatches, stages=stages)
    return stream_bytes / (bytes_per_s * microbatches) * max(0, microbatches + stages - 2)


def latency_bound_bytes(*, link_bytes_per_s: float, hop_latency_s: float) -> float:
    """Bytes of a message below which a hop waits for latency, not for bytes: W_link t_hop.

    >>> round(latency_bound_bytes(link_bytes_per_s=45e9, hop_latency_s=1e-6))
    45000

    Raises:
      ValueError: a size is not above 0.
    Source: scaling-book, "sharding", when do we become latency-bound?
    """
    above_zero(link_bytes_per_s=link_bytes_per_s, hop_latency_s=hop_latency_s)
    return link_bytes_per_s * hop_latency_s


def latency_bound_ways(whole_bytes: float, *, link_bytes_per_s: float, hop_latency_s: float) -> float:
    """Chips of a ring from which an all-gather waits for hops, not bytes: the shard of each takes less than a hop.

    V / Y / W_link < t_hop, so Y > V / (W_link t_hop).

    Raises:
      ValueError: a size is not above 0.
    Source: scaling-book, "inference", appendix C.
    """
    above_zero(whole_bytes=whole_bytes)
    return whole_bytes / latency_bound_bytes(link_bytes_per_s=link_bytes_per_s, hop_latency_s=hop_latency_s)
