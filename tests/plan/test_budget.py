"""What a run costs, by arithmetic done again here."""

import pytest

from gcompute.hardware.catalogue import find_chip
from gcompute.plan.budget import (
    attention_flops,
    checkpoint_bytes,
    compute_s,
    days,
    fewest_chips,
    flops_per_usd,
    forward_flops,
    most_params,
    smallest_slice,
    state_bytes,
    training_flops,
    usd,
    utilization,
)

V5E = find_chip("v5e")


@pytest.mark.oldest
def test_operations():
    assert (forward_flops(5, 7), training_flops(5, 7), training_flops(5, 7, recomputed=True)) == (70, 210, 280)
    assert attention_flops(16, heads=2, head_dim=4, sequences=3) == 4 * 3 * 16 * 16 * 2 * 4
    assert attention_flops(16, heads=2, head_dim=4, training=True) == 12 * 16 * 16 * 2 * 4


@pytest.mark.oldest
def test_time_and_utilization_are_inverse():
    flops, chips, peak, mfu = 6.3e24, 8960, 4.59e14, 0.4
    seconds = compute_s(flops, num_chips=chips, flops_per_s=peak, mfu=mfu)
    assert days(seconds) == pytest.approx(44.3, rel=0.01)
    assert utilization(flops, chip_hours=chips * seconds / 3600, flops_per_s=peak) == pytest.approx(mfu)


@pytest.mark.oldest
def test_memory():
    assert state_bytes(70e9) == 700e9
    assert most_params(96e9) == 9.6e9
    assert checkpoint_bytes(10, num_layers=3, values_per_token=5, value_bytes=4) == 4 * 10 * 3 * 5
    assert (fewest_chips(32e9, 16e9), fewest_chips(32e9 + 1, 16e9)) == (2, 3)


@pytest.mark.parametrize(("total", "shape"), [(1, (1, 1)), (70e9, (2, 4)), (140e9, (4, 4)), (256 * 16e9, (16, 16))])
def test_smallest_slice(total: float, shape: tuple[int, ...]):
    assert smallest_slice(V5E, total) == shape


@pytest.mark.oldest
def test_dollars():
    assert flops_per_usd(1e12, 2) == 1.8e15
    assert usd(3600 * 8, 1.2) == pytest.approx(9.6)


REFUSED = [
    (lambda: forward_flops(0), "params must be a number above 0, got 0"),
    (lambda: training_flops(1, -1), "tokens must be"),
    (lambda: attention_flops(1, heads=0, head_dim=1), "heads must be"),
    (lambda: compute_s(1, num_chips=0, flops_per_s=1), "num_chips must be"),
    (lambda: compute_s(1, num_chips=1, flops_per_s=1, mfu=1.5), "mfu must be a share above 0 and at most 1, got 1.5"),
    (lambda: compute_s(1, num_chips=1, flops_per_s=1, mfu=0), "mfu must be a share"),
    (lambda: days(-1), "seconds must be"),
    (lambda: utilization(1, chip_hours=0, flops_per_s=1), "chip_hours must be"),
    (lambda: state_bytes(1, bytes_per_param=-2), "bytes_per_param must be"),
    (lambda: most_params(0), "hbm_bytes must be"),
    (lambda: checkpoint_bytes(1, num_layers=0, values_per_token=1), "num_layers must be"),
    (lambda: fewest_chips(1, 0), "hbm_bytes must be"),
    (lambda: smallest_slice(V5E, 257 * 16e9), "no slice of v5e has 257 chips"),
    (lambda: smallest_slice(find_chip("h100"), 1), "has no slices in the catalogue"),
    (lambda: flops_per_usd(1, 0), "usd_per_hour must be"),
    (lambda: usd(-1, 1), "chip_seconds must be"),
]


@pytest.mark.parametrize(("make", "said"), REFUSED)
def test_refused_in_one_line(make, said: str):
    with pytest.raises(ValueError, match=said) as caught:
        make()
    assert "\n" not in str(caught.value)
