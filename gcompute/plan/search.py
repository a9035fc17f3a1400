"""Find the best way to train a model on given chips: every legal mesh, rematerialisation, microbatch and batch, ranked.

Memory is predicted first, which is quick, and time for what fits. At a given batch nothing that recomputes more can be
faster, so only the least rematerialisation that fits is timed; where the batch is free, the largest of each that fits.
"""

import dataclasses
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from gcompute.config.architecture import Architecture
from gcompute.config.mesh import MeshShape
from gcompute.plan.accuracy import accuracy_of
from gcompute.plan.links import MAY_CROSS_SLICES
from gcompute.plan.memory import OPERAND_BYTES
from gcompute.plan.program_memory import program_memory
from gcompute.plan.train_plan import (
    CLOSE,
    FITS,
    SHARED,
    TOO_LARGE,
    TRAIN_MEMORY,
    MemoryAnswer,
    TrainQuestion,
    memory_of,
    time_of,
)
from gcompute.plan.train_run import TrainRun
from gcompute.plan.train_time import TrainTime

REMATS = ("none", "dots", "full")
# More shares of a matrix or a sequence than these, or stages, cost more than they bring on any chip known here.
MOST_TENSOR, MOST_CONTEXT, MOST_STAGES = 64, 64, 32
MICROBATCHES = (1, 2, 4, 8, 16, 32, 64)
# Sequences of a microbatch in each share of the batch, where the batch is free: the most that fit are the fastest.
SEQUENCES = (32, 24, 16, 12, 8, 6, 4, 3, 2, 1)
# Microbatches for each stage of a pipeline, where the batch is free.
PER_STAGE = (1, 2, 4)


@dataclass(frozen=True, slots=True, kw_only=True)
class Candidate:
    """One way, with its predicted memory and time."""

    question: TrainQuestion
    total_bytes: float
    verdict: str
    time: TrainTime

    @property
    def run(self) -> TrainRun:
        return self.question.run


def search(
    question: TrainQuestion, *, batch: int | None, accumulation: int | None = None, remat: str | None = None
) -> tuple[Candidate, ...]:
    """Every way that fits, most tokens a second first; where none fits, those nearest to it.

    Args:
      question: what is fixed; its mesh, and whatever of the rest is given as None, is searched.
      batch: sequences a step; None tries several for each share of the batch.

    Raises:
      ValueError: no mesh divides the model and the batch.
    """
    tried: list[tuple[TrainQuestion, MemoryAnswer]] = []
    fitting: list[tuple[TrainQuestion, MemoryAnswer]] = []
    remats = (remat,) if remat else REMATS
    low = accuracy_of(TRAIN_MEMORY["tpu"], {}).low
    for mesh in _meshes(question):
        padding = question.replace(mesh=mesh).padding
        for alternatives in _batches(mesh, batch, accumulation, whole=question.run.schedule == "interleaved"):
            for policy in remats:
                close = sure = False
                for size, microbatches in alternatives:
                    one = question.replace(mesh=mesh, batch=size, accumulation=microbatches, remat=policy)
                    memory = _quick_memory(one, low, padding)
                    if memory.verdict in (FITS, SHARED):
                        fitting.append((one, memory))
                        sure = True
                        break
                    # What is too close to call is shown, and what surely fits is still looked for.
                    if memory.verdict == CLOSE and not close:
                        fitting.append((one, memory))
                        close = True
                    elif memory.verdict == TOO_LARGE:
                        tried.append((one, memory))
                if sure and batch:
                    break
    if not fitting and not tried:
        raise ValueError(
            f"no mesh of {question.target.num_devices} devices divides the model and batch={batch}. Use another batch:"
            " a multiple of the devices always has one."
            if question.run.chunks == 1
            else f"no mesh of {question.target.num_devices} devices has stages that divide the model's"
            f" {question.run.model.num_layers} layers in pipeline_chunks={question.run.chunks}, with batch={batch}."
        )
    nearest = sorted(tried, key=lambda one: one[1].total_bytes)[:20]
    found = [
        Candidate(question=one, total_bytes=memory.total_bytes, verdict=memory.verdict, time=time_of(one))
        for one, memory in fitting or nearest
    ]
    if not fitting:
        return tuple(found)
    # The trusted first; of equal speed, the simplest mesh and the smaller batch.
    return tuple(
        sorted(
            found,
            key=lambda one: (
                one.verdict == CLOSE,
                -one.time.tokens_per_s,
                _axes_used(one.run.mesh),
                one.run.batch,
            ),
        )
    )


def _meshes(question: TrainQuestion) -> Iterator[MeshShape]:
    """The legal meshes whose stages have whole chunks, and which split over the slices of the target."""
    run, target = question.run, question.target
    for mesh in legal_meshes(run.model, target.num_devices, run.seq):
        if run.chunks > 1 and (mesh.stage == 1 or run.model.num_layers % (mesh.stage * run.chunks)):
            continue
        if math.prod(mesh.size(axis) for axis in MAY_CROSS_SLICES) % target.slices == 0:
            yield mesh


def _axes_used(mesh: MeshShape) -> int:
    return sum(size > 1 for size in dataclasses.astuple(mesh))


def _quick_memory(question: TrainQuestion, low: float, padding: float) -> MemoryAnswer:
    """As `memory_of`, without looking the accuracy of each question up."""
    if question.target.backend != "tpu":
        return memory_of(question)
    predicted = program_memory(question.run, residual_bytes=OPERAND_BYTES[question.residual], padding=padding)
    return MemoryAnswer(
        components={},
        total_bytes=predicted.total_bytes,
        available_bytes=question.target.hbm_bytes,
        accuracy=None,
        low=low,
    )


def legal_meshes(model: Architecture, num_devices: int, seq: int) -> Iterator[MeshShape]:
    """Every mesh of `num_devices` that divides the model: data x stage x fsdp x expert x context x tensor.

    >>> from gcompute.config.models import planned_model
    >>> len(list(legal_meshes(planned_model("demo").architecture, 1, 256)))
    1
    """
    sizes = [
        math.gcd(group.attention.heads, group.attention.kv_heads, group.feed_forward.width, model.vocab)
        for group in model.layers
    ]
    tensors = _divisors(math.gcd(num_devices, *sizes), MOST_TENSOR)
    experts = [group.feed_forward.experts for group in model.layers if group.feed_forward.experts]
    for tensor in tensors:
        for expert in _divisors(math.gcd(num_devices // tensor, *experts), num_devices) if experts else (1,):
            left = num_devices // (tensor * expert)
            # Two pieces of a sequence a device.
            for context in _divisors(math.gcd(left, 1 if seq % 2 else seq // 2), MOST_CONTEXT):
                for stage in _divisors(math.gcd(left // context, model.num_layers), MOST_STAGES):
                    rest = left // (context * stage)
                    for fsdp in _divisors(math.gcd(rest, model.dim), rest):
                        yield MeshShape(
                            data=rest // fsdp, stage=stage, fsdp=fsdp, expert=expert, context=context, tensor=tensor
                        )


def _batches(
    mesh: MeshShape, batch: int | None, accumulation: int | None, *, whole: bool
) -> Iterator[Sequence[tuple[int, int]]]:
    """Alternatives of (batch, microbatches), of which the first that fits is the best.

    With the batch given each number of microbatches is one of its own; a pipeline has at least as many as stages, and
    `whole` groups of as many.
    """
    shares = mesh.batch_shards
    if batch:
        for count in (accumulation,) if accumulation else MICROBATCHES:
            if _fills(mesh, count, whole) and batch % (shares * count) == 0:
                yield ((batch, count),)
        return
    counts = (accumulation,) if accumulation else [mesh.stage * each for each in PER_STAGE if mesh.stage > 1] or [1]
    for count in counts:
        if _fills(mesh, count, whole):
            yield [(shares * count * each, count) for each in SEQUENCES]


def _fills(mesh: MeshShape, microbatches: int, whole: bool) -> bool:
    return microbatches % mesh.stage == 0 if whole else microbatches >= mesh.stage


def _divisors(number: int, most: int) -> tuple[int, ...]:
    return tuple(n for n in range(1, min(number, most) + 1) if number % n == 0)
