"""Which vector instructions the host's processor has, and which of them XLA may use."""

import os
import platform
import re
from pathlib import Path

CPUINFO_FILE = Path("/proc/cpuinfo")
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


def instruction_set() -> str:
    """The widest vector instructions of this processor that XLA may use: XLA_FLAGS can forbid the wider ones."""
    try:
        cpuinfo = CPUINFO_FILE.read_text(encoding="utf-8", errors="replace")
    except OSError:
        cpuinfo = ""
    flag = MAX_ISA.search(os.environ.get("XLA_FLAGS", ""))
    return parse_instruction_set(cpuinfo, platform.machine(), limit=flag[1].upper() if flag else None)


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
