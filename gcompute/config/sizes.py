"""Sizes that are given relative to the devices, turned into what a configuration keeps."""

from collections.abc import Mapping
from typing import Any

from gcompute.config.mesh import MeshShape, OpenMesh, mesh_over


def is_open(values: Mapping[str, Any]) -> bool:
    """Whether fields of a TrainConfig leave a size to the devices."""
    return isinstance(values.get("mesh"), OpenMesh) or values.get("per_device_batch") is not None


def over_devices(values: Mapping[str, Any], num_devices: int) -> dict[str, Any]:
    """TrainConfig fields resolved for `num_devices`: the mesh axis given as -1, and the global batch size.

      batch = per_device_batch x data x fsdp x expert x accumulation

    with the axes of the mesh, all devices on data where none is given, and 1 where accumulation is left open: the
    microbatches that are then chosen divide this batch. An axis that splits no batch (tensor, context, stage) does not
    count: its devices share one shard.

    >>> over_devices({"mesh": OpenMesh("data=-1,tensor=2"), "per_device_batch": 4, "accumulation": 2}, 8)["batch"]
    32

    Raises:
      ValueError: batch is given too, per_device_batch is below 1, or the mesh does not fit.
    """
    found = dict(values)
    if found.get("mesh") is not None:
        found["mesh"] = mesh_over(found["mesh"], num_devices)
    per_device = found.pop("per_device_batch", None)
    if per_device is None:
        return found
    if found.get("batch") is not None:
        raise ValueError(f"batch={found['batch']} and per_device_batch={per_device} say the same twice: give one.")
    if per_device < 1:
        raise ValueError(f"per_device_batch must be above 0, got {per_device}.")
    mesh = found.get("mesh") or MeshShape(data=num_devices)
    found["batch"] = per_device * mesh.batch_shards * max(1, found.get("accumulation") or 1)
    return found
