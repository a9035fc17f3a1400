"""What one chip can do, every figure with where it comes from."""

from collections.abc import Mapping
from dataclasses import dataclass, field


@dataclass(frozen=True, slots=True, kw_only=True)
class Figure:
    """One figure as its source gives it: `value` in `unit`; `date` is the source's, None where it has none."""

    value: float
    unit: str
    source: str
    date: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Chip:
    """One accelerator, in SI units. What is not known is None, never a guess.

    peak_flops_per_s: dense peak by operand dtype ("float32", "bfloat16", "float8", "int8"); a dtype that is absent has
      no units of its own.
    hbm_bytes: nominal memory of the chip; usable_hbm_bytes: what the compiler lets one device use, where it was read.
    devices_per_chip: how many devices JAX shows for a chip (2 on v7x); peaks and memory are the chip's.
    link_bytes_per_s: one direction of one ICI link, torus_dims 2 or 3 of them, wraparound by `wrap_multiple`: an axis
      has its wraparound link where its size is a multiple of this (16 on v5e and v6e, 4 on the 3D chips).
    max_chips: the largest slice. hop_latency_s: of one ICI hop.
    domain_chips: GPUs that NVLink joins all to all; domain_bytes_per_s: one direction of one GPU into it.
    dcn_bytes_per_s: data-centre network, one chip's share, one direction. pcie_bytes_per_s: to and from the host.
    host_chips, host_memory_bytes: of one host. usd_per_hour: on demand, a chip; power_watts: of one chip at work.
    figures: where each came from, by field name (peaks as "peak_flops_per_s.bfloat16").
    """

    name: str
    kind: str
    about: str
    peak_flops_per_s: Mapping[str, float]
    hbm_bytes: float
    hbm_bytes_per_s: float
    usable_hbm_bytes: float | None = None
    devices_per_chip: int = 1
    link_bytes_per_s: float | None = None
    torus_dims: int | None = None
    wrap_multiple: int | None = None
    max_chips: int | None = None
    hop_latency_s: float | None = None
    domain_chips: int | None = None
    domain_bytes_per_s: float | None = None
    dcn_bytes_per_s: float | None = None
    pcie_bytes_per_s: float | None = None
    host_chips: int | None = None
    host_memory_bytes: float | None = None
    usd_per_hour: float | None = None
    usd_per_hour_spot: float | None = None
    purchase_usd: float | None = None
    power_watts: float | None = None
    figures: Mapping[str, Figure] = field(default_factory=dict)
