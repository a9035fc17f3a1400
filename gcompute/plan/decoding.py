"""Serving by the roofline alone: a decode step, a prefill, how many sequences fit, and what they give a second.

Attention reads every cache and nothing shares it, so its time is added; products read their weights once for a batch,
and take the longer of that and their operations. For a plan with meshes and communication see `plan.serving`.
"""

from collections.abc import Iterable
from dataclasses import dataclass

from gcompute.plan.arguments import above_zero, at_least_zero
from gcompute.plan.budget import compute_s, forward_flops
from gcompute.plan.roof import Roof
from gcompute.plan.rooflines import transfer_s


@dataclass(frozen=True, slots=True, kw_only=True)
class Served:
    """A model as it is served.

    params: of which `weight_bytes` each are stored; active_params: those that a token uses, None is all of them.
    sequence_bytes: the cache of one sequence.

    Raises:
      ValueError: a size makes no sense.
    """

    params: float
    weight_bytes: float = 2.0
    sequence_bytes: float = 0.0
    active_params: float | None = None

    def __post_init__(self) -> None:
        above_zero(params=self.params, weight_bytes=self.weight_bytes)
        at_least_zero(sequence_bytes=self.sequence_bytes)
        if self.active_params is not None:
            above_zero(active_params=self.active_params)
            if self.active_params > self.params:
                raise ValueError(f"active_params={self.active_params} is more than params={self.params}.")

    @property
    def param_bytes(self) -> float:
        return self.params * self.weight_bytes

    def total_bytes(self, batch: float) -> float:
        """Bytes of the weights and the caches of `batch` sequences."""
        at_least_zero(batch=batch)
        return self.param_bytes + batch * self.sequence_bytes


@dataclass(frozen=True, slots=True, kw_only=True)
class DecodeStep:
    """One decode step for `batch` sequences over `num_chips`."""

    batch: int
    num_chips: int
    total_bytes: float
    step_s: float

    @property
    def tokens_per_s(self) -> float:
        return self.batch / self.step_s

    @property
    def tokens_per_s_per_chip(self) -> float:
        return self.tokens_per_s / self.num_chips


def decode_step_s(model: Served, batch: float, *, num_chips: float, roof: Roof) -> float:
    """Seconds of a decode step: B KV / (n W) + max(2 B P / (n C), weights / (n W)).

    >>> model = Served(params=30e9, weight_bytes=1, sequence_bytes=8192 * 100e3)
    >>> v5e = Roof(flops_per_s=1.97e14, bytes_per_s=8.2e11)
    >>> [round(decode_step_s(model, batch, num_chips=16, roof=v5e), 4) for batch in (4, 256)]
    [0.0025, 0.0209]

    Raises:
      ValueError: a size is not above 0.
    Source: scaling-book, "inference", theoretical estimates for latency and throughput.
    """
    above_zero(batch=batch, num_chips=num_chips)
    caches_s = transfer_s(batch * model.sequence_bytes, roof.bytes_per_s, num_chips=num_chips)
    weights_s = transfer_s(model.param_bytes, roof.bytes_per_s, num_chips=num_chips)
    flops = forward_flops(model.active_params or model.params, batch)
    return caches_s + max(weights_s, compute_s(flops, num_chips=num_chips, flops_per_s=roof.flops_per_s))


def decode_steps(model: Served, batches: Iterable[int], *, num_chips: int, roof: Roof) -> tuple[DecodeStep, ...]:
    """A table of decode steps, one a batch; whether its bytes fit is for the caller to see."""
    return tuple(
        DecodeStep(
            batch=batch,
            num_chips=num_chips,
            total_bytes=model.total_bytes(batch),
            step_s=decode_step_s(model, batch, num_chips=num_chips, roof=roof),
        )
        for batch in batches
    )


def prefill_s(params: float, tokens: float, *, num_chips: float, flops_per_s: float, mfu: float = 1.0) -> float:
    """Seconds of a prefill that computes at a share `mfu` of the peak, attention's scores not counted: 2 P T / (n C m).

    >>> round(prefill_s(70e9, 8192, num_chips=16, flops_per_s=1.97e14, mfu=0.4), 2)
    0.91

    Raises:
      ValueError: a number is not above 0, or mfu above 1.
    Source: scaling-book, "applied-inference", prefill.
    """
    return compute_s(forward_flops(params, tokens), num_chips=num_chips, flops_per_s=flops_per_s, mfu=mfu)


def most_sequences(model: Served, *, num_chips: float, hbm_bytes: float) -> int:
    """The most sequences whose caches fit beside the weights; 0 where the weights alone do not fit.

    Raises:
      ValueError: a size is not above 0, or sequences keep no cache.
    """
    above_zero(num_chips=num_chips, hbm_bytes=hbm_bytes, sequence_bytes=model.sequence_bytes)
    return max(0, int((num_chips * hbm_bytes - model.param_bytes) // model.sequence_bytes))


def queries_per_s_per_chip(batch: float, *, step_s: float, output_tokens: float, num_chips: float) -> float:
    """Answers of `output_tokens` that a chip finishes each second: B / (t G n).

    >>> round(queries_per_s_per_chip(43, step_s=0.019, output_tokens=512, num_chips=16), 2)
    0.28

    Raises:
      ValueError: a size is not above 0.
    """
    above_zero(batch=batch, step_s=step_s, output_tokens=output_tokens, num_chips=num_chips)
    return batch / (step_s * output_tokens * num_chips)


def prefill_servers(prefill_seconds: float, *, batch: float, step_s: float, output_tokens: float) -> float:
    """Prefill servers that keep one server of decoding full: what it finishes each second times a prefill, B p / (t G).

    >>> round(prefill_servers(0.91, batch=32, step_s=0.019, output_tokens=512), 1)
    3.0

    Raises:
      ValueError: a size is not above 0.
    Source: scaling-book, "applied-inference", disaggregation.
    """
    above_zero(prefill_seconds=prefill_seconds)
    return prefill_seconds * queries_per_s_per_chip(batch, step_s=step_s, output_tokens=output_tokens, num_chips=1)


def tokens_evicted_per_step(batch: float, *, prompt_tokens: float, output_tokens: float) -> float:
    """Cached tokens that leave at each step as sequences finish, on average: B (P + G) / G."""
    above_zero(batch=batch, prompt_tokens=prompt_tokens, output_tokens=output_tokens)
    return batch * (prompt_tokens + output_tokens) / output_tokens
