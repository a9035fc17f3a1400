"""The whole certificate: which rows there are, which are asked for, and running them one by one."""

from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import Any

import jax

from gcompute.aot.hlo import read_collectives
from gcompute.certify.cases import collectives, context, data, expert, pipeline, tensor
from gcompute.certify.collectives import Found, breaches, tally
from gcompute.certify.evidence import Row, Verdict
from gcompute.certify.expected import trainer_collectives
from gcompute.certify.explicit import FORM as EXPLICIT
from gcompute.certify.explicit import Case, explicit_row, lower_case
from gcompute.certify.precision import BFLOAT16, FLOAT64
from gcompute.certify.recipes import ALWAYS, Recipe, recipes
from gcompute.certify.session import Session
from gcompute.certify.strategies import STRATEGIES
from gcompute.certify.trained import lower
from gcompute.certify.trainer import FORM as TRAINER
from gcompute.certify.trainer import trainer_row
from gcompute.config.fields import nearest

Subject = Recipe | Case
THREADS = 2

# One row of each strategy, the cheapest that shows something: for a first look, and for the default tests.
QUICK = {
    *("all_gather", "ring_all_reduce one way", "tensor.row_parallel", "sequence.gather_column_parallel"),
    *("vocabulary.vocab_parallel_cross_entropy", "ulysses.gathered_attention contiguous"),
    *("data.shard_map_step 1 microbatch", "zero.zero_step stage 3, 2 microbatches"),
    *("pipeline.forward.pipeline_forward gpipe, 2 stages", "expert.dense_mixture"),
    *("data=2,fsdp=2,tensor=2", "context=2 ulysses"),
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Selection:
    """The rows asked for, and how many more would need more devices."""

    subjects: tuple[Subject, ...]
    num_left_out: int


def select(strategy: str | None = None, *, devices: int, quick: bool = False) -> Selection:
    """The rows of a strategy, or all, that `devices` devices hold.

    Args:
      quick: one row of each strategy and what must be refused, in float64 alone.

    Raises:
      ValueError: the strategy is not known, or there is no row for so few devices.
    """
    if strategy is not None and strategy not in STRATEGIES:
        raise ValueError(f"strategy {strategy!r} is not known. {nearest(strategy, STRATEGIES)}")
    families = (collectives, data, tensor, context, pipeline, expert)
    everything: list[Subject] = [*recipes(), *(case for family in families for case in family.cases())]
    wanted = [one for one in everything if strategy is None or strategy in one.strategies or one.strategies == ALWAYS]
    if quick:
        wanted = [_in_float64(one) for one in wanted if one.name in QUICK or (isinstance(one, Recipe) and one.refused)]
    held = tuple(one for one in wanted if one.mesh.num_devices <= devices)
    if not held:
        least = min(one.mesh.num_devices for one in wanted)
        raise ValueError(f"devices={devices} hold no row of this certificate. Use --devices {least} or more.")
    return Selection(subjects=held, num_left_out=len(wanted) - len(held))


def _in_float64(subject: Subject) -> Subject:
    return replace(subject, precisions=(FLOAT64,)) if isinstance(subject, Recipe) else subject


def certify(subjects: Sequence[Subject]) -> Iterator[Row]:
    """Run each row on the devices of this process, two at a time, in their order.

    Nearly all of the time goes to tracing, which holds Python's lock, and compiling, which does not: a second thread
    halves it, a third would wait.

    Raises:
      ValueError: there are fewer devices than a row needs.
    """
    most, available = max(one.mesh.num_devices for one in subjects), len(jax.devices())
    if most > available:
        raise ValueError(
            f"these rows need {most} devices and there are {available}. Start with JAX_NUM_CPU_DEVICES={most}"
            " JAX_PLATFORMS=cpu, or ask for fewer with --devices."
        )
    session = Session()

    def run(subject: Subject) -> Row:
        return trainer_row(subject, session) if isinstance(subject, Recipe) else explicit_row(subject, session)

    pool = ThreadPoolExecutor(THREADS)
    try:
        yield from pool.map(run, subjects)
    finally:
        pool.shutdown(cancel_futures=True)


def form_of(subject: Subject) -> str:
    """In which table a row belongs: what the trainer compiles, or a function to import."""
    return TRAINER if isinstance(subject, Recipe) else EXPLICIT


def compiles(subject: Subject) -> bool:
    """Whether a row has a program that can be compiled from outside."""
    return subject.refused is None if isinstance(subject, Recipe) else not subject.compiles_itself


@dataclass(frozen=True, slots=True, kw_only=True)
class Elsewhere:
    """What a row compiles to on a target that is not here: its collectives, and what is wrong with them."""

    name: str
    form: str
    place: str
    found: Found
    faults: tuple[str, ...]

    def added_to(self, row: Row) -> Row:
        """The row with this in it."""
        collectives = {**row.collectives, self.place: self.found.counts}
        return replace(row, collectives=collectives, faults=(*row.faults, *self.faults))


def compile_elsewhere(subject: Subject, devices: Sequence[Any], place: str) -> Elsewhere:
    """Compile a row's program for `devices`, which need not be here, and read its collectives.

    Programs are those of the row, but in bfloat16 and float32: an accelerator has no float64.
    """
    found, faults = Found(), ()
    try:
        if isinstance(subject, Recipe):
            program = lower(subject.run(BFLOAT16), BFLOAT16, devices)
            lowered, mesh, expected = program.lowered, program.mesh, trainer_collectives(subject)
        else:
            lowered, mesh = lower_case(subject, devices)
            expected = {axis.value: kinds for axis, kinds in subject.expected.items()}
        found = tally(read_collectives(lowered.compile(), mesh), mesh)
        if devices[0].platform == "tpu":
            expected = {axis: kinds.on_tpu() for axis, kinds in expected.items()}
        faults = tuple(breaches(found, expected, place))
    except Exception as error:  # As in a row: what stops the compiler is what there is to say.
        faults = (f"on {place} it does not compile: {type(error).__name__}: {' '.join(str(error).split())[:300]}",)
    return Elsewhere(name=subject.name, form=form_of(subject), place=place, found=found, faults=faults)


def counts(rows: Sequence[Row]) -> dict[str, int]:
    """How many rows ended how: {"equal": 90, "differs": 0, "refused": 11}."""
    return {verdict.value: sum(row.verdict is verdict for row in rows) for verdict in Verdict}
