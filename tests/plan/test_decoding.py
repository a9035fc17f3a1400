"""Decoding by the roofline: steps, tables, what fits, how many servers."""

import pytest

from gcompute.plan.decoding import (
    Served,
    decode_step_s,
    decode_steps,
    most_sequences,
    prefill_s,
    prefill_servers,
    queries_per_s_per_chip,
    tokens_evicted_per_step,
)
from gcompute.plan.roof import Roof
from gcompute.plan.rooflines import critical_batch

ROOF = Roof(flops_per_s=2e12, bytes_per_s=1e10)
MODEL = Served(params=1e9, weight_bytes=1, sequence_bytes=1e6)


def test_a_step_is_caches_and_the_longer_of_weights_and_operations():
    assert decode_step_s(MODEL, 1, num_chips=1, roof=ROOF) == pytest.approx(1e9 / 1e10 + 1e6 / 1e10)
    assert decode_step_s(MODEL, 1000, num_chips=4, roof=ROOF) == pytest.approx((2e12 / 2e12 + 1e9 / 1e10) / 4)


def test_without_caches_a_step_takes_longer_from_the_critical_batch_on():
    bare = Served(params=1e9, weight_bytes=1)
    critical = critical_batch(ROOF, weight_bytes=1)
    seconds = [decode_step_s(bare, critical * share, num_chips=1, roof=ROOF) for share in (0.01, 1, 2)]
    assert seconds[0] == pytest.approx(seconds[1])
    assert seconds[2] == pytest.approx(2 * seconds[1])


def test_experts_are_read_whole_and_multiplied_in_part():
    mixture = Served(params=1e9, weight_bytes=1, active_params=1e8)
    assert decode_step_s(mixture, 1, num_chips=1, roof=ROOF) == pytest.approx(0.1)
    assert decode_step_s(mixture, 10_000, num_chips=1, roof=ROOF) == pytest.approx(1.0)


def test_table():
    rows = decode_steps(MODEL, (1, 8), num_chips=2, roof=ROOF)
    assert [row.batch for row in rows] == [1, 8]
    assert rows[1].total_bytes == 1e9 + 8e6
    assert rows[1].tokens_per_s == pytest.approx(8 / rows[1].step_s)
    assert rows[1].tokens_per_s_per_chip == pytest.approx(4 / rows[1].step_s)


@pytest.mark.parametrize(("hbm", "most"), [(1e9, 0), (1.0075e9, 7), (0.5e9, 0)])
def test_most_sequences(hbm: float, most: int):
    assert most_sequences(MODEL, num_chips=1, hbm_bytes=hbm) == most


@pytest.mark.oldest
def test_rates():
    assert prefill_s(1e9, 1000, num_chips=2, flops_per_s=1e12, mfu=0.5) == pytest.approx(2.0)
    assert queries_per_s_per_chip(32, step_s=0.01, output_tokens=100, num_chips=4) == pytest.approx(8)
    assert prefill_servers(0.5, batch=32, step_s=0.01, output_tokens=100) == pytest.approx(16)
    assert tokens_evicted_per_step(32, prompt_tokens=8192, output_tokens=4096) == 96


REFUSED = [
    (lambda: Served(params=0), "params must be"),
    (lambda: Served(params=1, weight_bytes=-1), "weight_bytes must be"),
    (lambda: Served(params=1, sequence_bytes=-1), "sequence_bytes must be a number of at least 0"),
    (lambda: Served(params=1, active_params=2), "active_params=2 is more than params=1"),
    (lambda: MODEL.total_bytes(-1), "batch must be"),
    (lambda: decode_step_s(MODEL, 0, num_chips=1, roof=ROOF), "batch must be"),
    (lambda: decode_steps(MODEL, (1,), num_chips=0, roof=ROOF), "num_chips must be"),
    (lambda: prefill_s(1, 0, num_chips=1, flops_per_s=1), "tokens must be"),
    (lambda: most_sequences(Served(params=1), num_chips=1, hbm_bytes=1), "sequence_bytes must be"),
    (lambda: queries_per_s_per_chip(1, step_s=0, output_tokens=1, num_chips=1), "step_s must be"),
    (lambda: prefill_servers(0, batch=1, step_s=1, output_tokens=1), "prefill_seconds must be"),
    (lambda: tokens_evicted_per_step(1, prompt_tokens=1, output_tokens=0), "output_tokens must be"),
]


@pytest.mark.parametrize(("make", "said"), REFUSED)
def test_refused_in_one_line(make, said: str):
    with pytest.raises(ValueError, match=said) as caught:
        make()
    assert "\n" not in str(caught.value)
