"""Turn a configuration's "decide for me" into values, for the backend at hand."""

import math

import jax
import jax.numpy as jnp

from gcompute.config.mesh import MeshShape
from gcompute.config.train import RunConfig
from gcompute.model.transformer import Execution

# Measured on a 2-core AVX-512 machine: a microbatch whose feed-forward activations, tokens x F in float32, stay near
# the size of the second-level caches trains a 10M-parameter model 1.4 times as fast as the whole batch at once.
CACHE_BYTES = 4 * 2**20
# Below this many tokens a matmul has too few rows to run at full speed.
LEAST_TOKENS = 512
# Compile time grows with every layer that is written out.
MOST_UNROLLED = 32


def resolve_execution(run: RunConfig, backend: str) -> Execution:
    """How the model runs on `backend`: without a scan over layers on CPU, with one elsewhere, unless configured.

    Rematerialisation keeps the scan on CPU too: without its loop XLA:CPU merges what is computed twice.
    """
    layers = run.model.layers
    unrolled = backend == "cpu" and layers <= MOST_UNROLLED and run.train.remat == "none"
    unroll = run.train.unroll or (layers if unrolled else 1)
    return Execution(
        compute=jnp.dtype(run.train.precision),
        residual=jnp.dtype(run.train.residual),
        remat=run.train.remat,
        unroll=min(unroll, layers),
    )


def resolve_accumulation(run: RunConfig, mesh: MeshShape, backend: str) -> int:
    """Microbatches a step: as configured, else on CPU the least number that keeps a microbatch near the cache."""
    if run.train.accumulation:
        return run.train.accumulation
    rows = run.train.batch // mesh.batch_shards
    if backend != "cpu" or run.train.batch % mesh.batch_shards:
        return 1
    tokens = max(LEAST_TOKENS, CACHE_BYTES // (4 * run.model.ffn_size))
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
