"""What travels along each mesh axis in a train step, how long it takes, and how much of that hides behind the work."""

from collections.abc import Iterable
from dataclasses import dataclass

from gcompute.config.mesh import Axis
from gcompute.plan.collectives import Route, all_gather_s, all_reduce_s, all_to_all_s, permute_s
from gcompute.plan.efficiency import Efficiency
from gcompute.plan.train_run import TrainRun, expert_params, params_on_device


@dataclass(frozen=True, slots=True, kw_only=True)
class Communication:
    """All collectives of one kind along one axis in a step, on one device.

    payload_bytes: of the whole arrays, see `plan.collectives`. hidden_s: of its seconds, what runs beside computation.
    """

    axis: Axis
    what: str
    payload_bytes: float
    seconds: float
    hidden_s: float
    link: str

    @property
    def exposed_s(self) -> float:
        return self.seconds - self.hidden_s


@dataclass(frozen=True, slots=True, kw_only=True)
class Traffic:
    """What travels along one axis in a step, before any efficiency; `hides`: computation can go on beside it."""

    axis: Axis
    what: str
    payload_bytes: float
    seconds: float
    hides: bool


def communication_of(run: TrainRun, links: dict[Axis, Route], *, tpu: bool) -> tuple[Traffic, ...]:
    """Every axis's traffic on one device, at the full speed of its links.

    On TPU products go on beside the tensor axis's traffic, a piece of a matrix at a time; elsewhere they wait for it.
    """
    mesh, model, n = run.mesh, run.model, run.accumulation
    stored, used = params_on_device(run)
    tokens, act = run.local_tokens, run.activation_bytes
    stream = tokens * model.dim * act
    layers_here = model.num_layers / mesh.stage
    # Where the projection after attention is computed again, so is what brings its operands.
    passes = 2 if run.remat in ("none", "dots") or "out" in run.remat else 3
    found: list[Traffic] = []

    def add(axis: Axis, what: str, payload: float, seconds: float, *, hides: bool) -> None:
        found.append(Traffic(axis=axis, what=what, payload_bytes=payload, seconds=seconds, hides=hides))

    if Axis.FSDP in links:
        # Gathered in the forward and in the backward pass; gradients are reduced as they come.
        weights, gradients = 2 * n * used * run.weight_bytes, n * used * run.gradient_bytes
        add(Axis.FSDP, "all-gather", weights, all_gather_s(weights, links[Axis.FSDP]), hides=True)
        add(Axis.FSDP, "reduce-scatter", gradients, all_gather_s(gradients, links[Axis.FSDP]), hides=True)
    if Axis.DATA in links:
        payload = stored * run.gradient_bytes
        add(Axis.DATA, "all-reduce", payload, all_reduce_s(payload, links[Axis.DATA]), hides=True)
    if Axis.TENSOR in links:
        # Two gathers and two reductions of the stream a layer in each direction, and the forward's again.
        payload = n * layers_here * 2 * passes * stream
        seconds = all_reduce_s(payload, links[Axis.TENSOR])
        add(Axis.TENSOR, "all-gather, reduce-scatter", 2 * payload, seconds, hides=tpu)
    if Axis.CONTEXT in links:
        values = sum(
            group.num * group.attention.kv_heads * (group.attention.head_dim + group.attention.value_size)
            for group in model.layers
        )
        split = max(1, min(mesh.tensor, model.layers[0].attention.kv_heads)) * mesh.stage
        # Keys and values go round forwards (again where recomputed); backwards they and their gradients do.
        sent = n * values / split * tokens * act * (mesh.context - 1) * (passes + 1)
        add(Axis.CONTEXT, "permute", sent, permute_s(sent, links[Axis.CONTEXT]), hides=True)
    if Axis.EXPERT in links:
        mixtures = [group for group in model.layers if group.feed_forward.experts]
        sent_rows = sum(group.num * group.feed_forward.rows_per_token for group in mixtures) / mesh.stage
        payload = n * 2 * passes * sent_rows * tokens * mesh.expert * model.dim * act / mesh.tensor
        add(Axis.EXPERT, "all-to-all", payload, all_to_all_s(payload, links[Axis.EXPERT]), hides=False)
        shared = used - expert_params(model) / (mesh.expert * mesh.tensor * mesh.stage)
        gradients = n * shared / mesh.fsdp * run.gradient_bytes
        add(Axis.EXPERT, "all-reduce", gradients, all_reduce_s(gradients, links[Axis.EXPERT]), hides=True)
    if Axis.STAGE in links:
        sent = 2 * n * run.chunks * stream / (mesh.tensor if run.sequence_parallel else 1)
        add(Axis.STAGE, "permute", sent, permute_s(sent, links[Axis.STAGE]), hides=False)
    return tuple(found)


def hidden_behind(
    traffic: Iterable[Traffic], links: dict[Axis, Route], work_s: float, efficiency: Efficiency
) -> tuple[Communication, ...]:
    """How much of each hides behind the work: the share that can, as long as there is work to hide it."""
    left, found = work_s, []
    for one in traffic:
        seconds = one.seconds / efficiency.link
        hidden = min(left, seconds * efficiency.hidden) if one.hides else 0.0
        left -= hidden
        found.append(
            Communication(
                axis=one.axis,
                what=one.what,
                payload_bytes=one.payload_bytes,
                seconds=seconds,
                hidden_s=hidden,
                link=links[one.axis].slowest,
            )
        )
    return tuple(found)
