"""gcompute plan train: memory, time, bound and cost of training a model on chips that need not be here."""

import dataclasses
from pathlib import Path
from typing import Any

import click

from gcompute.cli.flags import FILE, MODEL, SectionedCommand, config_options, given
from gcompute.cli.plan_ranking import Ranked
from gcompute.cli.planning import check_picture, check_positive, checked_json, known_chips, planning_target
from gcompute.config.mesh import MeshShape
from gcompute.config.models import PlannedModel, planned_model
from gcompute.config.train import OPTIMIZERS, DataConfig, OptimizerConfig, RunConfig, TrainConfig
from gcompute.hardware.target import Target
from gcompute.plan.memory import OPERAND_BYTES
from gcompute.plan.search import REMATS, search
from gcompute.plan.train_plan import (
    TOO_LARGE,
    TrainQuestion,
    answer,
    check_devices,
    dtypes_of,
    memory_of,
    question_of,
)
from gcompute.plan.train_run import TrainRun

DOES_NOT_FIT = 1
BY = ("time", "cost")
# These change how long a run goes on and what it keeps, or hang on the machine that runs it: not the step.
NOT_PLANNED = {
    *("steps", "seed", "eval_every", "eval_batches", "final_eval_batches", "checkpoint_every", "keep", "keep_best"),
    *("log_every", "dispatch_steps", "tensorboard", "sample_every", "sample_prompt"),
    *("unroll", "batch", "per_device_batch", "seq", "mesh", "remat", "accumulation", "dropout"),
}
USUAL_SEQ = 8192
# Of Adam and its kin; a model that the trainer has not is planned for with these.
ADAM_STATE = 2.0


class PlanTrainCommand(SectionedCommand):
    examples = (
        "gcompute plan train llama3-70b --on v5p:8x8x16 --mesh fsdp=256,tensor=4 --batch 1024 --remat full",
        "gcompute plan train llama3-405b --on v5p:16x16x24 --search --batch 1536",
        "gcompute plan train llama3-8b --on v5e:8x8,v6e:4x8,v5p:2x4x4,h100:64 --search --by cost",
        "gcompute plan train path/to/config.json --on h100:64 --tokens 1e12 --plot roofline.png",
        "gcompute plan train llama3-8b --on v5e:4x4 --mesh fsdp=16 --batch 16 --seq 2048 --prove",
        "gcompute plan train demo --on this --search --calibrate",
    )


@click.command(cls=PlanTrainCommand)
@click.argument("model", type=MODEL)
@click.option(
    "--on", "target_text", required=True, help="v5p:8x8x16, 2*v6e:4x4, h100:64, this (measured); several, with commas."
)
@click.option("--mesh", help="Axes and sizes, as in fsdp=256,tensor=4, or fsdp=-1,tensor=4.  [the best one found]")
@click.option("--search", "searching", is_flag=True, help="Rank every legal mesh, remat, microbatch and batch.")
@click.option("--batch", type=click.IntRange(1), help="Sequences a step.  [searched; with --mesh one a share]")
@click.option("--seq", type=click.IntRange(1), help=f"Tokens a sequence.  [the model's context, at most {USUAL_SEQ}]")
@click.option("--accumulation", type=click.IntRange(1), help="Microbatches a step.  [1; searched]")
@click.option("--remat", type=click.Choice(REMATS), help="What is recomputed.  [the least that fits]")
@click.option("--optimizer", type=click.Choice(OPTIMIZERS), default="adamw", help="Which optimizer.  [adamw]")
@click.option("--by", type=click.Choice(BY), default="time", help="Rank by tokens/s, or dollars a token.  [time]")
@click.option("--top", type=click.IntRange(1), default=10, help="Ways that --search lists.  [10]")
@click.option("--tokens", type=float, help="Token budget, for days and dollars.  [20 a parameter]")
@click.option("--usd-per-hour", type=float, help="Price of a chip.  [the catalogue's]")
@click.option("--spot", is_flag=True, help="Use the spot price.")
@click.option("--chips", "chip_file", type=FILE, envvar="GCOMPUTE_CHIPS")
@click.option("--prove", is_flag=True, help="Compile the same step with the target's own compiler, and compare.")
@click.option("--calibrate", is_flag=True, help="With --on this: measure its roofline anew and keep it.")
@click.option("--plot", type=FILE, help="Roofline to this .png or .html file.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
@config_options(TrainConfig, "Training", NOT_PLANNED)
def command(
    model: str,
    target_text: str,
    mesh: str | None,
    searching: bool,
    by: str,
    top: int,
    tokens: float | None,
    usd_per_hour: float | None,
    spot: bool,
    chip_file: Path | None,
    prove: bool,
    calibrate: bool,
    plot: Path | None,
    as_json: bool,
    **values: Any,
) -> None:
    """Predict one train step of MODEL: a preset, our config, or a Hugging Face config.json.

    Every number is predicted from formulae unless it says compiled or measured, and carries the error that the exam
    found of its class. Exit status 0: it fits; 1: it does not; 2: what was asked does not go together.
    """
    from gcompute.cli.plan_ranking import show_search
    from gcompute.cli.plan_show import show_train, train_json
    from gcompute.plan.cost import known_price

    if searching and mesh:
        raise ValueError("--search chooses the mesh: leave --mesh away, or --search.")
    check_positive("--usd-per-hour", usd_per_hour)
    check_positive("--tokens", tokens)
    if calibrate and not target_text.strip().lower().startswith("this"):
        raise ValueError("--calibrate measures the machine at hand: use it with --on this.")
    check_picture(plot)
    planned = planned_model(model)
    chips = known_chips(chip_file)
    targets = [planning_target(text, chips, again=calibrate) for text in target_text.split(",")]
    prices = {}
    for target in targets:
        assert target.known is not None
        # A price that makes no sense is refused before anything is printed.
        prices[str(target)] = known_price(target.known, given=usd_per_hour, spot=spot)
        if prove:
            from gcompute.cli.prove import check_provable

            check_provable(planned, target)
    if mesh is not None and len(targets) > 1:
        raise ValueError(f"--mesh is for one target and --on names {len(targets)}: leave --mesh away.")
    if by == "cost" and None in prices.values():
        lacking = ", ".join(name for name, price in prices.items() if price is None)
        raise ValueError(f"--by cost: {lacking} has no price in the catalogue. Give --usd-per-hour, or a chip file.")
    seq = values["seq"] or min(planned.architecture.context, USUAL_SEQ)
    ranked: list[Ranked] = []
    if mesh is None:
        for target in targets:
            start = build_question(planned, target, {**values, "seq": seq, "mesh": MeshShape()})
            found = search(start, batch=values["batch"], accumulation=values["accumulation"], remat=values["remat"])
            price = prices[str(target)]
            hourly = price.usd_per_chip_hour * target.num_chips if price else None
            ranked += [Ranked(one, hourly) for one in found]
        # Each search has its own order among equals, which sorting keeps.
        ranked.sort(key=lambda one: one.rank(by))
        question = ranked[0].candidate.question
    else:
        given_mesh = MeshShape.parse(mesh, targets[0].num_devices)
        check_devices(given_mesh, targets[0])
        question = _chosen(planned, targets[0], {**values, "seq": seq, "mesh": given_mesh})
    target = question.target
    told = answer(question)
    price = {"tokens": tokens, "usd_per_hour": usd_per_hour, "spot": spot}
    proof = None
    if prove:
        from gcompute.cli.prove import prove_train

        proof = prove_train(told, run_of(planned, question, values))
    if plot:
        from gcompute.cli.plan_plot import plot_roofline

        plot_roofline(
            told.time.operations,
            target,
            question.run.precision,
            plot,
            title=f"{planned.name}: a train step on {target}",
        )
    if as_json:
        document = train_json(planned, told, **price)
        shown = {"search": [one.to_dict() for one in ranked[:top]]} if ranked else {}
        print(checked_json({**document, **shown, "proof": proof}))
    else:
        if searching:
            show_search(planned, ranked, top)
        show_train(planned, told, chosen=mesh is None, **price)
        if proof is not None:
            from gcompute.cli.prove import show_proof

            show_proof(proof)
        if plot:
            print(f"drawn to {plot}")
    fits = proof["fits"] if proof is not None else told.memory.verdict != TOO_LARGE
    if not fits:
        raise SystemExit(DOES_NOT_FIT)


def build_question(planned: PlannedModel, target: Target, values: dict[str, Any]) -> TrainQuestion:
    """The question that flags ask; what is absent among them has the trainer's defaults."""
    mesh: MeshShape = values["mesh"]
    accumulation = values.get("accumulation") or max(1, mesh.stage)
    batch = values.get("batch") or mesh.batch_shards * accumulation
    remat = values.get("remat") or "full"
    if planned.trainable is not None:
        run = run_config(planned, {**values, "batch": batch, "accumulation": accumulation, "remat": remat})
        return question_of(run, target, accumulation, name=planned.name)
    # Not of the trainer: the same settings, as far as a planner needs them.
    train = TrainConfig(**given(TrainConfig, {**values, "batch": batch, "accumulation": accumulation, "remat": remat}))
    precision, residual = dtypes_of(train, target)
    run = TrainRun(
        model=planned.architecture,
        batch=batch,
        seq=values["seq"],
        mesh=mesh,
        accumulation=accumulation,
        remat=remat,
        precision=precision,
        activation_bytes=OPERAND_BYTES[residual],
        state_values=ADAM_STATE,
        sequence_parallel=train.sequence_parallel,
        schedule=train.pipeline_schedule,
        chunks=train.pipeline_chunks,
        zero=train.zero,
    )
    return TrainQuestion(run=run, target=target, optimizer=values["optimizer"], residual=residual)


def run_config(planned: PlannedModel, values: dict[str, Any]) -> RunConfig:
    """The trainer's configuration of these flags."""
    assert planned.trainable is not None
    config = planned.trainable
    if values["seq"] > config.context:
        config = dataclasses.replace(config, context=values["seq"])
    return RunConfig(
        model=config,
        optimizer=OptimizerConfig(optimizer=values["optimizer"]),
        train=TrainConfig(**given(TrainConfig, values)),
        data=DataConfig(),
    )


def run_of(planned: PlannedModel, question: TrainQuestion, values: dict[str, Any]) -> RunConfig:
    """The trainer's configuration of a question that was answered, to be compiled."""
    run = question.run
    settled = {"batch": run.batch, "seq": run.seq, "mesh": run.mesh, "accumulation": run.accumulation}
    dtypes = {"precision": run.precision, "residual": question.residual}
    return run_config(planned, {**values, **settled, **dtypes, "remat": run.remat})


def _chosen(planned: PlannedModel, target: Target, values: dict[str, Any]) -> TrainQuestion:
    """The question of these flags; with no --remat the least that fits, or the most where none does."""
    question = build_question(planned, target, values)
    if values["remat"]:
        return question
    from gcompute.plan.train_plan import check_question

    check_question(question)
    tried = [question.replace(remat=policy) for policy in REMATS]
    return next((one for one in tried if memory_of(one).verdict != TOO_LARGE), tried[-1])
