"""What a run leaves open, settled once for the device at hand: each value with its reason."""

import dataclasses
from collections.abc import Mapping

from gcompute.config.mesh import MeshShape
from gcompute.config.train import PRECISIONS, RunConfig
from gcompute.measure.instructions import instruction_set, multiplies_bfloat16
from gcompute.plan.precision import choose_precision, choose_residual
from gcompute.train.resolve import resolve_accumulation


def settle(
    run: RunConfig, mesh: MeshShape, backend: str, matmul_flops_per_s: Mapping[str, float]
) -> tuple[RunConfig, dict[str, str]]:
    """The run with precision, residual and microbatches as values, and why each was chosen that was left open.

    The values belong in what is kept of the run: resumed elsewhere it must not choose again.

    Args:
      mesh: what the run trains on. backend: "cpu", "gpu" or "tpu". matmul_flops_per_s: measured, by dtype of operands.
    """
    chosen, reasons = {}, {}
    if run.train.precision not in PRECISIONS:
        chosen["precision"], reasons["precision"] = choose_precision(matmul_flops_per_s)
        instructions = instruction_set()
        if backend == "cpu" and not multiplies_bfloat16(instructions):
            # A library that XLA calls may know more of the processor than XLA was allowed to use.
            chosen["precision"] = "float32"
            reasons["precision"] = f"{instructions} does not multiply bfloat16; {reasons['precision']}"
    if run.train.residual not in PRECISIONS:
        chosen["residual"], reasons["residual"] = choose_residual(backend)
    run = dataclasses.replace(run, train=dataclasses.replace(run.train, **chosen))
    if run.train.accumulation is None:
        count = resolve_accumulation(run, mesh, backend)
        run = dataclasses.replace(run, train=dataclasses.replace(run.train, accumulation=count))
        reasons["accumulation"] = "microbatches near the size of the caches" if backend == "cpu" else "one pass"
        if mesh.stage > 1:
            reasons["accumulation"] = "enough microbatches to fill the pipeline"
    return run, reasons


def with_open_microbatches(run: RunConfig) -> RunConfig:
    """The run with its microbatches left open, to be settled for another mesh."""
    return dataclasses.replace(run, train=dataclasses.replace(run.train, accumulation=None))
