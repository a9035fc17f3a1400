"""Look at this machine: devices, processor, memory, versions, and what decides its speed."""

import dataclasses
import os
import platform
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

import jax
import psutil

from gcompute.measure.instructions import CPUINFO_FILE, instruction_set

HUGE_PAGES_FILE = Path("/sys/kernel/mm/transparent_hugepage/enabled")
CACHE_DIRECTORY = Path("/sys/devices/system/cpu/cpu0/cache")
# (limit, use) of this process's control group, versions 2 and 1: a container has less memory than its host shows.
CGROUP_MEMORY_FILES = (
    (Path("/sys/fs/cgroup/memory.max"), Path("/sys/fs/cgroup/memory.current")),
    (
        Path("/sys/fs/cgroup/memory/memory.limit_in_bytes"),
        Path("/sys/fs/cgroup/memory/memory.usage_in_bytes"),
    ),
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Machine:
    """What this process runs on. None is what the platform does not tell.

    `cores` are those that this process may use. `device_memory_bytes` is what JAX may allocate on one local device
    (None on CPU).
    `instruction_set` is the widest of the host's processor that XLA may use, see `instruction_set`.
    `huge_pages` is the kernel's transparent huge page mode; `malloc_huge_pages` whether glibc's malloc asks for them.
    """

    backend: str
    device_kind: str
    num_devices: int
    num_local_devices: int
    device_memory_bytes: int | None
    cpu: str | None
    cores: int
    memory_bytes: int
    memory_available_bytes: int
    instruction_set: str
    huge_pages: str | None
    malloc_huge_pages: bool
    system: str
    python: str
    jax: str
    jaxlib: str
    flax: str

    @property
    def uses_huge_pages(self) -> bool:
        """Whether large buffers of the host come in huge pages."""
        return self.huge_pages == "always" or (self.huge_pages == "madvise" and self.malloc_huge_pages)

    def to_dict(self) -> dict[str, str | int | bool | None]:
        return {**dataclasses.asdict(self), "uses_huge_pages": self.uses_huge_pages}


@dataclass(frozen=True, slots=True, kw_only=True)
class Cache:
    """One cache of the first core. level: 1 is the smallest. cores: how many share it."""

    level: int
    size_bytes: int
    cores: int


def look() -> Machine:
    """Look at this machine; starts JAX's backend."""
    device = jax.local_devices()[0]
    memory_bytes, memory_available_bytes = host_memory_bytes()
    return Machine(
        backend=jax.default_backend(),
        device_kind=device.device_kind,
        num_devices=jax.device_count(),
        num_local_devices=jax.local_device_count(),
        device_memory_bytes=(device.memory_stats() or {}).get("bytes_limit"),
        cpu=cpu_model(),
        cores=usable_cores(),
        memory_bytes=memory_bytes,
        memory_available_bytes=memory_available_bytes,
        instruction_set=instruction_set(),
        huge_pages=huge_page_mode(),
        malloc_huge_pages=malloc_asks_for_huge_pages(os.environ.get("GLIBC_TUNABLES", "")),
        system=f"{platform.system()} {platform.machine()}",
        python=platform.python_version(),
        jax=jax.__version__,
        jaxlib=version("jaxlib"),
        flax=version("flax"),
    )


def rounding() -> dict[str, str | int]:
    """What decides how a compiled program rounds: the same program on another of these may differ in its last bits.

    On CPU the instruction set decides how sums are vectorized, and the cores how matmuls are shared out.
    """
    backend = jax.default_backend()
    facts: dict[str, str | int] = {
        "backend": backend,
        "device_kind": jax.local_devices()[0].device_kind,
        "jaxlib": version("jaxlib"),
    }
    if backend == "cpu":
        facts |= {"instruction_set": instruction_set(), "cores": usable_cores()}
    return facts


def usable_cores() -> int:
    """Cores that this process may run on; all of them where the system has no affinity (macOS)."""
    if sys.platform == "linux":
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def cpu_model() -> str | None:
    """The processor's name, or None where the system does not tell it."""
    if sys.platform == "darwin":
        return _sysctl("machdep.cpu.brand_string")
    text = _read(CPUINFO_FILE)
    return parse_cpu_model(text) if text is not None else None


def parse_cpu_model(cpuinfo: str) -> str | None:
    r"""The first "model name" of /proc/cpuinfo; Arm processors give none.

    >>> parse_cpu_model("processor : 0\nmodel name : AMD EPYC\n")
    'AMD EPYC'
    """
    for line in cpuinfo.splitlines():
        name, _, value = line.partition(":")
        if name.strip().lower() == "model name" and value.strip():
            return value.strip()
    return None


def data_caches(directory: Path | None = None) -> tuple[Cache, ...]:
    """The caches that hold the first core's data, smallest first; empty where the system does not tell them.

    Linux lists them under /sys/devices/system/cpu, macOS tells those of its fast cores by sysctl.
    """
    if sys.platform == "darwin" and directory is None:
        return _darwin_caches()
    caches = []
    for index in sorted((directory or CACHE_DIRECTORY).glob("index*")):
        level, kind, size, shared = (_read(index / name) for name in ("level", "type", "size", "shared_cpu_list"))
        if level is None or kind is None or size is None or kind.strip() == "Instruction":
            continue
        size_bytes = parse_cache_size(size)
        if level.strip().isdecimal() and size_bytes:
            caches.append(Cache(level=int(level), size_bytes=size_bytes, cores=count_cores(shared or "0")))
    return tuple(sorted(caches, key=lambda cache: cache.level))


def second_level_bytes(caches: Sequence[Cache], *, cores: int) -> int | None:
    """What `cores` cores have of the second-level caches together, each its share of a shared one; None if untold.

    >>> second_level_bytes([Cache(level=2, size_bytes=2**19, cores=1)], cores=2) == 2**20
    True
    """
    return next((cache.size_bytes * cores // cache.cores for cache in caches if cache.level == 2), None)


def parse_cache_size(text: str) -> int | None:
    """Bytes of a size as the kernel writes it, None for anything else.

    >>> parse_cache_size("512K"), parse_cache_size("8M"), parse_cache_size("")
    (524288, 8388608, None)
    """
    number, unit = text.strip()[:-1], text.strip()[-1:]
    if unit.isdecimal():
        number, unit = text.strip(), ""
    scale = {"": 1, "K": 2**10, "M": 2**20, "G": 2**30}.get(unit)
    return int(number) * scale if scale and number.isdecimal() else None


def count_cores(cpu_list: str) -> int:
    """How many processors a list of the kernel names, at least 1.

    >>> count_cores("0-3,8-11"), count_cores("0")
    (8, 1)
    """
    total = 0
    for part in cpu_list.strip().split(","):
        first, _, last = part.partition("-")
        if first.isdecimal() and (last or first).isdecimal():
            total += int(last or first) - int(first) + 1
    return max(total, 1)


def _darwin_caches() -> tuple[Cache, ...]:
    caches = []
    for level, size_name, cores_name in (
        (1, "hw.perflevel0.l1dcachesize", None),
        (2, "hw.perflevel0.l2cachesize", "hw.perflevel0.cpusperl2"),
    ):
        size = _sysctl(size_name)
        cores = _sysctl(cores_name) if cores_name else "1"
        if size and size.isdecimal() and int(size):
            caches.append(
                Cache(level=level, size_bytes=int(size), cores=int(cores) if cores and cores.isdecimal() else 1)
            )
    return tuple(caches)


def host_memory_bytes() -> tuple[int, int]:
    """Total and available bytes of memory, within the control group's limit where there is one."""
    memory = psutil.virtual_memory()
    total, available = memory.total, memory.available
    for limit_file, use_file in CGROUP_MEMORY_FILES:
        limit, used = _read(limit_file), _read(use_file)
        if limit is not None and used is not None and limit.strip().isdecimal() and int(limit) < total:
            total = int(limit)
            available = min(available, max(0, total - int(used)))
    return total, available


def huge_page_mode() -> str | None:
    """The kernel's transparent huge page mode, or None where it has none."""
    text = _read(HUGE_PAGES_FILE)
    return parse_huge_page_mode(text) if text is not None else None


def parse_huge_page_mode(text: str) -> str | None:
    """The chosen one of the kernel's list of modes.

    >>> parse_huge_page_mode("always [madvise] never")
    'madvise'
    """
    return next((word[1:-1] for word in text.split() if word.startswith("[") and word.endswith("]")), None)


def malloc_asks_for_huge_pages(tunables: str) -> bool:
    """Whether GLIBC_TUNABLES has malloc ask for huge pages (1: by madvise; 2 and above: from the huge page pool).

    >>> malloc_asks_for_huge_pages("glibc.malloc.hugetlb=1")
    True
    """
    pairs = (setting.partition("=") for setting in tunables.split(":"))
    return any(name.strip() == "glibc.malloc.hugetlb" and value.strip() not in ("", "0") for name, _, value in pairs)


def _sysctl(name: str) -> str | None:
    """A value of macOS's, None where it has none of this name."""
    try:
        answer = subprocess.run(["sysctl", "-n", name], capture_output=True, text=True, check=True, timeout=5)
    except (OSError, subprocess.SubprocessError):
        return None
    return answer.stdout.strip() or None


def _read(path: Path) -> str | None:
    try:
        return path.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return None
