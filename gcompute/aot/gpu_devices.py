"""What XLA's GPU compiler has to be told of a GPU that is not here: the text form of its target description."""

from dataclasses import dataclass

from gcompute.hardware.catalogue import find_chip

# What XLA keeps of tuned kernels it finds by running them; without a GPU it takes its own choice.
XLA_FLAGS = "--xla_gpu_autotune_level=0"


@dataclass(frozen=True, slots=True, kw_only=True)
class GpuDevice:
    """The figures that kernels are chosen and fused by, beside those of the catalogue.

    capability: (major, minor). shared_bytes, l2_bytes: of one multiprocessor, of the chip. Source: NVIDIA's CUDA
    programming guide, table of technical specifications by compute capability, and each GPU's datasheet.
    """

    about: str
    multiprocessors: int
    capability: tuple[int, int]
    shared_bytes: int
    l2_bytes: int
    clock_ghz: float
    threads_per_multiprocessor: int = 2048


KIB, MIB = 2**10, 2**20
_HOPPER = {"capability": (9, 0), "shared_bytes": 228 * KIB, "l2_bytes": 50 * MIB}
_AMPERE = {"capability": (8, 0), "shared_bytes": 164 * KIB, "l2_bytes": 40 * MIB}
_BLACKWELL = {"capability": (10, 0), "shared_bytes": 228 * KIB, "l2_bytes": 126 * MIB}
GPU_DEVICES = {
    "t4": GpuDevice(
        about="Tesla T4",
        multiprocessors=40,
        capability=(7, 5),
        shared_bytes=64 * KIB,
        l2_bytes=4 * MIB,
        clock_ghz=1.59,
        threads_per_multiprocessor=1024,
    ),
    "l4": GpuDevice(
        about="NVIDIA L4",
        multiprocessors=58,
        capability=(8, 9),
        shared_bytes=100 * KIB,
        l2_bytes=48 * MIB,
        clock_ghz=2.04,
        threads_per_multiprocessor=1536,
    ),
    "a100-40": GpuDevice(about="NVIDIA A100-SXM4-40GB", multiprocessors=108, clock_ghz=1.41, **_AMPERE),
    "a100-80": GpuDevice(about="NVIDIA A100-SXM4-80GB", multiprocessors=108, clock_ghz=1.41, **_AMPERE),
    "h100-pcie": GpuDevice(about="NVIDIA H100 PCIe", multiprocessors=114, clock_ghz=1.755, **_HOPPER),
    "h100-sxm": GpuDevice(about="NVIDIA H100 80GB HBM3", multiprocessors=132, clock_ghz=1.98, **_HOPPER),
    "h200": GpuDevice(about="NVIDIA H200", multiprocessors=132, clock_ghz=1.98, **_HOPPER),
    "b200": GpuDevice(about="NVIDIA B200", multiprocessors=148, clock_ghz=1.965, **_BLACKWELL),
    "gb200": GpuDevice(about="NVIDIA GB200", multiprocessors=148, clock_ghz=1.965, **_BLACKWELL),
}


def target_description(name: str) -> str:
    """XLA's GPU target config of the chip called `name` in the catalogue, as text.

    >>> "core_count: 132" in target_description("h100-sxm")
    True
    """
    gpu, chip = GPU_DEVICES[name], find_chip(name)
    major, minor = gpu.capability
    return f"""
gpu_device_info {{
  threads_per_block_limit: 1024
  threads_per_warp: 32
  shared_memory_per_block: {48 * KIB}
  shared_memory_per_core: {gpu.shared_bytes}
  threads_per_core_limit: {gpu.threads_per_multiprocessor}
  core_count: {gpu.multiprocessors}
  fpus_per_core: {64 if gpu.capability in ((7, 5), (8, 0)) else 128}
  block_dim_limit_x: {2**31 - 1}
  block_dim_limit_y: {2**16 - 1}
  block_dim_limit_z: {2**16 - 1}
  memory_bandwidth: {int(chip.hbm_bytes_per_s)}
  l2_cache_size: {gpu.l2_bytes}
  clock_rate_ghz: {gpu.clock_ghz}
  device_memory_size: {int(chip.hbm_bytes)}
  shared_memory_per_block_optin: {gpu.shared_bytes - KIB if major > 7 else gpu.shared_bytes}
  cuda_compute_capability {{ major: {major} minor: {minor} }}
  registers_per_core_limit: {2**16}
  registers_per_block_limit: {2**16}
}}
platform_name: "CUDA"
dnn_version_info {{ major: 9 minor: 8 }}
device_description_str: "{gpu.about}"
"""
