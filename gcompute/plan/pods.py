"""What the units of a chip, and the chips of a slice, add up to."""

import math
from dataclasses import dataclass

from gcompute.hardware.target import CORES_IN_NAME, Target
from gcompute.plan.arguments import above_zero
from gcompute.plan.roof import peak_of


@dataclass(frozen=True, slots=True, kw_only=True)
class Pod:
    """All chips of a target together. hosts: None where the catalogue does not say how many chips one has."""

    chips: int
    hosts: int | None
    cores: int
    flops_per_s: float
    hbm_bytes: float


def pod(target: Target, dtype: str = "bfloat16") -> Pod:
    """Hosts, cores, peak and nominal memory of all chips of a target. A GPU counts as one core.

    >>> found = pod(Target.parse("v5e:16x16"))
    >>> found.hosts, found.cores, f"{found.flops_per_s:.3g}"
    (32, 256, '5.04e+16')

    Raises:
      ValueError: the catalogue has no figures for the target's devices, or no peak for the dtype.
    """
    chip = target.known
    if chip is None:
        raise ValueError(f"{target} has no figures in the catalogue.")
    chips = target.num_chips
    on_host = chip.host_chips or chip.domain_chips
    return Pod(
        chips=chips,
        hosts=math.ceil(chips / on_host) if on_host else None,
        cores=chips * CORES_IN_NAME.get(chip.name, 1),
        flops_per_s=chips * peak_of(chip, dtype),
        hbm_bytes=chips * chip.hbm_bytes,
    )


def matrix_unit_flops_per_s(dim: int, clock_hz: float, *, units: int = 1) -> float:
    """Operations a second of systolic arrays of dim x dim, a multiply and an add in each cell and cycle: 2 d d f n.

    >>> f"{matrix_unit_flops_per_s(128, 1.5e9):.2g}"
    '4.9e+13'
    """
    above_zero(dim=dim, clock_hz=clock_hz, units=units)
    return 2 * dim**2 * clock_hz * units


def vector_flops_per_s(lanes: int, clock_hz: float, *, flops_per_cycle: float = 1.0) -> float:
    """Operations a second of vector units, `lanes` of them over the chip or core."""
    above_zero(lanes=lanes, clock_hz=clock_hz, flops_per_cycle=flops_per_cycle)
    return lanes * clock_hz * flops_per_cycle


def clock_of(flops_per_s: float, lanes: int, *, flops_per_cycle: float = 1.0) -> float:
    """The clock, in hertz, at which `lanes` reach `flops_per_s`."""
    above_zero(flops_per_s=flops_per_s, lanes=lanes, flops_per_cycle=flops_per_cycle)
    return flops_per_s / (lanes * flops_per_cycle)
