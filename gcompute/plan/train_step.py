"""Predict the time of a train step: operations over the matmul ceiling, bytes over the memory bandwidth."""

import dataclasses
import math
from collections.abc import Iterable
from dataclasses import dataclass

from gcompute.config.model import ModelConfig
from gcompute.config.train import OPTIMIZERS, PRECISIONS, REMAT_POLICIES
from gcompute.plan.memory import (
    FLOAT32_BYTES,
    OPERAND_BYTES,
    activation_keeps,
    attended_keys,
    check_known,
    num_up_matrices,
    optimizer_state_values,
)
from gcompute.plan.params import count_params, weight_arrays

NEWTON_SCHULZ_STEPS = 5


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainFlops:
    """Matmul operations of one train step; a multiply and its add are two.

    `step_flops` = 6 P tokens + 12 L N H seq tokens, P the parameters multiplied by (the output layer among them, tied
    or not): what the program computes when attention scores the whole square, without recomputation. Of experts, P
    holds the k that a token is sent to: the program multiplies their empty places too, `rows_per_token` / k times as
    much, and those do not count. `attention_flops` is its second term.
    `causal_step_flops` counts only the scores s <= t that the mask keeps: the least a causal model can do, and what
    MFU counts (`plan.mfu`).

    Source: Chowdhery et al. 2022 (PaLM), arXiv:2204.02311, appendix B.
    """

    num_tokens: int
    forward_flops: int
    step_flops: int
    attention_flops: int
    causal_step_flops: int

    def to_dict(self) -> dict[str, int]:
        return dataclasses.asdict(self)


def train_flops(config: ModelConfig, *, batch: int, seq: int) -> TrainFlops:
    """Count the matmul operations of one train step of `batch` sequences of `seq` tokens."""
    num_tokens = batch * seq
    weights_flops = 6 * count_params(config).matmul * num_tokens
    per_pair = 12 * config.layers * config.heads * config.head_size
    attention_flops = per_pair * seq * num_tokens
    causal_pairs = batch * seq * (seq + 1) // 2
    return TrainFlops(
        num_tokens=num_tokens,
        forward_flops=(weights_flops + attention_flops) // 3,
        step_flops=weights_flops + attention_flops,
        attention_flops=attention_flops,
        causal_step_flops=weights_flops + per_pair * causal_pairs,
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class Matmul:
    """`num` products of `batch` matrices [m, k] by [k, n], operands at the compute precision, results in float32."""

    name: str
    m: int
    k: int
    n: int
    batch: int = 1
    num: int = 1

    @property
    def flops(self) -> int:
        return 2 * self.num * self.batch * self.m * self.k * self.n

    def moved_bytes(self, operand_bytes: int) -> int:
        inputs = operand_bytes * (self.m * self.k + self.k * self.n)
        return self.num * self.batch * (inputs + FLOAT32_BYTES * self.m * self.n)

    def backward(self) -> tuple["Matmul", "Matmul"]:
        """The two products that differentiate this one: by its left operand, and by its right."""
        left = dataclasses.replace(self, name=f"{self.name}, d left", k=self.n, n=self.k)
        right = dataclasses.replace(self, name=f"{self.name}, d right", m=self.k, k=self.m)
        return left, right


@dataclass(frozen=True, slots=True, kw_only=True)
class Pass:
    """`num` sweeps over `elements` values that move `bytes_each` bytes a value, reads and writes together."""

    name: str
    elements: int
    bytes_each: int
    num: int = 1

    @property
    def moved_bytes(self) -> int:
        return self.num * self.elements * self.bytes_each


def block_matmuls(config: ModelConfig, *, batch: int, seq: int, query_blocks: int = 1) -> tuple[Matmul, ...]:
    """The forward matmuls of all blocks; the query heads of one key/value head make one tall matrix.

    Every expert multiplies all of its places, empty ones too; each query, `attended_keys`.
    """
    keys = attended_keys(seq, query_blocks)
    tokens, dim, head, num = batch * seq, config.dim, config.head_size, config.layers
    group = config.heads // config.num_kv_heads
    rows, experts = batch * config.capacity(seq), config.num_experts
    up = 2 if config.gated else 1
    router = (Matmul(name="router", m=tokens, k=dim, n=experts, num=num),) if config.experts else ()
    return (
        Matmul(name="q", m=tokens, k=dim, n=config.heads * head, num=num),
        Matmul(name="k, v", m=tokens, k=dim, n=config.num_kv_heads * head, num=2 * num),
        Matmul(name="scores", m=group * seq, k=head, n=keys, batch=batch * config.num_kv_heads, num=num),
        Matmul(name="weighted sum", m=group * seq, k=keys, n=head, batch=batch * config.num_kv_heads, num=num),
        Matmul(name="o", m=tokens, k=config.heads * head, n=dim, num=num),
        *router,
        Matmul(name="up", m=rows, k=dim, n=config.ffn_size, batch=experts, num=up * num),
        Matmul(name="down", m=rows, k=config.ffn_size, n=dim, batch=experts, num=num),
    )


def block_forward_passes(
    config: ModelConfig, *, batch: int, seq: int, precision: str, query_blocks: int = 1
) -> tuple[Pass, ...]:
    """The sweeps between the forward matmuls of all blocks.

    What lies between two matmuls is one sweep, except that a row-wise reduction (a norm's variance, a softmax's maximum
    and sum) reads its input first. Each writes what `kept_bytes_per_token` lists, and an operand where it is cast.
    """
    cast, tokens, num = _cast_bytes(precision), batch * seq, config.layers
    stream, head = tokens * config.dim, config.head_size
    qk = tokens * (config.heads + config.num_kv_heads) * head
    up, keeps = num_up_matrices(config), activation_keeps(config)
    fed, sent, chosen = _expert_values(config, batch, seq)
    operand, scores = OPERAND_BYTES[precision], _scores(config, batch, seq, query_blocks)
    rows = [
        ("norm: variance; normalise, scale", stream, 4 + (4 + 8 + cast), 2),
        ("q, k norm: variance; normalise", qk, 4 + (4 + 8) if config.qk_norm else 0, 1),
        ("q, k, v: rotate, heads first", qk + tokens * config.num_kv_heads * head, 4 + 4 + cast, 1),
        ("softmax: max; exp; sum; divide", scores, 4 + (4 + 4) + 4 + (4 + 4 + cast), 1),
        ("attention result: tokens first", tokens * config.heads * head, 4 + 4 + cast, 1),
        ("residual add", stream, 4 + 4 + 4, 2),
        ("dispatch: gather", sent, 4 + operand, 1),
        ("activation", fed, 4 * up + 4 * (keeps - up) + cast, 1),
        ("experts' results to operand", sent, 4 + cast if cast else 0, 1),
        ("combine: gather; weigh, add", chosen, (operand + 4) + 4, 1),
    ]
    return tuple(Pass(name=n, elements=e, bytes_each=b, num=num * times) for n, e, b, times in rows if e and b)


def block_backward_passes(
    config: ModelConfig, *, batch: int, seq: int, precision: str, query_blocks: int = 1
) -> tuple[Pass, ...]:
    """The sweeps between the backward matmuls of all blocks, by the same rules."""
    cast, tokens, num = _cast_bytes(precision), batch * seq, config.layers
    stream, head = tokens * config.dim, config.head_size
    up, keeps = num_up_matrices(config), activation_keeps(config)
    fed, sent, chosen = _expert_values(config, batch, seq)
    operand, scores = OPERAND_BYTES[precision], _scores(config, batch, seq, query_blocks)
    rows = [
        ("residual gradient to operand", stream, 4 + cast if cast else 0, 2),
        ("combine gradient: weigh, row sums", chosen, 4 + 4 + operand, 1),
        ("combine gradient: gather", sent, operand + operand, 1),
        ("activation gradient", fed, 4 + 4 * keeps + (4 + cast) * up, 1),
        ("dispatch gradient: gather, add", chosen, operand + 4, 1),
        ("attention gradient: heads first", tokens * config.heads * head, 4 + 4 + cast, 1),
        ("softmax gradient: row sums; scores", scores, (4 + 4) + (4 + 4 + 4 + cast), 1),
        ("q, k, v gradient: tokens first", tokens * (config.heads + 2 * config.num_kv_heads) * head, 4 + 4 + cast, 1),
        ("sum of the gradients through q, k, v", stream, 4 * 3 + 4, 1),
        ("sum of the gradients through up, gate", stream, 4 * 2 + 4 if config.gated else 0, 1),
        ("norm gradient: scale; row sums; add to residual gradient", stream, 8 + 8 + (4 + 4 + 4 + 4), 2),
    ]
    return tuple(Pass(name=n, elements=e, bytes_each=b, num=num * times) for n, e, b, times in rows if e and b)


def ends_passes(config: ModelConfig, *, batch: int, seq: int, precision: str) -> tuple[Pass, ...]:
    """The sweeps outside the blocks, forward and backward: embedding, final norm, cross-entropy."""
    cast, tokens = _cast_bytes(precision), batch * seq
    stream, logits = tokens * config.dim, tokens * config.vocab
    return (
        Pass(name="embedding: gather", elements=stream, bytes_each=4 + 4),
        Pass(name="embedding: scatter-add", elements=stream, bytes_each=4 + 4 + 4),
        Pass(name="final norm", elements=stream, bytes_each=4 + (4 + 8 + cast)),
        Pass(name="final norm gradient: scale; row sums; result", elements=stream, bytes_each=8 + 8 + (4 + 4 + 4)),
        Pass(name="cross-entropy: max; exp and sum", elements=logits, bytes_each=4 + (4 + 4)),
        Pass(name="cross-entropy gradient", elements=logits, bytes_each=4 + 4 + cast),
    )


def _expert_values(config: ModelConfig, batch: int, seq: int) -> tuple[int, int, int]:
    """Values of F in the feed-forward layers, then of D that experts are sent and of D that tokens get from them."""
    rows = batch * config.num_experts * config.capacity(seq)
    if config.experts is None:
        return rows * config.ffn_size, 0, 0
    return rows * config.ffn_size, rows * config.dim, batch * seq * config.num_active_experts * config.dim


def _scores(config: ModelConfig, batch: int, seq: int, query_blocks: int) -> int:
    return batch * config.heads * seq * attended_keys(seq, query_blocks)


def _cast_bytes(precision: str) -> int:
    """Bytes written a value where a float32 result is also stored as an operand of a narrower dtype."""
    return OPERAND_BYTES[precision] % FLOAT32_BYTES


@dataclass(frozen=True, slots=True, kw_only=True)
class StepPrediction:
    """Predicted seconds of one train step: `step_s` = `compute_s` + `memory_s` + `optimizer_s`.

    `bound` is "compute" where matmuls limited by operations take at least half of the step, else "memory".
    """

    compute_s: float
    memory_s: float
    optimizer_s: float
    step_s: float
    tokens_per_s: float
    bound: str

    def to_dict(self) -> dict[str, float | str]:
        return dataclasses.asdict(self)


def predict_train_step(
    config: ModelConfig,
    *,
    batch: int,
    seq: int,
    precision: str,
    roofline_flops_per_s: float,
    memory_bytes_per_s: float,
    num_devices: int = 1,
    accumulation: int = 1,
    optimizer: str = "adamw",
    remat: str = "none",
    query_blocks: int = 1,
) -> StepPrediction:
    """Predict a train step from one device's two ceilings. A prediction from formulae, with no factor fitted to a run.

    compute_s = sum over matmuls, forward and both backward, of max(flops / ceiling, bytes / bandwidth)
    memory_s = bytes of the sweeps between them (`block_forward_passes`, `block_backward_passes`, `ends_passes`), of the
      weights cast to operands once a step, and of adding a microbatch's gradients, all / bandwidth
    optimizer_s = (two reads of the gradient, one for clipping, a read and a write of each parameter and state) /
      bandwidth, plus Muon's products / ceiling

    remat "dots" repeats the blocks' forward sweeps, "full" also their forward matmuls. Nothing overlaps, all traffic
    goes to main memory, and `num_devices` split all of it evenly with no communication: caches make small models faster
    than this, and matmuls of awkward shape, below the ceiling, make them slower.

    Args:
      query_blocks: blocks of queries of the attention, each over the keys up to its own end.
      roofline_flops_per_s: matmul ceiling of one device at `precision`; `memory_bytes_per_s`: its memory bandwidth.

    Raises:
      ValueError: a name is unknown, a ceiling is not above 0, or accumulation does not divide the batch.
    """
    check_known("precision", precision, PRECISIONS)
    check_known("optimizer", optimizer, OPTIMIZERS)
    check_known("remat", remat, REMAT_POLICIES)
    if roofline_flops_per_s <= 0 or memory_bytes_per_s <= 0:
        raise ValueError(
            f"roofline_flops_per_s={roofline_flops_per_s} and memory_bytes_per_s={memory_bytes_per_s} must be above 0."
        )
    if min(batch, seq, accumulation, num_devices) < 1 or batch % accumulation:
        raise ValueError(
            f"batch={batch}, seq={seq}, num_devices={num_devices} must be at least 1, and accumulation={accumulation} "
            "must divide the batch."
        )
    micro, operand = batch // accumulation, OPERAND_BYTES[precision]
    sizes: dict[str, int] = {"batch": micro, "seq": seq, "query_blocks": query_blocks}
    blocks = block_matmuls(config, **sizes)
    forward = (*blocks, Matmul(name="output layer", m=micro * seq, k=config.dim, n=config.vocab))
    matmuls = [*forward, *(product for matmul in forward for product in matmul.backward())]
    matmuls += blocks if remat == "full" else ()
    forward_passes = block_forward_passes(config, **sizes, precision=precision)
    passes = [*forward_passes, *block_backward_passes(config, **sizes, precision=precision)]
    passes += ends_passes(config, batch=micro, seq=seq, precision=precision)
    passes += forward_passes if remat != "none" else ()
    params = count_params(config)
    num_cast = sum(array.num_params for array in weight_arrays(config) if array.is_orthogonalised)
    num_cast += config.dim * config.vocab
    once = _total_bytes([Pass(name="weights to operands", elements=num_cast, bytes_each=4 + operand)])
    if operand == FLOAT32_BYTES:
        once = 0
    each = _total_bytes(passes)
    if accumulation > 1:
        each += Pass(name="add to accumulator", elements=params.total, bytes_each=4 + 4 + 4).moved_bytes

    compute_s = flops_limited_s = 0.0
    for matmul in matmuls:
        flops_s = accumulation * matmul.flops / roofline_flops_per_s
        bytes_s = accumulation * matmul.moved_bytes(operand) / memory_bytes_per_s
        compute_s += max(flops_s, bytes_s) / num_devices
        flops_limited_s += flops_s / num_devices if flops_s >= bytes_s else 0.0
    memory_s = (accumulation * each + once) / memory_bytes_per_s / num_devices
    optimizer_s = optimizer_traffic_bytes(config, optimizer) / memory_bytes_per_s / num_devices
    if optimizer == "muon":
        optimizer_s += newton_schulz_flops(config) / roofline_flops_per_s / num_devices
    step_s = compute_s + memory_s + optimizer_s
    return StepPrediction(
        compute_s=compute_s,
        memory_s=memory_s,
        optimizer_s=optimizer_s,
        step_s=step_s,
        tokens_per_s=batch * seq / step_s,
        bound="compute" if flops_limited_s >= step_s / 2 else "memory",
    )


def optimizer_traffic_bytes(config: ModelConfig, optimizer: str) -> int:
    """Bytes moved by one update: 16 a parameter (gradient read twice, parameter read and written), 8 a state value."""
    arrays = weight_arrays(config)
    num_params = sum(array.num_params for array in arrays)
    num_state = sum(optimizer_state_values(array, optimizer) for array in arrays)
    return 16 * num_params + 8 * num_state


def newton_schulz_flops(config: ModelConfig) -> int:
    """Operations of Muon's orthogonalisation: 5 (4 m^2 n + 2 m^3) for each matrix of the blocks, m <= n its two sizes.

    Each expert's is a matrix of its own, and a router is left to Adam.

    Source: K. Jordan et al. 2024, "Muon", the quintic iteration A = X X^T, X <- a X + (b A + c A A) X.
    """
    flops = 0
    for array in weight_arrays(config):
        if array.is_orthogonalised:
            num, (first, *rest) = array.shape[0], array.shape[1:]
            if array.of_experts:
                num, (first, *rest) = num * first, rest
            if array.name == "o":
                first, *rest = first * rest[0], *rest[1:]
            m, n = sorted((first, math.prod(rest)))
            flops += num * NEWTON_SCHULZ_STEPS * (4 * m * m * n + 2 * m**3)
    return flops


def _total_bytes(passes: Iterable[Pass]) -> int:
    return sum(one.moved_bytes for one in passes)
