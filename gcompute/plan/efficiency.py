"""How much of a chip's peak and bandwidth real programs reach: one stated model, the same for every model and mesh.

The figures were fitted once to published training runs (`gcompute exam` shows which, and the error of each when it is
left out of the fit). Nothing in them depends on the run.
"""

from dataclasses import dataclass

from gcompute.hardware.chip import Chip
from gcompute.plan.operations import Operation


@dataclass(frozen=True, slots=True, kw_only=True)
class Efficiency:
    """Shares of what a datasheet says.

    matmul: of the peak that large products reach, beside the traffic of their operands. reuse_flops_per_byte:
    operations for each byte of operands that products stream from memory without hiding it. attention: of the products'
    share, where a head fills the matrix unit; attention_flops_per_byte: its operations for each byte that its kernel
    streams beside them. sweep: of the memory bandwidth. link: of the links' bandwidth.
    hidden: of the communication that can run beside computation, how much does. ragged: of the products' share, what
    experts reach that drop nothing.
    """

    matmul: float
    reuse_flops_per_byte: float
    attention: float
    sweep: float
    link: float
    hidden: float
    attention_flops_per_byte: float = float("inf")
    ragged: float = 1.0


# `python -m gcompute.exam.fit` makes these; see gcompute/exam.
BY_KIND = {
    "tpu": Efficiency(
        matmul=0.90, reuse_flops_per_byte=1530, attention=0.85, sweep=0.733, link=0.975, hidden=0.54, ragged=0.4
    ),
    "gpu": Efficiency(
        matmul=0.85,
        reuse_flops_per_byte=876,
        attention=0.948,
        sweep=0.669,
        link=0.554,
        hidden=0.342,
        attention_flops_per_byte=79.7,
    ),
}
# A machine that was measured: its ceilings are what products and sweeps reached there.
MEASURED = Efficiency(matmul=1.0, reuse_flops_per_byte=float("inf"), attention=1.0, sweep=1.0, link=1.0, hidden=0.0)
DATASHEET = MEASURED


@dataclass(frozen=True, slots=True, kw_only=True)
class Device:
    """One device as JAX shows it: a chip, or one of the two of a v7x.

    matrix_dim: sides of its matrix unit; a head that is smaller leaves a part of it idle. 0 where that is not known.
    """

    kind: str
    flops_per_s: float
    hbm_bytes_per_s: float
    matrix_dim: int = 0

    @property
    def ridge(self) -> float:
        """Operations a byte at which a roofline turns."""
        return self.flops_per_s / self.hbm_bytes_per_s


def device_of(chip: Chip, dtype: str = "bfloat16") -> Device:
    """One device of `chip` with operands of `dtype`; float16 stands in for bfloat16 where a chip has only that.

    Raises:
      ValueError: the chip has no peak for the dtype.
    """
    peaks = dict(chip.peak_flops_per_s)
    if dtype == "bfloat16" and dtype not in peaks and "float16" in peaks:
        dtype = "float16"
    if dtype == "float32" and dtype not in peaks:
        raise ValueError(f"{chip.name} has no peak for float32 in the catalogue. Legal: {', '.join(peaks)}.")
    if dtype not in peaks:
        raise ValueError(f"{chip.name} has no peak for {dtype}. Legal: {', '.join(peaks)}.")
    return Device(
        kind=chip.kind,
        flops_per_s=peaks[dtype] / chip.devices_per_chip,
        hbm_bytes_per_s=chip.hbm_bytes_per_s / chip.devices_per_chip,
        matrix_dim=chip.matrix_dim or 0,
    )


def operation_s(operation: Operation, device: Device, efficiency: Efficiency) -> float:
    """Seconds of all runs of one operation.

    A product: max(flops / (e peak), bytes / (s bandwidth)) + flops / (r bandwidth); attention the same with e a f
    in place of e, f the part of the matrix unit that a head fills, and its own r; a sweep: bytes / (s bandwidth).
    """
    bytes_s = operation.moved_bytes / (device.hbm_bytes_per_s * efficiency.sweep)
    share = efficiency.matmul * (efficiency.ragged if operation.ragged else 1.0)
    if operation.kind == "attention":
        share *= efficiency.attention
        if device.matrix_dim and operation.depth:
            share *= min(1.0, operation.depth / device.matrix_dim)
    flops_s = operation.flops / (device.flops_per_s * share)
    reuse = {"matmul": efficiency.reuse_flops_per_byte, "attention": efficiency.attention_flops_per_byte}
    streamed_s = operation.flops / (device.hbm_bytes_per_s * reuse.get(operation.kind, float("inf")))
    return operation.times * (max(flops_s, bytes_s) + streamed_s)


def efficiency_of(kind: str) -> Efficiency:
    """The efficiency of a kind of chip; a CPU is one that was measured."""
    return BY_KIND.get(kind, MEASURED)
