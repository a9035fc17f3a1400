"""Compile for a `Target` that need not be here: what its compiler is called, and what it wants of a process.

Importing this module does not load JAX: `target_environment` must be set before it starts.
"""

import importlib.util
import math
import os
from dataclasses import dataclass
from typing import Any

from gcompute.aot.gpu_devices import GPU_DEVICES, XLA_FLAGS, target_description
from gcompute.aot.xla_flags import add_flags
from gcompute.hardware.target import CORES_IN_NAME, CPU, Target

INSTALL = {"tpu": "pip install gcompute[tpu-aot]", "gpu": "pip install gcompute[gpu-aot]"}
NEEDS = {"tpu": ("libtpu",), "gpu": ("jax_cuda12_plugin", "jax_plugins.xla_cuda12")}
GIB = 2**30


@dataclass(frozen=True, slots=True, kw_only=True)
class CompilerName:
    """What the TPU compiler calls a chip; `accelerator` begins the names of whole slices, as in v5p-128.

    chip_config: on a v4 the two cores of a chip are one device only where this is asked for.
    """

    topology: str
    accelerator: str
    chip_config: str | None = None


TPU_NAMES = {
    "v4": CompilerName(topology="v4", accelerator="v4", chip_config="megacore"),
    "v5e": CompilerName(topology="v5e", accelerator="v5litepod"),
    "v5p": CompilerName(topology="v5p", accelerator="v5p"),
    "v6e": CompilerName(topology="v6e", accelerator="v6e"),
    "v7x": CompilerName(topology="tpu7x", accelerator="tpu7x"),
}


def compile_target(text: str) -> Target:
    """`Target.parse`, of what can be compiled for.

    Raises:
      ValueError: as `Target.parse`, or there is no compiler for the chip.
    """
    target = Target.parse(text)
    if target.chip not in (*TPU_NAMES, *GPU_DEVICES, CPU):
        legal = ", ".join((*TPU_NAMES, *GPU_DEVICES, CPU))
        raise ValueError(f"there is no compiler for {target.chip}: it can be planned for only. Legal: {legal}.")
    return target


def target_environment(target: Target) -> dict[str, str]:
    """Environment variables that a process needs before JAX starts, to compile for `target`."""
    shared = {"JAX_PLATFORMS": "cpu", "TF_CPP_MIN_LOG_LEVEL": "2"}
    if target.backend == "gpu":
        return {**shared, "XLA_FLAGS": add_flags(os.environ.get("XLA_FLAGS", ""), XLA_FLAGS)}
    if target.backend == "cpu":
        return {**shared, "JAX_NUM_CPU_DEVICES": str(target.num_devices)}
    cores = math.prod(target.shape) * CORES_IN_NAME.get(target.chip, 1)
    return {
        **shared,
        # libtpu would ask the metadata server of a cloud machine what it runs on.
        "TPU_SKIP_MDS_QUERY": "1",
        "TPU_ACCELERATOR_TYPE": f"{TPU_NAMES[target.chip].accelerator}-{cores}",
        "TPU_WORKER_HOSTNAMES": "localhost",
        "TPU_WORKER_ID": "0",
        # libtpu lets one process at a time use the chips, by a lock file; compiling uses none of them.
        "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
    }


def check_installed(target: Target) -> None:
    """Raise ValueError, with what to install, where the target's compiler is not here."""
    if target.backend == "cpu":
        return
    if not all(_is_here(module) for module in NEEDS[target.backend]):
        raise ValueError(
            f"compiling for {target} needs the {target.backend.upper()} compiler, which is not installed. Run:"
            f" {INSTALL[target.backend]}"
        )


def _is_here(module: str) -> bool:
    try:
        return importlib.util.find_spec(module) is not None
    except ModuleNotFoundError:
        return False


def target_devices(target: Target) -> list[Any]:
    """The devices of `target`, to build a mesh of; nothing can run on those that are not here, only compile.

    The process must have been started with `target_environment(target)`.

    Raises:
      ValueError: the compiler is not installed, or this process has too few CPU devices.
    """
    check_installed(target)
    if target.backend == "cpu":
        import jax

        devices = jax.devices("cpu")
        if len(devices) < target.num_devices:
            raise ValueError(
                f"{target} needs {target.num_devices} CPU devices and this process has {len(devices)}. Start it with"
                f" JAX_NUM_CPU_DEVICES={target.num_devices}."
            )
        return devices[: target.num_devices]
    from jax.experimental import topologies

    if target.backend == "gpu":
        hosts = target.num_devices // target.domain_devices
        topology = f"1x{hosts}x{target.domain_devices}"
        description = target_description(target.chip)
        return list(
            topologies.get_topology_desc(target.chip, "cuda", target_config=description, topology=topology).devices
        )
    chip = TPU_NAMES[target.chip]
    options: dict[str, Any] = {"chip_config_name": chip.chip_config} if chip.chip_config else {}
    if target.slices > 1:
        options["num_slices"] = target.slices
    name = f"{chip.topology}:{'x'.join(map(str, target.shape))}"
    return list(topologies.get_topology_desc(name, "tpu", **options).devices)
