"""Say in words what bounds a prediction, and which one change would help most: every neighbour is predicted too."""

import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass

from gcompute.config.mesh import Axis, MeshShape
from gcompute.hardware.target import Target
from gcompute.plan.search import REMATS
from gcompute.plan.serving import ServeRun, critical_batch, decode_time, load_of, most_concurrency
from gcompute.plan.train_plan import (
    CLOSE,
    FITS,
    TOO_LARGE,
    TrainAnswer,
    TrainQuestion,
    check_question,
    memory_of,
    time_of,
)

# A change that brings less is not worth a reader's time.
LEAST_GAIN = 0.02


@dataclass(frozen=True, slots=True, kw_only=True)
class Change:
    """A choice that differs in one thing, and the tokens a second it would have against now, less 1.

    question: what it makes of the question that was answered.
    """

    what: str
    gain: float
    question: TrainQuestion


def best_change(found: TrainAnswer) -> Change | None:
    """The change of one thing that fits and brings most tokens a second; None where none brings `LEAST_GAIN`.

    What surely fits is left for nothing less sure. Where it does not fit, whatever does is a gain.
    """
    best: Change | None = None
    verdict = found.memory.verdict
    refused = {TOO_LARGE, CLOSE} if verdict == FITS else {TOO_LARGE}
    least = -1.0 if verdict == TOO_LARGE else LEAST_GAIN
    for what, question in _neighbours(found.question):
        try:
            check_question(question)
            if memory_of(question).verdict in refused:
                continue
            gain = time_of(question).tokens_per_s / found.time.tokens_per_s - 1
        except ValueError:
            continue
        if gain > least and (best is None or gain > best.gain):
            best = Change(what=what, gain=gain, question=question)
    return best


def _neighbours(question: TrainQuestion) -> Iterator[tuple[str, TrainQuestion]]:
    run = question.run
    mesh = run.mesh
    for remat in REMATS:
        if remat != run.remat:
            yield f"--remat {remat}", question.replace(remat=remat)
    for times in (2, 4):
        yield f"--batch {times * run.batch}", question.replace(batch=times * run.batch)
        if run.batch % times == 0:
            yield f"--batch {run.batch // times}", question.replace(batch=run.batch // times)
        yield f"--accumulation {times * run.accumulation}", question.replace(accumulation=times * run.accumulation)
    if mesh.stage > 1:
        for times in (2, 4):
            more = times * run.accumulation
            yield (
                f"--batch {times * run.batch} in {more} microbatches",
                question.replace(batch=times * run.batch, accumulation=more),
            )
        if run.schedule != "zero-bubble":
            chunks = " --pipeline-chunks 1" if run.chunks > 1 else ""
            yield f"--pipeline-schedule zero-bubble{chunks}", question.replace(schedule="zero-bubble", chunks=1)
    if run.accumulation > 1 and mesh.stage == 1:
        yield f"--accumulation {run.accumulation // 2}", question.replace(accumulation=run.accumulation // 2)
    for source in Axis:
        for target in Axis:
            for factor in (2, 4):
                if source is not target and mesh.size(source) % factor == 0:
                    moved = {
                        **{axis.value: mesh.size(axis) for axis in Axis},
                        source.value: mesh.size(source) // factor,
                        target.value: mesh.size(target) * factor,
                    }
                    other = MeshShape(**moved)
                    yield f"--mesh {other}", question.replace(mesh=other)


def why_train(found: TrainAnswer) -> str:
    """One paragraph: the shares of the step, what bounds it, whether memory is the limit, and the best change."""
    time, memory = found.time, found.memory
    work = time.matmul_s + time.attention_s
    parts = {
        "arithmetic": work / time.step_s,
        "memory traffic between products": time.sweep_s / time.step_s,
        "communication that nothing hides": time.exposed_s / time.step_s,
        "pipeline bubbles": time.bubble_s / time.step_s,
        "the optimizer": time.optimizer_s / time.step_s,
    }
    shares = ", ".join(f"{share:.0%} {name}" for name, share in parts.items() if share >= 0.005)
    words = [f"A step is {shares}; most of it waits for {time.bound}."]
    wasted = sum(one.flops * one.times for one in time.operations if one.name.endswith(" again"))
    spent = sum(one.flops * one.times for one in time.operations)
    if wasted / spent > 0.01:
        words.append(f"{wasted / spent:.0%} of its operations are recomputation (remat {found.question.run.remat}).")
    slowest = max(time.communication, key=lambda one: one.exposed_s, default=None)
    if slowest is not None and slowest.exposed_s > 0.01 * time.step_s:
        words.append(
            f"Of communication, axis {slowest.axis.value} costs most: {slowest.seconds:.3g} s of {slowest.what} over"
            f" {slowest.link}, {slowest.hidden_s / slowest.seconds:.0%} of it hidden."
        )
    if memory.verdict == TOO_LARGE and memory.available_bytes:
        over = memory.total_bytes / memory.available_bytes
        largest = max(memory.components, key=lambda name: memory.components[name])
        words.append(f"Memory is {over:.2f} times what a device has; most of it is for {largest}.")
    change = best_change(found)
    if memory.verdict == TOO_LARGE:
        fits = f"It would fit with {change.what}, {change.gain:+.0%} tokens a second (predicted)." if change else ""
        words.append(fits or "No single change of mesh, batch, microbatches or rematerialisation makes it fit.")
    elif change is None:
        words.append("No single change of mesh, batch, microbatches or rematerialisation brings 2% more.")
    else:
        words.append(f"What would help most: {change.what}, {change.gain:+.0%} tokens a second (predicted).")
    return " ".join(words)


def why_serve(run: ServeRun, target: Target) -> str:
    """One paragraph: what a decode step waits for, where its batch stands, and what would help most."""
    now = load_of(run, target, run.concurrency)
    step = decode_time(run, target, run.concurrency, run.prompt + run.output / 2)
    critical = critical_batch(run, target) * run.replicas
    most = most_concurrency(run, target)
    words = [
        f"A decode step waits for {step.bound}: {run.concurrency} requests against a critical batch of {critical:,.0f}."
    ]
    if most == 0:
        narrower = "" if run.weight_bytes == 1 else ", or --weights int8"
        words.append(f"Not one request fits: use more chips on the tensor axis{narrower}.")
        return " ".join(words)
    changes = {}
    for what, other in _serve_neighbours(run, most):
        try:
            if most_concurrency(other, target) >= other.concurrency:
                changes[what] = load_of(other, target, other.concurrency).tokens_per_s / now.tokens_per_s - 1
        except ValueError:
            continue
    if changes:
        what = max(changes, key=lambda name: changes[name])
        if changes[what] > LEAST_GAIN:
            words.append(f"What would help most: {what}, {changes[what]:+.0%} tokens a second (predicted).")
    return " ".join(words)


def _serve_neighbours(run: ServeRun, most: int) -> Iterator[tuple[str, ServeRun]]:
    if run.weights != "int8":
        yield "--weights int8", dataclasses.replace(run, weights="int8")
    if run.cache != "int8":
        yield "--kv int8", dataclasses.replace(run, cache="int8")
    if 2 * run.concurrency <= most:
        yield f"--concurrency {2 * run.concurrency}", dataclasses.replace(run, concurrency=2 * run.concurrency)
    mesh = run.mesh
    for source, target in ((Axis.TENSOR, Axis.DATA), (Axis.DATA, Axis.TENSOR)):
        if mesh.size(source) % 2 == 0:
            sizes = {axis.value: mesh.size(axis) for axis in Axis}
            sizes[source.value] //= 2
            sizes[target.value] *= 2
            other = MeshShape(**sizes)
            try:
                yield f"--mesh {other}", dataclasses.replace(run, mesh=other)
            except ValueError:
                continue
