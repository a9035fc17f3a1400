"""Timing waits for results, and counts what it says it counts."""

import jax
import jax.numpy as jnp
import pytest

from gcompute.measure.timing import Timing, measure


@pytest.mark.oldest
def test_counts_warm_up_and_repeats():
    calls = []
    timing = measure(lambda x: calls.append(x) or x, 1.0, repeats=4, warmup=3)
    assert len(calls) == 7
    assert len(timing.samples_s) == 4
    assert timing.min_s == min(timing.samples_s) <= timing.median_s


def test_median_is_of_the_middle():
    timing = Timing.of((3.0, 1.0, 2.0, 10.0))
    assert (timing.median_s, timing.min_s) == (2.5, 1.0)


def test_waits_until_the_result_is_ready():
    program = jax.jit(lambda x: jax.lax.fori_loop(0, 2000, lambda _, y: y @ x / 256, x))
    x = jnp.ones((256, 256))
    pending = program(x)
    assert not pending.is_ready(), "dispatch waited for the program, so this test would prove nothing"
    results = []
    measure(lambda: results.append(program(x)) or results[-1], repeats=1, warmup=0)
    assert results[-1].is_ready()


@pytest.mark.parametrize(("repeats", "warmup"), [(0, 1), (1, -1)])
def test_refuses_no_repeats(repeats, warmup):
    with pytest.raises(ValueError, match="repeats must be at least 1"):
        measure(lambda: None, repeats=repeats, warmup=warmup)
