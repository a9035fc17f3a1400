"""What training and serving cost: operations, days, chips, memory of all chips together, dollars."""

import math

from gcompute.hardware.chip import Chip
from gcompute.hardware.target import slices_of
from gcompute.plan.arguments import above_zero, at_least_zero, share

SECONDS_PER_HOUR = 3600
HOURS_PER_DAY = 24
# bfloat16 parameters, and two moments of Adam in float32; gradients are not kept.
ADAM_BYTES_PER_PARAM = 10.0


def forward_flops(params: float, tokens: float = 1) -> float:
    """Operations forwards: 2 P T, attention's scores not counted. P are the parameters that a token uses."""
    above_zero(params=params, tokens=tokens)
    return 2.0 * params * tokens


def training_flops(params: float, tokens: float = 1, *, recomputed: bool = False) -> float:
    """Operations forwards and backwards: 6 P T, or 8 P T where the forward pass is run again.

    >>> f"{training_flops(70e9, 15e12):.2g}"
    '6.3e+24'

    Raises:
      ValueError: a number is not above 0.
    Source: Kaplan et al. 2020, arXiv:2001.08361, section 2.1; scaling-book, "transformers".
    """
    return (4 if recomputed else 3) * forward_flops(params, tokens)


def attention_flops(tokens: float, *, heads: int, head_dim: int, sequences: float = 1, training: bool = False) -> float:
    """Operations of one layer's scores and sums of values over the whole square: 4 B T T N H, training 12.

    Source: scaling-book, "transformers", attention.
    """
    above_zero(tokens=tokens, heads=heads, head_dim=head_dim, sequences=sequences)
    return (12.0 if training else 4.0) * sequences * tokens**2 * heads * head_dim


def compute_s(flops: float, *, num_chips: float, flops_per_s: float, mfu: float = 1.0) -> float:
    """Seconds of `flops` on chips that reach a share `mfu` of `flops_per_s` each.

    >>> seconds = compute_s(6.3e24, num_chips=8960, flops_per_s=4.59e14, mfu=0.4)
    >>> round(days(seconds))
    44

    Raises:
      ValueError: a number is not above 0, or mfu above 1.
    """
    above_zero(flops=flops, num_chips=num_chips, flops_per_s=flops_per_s)
    share(mfu=mfu)
    return flops / (num_chips * flops_per_s * mfu)


def days(seconds: float) -> float:
    """Seconds as days."""
    at_least_zero(seconds=seconds)
    return seconds / (SECONDS_PER_HOUR * HOURS_PER_DAY)


def utilization(flops: float, *, chip_hours: float, flops_per_s: float) -> float:
    """Share of what the chips could have done in the time they were rented: flops / (hours 3600 C).

    Raises:
      ValueError: a number is not above 0.
    """
    above_zero(flops=flops, chip_hours=chip_hours, flops_per_s=flops_per_s)
    return flops / (chip_hours * SECONDS_PER_HOUR * flops_per_s)


def state_bytes(params: float, *, bytes_per_param: float = ADAM_BYTES_PER_PARAM) -> float:
    """Bytes of parameters and optimizer state: 10 P with Adam, bfloat16 parameters and float32 moments.

    Raises:
      ValueError: a number is not above 0.
    Source: scaling-book, "training", data parallelism.
    """
    above_zero(params=params, bytes_per_param=bytes_per_param)
    return params * bytes_per_param


def most_params(hbm_bytes: float, *, bytes_per_param: float = ADAM_BYTES_PER_PARAM) -> float:
    """The most parameters whose state fits one chip, as pure data parallelism needs."""
    above_zero(hbm_bytes=hbm_bytes, bytes_per_param=bytes_per_param)
    return hbm_bytes / bytes_per_param


def checkpoint_bytes(tokens: float, *, num_layers: int, values_per_token: float, value_bytes: float = 2.0) -> float:
    """Bytes of the activations that a step keeps: b T L v, v values a token of each layer.

    >>> f"{checkpoint_bytes(4e6, num_layers=80, values_per_token=4 * 8192):.3g}"
    '2.1e+13'

    Raises:
      ValueError: a number is not above 0.
    Source: scaling-book, "transformers", gradient checkpointing; "applied-training".
    """
    above_zero(tokens=tokens, num_layers=num_layers, values_per_token=values_per_token, value_bytes=value_bytes)
    return value_bytes * tokens * num_layers * values_per_token


def fewest_chips(total_bytes: float, hbm_bytes: float) -> int:
    """Chips whose memories hold `total_bytes` between them.

    >>> fewest_chips(21.6e12, 96e9)
    225

    Raises:
      ValueError: a number is not above 0.
    """
    above_zero(total_bytes=total_bytes, hbm_bytes=hbm_bytes)
    return math.ceil(total_bytes / hbm_bytes)


def smallest_slice(chip: Chip, total_bytes: float) -> tuple[int, ...]:
    """The smallest slice of a TPU whose nominal memory holds `total_bytes`.

    >>> from gcompute.hardware.catalogue import find_chip
    >>> smallest_slice(find_chip("v5e"), 70e9)
    (2, 4)

    Raises:
      ValueError: no slice is large enough, or the chip is no TPU.
    """
    needed = fewest_chips(total_bytes, chip.hbm_bytes)
    for shape in slices_of(chip):
        if math.prod(shape) >= needed:
            return shape
    raise ValueError(f"no slice of {chip.name} has {needed} chips, which {total_bytes:.3g} bytes need.")


def flops_per_usd(flops_per_s: float, usd_per_hour: float) -> float:
    """Operations that a dollar buys at the peak: 3600 C / price.

    >>> f"{flops_per_usd(1.97e14, 1.2):.2g}"
    '5.9e+17'

    Raises:
      ValueError: a number is not above 0.
    Source: scaling-book, "applied-inference".
    """
    above_zero(flops_per_s=flops_per_s, usd_per_hour=usd_per_hour)
    return flops_per_s * SECONDS_PER_HOUR / usd_per_hour


def usd(chip_seconds: float, usd_per_hour: float) -> float:
    """What `chip_seconds` cost at a price for one chip.

    >>> usd(7200, 4.2)
    8.4
    """
    at_least_zero(chip_seconds=chip_seconds)
    above_zero(usd_per_hour=usd_per_hour)
    return chip_seconds / SECONDS_PER_HOUR * usd_per_hour
