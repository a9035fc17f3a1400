"""From a MeshShape to a jax.sharding.Mesh."""

from collections.abc import Sequence
from typing import Any

import jax
from jax.sharding import AxisType, Mesh

from gcompute.config.mesh import Axis, MeshShape


def build_mesh(shape: MeshShape, devices: Sequence[Any] | None = None) -> Mesh:
    """A mesh with all six axes, in the order of `Axis`, over the first devices of this job.

    Axis types are Auto, stated because the default differs between JAX 0.7 and later versions.

    Raises:
      ValueError: the mesh needs more devices than there are, or leaves some process without a device.
    """
    available = list(devices if devices is not None else jax.devices())
    if shape.num_devices > len(available):
        raise ValueError(
            f"mesh {shape} needs {shape.num_devices} devices and there are {len(available)}. Use a smaller mesh, or try"
            f" it on CPU with JAX_NUM_CPU_DEVICES={shape.num_devices} JAX_PLATFORMS=cpu."
        )
    used = available[: shape.num_devices]
    processes, used_processes = {d.process_index for d in available}, {d.process_index for d in used}
    if processes != used_processes:
        raise ValueError(
            f"mesh {shape} covers {len(used)} of {len(available)} devices and leaves {len(processes - used_processes)}"
            f" of {len(processes)} processes idle. Use a mesh over all {len(available)} devices."
        )
    sizes = tuple(shape.size(axis) for axis in Axis)
    names = tuple(axis.value for axis in Axis)
    return jax.make_mesh(sizes, names, axis_types=(AxisType.Auto,) * len(names), devices=used)
