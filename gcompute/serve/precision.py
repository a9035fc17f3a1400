"""The dtype that a model is served in, where the configuration leaves it open."""

from dataclasses import replace

import jax

from gcompute.config.serve import ServeConfig
from gcompute.config.train import PRECISIONS
from gcompute.measure.instructions import instruction_set, multiplies_bfloat16
from gcompute.serve.native import build


def settle(serve: ServeConfig) -> tuple[ServeConfig, str | None]:
    """The configuration with its precision as a value, and why that was chosen; None where it was given.

    On CPU the first call may compile the kernels, which decide it.
    """
    if serve.precision in PRECISIONS:
        return serve, None
    precision, reason = _choose(on_mesh=serve.mesh is not None and serve.mesh.num_devices > 1)
    return replace(serve, precision=precision), reason


def _choose(*, on_mesh: bool) -> tuple[str, str]:
    if jax.default_backend() != "cpu":
        return "bfloat16", "what the matrix units multiply, at half the memory of float32"
    if multiplies_bfloat16(instruction_set()):
        return "bfloat16", "this processor multiplies it, at half the memory traffic of float32"
    if not on_mesh and build.available():
        return "bfloat16", "half the memory traffic of float32; the kernels widen it as they multiply in float32"
    return "float32", "this processor does not multiply bfloat16, and XLA widens each operand first"
