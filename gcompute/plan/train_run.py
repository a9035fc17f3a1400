"""A training run as a planner sees it: the model, the batch, the mesh, and what is kept and recomputed."""

from collections.abc import Collection
from dataclasses import dataclass, field

from gcompute.config.architecture import Architecture
from gcompute.config.mesh import MeshShape
from gcompute.plan.sizes import attention_params, feed_forward_params


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainRun:
    """What is trained and how, as far as its time depends on it.

    batch: sequences a step over all devices. remat: "none", "dots" or "full" as the trainer has them, or the parts of a
    block whose products are kept ("qkv", "attention", "out", "up"), all else being recomputed. activation_bytes: of the
    values between products. gradient_bytes: of a gradient as it travels. state_values: of the optimizer, a parameter.
    """

    model: Architecture
    batch: int
    seq: int
    mesh: MeshShape = field(default_factory=MeshShape)
    accumulation: int = 1
    remat: str | Collection[str] = "full"
    precision: str = "bfloat16"
    activation_bytes: float = 2.0
    gradient_bytes: float = 4.0
    state_values: float = 2.0
    sequence_parallel: bool = True
    schedule: str = "1f1b"
    chunks: int = 1
    zero: int = 0
    context_attention: str = "ring"

    def __post_init__(self) -> None:
        if min(self.batch, self.seq, self.accumulation, self.chunks) < 1:
            raise ValueError(
                f"batch={self.batch}, seq={self.seq}, accumulation={self.accumulation} and chunks={self.chunks} must be"
                " at least 1."
            )

    @property
    def tokens(self) -> int:
        """Tokens of one step."""
        return self.batch * self.seq

    @property
    def local_tokens(self) -> float:
        """Tokens of one microbatch on one device."""
        return self.tokens / (self.accumulation * self.mesh.batch_shards * self.mesh.context)

    @property
    def weight_bytes(self) -> float:
        return 2.0 if self.precision == "bfloat16" else 4.0


def params_on_device(run: TrainRun) -> tuple[float, float]:
    """(parameters that a device stores, those of its layers that it multiplies by after fsdp has gathered them).

    As `parallel.rules` has it: tensor splits heads, feed-forward and vocabulary, stage the layers, expert the experts
    and their columns of the router, fsdp whatever has a dim D.
    """
    mesh, model = run.mesh, run.model
    norm = model.dim * (2 if model.norm_bias else 1)
    ends = model.vocab * model.dim * (1 if model.tied else 2)
    with_dim = ends / mesh.tensor + norm + (model.context * model.dim if model.learned_positions else 0)
    without = model.vocab / mesh.tensor if model.head_bias else 0.0
    for group in model.layers:
        attention, fed, here = group.attention, group.feed_forward, group.num / mesh.stage
        matrices, vectors = attention_params(attention, model.dim)
        matrices += (fed.num_up + 1) * model.dim * ((fed.width if fed.experts is None else 0) + fed.shared_width)
        of_heads = attention.heads * attention.head_dim
        of_heads += attention.kv_heads * (attention.head_dim + attention.value_size)
        split = (of_heads if attention.bias else 0) + (fed.num_up * fed.width if fed.bias else 0)
        biases = (model.dim if attention.output_bias else 0) + (model.dim if fed.bias else 0)
        rest = vectors - (of_heads if attention.bias else 0) - (model.dim if attention.output_bias else 0)
        experts = (fed.experts or 0) / mesh.expert * model.dim
        mixture = experts * ((fed.num_up + 1) * fed.width / mesh.tensor + 1)
        with_dim += here * (matrices / mesh.tensor + mixture + biases + model.norms_per_layer * norm)
        without += here * (split / mesh.tensor + rest)
    return with_dim / mesh.fsdp + without, with_dim + without


def expert_params(model: Architecture) -> float:
    """Values of all experts' matrices and routers, over all layers."""
    return float(
        sum(
            group.num * (feed_forward_params(group.feed_forward, model.dim)[0])
            for group in model.layers
            if group.feed_forward.experts
        )
    )
