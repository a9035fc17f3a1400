"""The demo is as long as the prediction allows, on any machine."""

import pytest

from gcompute.cli.demo_size import LADDER, LEAST_STEPS, MOST_STEPS, demo_run, size_demo
from gcompute.plan.params import count_params

SECONDS = 120.0


def machine(flops_per_s: float):
    """Predicted step of a machine that reaches so many FLOP/s, whatever the model."""
    return lambda run: 6 * count_params(run.model).total * run.tokens_per_step / flops_per_s


def test_the_ladder_descends():
    work = [machine(1.0)(demo_run(preset, vocab, 1)) for preset, vocab in LADDER]
    assert work == sorted(work, reverse=True)
    assert len(set(work)) == len(work)


@pytest.mark.parametrize("flops_per_s", [5e9, 2e10, 4e10, 1e11, 3e11, 1e13])
def test_it_takes_the_time_there_is_or_less(flops_per_s):
    size = size_demo(machine(flops_per_s), seconds=SECONDS)
    steps = size.run.train.steps
    assert LEAST_STEPS <= steps <= MOST_STEPS
    assert size.predicted_s == pytest.approx(steps * machine(flops_per_s)(size.run))
    smallest = size.preset == LADDER[-1][0]
    assert size.predicted_s <= SECONDS or (smallest and steps == LEAST_STEPS)
    larger = LADDER[: [preset for preset, _ in LADDER].index(size.preset)]
    # Nothing larger would have had enough steps, and nothing is left unused but where the steps are at their most.
    assert all(machine(flops_per_s)(demo_run(*one, 1)) * LEAST_STEPS > SECONDS for one in larger)
    assert steps == MOST_STEPS or size.predicted_s > SECONDS - 10 * size.predicted_s / steps


def test_a_slower_machine_trains_no_larger_model():
    presets = [size_demo(machine(rate), seconds=SECONDS).preset for rate in (1e9, 3e10, 6e10, 1e11, 1e12)]
    order = [preset for preset, _ in LADDER]
    assert [order.index(preset) for preset in presets] == sorted(map(order.index, presets), reverse=True)
    assert {presets[0], presets[-1]} == {order[0], order[-1]}


def test_given_steps_are_kept():
    assert size_demo(machine(1e13), seconds=SECONDS, steps=2000).run.train.steps == 2000
    assert size_demo(machine(1e9), seconds=SECONDS, steps=7).run.train.steps == 7


def test_its_text_is_enough_for_its_steps():
    # About four bytes to a token of these vocabularies, nine tenths of which train.
    run = demo_run(*LADDER[0], MOST_STEPS)
    assert run.data.text_mb is not None
    assert run.tokens_per_step * MOST_STEPS < 0.9 * run.data.text_mb * 1e6 / 4
