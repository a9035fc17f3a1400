"""Turn a configuration's "decide for me" into values, for the backend at hand."""

import math

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from gcompute.config.mesh import MeshShape
from gcompute.config.train import PRECISIONS, RunConfig
from gcompute.measure.instructions import instruction_set, multiplies_bfloat16
from gcompute.measure.machine import data_caches, second_level_bytes, usable_cores
from gcompute.model.splash import fits_splash
from gcompute.model.transformer import Execution
from gcompute.parallel.pipeline.schedule import Schedule, gpipe, interleaved, one_f_one_b, zero_bubble
from gcompute.parallel.placement import Placement
from gcompute.plan.memory import choose_query_blocks
from gcompute.plan.precision import choose_residual

# What stands for a core's second-level cache where the machine does not tell it.
UNTOLD_CACHE_BYTES = 2**19
# Bytes of a microbatch's feed-forward activations, tokens x F in float32, for each byte of second-level cache. Measured
# with 2 MiB of it: twice as many tokens are slower by a tenth, and the whole batch at once by two fifths.
ACTIVATIONS_PER_CACHE = 2
# Below this many tokens a matmul has too few rows to run at full speed.
LEAST_TOKENS = 512
# With four microbatches a stage a 1F1B pipeline idles for less than a fifth of its time.
PIPELINE_MICROBATCHES = 4
# Compile time grows with every layer that is written out.
MOST_UNROLLED = 32


def resolve_execution(run: RunConfig, mesh: MeshShape, backend: str) -> Execution:
    """How the model runs on `backend`: without a scan over layers on CPU, with one elsewhere, unless configured.

    Rematerialisation keeps the scan on CPU too: without its loop XLA:CPU merges what is computed twice. A pipeline's
    stage scans its layers, for the program holds it once for each segment of the schedule. On TPUs whole sequences are
    attended to by the kernel that JAX ships, where it takes them.
    """
    layers = run.model.layers
    unrolled = backend == "cpu" and layers <= MOST_UNROLLED and run.train.remat == "none" and mesh.stage == 1
    precision = resolve_precision(run, backend)
    one_cpu = backend == "cpu" and mesh.num_devices == 1
    unroll = run.train.unroll or (layers if unrolled else 1)
    whole_sequences = mesh.context == 1 or run.train.context_attention == "ulysses"
    return Execution(
        compute=jnp.dtype(precision),
        residual=jnp.dtype(resolve_residual(run, backend)),
        remat=run.train.remat,
        unroll=min(unroll, layers),
        one_projection=one_cpu,
        output_major=one_cpu and precision == "float32",
        query_blocks=resolve_query_blocks(run, mesh, backend),
        kernel="splash" if backend == "tpu" and whole_sequences and fits_splash(run.seq) else "xla",
    )


def resolve_precision(run: RunConfig, backend: str) -> str:
    """The precision as configured; where it is left open, what the processor multiplies itself, bfloat16 elsewhere.

    A session settles it before, by the measured roofline (`automatic.settle`).
    """
    if run.train.precision in PRECISIONS:
        return run.train.precision
    return "bfloat16" if backend != "cpu" or multiplies_bfloat16(instruction_set()) else "float32"


def resolve_residual(run: RunConfig, backend: str) -> str:
    """The dtype of the residual stream: as configured, else as `plan.precision.choose_residual` says."""
    return run.train.residual if run.train.residual in PRECISIONS else choose_residual(backend)[0]


def resolve_query_blocks(run: RunConfig, mesh: MeshShape, backend: str) -> int:
    """As `plan.memory.choose_query_blocks` says of this run."""
    whole_sequences = mesh.context == 1 or run.train.context_attention == "ulysses"
    precision = resolve_precision(run, backend)
    return choose_query_blocks(backend, seq=run.seq, precision=precision, whole_sequences=whole_sequences)


def resolve_placement(run: RunConfig, mesh: Mesh, shape: MeshShape) -> Placement:
    """How the forward pass lies on `mesh`."""
    divides = run.seq % (shape.context * shape.tensor) == 0
    return Placement(
        mesh=mesh,
        shape=shape,
        context_attention=run.train.context_attention,
        sequence_parallel=run.train.sequence_parallel and shape.tensor > 1 and divides,
    )


def resolve_schedule(run: RunConfig, mesh: MeshShape, accumulation: int) -> Schedule | None:
    """The pipeline's schedule, None without stages."""
    if mesh.stage == 1:
        return None
    match run.train.pipeline_schedule:
        case "gpipe":
            return gpipe(mesh.stage, accumulation)
        case "interleaved":
            return interleaved(mesh.stage, accumulation, run.train.pipeline_chunks)
        case "zero-bubble":
            return zero_bubble(mesh.stage, accumulation)
        case _:
            return one_f_one_b(mesh.stage, accumulation)


def resolve_accumulation(run: RunConfig, mesh: MeshShape, backend: str, *, cache_bytes: int | None = None) -> int:
    """Microbatches per step: as configured, else on CPU the fewest whose activations stay near the cores' own caches.

    Weights and gradients are read and written once per microbatch, so fewer are faster as long as one product passes
    its result to the next through the cache. A microbatch has at most `ACTIVATIONS_PER_CACHE` cache_bytes / 4 F tokens,
    F the feed-forward size, and at least `LEAST_TOKENS`. A pipeline has as many microbatches as divide the batch, up to
    `PIPELINE_MICROBATCHES` per stage.

    Args:
      cache_bytes: second-level caches of the cores of this process together (None: asks the machine).
    """
    if run.train.accumulation:
        return run.train.accumulation
    rows = run.train.batch // mesh.batch_shards
    if mesh.stage > 1 and rows:
        legal = [n for n in divisors(rows) if n % mesh.stage == 0] or divisors(rows)
        few = [n for n in legal if n <= PIPELINE_MICROBATCHES * mesh.stage]
        return few[-1] if few else legal[0]
    if backend != "cpu" or run.train.batch % mesh.batch_shards:
        return 1
    if cache_bytes is None:
        cores = usable_cores()
        cache_bytes = second_level_bytes(data_caches(), cores=cores) or cores * UNTOLD_CACHE_BYTES
    tokens = max(LEAST_TOKENS, ACTIVATIONS_PER_CACHE * cache_bytes // (4 * run.model.ffn_size))
    legal = divisors(rows)
    enough = [n for n in legal if rows * run.seq / n <= tokens]
    largest = [n for n in legal if rows * run.seq / n >= LEAST_TOKENS] or [1]
    return min(enough[0] if enough else largest[-1], largest[-1])


def divisors(number: int) -> list[int]:
    """Whole numbers that divide `number`, smallest first.

    >>> divisors(12)
    [1, 2, 3, 4, 6, 12]
    """
    low = [n for n in range(1, math.isqrt(number) + 1) if number % n == 0]
    return sorted({*low, *(number // n for n in low)})


def default_mesh() -> MeshShape:
    """Every device of the job on the data axis."""
    return MeshShape(data=len(jax.devices()))
