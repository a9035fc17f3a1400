"""How far rounding alone takes one device from the truth, in a precision: measured by doing its sums in other orders.

"Tensor parallelism changes the loss: noise or a bug?" A sharded program adds the same numbers in another order, so in
float32 or bfloat16 its result moves. So does the result of one device whose batch is shuffled, cut into microbatches
or whose hidden units change places: none of these changes the function. The largest error that any of them makes is
the band; a sharded program that stays within a small factor of it has shown nothing but noise. (A bug smaller than
the band hides there, and shows in float64.)
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace

import numpy as np

from gcompute.certify.evidence import relative_errors
from gcompute.certify.precision import BFLOAT16, FLOAT32
from gcompute.certify.recipes import BATCH, Recipe
from gcompute.certify.reference import Trajectory
from gcompute.certify.trained import Values, follow, lower
from gcompute.config.mesh import MeshShape

# The band is the largest of seven draws of something that a row draws once more, in another algorithm's order: a ring,
# say, rounds each block's weights before it knows their sum. The largest ratio seen is 3.6, that of a single number
# (a norm in bfloat16), and most are near 1. A fault in one of many sums is orders of magnitude outside, and shows in
# float64 whatever its size.
WITHIN = 8.0
MICROBATCHES = (1, 2, 4, BATCH)
QUANTITIES: tuple[str, ...] = ("losses", "balances", "norms", "gradients", "first", "last")
SHOWN = {
    "losses": "loss",
    "balances": "balance loss",
    "norms": "gradient norm",
    "gradients": "gradients",
    "first": "parameters after 1 step",
    "last": "parameters after all steps",
}
# Half a unit in the last place of a float32 result: what even an exact sum is off by when it is stored.
STORED = float(np.finfo(np.float32).eps) / 2


@dataclass(frozen=True, slots=True, kw_only=True)
class Reordering:
    """One device's run with its sums in another order. permutation: of the hidden units of feed-forward layers."""

    name: str
    accumulation: int = 1
    shuffled: bool = False
    permuted: bool = False


REORDERINGS = (
    *(Reordering(name=f"{n} microbatches", accumulation=n) for n in MICROBATCHES),
    Reordering(name="batch shuffled", shuffled=True),
    Reordering(name="hidden units permuted", permuted=True),
    Reordering(name="both", shuffled=True, permuted=True),
)


def quantities(trajectory: Trajectory) -> Iterator[tuple[str, Mapping[str, np.ndarray]]]:
    """What a row compares, each as a flat tree."""
    for name in QUANTITIES:
        value = getattr(trajectory, name)
        yield name, value if isinstance(value, dict) else {name: value}


def permute(leaves: Mapping[str, np.ndarray], order: np.ndarray) -> dict[str, np.ndarray]:
    """The same function with the hidden units of every feed-forward layer in another order."""

    def moved(path: str, leaf: np.ndarray) -> np.ndarray:
        dims = path.rsplit("_", 1)[-1]
        if "mlp" not in path or "F" not in dims or not dims.isupper():
            return leaf
        # Blocks are stacked, so the leaf has one dim more than its name says, in front.
        return np.take(leaf, order, axis=1 + dims.index("F"))

    return {path: moved(path, leaf) for path, leaf in leaves.items()}


def measured_bands(recipe: Recipe, values: Values, truth: Trajectory) -> dict[str, dict[str, float]]:
    """The band of each quantity, {precision: {quantity: largest error of any reordering}}, on one device.

    `recipe` gives the model and the optimizer; its mesh and settings are left out.
    """
    random = np.random.default_rng(1)
    rows, units = random.permutation(BATCH), random.permutation(recipe.model.ffn_size)
    bands: dict[str, dict[str, float]] = {}
    for precision in (FLOAT32, BFLOAT16):
        largest: dict[str, float] = dict.fromkeys(QUANTITIES, STORED)
        compiled = {}
        for reordering in REORDERINGS:
            n = reordering.accumulation
            alone = replace(recipe, mesh=MeshShape(), settings={"accumulation": n})
            if n not in compiled:
                program = lower(alone.run(precision), precision)
                compiled[n] = program, program.lowered.compile()
            order = rows if reordering.shuffled else np.arange(BATCH)
            started = Values(
                params=permute(values.params, units) if reordering.permuted else values.params,
                inputs_NBT=values.inputs_NBT[:, order],
                targets_NBT=values.targets_NBT[:, order],
            )
            program, executable = compiled[n]
            found = follow(program, executable, started, recipe.optimizer, precision)
            expected = dict(quantities(truth))
            for name, value in quantities(found):
                back = permute(value, np.argsort(units)) if reordering.permuted else value
                largest[name] = max(largest[name], *relative_errors(back, expected[name]).values())
        bands[precision] = largest
    return bands
