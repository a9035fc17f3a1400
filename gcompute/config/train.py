"""What a training run is: data, optimizer, and the run itself."""

from dataclasses import dataclass, replace

from gcompute.config.fields import check_choices, check_numbers, option, to_plain
from gcompute.config.mesh import MeshShape
from gcompute.config.model import ModelConfig

OPTIMIZERS = ("adamw", "muon", "lion", "adafactor", "adam", "nadamw", "lamb", "sgd")
REMAT_POLICIES = ("none", "dots", "full")
PRECISIONS = ("float32", "bfloat16")
# What is chosen for the device at hand, from its measured roofline.
AUTO = "auto"
PIPELINE_SCHEDULES = ("1f1b", "gpipe", "interleaved", "zero-bubble")
CONTEXT_ATTENTIONS = ("ring", "ulysses")
MOST_ZERO = 2
MOST_SEED = 2**32 - 1
# Indices of tokens within a batch are int32.
MOST_TOKENS_PER_STEP = 2**31 - 1
# What a resumed run may be given anew: nothing of this changes the steps already done, and the same steps follow. Two
# exceptions that are asked for: `decay_steps` move the end of the schedule, another `mesh` adds in another order, as do
# the settings that say how a mesh is used.
RESUMABLE = {"steps", "eval_every", "eval_batches", "checkpoint_every", "keep", "log_every", "dispatch_steps", "mesh"}
RESUMABLE |= {"final_eval_batches", "decay_steps", "keep_best", "tensorboard"}
RESUMABLE |= {"sample_every", "sample_prompt"}
RESUMABLE |= {"accumulation", "zero", "sequence_parallel", "context_attention", "pipeline_schedule", "pipeline_chunks"}
# The tokens are compared with those that the run began with, so the text may have moved.
RESUMABLE |= {"data", "validation"}


@dataclass(frozen=True, slots=True, kw_only=True)
class DataConfig:
    """Where the text comes from and how it becomes tokens."""

    data: str = option(
        "stdlib",
        "stdlib (this Python's own source text), a file, pipe or directory of text or JSONL, compressed or not",
        path=True,
    )
    tokenizer: str = option("bpe:4096", "byte, char, bpe:VOCAB (trained on the data), or a tokenizer.json", path=True)
    validation: str | None = option(
        None, "text to validate on, of the kinds that data takes (default: a part of data, by val_fraction)", path=True
    )
    val_fraction: float = option(0.1, "share of the text kept for validation (of the files, or the end of one file)")
    text_mb: float | None = option(
        None, "megabytes of data's text to read: whole files chosen evenly, or the start of one file (default: all)"
    )

    def __post_init__(self) -> None:
        check_numbers(self, positive=("text_mb",))
        if not 0 < self.val_fraction < 1:
            raise ValueError(f"val_fraction must lie between 0 and 1, got {self.val_fraction}.")


@dataclass(frozen=True, slots=True, kw_only=True)
class OptimizerConfig:
    """The optimizer, its schedule and its clipping."""

    optimizer: str = option("adamw", "which optimizer, from optax", choices=OPTIMIZERS)
    learning_rate: float = option(1e-3, "peak learning rate")
    schedule: str = option("cosine", "after the warm-up", choices=("cosine", "linear", "constant", "wsd"))
    warmup_steps: int = option(100, "steps of linear warm-up from 0")
    warmup_fraction: float | None = option(
        None, "warm-up as a share of the schedule's steps (default: warmup_steps says it)"
    )
    decay_steps: int | None = option(
        None, "step at which the schedule has reached its end, and stays there (default: steps, as the run began)"
    )
    final_fraction: float = option(0.1, "learning rate at the end, as a share of the peak")
    weight_decay: float = option(0.1, "decoupled weight decay of matrices and embeddings; biases and norms have none")
    b1: float = option(0.9, "decay of the first moment (momentum for sgd and muon)")
    b2: float = option(0.99, "decay of the second moment")
    eps: float = option(1e-8, "added to the root of the second moment")
    clip: float = option(1.0, "largest global norm of the gradient; 0 turns clipping off")

    def __post_init__(self) -> None:
        check_choices(self)
        check_numbers(
            self,
            positive=("learning_rate", "eps", "decay_steps"),
            at_least_zero=("warmup_steps", "warmup_fraction", "final_fraction", "weight_decay", "b1", "b2", "clip"),
        )
        if self.b1 >= 1 or self.b2 >= 1:
            raise ValueError(f"b1 and b2 must be below 1, got b1={self.b1}, b2={self.b2}.")

        if self.warmup_fraction is not None and self.warmup_fraction > 1:
            raise ValueError(f"warmup_fraction must be at most 1, got {self.warmup_fraction}.")

    def warmup(self, steps: int) -> int:
        """Steps of warm-up in a schedule of `steps`, as asked for: a fixed number may be more."""
        return self.warmup_steps if self.warmup_fraction is None else round(self.warmup_fraction * steps)

    def schedule_steps(self, steps: int) -> int:
        """At which step the schedule of a run of `steps` has reached its end."""
        return self.decay_steps or steps


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainConfig:
    """How long to train, in what pieces, and what to keep."""

    batch: int = option(32, "sequences per step, over all devices")
    per_device_batch: int | None = option(
        None,
        "instead of batch: sequences per microbatch of each batch shard; batch is that times data x fsdp x expert of"
        " the mesh, times accumulation where that is given (default: batch says it)",
    )
    seq: int | None = option(None, "tokens a sequence (default: the model's context)")
    steps: int = option(1000, "optimizer steps")
    accumulation: int | None = option(
        None, "microbatches a step (default: as many as keep one near the cache on CPU, 1 elsewhere)"
    )
    mesh: MeshShape | None = option(
        None, "mesh axes and sizes, as in data=2,fsdp=4; one may be -1, the rest (default: all devices on data)"
    )
    zero: int = option(
        0, "what the data axis splits besides the batch: 1 optimizer state, 2 gradients too (the fsdp axis is ZeRO-3)"
    )
    sequence_parallel: bool = option(
        True, "with tensor > 1, split activations between blocks along the sequence, where it divides"
    )
    collective_matmul: bool = option(
        True, "on TPU, multiply by the pieces of a split matrix as they arrive: hides communication, takes memory"
    )
    context_attention: str = option("ring", "how the context axis attends", choices=CONTEXT_ATTENTIONS)
    pipeline_schedule: str = option("1f1b", "order of the pipeline's work", choices=PIPELINE_SCHEDULES)
    pipeline_chunks: int = option(1, "model chunks a pipeline stage, above 1 with the interleaved schedule")
    precision: str = option(
        AUTO,
        "dtype of matmul operands; results are float32 (auto: bfloat16 where this device multiplies it faster)",
        choices=(AUTO, *PRECISIONS),
    )
    residual: str = option(
        AUTO,
        "dtype of the residual stream and feed-forward activations (auto: float32 on CPU, bfloat16 elsewhere)",
        choices=(AUTO, *PRECISIONS),
    )
    remat: str = option("none", "what the backward pass recomputes", choices=REMAT_POLICIES)
    unroll: int | None = option(None, "layers a scan step (default: all on CPU, 1 elsewhere)")
    dropout: float = option(
        0.0, "probability of zero in the embedding's sum and in what attention and feed-forward add; training alone"
    )
    seed: int = option(0, "seed of the initial values and of the order of the data")
    eval_every: int = option(200, "steps between evaluations; 0: only at the end")
    eval_batches: int | None = option(20, "validation batches per evaluation, spread over the split")
    final_eval_batches: int | None = option(
        None,
        "validation batches of the last evaluation; 0: the whole split (default: as many as make a tenth of the"
        " training's work, at least eval_batches)",
    )
    checkpoint_every: int = option(200, "steps between checkpoints; 0: only at the end")
    keep: int = option(3, "checkpoints kept, the newest")
    keep_best: bool = option(
        False, "also save and keep the one of lowest validation loss over eval_batches: OUT/checkpoints/best names it"
    )
    log_every: int = option(
        10, "steps between lines of the metrics file's summary on a terminal that is not interactive"
    )
    sample_every: int = option(0, "steps between texts of the model, printed and kept in OUT/samples.jsonl; 0: none")
    sample_prompt: str | None = option(
        None, "what those texts continue (default: the first words of the validation text)"
    )
    tensorboard: bool = option(False, "write the scalars of metrics.jsonl to OUT/tensorboard too (extra tensorboard)")
    dispatch_steps: int | None = option(None, "most steps one dispatch runs (default: as many as take half a second)")

    def __post_init__(self) -> None:
        check_choices(self)
        check_numbers(
            self,
            positive=(
                "batch",
                "seq",
                "steps",
                "accumulation",
                "unroll",
                "eval_batches",
                "keep",
                "log_every",
                "dispatch_steps",
                "pipeline_chunks",
            ),
            at_least_zero=("seed", "eval_every", "checkpoint_every", "zero", "final_eval_batches", "sample_every"),
        )
        if self.per_device_batch is not None:
            raise ValueError(
                f"per_device_batch={self.per_device_batch} means nothing before the devices are known: see"
                " gcompute.config.sizes.over_devices, or give batch."
            )
        if not 0 <= self.dropout < 1:
            raise ValueError(f"dropout must be at least 0 and below 1, got {self.dropout:g}.")
        if self.zero > MOST_ZERO:
            raise ValueError(f"zero must be 0, 1 or 2, got {self.zero}: the third stage is the mesh axis fsdp.")
        if (self.pipeline_schedule == "interleaved") != (self.pipeline_chunks > 1):
            raise ValueError(
                f"pipeline_schedule={self.pipeline_schedule} and pipeline_chunks={self.pipeline_chunks} do not go"
                " together: the interleaved schedule has at least 2 chunks a stage, the others 1."
            )
        if self.seed > MOST_SEED:
            raise ValueError(f"seed must be at most {MOST_SEED}, got {self.seed}.")
        if self.accumulation and self.batch % self.accumulation:
            raise ValueError(f"batch={self.batch} does not divide into accumulation={self.accumulation} microbatches.")


@dataclass(frozen=True, slots=True, kw_only=True)
class RunConfig:
    """Everything that decides the numbers of a run.

    Raises:
      ValueError: a sequence is longer than the model's context, or a step has more tokens than int32 counts.
    """

    model: ModelConfig
    optimizer: OptimizerConfig
    train: TrainConfig
    data: DataConfig

    def __post_init__(self) -> None:
        if self.seq > self.model.context:
            raise ValueError(
                f"seq={self.seq} is longer than the model's context={self.model.context}. Use a smaller seq, or a"
                " larger context."
            )
        if self.tokens_per_step > MOST_TOKENS_PER_STEP:
            raise ValueError(
                f"batch={self.train.batch} of seq={self.seq} is {self.tokens_per_step} tokens a step, and"
                f" {MOST_TOKENS_PER_STEP} is the most."
            )

    @property
    def seq(self) -> int:
        return self.train.seq or self.model.context

    @property
    def tokens_per_step(self) -> int:
        return self.train.batch * self.seq

    def lasting(self, steps: int) -> "RunConfig":
        """This run with another number of steps and the schedule that it has, so that no learning rate changes."""
        if steps == self.train.steps:
            return self
        kept = replace(self.optimizer, decay_steps=self.optimizer.schedule_steps(self.train.steps))
        return replace(self, optimizer=kept, train=replace(self.train, steps=steps))

    def to_dict(self) -> dict[str, dict[str, object]]:
        """Plain values, a section a dataclass; the same that a TOML file holds."""
        return {section: to_plain(getattr(self, section)) for section in ("model", "optimizer", "train", "data")}
