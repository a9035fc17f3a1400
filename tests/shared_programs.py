"""Programs are compiled once a run, and each test file gives back the memory that it took.

The workers of a run, and the processes that their tests start, share one cache of compiled programs on disk, made anew
for each run, so that nothing depends on what ran before. What JAX keeps of a test file's programs in memory is dropped
when its last test ends: over thousands of tests it comes to gigabytes, which each garbage collection walks.
"""

import gc
import os
import shutil
import sys
import tempfile
from collections.abc import Iterator

import pytest

CACHE = {
    "JAX_COMPILATION_CACHE_DIR": "",
    "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
    "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "-1",
}
# When this is imported, for JAX reads the environment when it is imported, and workers and processes inherit it.
_made = ""
if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
    _made = tempfile.mkdtemp(prefix="gcompute-tests-")
    os.environ.update(CACHE, JAX_COMPILATION_CACHE_DIR=_made)


def pytest_unconfigure(config: pytest.Config) -> None:
    if _made:
        shutil.rmtree(_made, ignore_errors=True)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_teardown(item: pytest.Item, nextitem: pytest.Item | None) -> Iterator[None]:
    yield
    if nextitem is None or nextitem.path != item.path:
        if (jax := sys.modules.get("jax")) is not None:
            jax.clear_caches()
        gc.collect()
        # What is left is there for good: no later collection need walk it.
        gc.freeze()
