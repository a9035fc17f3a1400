"""Set the process up for speed on CPU: restart once, visibly, with huge pages for large allocations.

XLA on CPU takes its large temporaries from malloc, page by page; with 4 KiB pages the page faults alone can cost a
third of a training step. glibc backs them with 2 MiB pages when GLIBC_TUNABLES says so before the process starts.
"""

import logging
import os
import re
import sys
import tempfile
import warnings
from pathlib import Path

from gcompute.cli.tested_jax import warn_if_untested
from gcompute.measure.cache import cache_directory

TUNABLE = "glibc.malloc.hugetlb=1"
HUGE_PAGES = Path("/sys/kernel/mm/transparent_hugepage/enabled")
SWITCH = "GCOMPUTE_FAST"
THREADS_A_FAKE_DEVICE = 8
MIN_COMPILE_S = "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"


def fast_environment(environment: dict[str, str], huge_pages: str) -> dict[str, str] | None:
    """The environment to restart with, or None when there is nothing to gain or it is set already."""
    tunables = environment.get("GLIBC_TUNABLES", "")
    if "hugetlb" in tunables or environment.get(SWITCH) == "0":
        return None
    if not any(f"[{mode}]" in huge_pages for mode in ("madvise", "always")):
        return None
    return {**environment, "GLIBC_TUNABLES": ":".join(filter(None, (tunables, TUNABLE)))}


def restart_fast(wanted: bool) -> None:
    """Re-execute this very command once with huge pages, unless not wanted, not possible or already done."""
    if not wanted or not sys.platform.startswith("linux") or "jax" in sys.modules:
        return
    try:
        environment = fast_environment(dict(os.environ), HUGE_PAGES.read_text(encoding="utf-8"))
    except OSError:
        return
    if environment is None:
        return
    print(f"restarting once with GLIBC_TUNABLES={environment['GLIBC_TUNABLES']} (--no-fast: don't)", file=sys.stderr)
    sys.stdout.flush()
    sys.stderr.flush()
    os.execve(sys.executable, [sys.executable, *sys.orig_argv[1:]], environment)


def quiet_backends() -> None:
    """Keep C++ start-up chatter off the terminal, and what Orbax leaves behind; errors still show.

    Every command that uses JAX calls this before it starts, and so it also names a JAX that is newer than any tested.
    """
    warn_if_untested()
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
    threads_for_fake_devices()
    # Where one file of a checkpoint cannot be written or read, the tasks for the others find their event loop closed,
    # and each would print a traceback. The error itself arrives as an exception and is told in one line.
    logging.getLogger("asyncio").setLevel(logging.CRITICAL)
    warnings.filterwarnings("ignore", r"coroutine .* was never awaited", RuntimeWarning)
    if sys.unraisablehook is sys.__unraisablehook__:
        sys.unraisablehook = lambda unraisable: None


def threads_for_fake_devices() -> None:
    """Give XLA enough threads where a CPU stands for several devices; call before JAX starts.

    XLA on CPU starts collectives that do not depend on each other side by side, and each holds a thread until all its
    devices have come. With as many threads as devices, the default, a pipeline's transfer and the all-to-all of its
    stages can hold them all and wait for each other for ever (seen: jaxlib 0.7.2 and 0.10.2). It reads NPROC.
    """
    flag = re.search(r"--xla_force_host_platform_device_count=(\d+)", os.environ.get("XLA_FLAGS", ""))
    num = int(flag[1]) if flag else int(os.environ.get("JAX_NUM_CPU_DEVICES") or 1)
    if num > 1:
        os.environ.setdefault("NPROC", str(THREADS_A_FAKE_DEVICE * num))


def use_compilation_cache() -> None:
    """Keep compiled programs between processes: in JAX_COMPILATION_CACHE_DIR, or else beside all that is cached.

    Where that cannot be written programs are compiled anew each time.
    """
    import jax

    directory = "jax_compilation_cache_dir"
    if getattr(jax.config, directory) is None:
        kept = cache_directory() / "xla"
        try:
            kept.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryFile(dir=kept):
                pass
        except OSError:
            return
        jax.config.update(directory, str(kept))
    if MIN_COMPILE_S not in os.environ:
        jax.config.update(MIN_COMPILE_S.lower(), 0.3)
