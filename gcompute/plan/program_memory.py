"""Predict the memory of a train step as the TPU compiler lays it out, attention being done by a kernel.

What a step keeps (parameters, optimizer, gradients, the activations of every layer) follows from shapes and is exact.
What it works with while one layer is differentiated does not: the compiler's buffers there were read from its own
reports, and the shares below were fitted once to its totals (`gcompute exam` compares them with every program it
was asked for). `plan.memory` predicts the step whose attention is plain XLA, as on a CPU.
"""

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType

from gcompute.config.architecture import Architecture, Layers
from gcompute.plan.memory import loss_chunks
from gcompute.plan.sizes import attention_params, feed_forward_params
from gcompute.plan.tiling import LANES
from gcompute.plan.train_run import TrainRun, params_on_device

WIDE, NARROW = 4, 2
# Of the arrays that lie beside what is kept while a layer is differentiated, how many of each there are. `head`: the
# output layer in float32; `feed_forward`, `stream`, `wide_stream`: of its tokens' F and D, in the residual's dtype and
# in float32; `experts`, `dispatched`: of the rows that experts get, F in float32 and D rounded; `block`: one layer's
# gathered matrices; `copies`: the device's own parameters cast for products; `ring`: a context shard's stream in
# float32. While losses are computed: `loss_head`, `loss_chunk`, of a chunk of logits in float32. At both times `tied`:
# the output layer where it is the embedding, for its two gradients wait for each other.
WORKSPACE: Mapping[str, float] = MappingProxyType(
    {
        "head": 1.09,
        "feed_forward": 2.55,
        "experts": 3.12,
        "dispatched": 3.0,
        "wide_stream": 2.97,
        "stream": 11.4,
        "block": 2.4,
        "copies": 0.796,
        "ring": 16.5,
        "loss_head": 1.64,
        "loss_chunk": 2.37,
        "tied": 2.43,
    }
)
IN_LOSS, ALWAYS = ("loss_head", "loss_chunk"), ("tied",)
# Gradients summed over microbatches: the sum, and the one that a microbatch adds.
ACCUMULATORS = 2
# With ZeRO the shares of the updated parameters are gathered beside the old ones.
GATHERED = 1


@dataclass(frozen=True, slots=True, kw_only=True)
class ProgramMemory:
    """Predicted bytes on the fullest device, by component.

    total_bytes: parameters, optimizer, accumulator and activations, and the larger of what the losses need
    (`logits_bytes`) and what a layer's gradient does (`gradients_bytes`, `workspace_bytes`).
    """

    parameters_bytes: float
    optimizer_bytes: float
    accumulator_bytes: float
    activations_bytes: float
    gradients_bytes: float
    workspace_bytes: float
    logits_bytes: float

    @property
    def arguments_bytes(self) -> float:
        """What the step is given, and gives back in its place."""
        return self.parameters_bytes + self.optimizer_bytes

    @property
    def temporaries_bytes(self) -> float:
        working = max(self.gradients_bytes + self.workspace_bytes, self.logits_bytes)
        return self.accumulator_bytes + self.activations_bytes + working

    @property
    def total_bytes(self) -> float:
        return self.arguments_bytes + self.temporaries_bytes

    def to_dict(self) -> dict[str, float]:
        derived = {name: getattr(self, name) for name in ("arguments_bytes", "temporaries_bytes", "total_bytes")}
        return {**dataclasses.asdict(self), **derived}


def program_memory(
    run: TrainRun,
    *,
    residual_bytes: float = WIDE,
    padding: float = 1.0,
    workspace: Mapping[str, float] = WORKSPACE,
) -> ProgramMemory:
    """Predict the memory of one step of `run` on its fullest device.

    With P parameters on the device, t tokens of a microbatch, n tensor shares and r bytes of residual stream:

    - parameters 4 P, optimizer 4 P a value of state (over data too with ZeRO), gradients 4 P, accumulator 8 P where
      there are microbatches, and 4 P with ZeRO.
    - activations: t `kept_bytes` for every layer here, of min(stage, accumulation) microbatches.
    - all of P times `padding`, see `plan.tiling`.
    - workspace: the sum of `WORKSPACE` times its arrays. logits: while losses are computed.

    Source: Korthikanti et al. 2022, arXiv:2205.05198, section 4, for what each rematerialisation keeps; the shares of
    the workspace: libtpu 0.0.52.
    """
    model, mesh = run.model, run.mesh
    stored = padding * params_on_device(run)[0]
    tokens, scattered = run.local_tokens, mesh.tensor if run.sequence_parallel else 1
    in_flight = min(mesh.stage, run.accumulation) if mesh.stage > 1 else 1
    kept = sum(
        group.num
        / mesh.stage
        * kept_bytes(model, group, remat=_policy(run), tensor=mesh.tensor, scattered=scattered, residual=residual_bytes)
        for group in model.layers
    )
    if run.remat == "none" and mesh.fsdp > 1:
        # The experts' gathered matrices are kept for the backward pass too.
        each = sum(
            group.num * feed_forward_params(group.feed_forward, model.dim)[0]
            for group in model.layers
            if group.feed_forward.experts
        )
        whole_layers = NARROW * each / (mesh.stage * mesh.tensor * mesh.expert)
    else:
        whole_layers = 0.0
    wide = max(model.layers, key=lambda group: group.feed_forward.width * group.feed_forward.rows_per_token)
    rows = wide.feed_forward.rows_per_token if wide.feed_forward.experts else 0.0
    dense = wide.feed_forward.shared_width if wide.feed_forward.experts else wide.feed_forward.width
    vocab = model.vocab / mesh.tensor
    head = WIDE * model.dim * vocab if mesh.fsdp > 1 else 0.0
    chunk = WIDE * tokens * vocab / loss_chunks(max(1, int(tokens)), max(1, int(vocab)))
    arrays = {
        "head": head,
        "feed_forward": residual_bytes * tokens * dense / mesh.tensor,
        "experts": WIDE * tokens * rows * wide.feed_forward.width / mesh.tensor,
        "dispatched": NARROW * tokens * rows * model.dim,
        "wide_stream": WIDE * tokens * model.dim,
        "stream": residual_bytes * tokens * model.dim / scattered,
        "block": NARROW * _block_params(wide, model.dim) / (mesh.tensor * _experts_split(wide, mesh.expert)),
        "copies": NARROW * stored,
        "ring": WIDE * tokens * model.dim if mesh.context > 1 else 0.0,
        "loss_head": head,
        "loss_chunk": chunk,
        "tied": head if model.tied else 0.0,
    }
    if mesh.fsdp == 1:
        arrays["block"] = 0.0
    state = stored / (mesh.data if run.zero else 1)
    beside = (ACCUMULATORS if run.accumulation > 1 else 0) + (GATHERED if run.zero and mesh.data > 1 else 0)
    return ProgramMemory(
        parameters_bytes=WIDE * stored,
        optimizer_bytes=WIDE * state * run.state_values,
        accumulator_bytes=WIDE * stored * beside,
        activations_bytes=in_flight * tokens * kept + whole_layers,
        gradients_bytes=WIDE * stored / (mesh.data if run.zero > 1 else 1),
        workspace_bytes=sum(workspace[name] * size for name, size in arrays.items() if name not in IN_LOSS),
        logits_bytes=sum(workspace[name] * arrays[name] for name in (*IN_LOSS, *ALWAYS)),
    )


def kept_bytes(
    model: Architecture, group: Layers, *, remat: str, tensor: int, scattered: int, residual: float
) -> float:
    """Bytes that one layer keeps for its backward pass, per token of a device.

    - full: its input, r D / s; s is `tensor` where the stream between blocks is split over it.
    - dots: that and the attention's projection; q in float32, k in float32 and v rounded; up and gate, r F each.
    - none: what the gradients of norms (4 D in float32, 2 D rounded), attention (q, k, v and its result, rounded and in
      whole lanes, and that again) and the feed-forward layer (five F in float32 and one rounded) need.
    - experts multiply `rows_per_token` rows of F; with dots and none their rows are kept, rounded, and with none the k
      results of each token and the stream once more, in float32.
    """
    attention, fed = group.attention, group.feed_forward
    dim = model.dim
    heads, value = attention.heads / tensor, attention.value_size
    kv_heads = max(1.0, attention.kv_heads / tensor)
    rows = fed.rows_per_token if fed.experts else 0.0
    width = (fed.width * (rows or 1.0) + fed.shared_width) / tensor
    if remat == "full":
        return residual * dim / scattered
    if remat == "dots":
        keys = kv_heads * (WIDE * attention.head_dim + NARROW * value)
        # Experts' results stay in float32, and so do the rows that they are given, rounded.
        up = (WIDE if fed.experts else residual) * fed.num_up * width + NARROW * rows * dim
        return 2 * residual * dim / scattered + WIDE * heads * attention.head_dim + keys + up
    stream = 4 * WIDE * dim / scattered + 2 * NARROW * dim
    queries_keys = (heads + kv_heads) * (_lanes(attention.head_dim) + _lanes(value))
    attended = NARROW * (queries_keys + heads * value)
    if attention.qk_norm:
        attended += 2 * WIDE * (heads + kv_heads) * attention.head_dim
    fed_bytes = (5 * WIDE + NARROW) * width
    if fed.experts:
        fed_bytes += NARROW * rows * dim + WIDE * (fed.experts_per_token + 1) * dim
    return stream + attended + fed_bytes


def _lanes(size: int) -> int:
    """A head's size as it is stored, a whole number of lanes."""
    return math.ceil(size / LANES) * LANES


def _policy(run: TrainRun) -> str:
    return run.remat if isinstance(run.remat, str) else "full"


def _block_params(group: Layers, dim: int) -> float:
    return float(attention_params(group.attention, dim)[0] + feed_forward_params(group.feed_forward, dim)[0])


def _experts_split(group: Layers, expert: int) -> int:
    return expert if group.feed_forward.experts else 1


def largest_batch(run: TrainRun, available_bytes: float, *, residual_bytes: float = WIDE) -> int:
    """The largest batch whose predicted memory fits, a multiple of what the mesh and microbatches divide; 0 if none."""
    unit = run.mesh.batch_shards * run.accumulation

    def fits(times: int) -> bool:
        tried = dataclasses.replace(run, batch=times * unit)
        return program_memory(tried, residual_bytes=residual_bytes).total_bytes <= available_bytes

    return _largest(fits) * unit


def largest_context(run: TrainRun, available_bytes: float, *, residual_bytes: float = WIDE, step: int = 128) -> int:
    """The longest sequence whose predicted memory fits at this batch, a multiple of `step`; 0 if none."""

    def fits(times: int) -> bool:
        tried = dataclasses.replace(run, seq=times * step)
        return program_memory(tried, residual_bytes=residual_bytes).total_bytes <= available_bytes

    return _largest(fits) * step


def _largest(fits, most: int = 2**24) -> int:
    """The largest whole number up to `most` that fits, by bisection; 0 where 1 does not."""
    if not fits(1):
        return 0
    low, high = 1, 2
    while high < most and fits(high):
        low, high = high, 2 * high
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return low if math.isfinite(low) else 0
