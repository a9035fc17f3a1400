"""A roof: operations a chip can do each second, over a stream of bytes that it can take each second.

The stream is device memory, the links of a torus, a switch, the network between hosts or the host's bus. The ridge of a
roof, C / W, is how many operations each byte must feed for the operations to be what takes the time.
"""

from dataclasses import dataclass

from gcompute.hardware.chip import Chip
from gcompute.plan.arguments import above_zero
from gcompute.plan.efficiency import device_of


@dataclass(frozen=True, slots=True, kw_only=True)
class Roof:
    """Operations and bytes a second of one chip.

    bytes_per_s: of memory what it reads; of links the rate at which a chip gathers, see the functions below.

    Raises:
      ValueError: a rate is not above 0.
    """

    flops_per_s: float
    bytes_per_s: float

    def __post_init__(self) -> None:
        above_zero(flops_per_s=self.flops_per_s, bytes_per_s=self.bytes_per_s)

    @property
    def ridge(self) -> float:
        """Operations a byte at which the roof turns: C / W."""
        return self.flops_per_s / self.bytes_per_s


def peak_of(chip: Chip, dtype: str = "bfloat16") -> float:
    """Operations a second of a whole chip with operands of `dtype`.

    >>> from gcompute.hardware.catalogue import find_chip
    >>> peak_of(find_chip("v5p"))
    459000000000000.0

    Raises:
      ValueError: the chip has no peak for the dtype.
    """
    return device_of(chip, dtype).flops_per_s * chip.devices_per_chip


def memory_roof(chip: Chip, dtype: str = "bfloat16") -> Roof:
    """Over the chip's own memory.

    >>> from gcompute.hardware.catalogue import find_chip
    >>> round(memory_roof(find_chip("v5e")).ridge)
    241

    Raises:
      ValueError: the chip has no peak for the dtype.
    """
    return Roof(flops_per_s=peak_of(chip, dtype), bytes_per_s=chip.hbm_bytes_per_s)


def torus_roof(chip: Chip, axes: int = 1, dtype: str = "bfloat16") -> Roof:
    """Over `axes` closed axes of a torus: W = 2 link axes, for an array comes both ways round each ring.

    >>> from gcompute.hardware.catalogue import find_chip
    >>> round(torus_roof(find_chip("v5p")).ridge), round(torus_roof(find_chip("v5p"), 3).ridge)
    (2550, 850)

    Raises:
      ValueError: the chip has no such links, fewer axes, or no peak for the dtype.
    Source: scaling-book, "sharding", AllGather.
    """
    link, dims = _known(chip, "link_bytes_per_s", "TPUs have ICI links"), chip.torus_dims or 1
    if not 1 <= axes <= dims:
        raise ValueError(f"axes={axes} is not one of the torus of {chip.name}. Legal: 1 to {dims}.")
    return Roof(flops_per_s=peak_of(chip, dtype), bytes_per_s=2 * link * axes)


def node_roof(chip: Chip, dtype: str = "bfloat16") -> Roof:
    """Over the switch that joins the GPUs of a node, W of one GPU, one way.

    Raises:
      ValueError: nothing joins such GPUs all to all, or there is no peak for the dtype.
    Source: scaling-book, "gpus", collectives inside a node.
    """
    joined = _known(chip, "domain_bytes_per_s", "GPUs that NVLink joins have one")
    return Roof(flops_per_s=peak_of(chip, dtype), bytes_per_s=joined)


def across_nodes_roof(chip: Chip, nodes: int = 1, dtype: str = "bfloat16") -> Roof:
    """Over the network between nodes: each GPU gathers as fast as its node, W = one GPU's share x GPUs a node x nodes.

    nodes: over how many each copy of the model is split, by pipeline stages for instance; each of them gathers its part
    at the same time.

    >>> from gcompute.hardware.catalogue import find_chip
    >>> round(across_nodes_roof(find_chip("h100")).ridge)
    2472

    Raises:
      ValueError: the catalogue has no network for this chip, or there is no peak for the dtype.
    Source: scaling-book, "gpus", collectives across nodes.
    """
    above_zero(nodes=nodes)
    network = _known(chip, "dcn_bytes_per_s", "give a Roof with the network's rate")
    together = chip.domain_chips or 1
    return Roof(flops_per_s=peak_of(chip, dtype), bytes_per_s=network * together * nodes)


def network_roof(chip: Chip, dtype: str = "bfloat16") -> Roof:
    """Over one chip's own share of the data centre's network, one way.

    Raises:
      ValueError: the catalogue has no such share for this chip, or there is no peak for the dtype.
    """
    network = _known(chip, "dcn_bytes_per_s", "give a Roof with the network's rate")
    return Roof(flops_per_s=peak_of(chip, dtype), bytes_per_s=network)


def host_roof(chip: Chip, dtype: str = "bfloat16") -> Roof:
    """Over one chip's bus to the memory of its host.

    Raises:
      ValueError: the catalogue does not know that bus, or there is no peak for the dtype.
    """
    bus = _known(chip, "pcie_bytes_per_s", "give a Roof with the bus's rate")
    return Roof(flops_per_s=peak_of(chip, dtype), bytes_per_s=bus)


def _known(chip: Chip, field: str, advice: str) -> float:
    value = getattr(chip, field)
    if value is None:
        raise ValueError(f"{chip.name} has no {field} in the catalogue: {advice}.")
    return value
