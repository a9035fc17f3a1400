"""The sizes of a mixture of experts: what is derived, and what is refused."""

import dataclasses
import math
from fractions import Fraction

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gcompute.config.model import ModelConfig
from gcompute.config.presets import PRESETS

MIXTRAL = PRESETS["mixtral-8x7b"]


@given(
    seq=st.integers(1, 10**5),
    experts=st.integers(1, 256),
    share=st.floats(0, 1),
    factor=st.integers(1, 400).map(lambda hundredths: hundredths / 100),
)
def test_capacity_is_the_fair_share_times_the_factor_rounded_up(seq: int, experts: int, share: float, factor: float):
    k = max(1, int(share * experts))
    config = ModelConfig(experts=experts, experts_per_token=k, capacity_factor=factor)
    exact = Fraction(round(100 * factor), 100) * seq * k / experts
    assert config.capacity(seq) == min(seq, math.ceil(exact))
    assert 1 <= config.capacity(seq) <= seq


def test_a_factor_counts_as_the_decimal_that_it_is_written_as():
    config = dataclasses.replace(MIXTRAL, experts=2, experts_per_token=1, capacity_factor=1.1)
    # In binary, 1.1 * 50 is a little above 55.
    assert 1.1 * 50 > 55
    assert config.capacity(100) == 55


@pytest.mark.oldest
def test_without_a_factor_there_is_room_for_all():
    assert MIXTRAL.capacity(4096) == 4096
    assert PRESETS["gpt2"].capacity(7) == 7


def test_a_dense_model_has_one_expert_that_every_token_uses():
    assert (PRESETS["gpt2"].num_experts, PRESETS["gpt2"].num_active_experts) == (1, 1)
    assert (MIXTRAL.num_experts, MIXTRAL.num_active_experts) == (8, 2)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        (
            {"experts": 4, "experts_per_token": 5},
            "experts_per_token=5 is more than experts=4. Legal: experts_per_token=1 to 4.",
        ),
        ({"experts": 0}, "experts must be above 0, got 0."),
        ({"experts": 4, "capacity_factor": 0.0}, "capacity_factor must be above 0, got 0.0."),
        ({"capacity_factor": 1.0}, "capacity_factor=1.0 is for a model with experts: give experts too."),
        ({"experts": 4, "bias": True}, "experts=4 have no biases. Use bias=False, or no experts."),
        ({"experts": 4, "balance_weight": -1.0}, "balance_weight must be at least 0, got -1.0."),
    ],
)
def test_refuses_what_cannot_be(fields: dict[str, object], message: str):
    with pytest.raises(ValueError) as caught:  # noqa: PT011 (the whole message is compared)
        ModelConfig(**fields)
    assert str(caught.value) == message
