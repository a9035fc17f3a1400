"""Predict serving: what fits, time to first token, time per token, throughput against concurrency, all from formulae.

Requests are batched continuously: all that run decode together, a step at a time, and a prefill goes between two steps.
So a token costs the device its share of a decode step and its share of its request's prefill,

    device seconds a token = step(B) / B + prefill / output,   time per token = step(B) + B prefill / output
"""

import dataclasses
import math
from dataclasses import dataclass

from gcompute.config.architecture import Architecture
from gcompute.config.mesh import Axis, MeshShape
from gcompute.hardware.target import Target
from gcompute.plan.collectives import all_reduce_s, all_to_all_s
from gcompute.plan.efficiency import Device, Efficiency, device_of, efficiency_of, operation_s
from gcompute.plan.links import routes
from gcompute.plan.operations import Operation, Rows, block_forward, output_forward
from gcompute.plan.serve_workspace import (
    PAGE,
    bucket_of,
    decode_workspace,
    padded,
    pool_bytes,
    prefill_workspace,
    request_bytes,
    split_heads,
    weights_here,
)
from gcompute.plan.sizes import cache_bytes, sizes

STORED_BYTES = {"float32": 4.0, "bfloat16": 2.0, "int8": 1.0, "float8": 1.0}
ACTIVATION_BYTES = 2.0
LOGIT_BYTES = 4
# Concurrencies of the throughput-latency curve.
CURVE = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096)
# Of what the compiler lets a program use, so that fragments and the host's own buffers have room.
USABLE = 0.97


@dataclass(frozen=True, slots=True, kw_only=True)
class ServeRun:
    """What is served: `concurrency` requests of `prompt` and `output` tokens, with room for `context` each.

    weights, cache: dtypes in memory. compute: of the products. mesh: tensor splits heads, feed-forward and vocabulary,
    data and fsdp the requests (each share has all weights), expert the experts.

    Raises:
      ValueError: a size is below 1, a request does not fit the context, or a dtype is not known.
    """

    model: Architecture
    prompt: int
    output: int
    concurrency: int = 1
    context: int | None = None
    mesh: MeshShape = dataclasses.field(default_factory=MeshShape)
    weights: str = "bfloat16"
    cache: str = "bfloat16"
    compute: str = "bfloat16"

    def __post_init__(self) -> None:
        if min(self.prompt, self.output, self.concurrency) < 1:
            raise ValueError(
                f"prompt={self.prompt}, output={self.output} and concurrency={self.concurrency} must be at least 1."
            )
        if self.prompt + self.output > self.room:
            raise ValueError(
                f"prompt={self.prompt} and output={self.output} do not fit context={self.room}. Use a larger --context."
            )
        for name, dtype in (("weights", self.weights), ("kv", self.cache)):
            if dtype not in STORED_BYTES:
                raise ValueError(f"{name}={dtype!r} is not known. Legal: {', '.join(STORED_BYTES)}.")
        check_serving_mesh(self.model, self.mesh)

    @property
    def room(self) -> int:
        """Tokens that the cache of one request has room for."""
        return self.context or self.prompt + self.output

    @property
    def replicas(self) -> int:
        """Groups of devices that each have all weights."""
        return self.mesh.data * self.mesh.fsdp

    @property
    def weight_bytes(self) -> float:
        return STORED_BYTES[self.weights]

    @property
    def cache_bytes(self) -> float:
        return STORED_BYTES[self.cache]


def check_serving_mesh(model: Architecture, mesh: MeshShape) -> None:
    """Raise ValueError where a mesh cannot serve `model`; key/value heads may be copied, query heads not split."""
    for axis in (Axis.STAGE, Axis.CONTEXT):
        if mesh.size(axis) > 1:
            raise ValueError(f"mesh {axis.value}={mesh.size(axis)} does not serve: use tensor, data and expert.")
    for group in model.layers:
        for name, size in (("heads", group.attention.heads), ("ffn", group.feed_forward.width)):
            if size % mesh.tensor:
                legal = ", ".join(str(n) for n in range(1, size + 1) if size % n == 0 and n <= 1024)
                raise ValueError(f"mesh tensor={mesh.tensor} does not divide {name}={size}. Legal: tensor={legal}.")
        experts = group.feed_forward.experts
        if mesh.expert > 1 and experts is not None and experts % mesh.expert:
            raise ValueError(f"mesh expert={mesh.expert} does not divide experts={experts}.")
    if mesh.expert > 1 and not any(group.feed_forward.experts for group in model.layers):
        raise ValueError(f"mesh expert={mesh.expert} needs a model with experts, and this one has none. Use expert=1.")


@dataclass(frozen=True, slots=True, kw_only=True)
class ServeMemory:
    """Predicted bytes on one device: what stays, and what a prefill and a decode have beside it while they run.

    The engine runs one program at a time, so the total is that of the larger one.
    """

    weights_bytes: float
    cache_bytes: float
    prefill_bytes: float
    decode_bytes: float
    available_bytes: float | None

    @property
    def arguments_bytes(self) -> float:
        """What both programs are given."""
        return self.weights_bytes + self.cache_bytes

    @property
    def total_bytes(self) -> float:
        return self.arguments_bytes + max(self.prefill_bytes, self.decode_bytes)

    @property
    def fits(self) -> bool:
        return self.available_bytes is None or self.total_bytes <= self.available_bytes * USABLE

    def to_dict(self) -> dict[str, float | bool | None]:
        return {**dataclasses.asdict(self), "total_bytes": self.total_bytes, "fits": self.fits}

    def program_bytes(self, program: str) -> float:
        """The total of one program, "prefill" or "decode"."""
        return self.arguments_bytes + {"prefill": self.prefill_bytes, "decode": self.decode_bytes}[program]


def weights_on_device(run: ServeRun) -> float:
    """Values of the weights that one device holds: see `serve_workspace.weights_here`."""
    held = weights_here(run.model, run.mesh)
    return held.matrices + held.rest


def cache_of_one(run: ServeRun, tokens: int) -> float:
    """Bytes that one request's cache of `tokens` takes on a device that serves it.

    Key/value heads are split over tensor where it divides them; if not, and if latent, they are whole on every device.
    """
    total = 0.0
    for group in run.model.layers:
        alone = dataclasses.replace(run.model, layers=(group,))
        heads = group.attention.kv_heads
        here = 1.0 if group.attention.kv_rank is not None else split_heads(heads, run.mesh.tensor) / heads
        total += cache_bytes(alone, tokens, value_bytes=run.cache_bytes) * here
    return total


def serve_memory(run: ServeRun, target: Target) -> ServeMemory:
    """Predict the bytes on one device: weights, the pool of its share of the requests and rows of all, and what the
    engine's prefill and decode need beside them. Matrices are in `run.weights`, norms, biases and routers in
    float32."""
    rows, cells = math.ceil(run.concurrency / run.replicas), padded(run.room, PAGE)
    tokens = bucket_of(padded(run.prompt, PAGE), cells)
    return ServeMemory(
        weights_bytes=weights_here(run.model, run.mesh).num_bytes(run.weight_bytes),
        cache_bytes=pool_bytes(run.model, run.mesh, rows=rows, cells=cells, cache_bytes=run.cache_bytes)
        + request_bytes(rows * run.replicas, cells),
        prefill_bytes=prefill_workspace(
            run.model,
            run.mesh,
            tokens=tokens,
            cache_bytes=run.cache_bytes,
            chip=target.known,
            rows=rows,
            cells=cells,
        ),
        decode_bytes=decode_workspace(
            run.model,
            run.mesh,
            rows=rows,
            cells=cells,
            weight_bytes=run.weight_bytes,
            cache_bytes=run.cache_bytes,
            chip=target.known,
        ),
        available_bytes=target.hbm_bytes,
    )


def most_concurrency(run: ServeRun, target: Target) -> int:
    """The most requests that fit at once, over all devices; 0 where not one does.

    Raises:
      ValueError: the target's memory is not known.
    """
    available = serve_memory(run, target).available_bytes
    if available is None:
        raise ValueError(f"how much memory a device of {target} has is not known.")

    def fits(rows: int) -> bool:
        return rows == 0 or serve_memory(dataclasses.replace(run, concurrency=rows * run.replicas), target).fits

    # Memory rises with each request, by its pages at least.
    low, high = 0, 1 + int(available // cache_of_one(run, run.room))
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return low * run.replicas


@dataclass(frozen=True, slots=True, kw_only=True)
class StepTime:
    """Predicted seconds of one program: its operations, and communication that nothing hides."""

    operations: tuple[Operation, ...]
    operations_s: float
    communication_s: float
    bound: str

    @property
    def seconds(self) -> float:
        return self.operations_s + self.communication_s


def decode_operations(run: ServeRun, requests: float, tokens_before: float) -> tuple[Operation, ...]:
    """One decode step for `requests` on one device, each attending to `tokens_before` cached tokens."""
    rows = Rows(
        tokens=requests,
        keys=tokens_before,
        tensor=run.mesh.tensor,
        expert=run.mesh.expert,
        activation_bytes=ACTIVATION_BYTES,
        weight_bytes=run.weight_bytes,
        cache_bytes=run.cache_bytes,
        reads_cache=True,
        sequences=requests,
        dropless=True,
    )
    return _operations(run.model, rows, None)


def prefill_operations(run: ServeRun, tokens: int) -> tuple[Operation, ...]:
    """The prefill of one prompt of `tokens`, whose last token's logits alone are wanted."""
    rows = Rows(
        tokens=tokens,
        keys=(tokens + 1) / 2,
        tensor=run.mesh.tensor,
        expert=run.mesh.expert,
        activation_bytes=ACTIVATION_BYTES,
        weight_bytes=run.weight_bytes,
        dropless=True,
    )
    return _operations(run.model, rows, 1)


def _operations(model: Architecture, rows: Rows, logits_of: float | None) -> tuple[Operation, ...]:
    blocks = [one.repeated(group.num) for group in model.layers for one in block_forward(model, group, rows)]
    return (*blocks, *output_forward(model, rows, logits_of=logits_of))


def decode_time(
    run: ServeRun, target: Target, requests: int, tokens_before: float, efficiency: Efficiency | None = None
) -> StepTime:
    """Predict one decode step of `requests` over all replicas, each with `tokens_before` cached tokens."""
    here = math.ceil(requests / run.replicas)
    return _timed(run, target, decode_operations(run, here, tokens_before), here, efficiency)


def prefill_time(run: ServeRun, target: Target, tokens: int, efficiency: Efficiency | None = None) -> StepTime:
    """Predict the prefill of one prompt of `tokens` on one replica."""
    return _timed(run, target, prefill_operations(run, tokens), tokens, efficiency)


def _timed(
    run: ServeRun, target: Target, operations: tuple[Operation, ...], rows: float, efficiency: Efficiency | None
) -> StepTime:
    device, efficiency = _device(run, target), efficiency or efficiency_of(target.backend)
    seconds = [operation_s(one, device, efficiency) for one in operations]
    sent_s = _communication_s(run, target, rows) / efficiency.link
    computing = sum(s for one, s in zip(operations, seconds, strict=True) if one.intensity >= device.ridge)
    parts = {"compute": computing, "HBM": sum(seconds) - computing, "links": sent_s}
    return StepTime(
        operations=operations,
        operations_s=sum(seconds),
        communication_s=sent_s,
        bound=max(parts, key=lambda name: parts[name]),
    )


def _device(run: ServeRun, target: Target) -> Device:
    if target.known is None:
        raise ValueError(f"{target} has no figures in the catalogue: plan for a chip of it, or --on this, measured.")
    return device_of(target.known, run.compute)


def _communication_s(run: ServeRun, target: Target, rows: float) -> float:
    """Two all-reduces of the stream a layer over tensor, and for experts an all-to-all there and back."""
    links = routes(run.mesh, target)
    stream = rows * run.model.dim * ACTIVATION_BYTES
    seconds = 0.0
    if Axis.TENSOR in links:
        seconds += 2 * run.model.num_layers * all_reduce_s(stream, links[Axis.TENSOR])
    if Axis.EXPERT in links:
        sent = sum(group.num * group.feed_forward.experts_per_token for group in run.model.layers)
        seconds += 2 * all_to_all_s(stream * sent * run.mesh.expert, links[Axis.EXPERT])
    return seconds


def critical_batch(run: ServeRun, target: Target) -> float:
    """Requests decoded together on one replica from which weights are no longer what a step waits for.

    peak / bandwidth times the bytes of a weight over its 2 operations; with experts times E / k, for each token uses
    but k of them. Source: scaling-book, "inference" and "transformers".
    """
    device = _device(run, target)
    counted = sizes(run.model)
    return device.ridge * run.weight_bytes / 2 * counted.total / counted.active


@dataclass(frozen=True, slots=True, kw_only=True)
class Load:
    """What `concurrency` requests at once get, predicted: seconds a token while decoding (prefills of others between),
    seconds to the first token of a request that finds a place, output tokens a second in all."""

    concurrency: int
    step_s: float
    time_per_token_s: float
    ttft_s: float
    tokens_per_s: float
    fits: bool


def load_of(run: ServeRun, target: Target, concurrency: int, efficiency: Efficiency | None = None) -> Load:
    """Predict how `concurrency` requests of this kind are served, prompt and output as in `run`."""
    step = decode_time(run, target, concurrency, run.prompt + run.output / 2, efficiency)
    prefill = prefill_time(run, target, run.prompt, efficiency)
    here = math.ceil(concurrency / run.replicas)
    per_token = step.seconds + here * prefill.seconds / run.output
    at = dataclasses.replace(run, concurrency=concurrency)
    return Load(
        concurrency=concurrency,
        step_s=step.seconds,
        time_per_token_s=per_token,
        ttft_s=prefill.seconds + step.seconds,
        tokens_per_s=concurrency / per_token,
        fits=serve_memory(at, target).fits,
    )


def curve(run: ServeRun, target: Target, efficiency: Efficiency | None = None) -> tuple[Load, ...]:
    """Loads of rising concurrency, up to the most that fits, which is the last."""
    most = most_concurrency(run, target)
    points = sorted({one for one in (*CURVE, run.concurrency, most) if one and one % run.replicas == 0 and one <= most})
    return tuple(load_of(run, target, one, efficiency) for one in points)


def within_slo(loads: tuple[Load, ...], *, ttft_s: float | None, time_per_token_s: float | None) -> Load | None:
    """The load of most tokens a second that keeps both limits; None where none does."""
    kept = [
        one
        for one in loads
        if one.fits
        and (ttft_s is None or one.ttft_s <= ttft_s)
        and (time_per_token_s is None or one.time_per_token_s <= time_per_token_s)
    ]
    return max(kept, key=lambda one: one.tokens_per_s, default=None)
