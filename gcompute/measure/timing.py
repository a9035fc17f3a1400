"""Time a computation until its result is ready."""

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax


@dataclass(frozen=True, slots=True, kw_only=True)
class Timing:
    """Seconds of each call, in order; `median_s` is what to report, `min_s` what the machine can do undisturbed."""

    median_s: float
    min_s: float
    samples_s: tuple[float, ...]

    @classmethod
    def of(cls, samples_s: tuple[float, ...]) -> "Timing":
        return cls(median_s=statistics.median(samples_s), min_s=min(samples_s), samples_s=samples_s)


def measure(fn: Callable[..., Any], *args: Any, repeats: int = 5, warmup: int = 1) -> Timing:
    """Time `fn(*args)`, dispatch to ready result, `repeats` times after `warmup` calls that are not counted.

    The same arguments are passed each time, so `fn` must not donate them. A program that is jitted compiles in the
    warm-up.

    Raises:
      ValueError: repeats is below 1 or warmup below 0.
    """
    if repeats < 1 or warmup < 0:
        raise ValueError(f"repeats must be at least 1 and warmup at least 0, got {repeats} and {warmup}.")
    for _ in range(warmup):
        jax.block_until_ready(fn(*args))
    return Timing.of(tuple(_once_s(fn, args) for _ in range(repeats)))


def _once_s(fn: Callable[..., Any], args: tuple[Any, ...]) -> float:
    start_s = time.perf_counter()
    jax.block_until_ready(fn(*args))
    return time.perf_counter() - start_s
