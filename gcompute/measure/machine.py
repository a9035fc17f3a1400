"""Look at this machine: devices, processor, memory, versions, and what decides its speed."""

import dataclasses
import os
import platform
import re
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

# Ascending on each architecture, by XLA's names for --xla_cpu_max_isa; what /proc/cpuinfo must list for each.
INSTRUCTION_SETS = {
    "SSE4_2": {"sse4_2"},
    "AVX": {"avx"},
    "AVX2": {"avx2", "fma"},
    "AVX512": {"avx2", "fma", "avx512f"},
    "AVX512_VNNI": {"avx2", "fma", "avx512f", "avx512_vnni"},
    "AVX512_BF16": {"avx2", "fma", "avx512f", "avx512_bf16"},
    "AMX": {"avx512f", "avx512_bf16", "amx_tile", "amx_bf16"},
    "NEON": {"asimd"},
    "NEON_BF16": {"asimd", "bf16"},
}
BFLOAT16_SETS = frozenset({"AVX512_BF16", "AMX", "NEON_BF16"})
MAX_ISA = re.compile(r"--xla_cpu_max_isa=(\w+)")


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


def instruction_set() -> str:
    """The widest vector instructions of this processor that XLA may use: XLA_FLAGS can forbid the wider ones."""
    flag = MAX_ISA.search(os.environ.get("XLA_FLAGS", ""))
    return parse_instruction_set(_read(CPUINFO_FILE) or "", platform.machine(), limit=flag[1].upper() if flag else None)


def parse_instruction_set(cpuinfo: str, machine: str, *, limit: str | None = None) -> str:
    """The widest of `INSTRUCTION_SETS` that /proc/cpuinfo lists, up to `limit`; `machine` where it lists none.

    >>> parse_instruction_set("flags : fpu avx avx2 fma avx512f avx512_vnni avx512_bf16", "x86_64")
    'AVX512_BF16'
    >>> parse_instruction_set("flags : fpu avx avx2 fma avx512f", "x86_64", limit="AVX2")
    'AVX2'
    >>> parse_instruction_set("Features : fp asimd bf16", "aarch64")
    'NEON_BF16'
    """
    lines = (line.partition(":") for line in cpuinfo.splitlines())
    flags = {flag for name, _, value in lines if name.strip() in ("flags", "Features") for flag in value.split()}
    found = machine
    for name, needed in INSTRUCTION_SETS.items():
        if needed <= flags:
            found = name
        if name == limit:
            break
    return found


def multiplies_bfloat16(instructions: str) -> bool:
    """Whether a processor of this instruction set multiplies bfloat16 without widening it first."""
    return instructions in BFLOAT16_SETS


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
