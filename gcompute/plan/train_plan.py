"""The whole answer on a training run: does it fit, how long does a step take, what bounds it, what does it cost."""

import dataclasses
from dataclasses import dataclass, field

from gcompute.config.architecture import Architecture, architecture
from gcompute.config.mesh import Axis, MeshShape
from gcompute.config.model import ModelConfig
from gcompute.config.train import PRECISIONS, RunConfig, TrainConfig
from gcompute.hardware.target import Target
from gcompute.plan.accuracy import Accuracy, accuracy_of
from gcompute.plan.legal import check_mesh
from gcompute.plan.memory import (
    OPERAND_BYTES,
    choose_query_blocks,
    optimizer_state_values,
    train_memory,
)
from gcompute.plan.params import weight_arrays
from gcompute.plan.precision import choose_precision, choose_residual
from gcompute.plan.program_memory import ProgramMemory, program_memory
from gcompute.plan.tiling import tile_padding
from gcompute.plan.train_run import TrainRun
from gcompute.plan.train_step import predict_train_step
from gcompute.plan.train_time import TrainTime, train_time

FITS, CLOSE, TOO_LARGE, SHARED = "fits", "too close to call", "does not fit", "shares the machine's memory"
TRAIN_MEMORY = {"tpu": "train memory, TPU compiler", "gpu": "train memory, GPU compiler"}


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainQuestion:
    """A training run on a target, with all that its memory depends on. config: None where the trainer has no such
    model. residual: dtype of the stream between blocks."""

    run: TrainRun
    target: Target
    config: ModelConfig | None = None
    optimizer: str = "adamw"
    residual: str = "bfloat16"

    @property
    def padding(self) -> float:
        """What the layout of a TPU adds to the parameters; 1 for a model that the trainer has not."""
        if self.config is None or self.target.backend != "tpu":
            return 1.0
        return tile_padding(self.config, self.run.mesh)

    def replace(self, **changes: object) -> "TrainQuestion":
        """The same question with other fields of its run."""
        return dataclasses.replace(self, run=dataclasses.replace(self.run, **changes))


@dataclass(frozen=True, slots=True, kw_only=True)
class MemoryAnswer:
    """Predicted bytes on the fullest device by component, against what a program may use of it.

    available_bytes: None on CPU devices. accuracy: of this class of prediction; None on chips whose programs were not
    examined. low: the most by which such a prediction was too small, as a share; the verdict is "fits" only where it
    would even then.
    """

    components: dict[str, float]
    total_bytes: float
    available_bytes: float | None
    accuracy: Accuracy | None
    low: float = 0.0

    @property
    def verdict(self) -> str:
        if self.available_bytes is None:
            return SHARED
        if self.total_bytes * (1 + self.low) <= self.available_bytes:
            return FITS
        return CLOSE if self.total_bytes <= self.available_bytes else TOO_LARGE

    @property
    def left_bytes(self) -> float | None:
        return None if self.available_bytes is None else self.available_bytes - self.total_bytes


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainAnswer:
    """The memory and time of a question, and what was said of their class of prediction."""

    question: TrainQuestion
    memory: MemoryAnswer
    time: TrainTime
    time_accuracy: Accuracy | None
    notes: tuple[str, ...] = field(default_factory=tuple)


def question_of(run: RunConfig, target: Target, accumulation: int, *, name: str) -> TrainQuestion:
    """The question that a configuration of the trainer is, on `target`.

    Raises:
      ValueError: the mesh, the model and the batch do not go together.
    """
    config, mesh = run.train, run.train.mesh
    assert mesh is not None
    model = architecture(run.model, name)
    precision, residual = dtypes_of(config, target)
    planned = TrainRun(
        model=model,
        batch=config.batch,
        seq=run.seq,
        mesh=mesh,
        accumulation=accumulation,
        remat=config.remat,
        precision=precision,
        activation_bytes=OPERAND_BYTES[residual],
        state_values=state_values(run.model, run.optimizer.optimizer),
        sequence_parallel=config.sequence_parallel,
        schedule=config.pipeline_schedule,
        chunks=config.pipeline_chunks,
        zero=config.zero,
        context_attention=config.context_attention,
    )
    return TrainQuestion(
        run=planned, target=target, config=run.model, optimizer=run.optimizer.optimizer, residual=residual
    )


def dtypes_of(config: TrainConfig, target: Target) -> tuple[str, str]:
    """Precision and residual on `target`: as configured, else what suits its chip."""
    precision, residual = config.precision, config.residual
    if precision not in PRECISIONS:
        precision, _ = choose_precision(target.known.peak_flops_per_s if target.known else {})
    return precision, residual if residual in PRECISIONS else choose_residual(target.backend)[0]


def state_values(config: ModelConfig, optimizer: str) -> float:
    """Values of state that an optimizer keeps for each parameter, over the whole model."""
    arrays = weight_arrays(config)
    return sum(optimizer_state_values(array, optimizer) for array in arrays) / sum(a.num_params for a in arrays)


def check_devices(mesh: MeshShape, target: Target) -> None:
    """Raise ValueError where a mesh is not of the target's size."""
    if mesh.num_devices != target.num_devices:
        raise ValueError(
            f"mesh {mesh} is of {mesh.num_devices} devices and {target} has {target.num_devices}. Give axes whose"
            f" product is {target.num_devices}, as in --mesh fsdp={target.num_devices}, or --search."
        )


def check_question(question: TrainQuestion) -> None:
    """Raise ValueError where the mesh does not divide the model or the batch, or is not of the target's size."""
    run = question.run
    check_devices(run.mesh, question.target)
    check_mesh(
        run.model,
        run.mesh,
        batch=run.batch,
        seq=run.seq,
        accumulation=run.accumulation,
        schedule=run.schedule,
        chunks=run.chunks,
        context_attention=run.context_attention,
    )


def memory_of(question: TrainQuestion) -> MemoryAnswer:
    """Predict the memory of a question; plain XLA attention, off TPU, keeps scores."""
    run, target = question.run, question.target
    kind = TRAIN_MEMORY.get(target.backend) if question.config or target.backend == "tpu" else None
    accuracy = accuracy_of(kind, memory_facts(question)) if kind else None
    if target.backend == "tpu" or question.config is None:
        residual = OPERAND_BYTES[question.residual]
        predicted = program_memory(run, residual_bytes=residual, padding=question.padding)
        components, total = _named(predicted), predicted.total_bytes
    else:
        plain = train_memory(
            question.config,
            batch=run.batch,
            seq=run.seq,
            accumulation=run.accumulation,
            optimizer=question.optimizer,
            precision=run.precision,
            remat=run.remat if isinstance(run.remat, str) else "full",
            mesh=run.mesh,
            residual=question.residual,
            fuses_mask=target.backend == "gpu",
            query_blocks=_query_blocks(question),
        )
        components = {name.removesuffix("_bytes"): float(value) for name, value in plain.to_dict().items()}
        total = components.pop("total")
    return MemoryAnswer(
        components=components,
        total_bytes=total,
        available_bytes=target.hbm_bytes,
        accuracy=accuracy,
        low=accuracy.low if accuracy else 0.0,
    )


def _query_blocks(question: TrainQuestion) -> int:
    run = question.run
    whole_sequences = run.mesh.context == 1 or run.context_attention == "ulysses"
    backend = question.target.backend
    return choose_query_blocks(backend, seq=run.seq, precision=run.precision, whole_sequences=whole_sequences)


def _named(memory: ProgramMemory) -> dict[str, float]:
    return {field.name.removesuffix("_bytes"): getattr(memory, field.name) for field in dataclasses.fields(memory)}


def memory_facts(question: TrainQuestion) -> dict[str, str | tuple[str, ...]]:
    """What an examination of memory distinguishes."""
    run = question.run
    return {
        "chip": question.target.chip,
        "axis": _axes(run),
        "remat": run.remat if isinstance(run.remat, str) else "full",
        "layers": _kinds(run.model),
        "optimizer": question.optimizer,
    }


def time_facts(run: TrainRun, target: Target) -> dict[str, str | tuple[str, ...]]:
    """What an examination of step times distinguishes."""
    return {"chip": target.chip, "axis": _axes(run), "layers": _kinds(run.model), "precision": run.precision}


def _axes(run: TrainRun) -> tuple[str, ...]:
    return tuple(axis.value for axis in Axis if run.mesh.size(axis) > 1)


def _kinds(model: Architecture) -> tuple[str, ...]:
    kinds = set()
    for group in model.layers:
        fed = group.feed_forward
        # Rows of experts without empty places need kernels of another kind.
        kinds.add("dense" if not fed.experts else "dropless experts" if fed.capacity_factor == 1 else "experts")
        kinds |= {"latent attention"} if group.attention.kv_rank is not None else set()
        kinds |= {"windows"} if group.attention.window is not None else set()
    return tuple(sorted(kinds))


def answer(question: TrainQuestion) -> TrainAnswer:
    """Predict all of a question.

    Raises:
      ValueError: it does not go together, or the catalogue lacks a figure that it needs.
    """
    check_question(question)
    run, target = question.run, question.target
    kind = {"tpu": "train step, TPU", "gpu": "train step, GPU"}.get(target.backend)
    return TrainAnswer(
        question=question,
        memory=memory_of(question),
        time=time_of(question),
        time_accuracy=accuracy_of(kind, time_facts(run, target)) if kind else None,
    )


def time_of(question: TrainQuestion) -> TrainTime:
    """Predict the step of a question: on chips by the stated efficiencies, on this machine's CPU by its own sweeps."""
    return _on_cpu(question) if question.target.backend == "cpu" else train_time(question.run, question.target)


def _on_cpu(question: TrainQuestion) -> TrainTime:
    """The step on this machine, by its measured ceilings and the trainer's own sweeps (`plan.train_step`)."""
    run, chip = question.run, question.target.known
    assert chip is not None
    if question.config is None:
        raise ValueError(f"{run.model.name} is not a model of this library's trainer, which runs on this machine.")
    whole = train_time(run, question.target)
    step = predict_train_step(
        question.config,
        batch=run.batch,
        seq=run.seq,
        precision=run.precision,
        roofline_flops_per_s=chip.peak_flops_per_s[run.precision],
        memory_bytes_per_s=chip.hbm_bytes_per_s,
        accumulation=run.accumulation,
        optimizer=question.optimizer,
        remat=run.remat if isinstance(run.remat, str) else "full",
        query_blocks=_query_blocks(question),
    )
    return dataclasses.replace(
        whole,
        matmul_s=step.compute_s,
        attention_s=0.0,
        sweep_s=step.memory_s,
        exposed_s=0.0,
        bubble_s=0.0,
        optimizer_s=step.optimizer_s,
        step_s=step.step_s,
        tokens_per_s=step.tokens_per_s,
        mfu=whole.mfu * whole.step_s / step.step_s,
        bound="compute" if step.bound == "compute" else "HBM",
    )
