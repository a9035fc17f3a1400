"""What single operations ask of a roof: their intensity, their least time, the batch from which compute bounds them."""

import math

from gcompute.plan.arguments import above_zero, at_least_zero
from gcompute.plan.operations import Operation, Rows, matmul
from gcompute.plan.roof import Roof


def product(
    rows: float,
    depth: float,
    width: float,
    *,
    weight_bytes: float = 2.0,
    activation_bytes: float = 2.0,
    num_weights: float = 1.0,
) -> Operation:
    """[rows, depth] by a weight of [depth, width]: 2 B D F operations, w D F + a B (D + F) bytes.

    num_weights: how many such matrices the rows share out among them; with as many as rows, each row has its own.

    >>> round(product(240, 8192, 8192).intensity)
    227

    Raises:
      ValueError: a size is not above 0.
    Source: scaling-book, "roofline", matrix multiplication.
    """
    above_zero(rows=rows, depth=depth, width=width, num_weights=num_weights)
    above_zero(weight_bytes=weight_bytes, activation_bytes=activation_bytes)
    on = Rows(tokens=rows, keys=0, activation_bytes=activation_bytes, weight_bytes=weight_bytes * num_weights)
    return matmul("product", "product", rows, depth, width, on=on)


def dot_product(length: float, *, value_bytes: float = 2.0) -> Operation:
    """Two vectors: 2 N - 1 operations, 2 N + 1 values.

    Source: scaling-book, "roofline", dot product.
    """
    above_zero(length=length, value_bytes=value_bytes)
    moved = (2 * length + 1) * value_bytes
    return Operation(name="dot product", kind="matmul", part="product", flops=2 * length - 1, moved_bytes=moved)


def elementwise(values: float, *, operands: int = 2, value_bytes: float = 4.0, flops_each: float = 1.0) -> Operation:
    """`operands` arrays of `values` made into one: so many reads and one write of each."""
    above_zero(values=values, operands=operands, value_bytes=value_bytes, flops_each=flops_each)
    moved = (operands + 1) * values * value_bytes
    return Operation(name="elementwise", kind="sweep", part="product", flops=flops_each * values, moved_bytes=moved)


def attention_product(
    queries: float, keys: float, *, heads: int, kv_heads: int, head_dim: int, batch: float = 1, value_bytes: float = 2.0
) -> Operation:
    """Scores and their sum of values, nothing kept between: 4 B T S N H operations; q, k, v and the result are moved.

    Intensity in two-byte values T S G / (T G + S), G = N / K: long queries T G / (G + 1), one query G.

    >>> one = attention_product(1, 8192, heads=64, kv_heads=8, head_dim=128)
    >>> round(one.intensity, 1)
    8.0

    Raises:
      ValueError: a size is not above 0.
    Source: scaling-book, "transformers", question 4.
    """
    above_zero(queries=queries, keys=keys, heads=heads, kv_heads=kv_heads, head_dim=head_dim)
    above_zero(batch=batch, value_bytes=value_bytes)
    moved = 2 * batch * head_dim * (queries * heads + keys * kv_heads) * value_bytes
    flops = 4 * batch * queries * keys * heads * head_dim
    return Operation(
        name="attention", kind="attention", part="attention", flops=flops, moved_bytes=moved, depth=head_dim
    )


def contraction_flops(*dims: float) -> float:
    """Operations of a contraction: 2 for each value of all its dims, those of batch and contracted counted once.

    >>> contraction_flops(4, 8, 16)
    1024

    Source: scaling-book, "transformers", counting dots.
    """
    above_zero(**{f"dim {index}": size for index, size in enumerate(dims)})
    return 2 * math.prod(dims)


def tile_intensity(rows: float, columns: float, *, value_bytes: float = 2.0) -> float:
    """Operations a byte of a product whose result is made by tiles, a long dim contracted: 2 m n / (b (m + n))."""
    above_zero(rows=rows, columns=columns, value_bytes=value_bytes)
    return 2 * rows * columns / (value_bytes * (rows + columns))


def roofline_s(operation: Operation, roof: Roof, *, num_chips: float = 1) -> float:
    """Least seconds of an operation split evenly over chips: max(flops / C, bytes / W) / n.

    >>> round(roofline_s(product(8, 8192, 8192), Roof(flops_per_s=197e12, bytes_per_s=819e9)) * 1e6)
    164

    Raises:
      ValueError: there is no chip.
    Source: Williams, Waterman, Patterson 2009 (Roofline).
    """
    above_zero(num_chips=num_chips)
    seconds = max(operation.flops / roof.flops_per_s, operation.moved_bytes / roof.bytes_per_s)
    return operation.times * seconds / num_chips


def transfer_s(num_bytes: float, bytes_per_s: float, *, num_chips: float = 1) -> float:
    """Seconds to bring bytes that are split evenly over chips, each with a stream of its own: bytes / (n W).

    >>> transfer_s(400e9, 1.25e12, num_chips=32)
    0.01

    Raises:
      ValueError: bytes below 0, or no rate or chip.
    """
    at_least_zero(num_bytes=num_bytes)
    above_zero(bytes_per_s=bytes_per_s, num_chips=num_chips)
    return num_bytes / (bytes_per_s * num_chips)


def overlap_bounds(*seconds: float) -> tuple[float, float]:
    """(least, most) seconds of work that may run at once: the longest part, or one after the other.

    >>> overlap_bounds(2.0, 1.0)
    (2.0, 3.0)
    """
    at_least_zero(**{f"part {index}": one for index, one in enumerate(seconds)})
    if not seconds:
        raise ValueError("there is nothing to overlap: give the seconds of each part.")
    return max(seconds), sum(seconds)


def critical_batch(roof: Roof, *, weight_bytes: float = 2.0, experts: float = 1, experts_per_token: float = 1) -> float:
    """Tokens from which a product is bound by operations, activations not counted: C / W w / 2 E / k.

    A token costs 2 operations a weight, a weight is read once however many tokens there are, and of E experts each
    token uses k. `roof` is of the dtype that is computed in, `weight_bytes` of the one that is stored.

    >>> round(critical_batch(Roof(flops_per_s=197e12, bytes_per_s=820e9), weight_bytes=1, experts=256,
    ...     experts_per_token=8))
    3844

    Raises:
      ValueError: a size is not above 0, or a token uses more experts than there are.
    Source: scaling-book, "roofline"; "transformers", question 8.
    """
    above_zero(weight_bytes=weight_bytes)
    return roof.ridge * weight_bytes / 2 * sparsity(experts, experts_per_token)


def exact_critical_batch(
    depth: float, width: float, roof: Roof, *, weight_bytes: float = 2.0, activation_bytes: float = 2.0
) -> float:
    """Tokens from which [B, D] by [D, F] is bound by operations, its activations counted; infinite where none will do.

    2 B D F = C / W (w D F + a B (D + F)), so B = r w D F / (2 D F - r a (D + F)), r = C / W.

    >>> roof = Roof(flops_per_s=197e12, bytes_per_s=820e9)
    >>> round(exact_critical_batch(4096, 4096, roof, weight_bytes=1))
    136

    Raises:
      ValueError: a size is not above 0.
    Source: scaling-book, "roofline", question 3.
    """
    above_zero(depth=depth, width=width, weight_bytes=weight_bytes, activation_bytes=activation_bytes)
    free = 2 * depth * width - roof.ridge * activation_bytes * (depth + width)
    return roof.ridge * weight_bytes * depth * width / free if free > 0 else math.inf


def attention_tokens(matrix_params: float, *, heads: int, head_dim: int) -> float:
    """Tokens of a sequence at which attention, not masked, costs as much as a layer's matrices: T = P / (2 N H).

    A layer costs 2 P T, its scores and sums 4 T T N H. A causal mask that is made use of doubles T.

    >>> attention_tokens(16 * 8192**2, heads=64, head_dim=128)
    65536.0

    Raises:
      ValueError: a size is not above 0.
    Source: scaling-book, "transformers", "how does the fraction of FLOPs scale with T?"
    """
    above_zero(matrix_params=matrix_params, heads=heads, head_dim=head_dim)
    return matrix_params / (2 * heads * head_dim)


def sparsity(experts: float, experts_per_token: float) -> float:
    """E / k: how many times fewer weights a token uses than are stored.

    Raises:
      ValueError: a number is not above 0, or a token uses more experts than there are.
    """
    above_zero(experts=experts, experts_per_token=experts_per_token)
    if experts_per_token > experts:
        raise ValueError(f"experts_per_token={experts_per_token} is more than the {experts} experts there are.")
    return experts / experts_per_token
