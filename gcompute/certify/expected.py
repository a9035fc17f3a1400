"""The collectives that each strategy of the trainer needs, and those that it may have.

A reduction may come out as an all-reduce or as a reduce-scatter: XLA on CPU has no pass that makes the second.
"""

from collections.abc import Mapping

from gcompute.certify.collectives import Expected, expect
from gcompute.certify.recipes import Recipe
from gcompute.config.mesh import Axis, MeshShape

REDUCTION = "all-reduce|reduce-scatter"


def trainer_collectives(recipe: Recipe) -> Mapping[str, Expected]:
    """What must and may run along each axis of the recipe's mesh."""
    mesh, settings = recipe.mesh, recipe.settings
    axes = [axis for axis in Axis if mesh.size(axis) > 1]
    return {axis.value: _along(axis, axes, recipe, mesh, settings) for axis in axes}


def _along(axis: Axis, axes: list[Axis], recipe: Recipe, mesh: MeshShape, settings: Mapping[str, object]) -> Expected:
    alone = len(axes) == 1
    match axis:
        case Axis.DATA:
            # The gradient, and nothing else. With ZeRO the updated parameters are gathered, and for ZeRO-2 gradients
            # are scattered.
            zero = settings.get("zero", 0)
            return expect(
                *(["reduce-scatter"] if zero == 2 else []),
                *(["all-gather"] if zero else []),
                *([] if zero == 2 else [REDUCTION]),
                also="all-reduce",
            )
        case Axis.STAGE:
            # Activations and their gradients to the neighbour; one sum of the loss and of what all stages share.
            # The interleaved schedule deals layers out in another order than they are stored in, each step anew.
            moved = "all-gather" if settings.get("pipeline_schedule") == "interleaved" else ""
            return expect("collective-permute", REDUCTION, also=moved)
        case Axis.FSDP:
            # Weights are gathered for use, their gradients reduced; tokens are looked up where the columns of their
            # rows are, and an all-to-all deals the rows out.
            return expect("all-gather", REDUCTION, also="all-to-all")
        case Axis.EXPERT:
            # Tokens there and back. The expert axis splits sequences too: what is no expert's is reduced over it.
            return expect("all-to-all", REDUCTION, also="all-gather")
        case Axis.CONTEXT:
            ring = settings.get("context_attention", "ring") == "ring"
            # Alone, a ring gathers nothing: no device sees all keys. Beside other axes XLA gathers the gradient of the
            # embedding before it scatters it, and experts with capacity share the places of a sequence.
            also = "" if ring and alone else "all-gather|reduce-scatter|all-to-all"
            return expect("collective-permute" if ring else "all-to-all", REDUCTION, also=also)
        case Axis.TENSOR:
            split = settings.get("sequence_parallel", True)
            # Between the blocks activations are split by sequence, inside them by heads: an all-to-all turns one into
            # the other where XLA can use it.
            return expect(REDUCTION, *(["all-gather"] if split else []), also="all-gather|all-to-all")
