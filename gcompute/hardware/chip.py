"""What one chip can do, every figure with where it comes from."""

from collections.abc import Mapping
from dataclasses import dataclass, field


@dataclass(frozen=True, slots=True, kw_only=True)
class Figure:
    """One figure as its source gives it: `value` in `unit`. `date` is the source's, None where it has none.

    others: what other sources say, where they disagree.
    """

    value: float
    unit: str
    source: str
    date: str | None = None
    others: tuple["Figure", ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Chip:
    """One accelerator, in SI units; what nobody states is None. See `figures` for the source of each field.

    kind: "tpu", "gpu" or "cpu".
    peak_flops_per_s: dense peak by operand dtype; one that is absent has no units of its own, or is not stated.
    hbm_bytes: nominal memory of the chip. usable_hbm_bytes: what the compiler lets one device use.
    vmem_bytes: the memory beside the matrix units of a TPU. matrix_dim: the sides of one such unit.
    devices_per_chip: how many devices JAX shows for a chip; peaks, bandwidths and hbm_bytes are the chip's.
    link_bytes_per_s: one direction of one ICI link; a chip has one link either way on each of `torus_dims` axes.
    wrap_multiple: see `torus.wraparound`. max_chips: of the largest slice. hop_latency_s: of one ICI hop.
    domain_chips: GPUs that NVLink or its like joins all to all. domain_bytes_per_s: one direction, of one GPU.
    dcn_bytes_per_s: one chip's share of the data centre's network, one direction. pcie_bytes_per_s: to the host.
    host_chips, host_memory_bytes: of one host. usd_per_hour: on demand, for one chip. power_watts: of a chip at work.
    """

    name: str
    kind: str
    about: str
    peak_flops_per_s: Mapping[str, float]
    hbm_bytes: float
    hbm_bytes_per_s: float
    usable_hbm_bytes: float | None = None
    vmem_bytes: float | None = None
    matrix_dim: int | None = None
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

    def critical_batch(self, dtype: str, *, weight_bytes: float) -> float:
        """Tokens from which a matmul is bound by operations: peak / bandwidth weight_bytes / 2.

        A token costs 2 operations a weight, and a weight is read once however many tokens there are.

        Raises:
          ValueError: the chip has no peak for `dtype`.
        Source: scaling-book, "roofline".
        """
        if dtype not in self.peak_flops_per_s:
            raise ValueError(f"{self.name} has no peak for {dtype}. Legal: {', '.join(self.peak_flops_per_s)}.")
        return self.peak_flops_per_s[dtype] / self.hbm_bytes_per_s * weight_bytes / 2
