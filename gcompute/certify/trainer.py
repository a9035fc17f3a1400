"""The trainer's rows: its own compiled step on a mesh, followed for several steps, against the textbook."""

import time
from typing import Any

import jax

from gcompute.aot.hlo import read_collectives
from gcompute.certify.bands import SHOWN, WITHIN, quantities
from gcompute.certify.collectives import breaches, tally
from gcompute.certify.evidence import Check, Row, compare
from gcompute.certify.expected import trainer_collectives
from gcompute.certify.precision import FLOAT64
from gcompute.certify.recipes import Recipe
from gcompute.certify.reference import Trajectory
from gcompute.certify.session import Session
from gcompute.certify.trained import follow, lower
from gcompute.config.mesh import Axis
from gcompute.train.step import TrainState

# Relative to the largest entry of an array. A sum of n terms in another order moves by at most n u of the sum of their
# magnitudes (Higham 2002, section 4.2): n is at most 4,096 here and u = 1.1e-16, which is 5e-13, and two layers, their
# gradients and four steps chain about twenty such sums. What is seen is 1e-14; float32 would be 1e-6.
FLOAT64_LIMIT = 1e-11
FORM = "trainer"
CPU = "cpu"


def trainer_row(recipe: Recipe, session: Session) -> Row:
    """Train as `recipe` says and compare; a program that cannot be built or run is a red row too."""
    started = time.perf_counter()
    fields: dict[str, Any] = {}
    try:
        fields = _run(recipe, session) if recipe.refused is None else _refused(recipe)
    except Exception as error:  # Whatever stops a program is what its row has to say.
        fields["faults"] = (_told(error),)
    return Row(
        name=recipe.name,
        form=FORM,
        strategies=recipe.strategies,
        seconds=time.perf_counter() - started,
        **fields,
    )


def _refused(recipe: Recipe) -> dict[str, Any]:
    """Whether the trainer refuses, and says why."""
    assert recipe.refused is not None
    try:
        lower(recipe.run(FLOAT64), FLOAT64)
    except ValueError as error:
        told = _told(error)
        wrong = () if recipe.refused in told else (f"the refusal does not speak of {recipe.refused!r}: {told}",)
        return {"refusal": told, "faults": wrong}
    return {"faults": (f"it was not refused, though {recipe.refused} does not allow it",)}


def _run(recipe: Recipe, session: Session) -> dict[str, Any]:
    values, truth = session.truths.run(recipe.model, recipe.optimizer)
    checks: list[Check] = []
    fields: dict[str, Any] = {}
    for precision in recipe.precisions:
        program = lower(recipe.run(precision), precision)
        before = session.counter.count
        compiled = program.lowered.compile()
        with session.running:
            found = follow(program, compiled, values, recipe.optimizer, precision)
        compilations = session.counter.count - before
        checks += _checks(recipe, found, truth, precision, session)
        if precision == FLOAT64:
            collectives = tally(read_collectives(compiled, program.mesh), program.mesh)
            wrong = breaches(collectives, trainer_collectives(recipe), CPU)
            wrong += _unsplit(recipe, program.abstract_state)
            if compilations != 1:
                wrong.append(f"{compilations} compilations where there should be one")
            fields = {
                "collectives": {CPU: collectives.counts},
                "compilations": compilations,
                "faults": tuple(wrong),
            }
    return {**fields, "checks": tuple(checks)}


def _unsplit(recipe: Recipe, state: TrainState) -> list[str]:
    """A sentence for each axis that should split parameters (with ZeRO the optimizer state) and leaves most whole."""
    parameters = tuple((axis, state.params) for axis in (Axis.STAGE, Axis.FSDP, Axis.EXPERT, Axis.TENSOR))
    optimizer = ((Axis.DATA, state.optimizer),) if recipe.settings.get("zero") else ()
    wrong = []
    for axis, tree in parameters + optimizer:
        leaves = jax.tree.leaves(tree)
        split = sum(leaf.size for leaf in leaves if axis in jax.tree.leaves(tuple(leaf.sharding.spec)))
        if recipe.mesh.size(axis) > 1 and 2 * split < sum(leaf.size for leaf in leaves):
            wrong.append(f"{axis} splits {split / sum(leaf.size for leaf in leaves):.0%} of what it is there to split")
    return wrong


def _checks(recipe: Recipe, found: Trajectory, truth: Trajectory, precision: str, session: Session) -> list[Check]:
    """Every quantity of a run, against its limit in this precision."""
    checks = []
    expected = dict(quantities(truth))
    for name, value in quantities(found):
        if name == "balances" and not recipe.model.experts:
            continue
        band = None if precision == FLOAT64 else session.truths.band(recipe, precision, name)
        limit = FLOAT64_LIMIT if band is None else WITHIN * band
        checks.append(compare(SHOWN[name], value, expected[name], precision=precision, limit=limit, band=band))
    if recipe.model.experts and precision == FLOAT64:
        same = {"dropped": found.dropped}
        checks.append(compare("dropped choices", same, {"dropped": truth.dropped}, precision=precision, limit=0.0))
    return checks


def _told(error: Exception) -> str:
    """An error as one line."""
    text = " ".join(str(error).split())
    return text if isinstance(error, ValueError) and text else f"{type(error).__name__}: {text[:300]}"
