"""MFU has one meaning: that of the planner and of the trainer, and what the README says of it."""

import dataclasses

import pytest

from gcompute.config.architecture import architecture
from gcompute.config.presets import PRESETS
from gcompute.plan.mfu import kept_keys, mfu, model_flops
from gcompute.plan.train_step import train_flops


@pytest.mark.parametrize("name", ["demo", "nano-small", "gpt2", "llama3-8b", "mixtral-8x7b"])
def test_both_planners_count_the_same_model_flops(name: str):
    config = dataclasses.replace(PRESETS[name], capacity_factor=None)
    flops = train_flops(config, batch=2, seq=config.context)
    assert model_flops(architecture(config), 2, config.context) == flops.causal_step_flops < flops.step_flops


def test_the_least_time_of_a_causal_step_is_an_mfu_of_one():
    model = architecture(PRESETS["demo"])
    assert mfu(model, 8, 64, model_flops(model, 8, 64) / 5e11, 5e11) == pytest.approx(1.0)


@pytest.mark.parametrize("window", [None, 1, 3, 7, 8, 100])
def test_kept_keys_by_counting(window: int | None):
    seen = [min(query + 1, window or 8) for query in range(8)]
    assert kept_keys(8, window) == sum(seen) / 8


def test_mfu_refuses_no_time():
    with pytest.raises(ValueError, match="above 0"):
        mfu(architecture(PRESETS["test"]), 8, 32, 0.0, 1e12)
