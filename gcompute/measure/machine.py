"""Look at this machine: devices, processor, memory, versions, and what decides its speed."""

import dataclasses
import os
import platform
import subprocess
import sys
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

import jax
import psutil

HUGE_PAGES_FILE = Path("/sys/kernel/mm/transparent_hugepage/enabled")
CPUINFO_FILE = Path("/proc/cpuinfo")
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
        huge_pages=huge_page_mode(),
        malloc_huge_pages=malloc_asks_for_huge_pages(os.environ.get("GLIBC_TUNABLES", "")),
        system=f"{platform.system()} {platform.machine()}",
        python=platform.python_version(),
        jax=jax.__version__,
        jaxlib=version("jaxlib"),
        flax=version("flax"),
    )


def usable_cores() -> int:
    """Cores that this process may run on; all of them where the system has no affinity (macOS)."""
    if sys.platform == "linux":
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def cpu_model() -> str | None:
    """The processor's name, or None where the system does not tell it."""
    if sys.platform == "darwin":
        command = ["sysctl", "-n", "machdep.cpu.brand_string"]
        try:
            answer = subprocess.run(command, capture_output=True, text=True, check=True, timeout=5)
        except (OSError, subprocess.SubprocessError):
            return None
        return answer.stdout.strip() or None
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


def _read(path: Path) -> str | None:
    try:
        return path.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return None
