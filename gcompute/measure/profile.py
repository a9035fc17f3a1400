"""Profiles that XProf and Perfetto open, and the most memory that was in use."""

import resource
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import jax


@dataclass(frozen=True, slots=True, kw_only=True)
class TraceFiles:
    """Where a trace is written; `xplane` and `perfetto` exist once `trace` has ended.

    `earlier` are the profiles that the directory held before.
    """

    directory: Path
    earlier: frozenset[Path]

    @property
    def xplane(self) -> Path:
        """The protocol buffer that XProf reads: `xprof --logdir` takes `directory`."""
        return self._new("*.xplane.pb")

    @property
    def perfetto(self) -> Path:
        """The gzipped JSON that ui.perfetto.dev opens."""
        return self._new("perfetto_trace.json.gz")

    def _new(self, pattern: str) -> Path:
        found = [path for path in _profiles(self.directory, pattern) if path not in self.earlier]
        if not found:
            raise ValueError(
                f"no {pattern} in {self.directory}: the trace has not ended. Read it after `with trace()`."
            )
        return found[-1]


def check_trace() -> None:
    """Refuse where JAX's profiler is known to take the process down with it (seen: JAX 0.10.2, libtpu 0.0.52).

    Raises:
      ValueError: the TPU compiler is installed, JAX may use it, and runs on CPU.
    """
    may_use_tpu = not getattr(jax.config, "jax_platforms", None) and find_spec("libtpu") is not None
    if may_use_tpu and jax.default_backend() == "cpu":
        raise ValueError("JAX's profiler crashes where libtpu is installed and there is no TPU: set JAX_PLATFORMS=cpu.")


@contextmanager
def trace(directory: Path | str) -> Iterator[TraceFiles]:
    """Profile what runs inside the `with`, on host and devices, into `directory`/plugins/profile/<time>/.

    Keep it to a few steps: a trace grows by megabytes a second. Work still running on a device when the block ends is
    cut off: block on the last result first.

    Raises:
      ValueError: the profiler would crash here (`check_trace`).
    """
    check_trace()
    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    files = TraceFiles(directory=directory, earlier=frozenset(_profiles(directory, "*")))
    with jax.profiler.trace(str(directory), create_perfetto_trace=True):
        yield files


def _profiles(directory: Path, pattern: str) -> list[Path]:
    return sorted((directory / "plugins" / "profile").glob(f"*/{pattern}"))


def device_memory() -> dict[str, Any]:
    """The most bytes in use so far, as plain values: `source`, `peak_bytes` by device, and their largest.

    `source` is "device allocator", or "process peak RSS" where the devices share the host's memory and keep no count
    (CPU): one figure for the whole process, under "host".
    """
    peaks = {}
    for device in jax.local_devices():
        stats = device.memory_stats() or {}
        if "peak_bytes_in_use" in stats:
            peaks[str(device)] = int(stats["peak_bytes_in_use"])
    source = "device allocator" if peaks else "process peak RSS"
    peaks = peaks or {"host": process_peak_bytes()}
    return {"source": source, "peak_bytes": peaks, "largest_peak_bytes": max(peaks.values())}


def process_peak_bytes() -> int:
    """The most resident memory that this process has had."""
    # On Linux ru_maxrss survives exec, so a process started by a larger one would report that one's peak.
    try:
        status = Path("/proc/self/status").read_text(encoding="utf-8")
    except OSError:
        status = ""
    for line in status.splitlines():
        name, _, value = line.partition(":")
        if name == "VmHWM":
            return int(value.split()[0]) * 1024
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
