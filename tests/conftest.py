"""The devices that tests run on, set before JAX starts, and small things that several of them need."""

import os
import signal

import pytest

from gcompute.aot.xla_flags import FAST_COMPILES, add_flags

pytest_plugins = ["selection", "shared_programs"]

# Shells start what runs in the background with Ctrl-C ignored, and nohup with SIGHUP; so would be the programs that
# tests interrupt.
if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)
if hasattr(signal, "SIGHUP") and signal.getsignal(signal.SIGHUP) == signal.SIG_IGN:
    signal.signal(signal.SIGHUP, signal.SIG_DFL)
os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("JAX_NUM_CPU_DEVICES", "8")
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
# XLA's threads: collectives of 8 devices side by side each hold one until all have come (see cli/environment.py).
os.environ.setdefault("NPROC", "64")
os.environ["GCOMPUTE_FAST"] = "0"
# The slow tiers that start `gcompute` as a process of its own compile with optimized machine code.
if "XLA_FLAGS" not in os.environ:
    os.environ["XLA_FLAGS"] = add_flags("", FAST_COMPILES)


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """With `-m oldest`, of the parameters of a test those that its mark names: `@pytest.mark.oldest("ring-2")`.

    Without names all run.
    """
    if config.getoption("markexpr") != "oldest":
        return
    kept, left_out, found = [], [], {}
    for item in items:
        mark, parameters = item.get_closest_marker("oldest"), getattr(item, "callspec", None)
        named = mark.args if mark and parameters else ()
        if named:
            found.setdefault((item.path, item.originalname), set(named)).discard(parameters.id)
        (left_out if named and parameters.id not in named else kept).append(item)
    whole = not any("::" in argument for argument in config.args)
    if whole and (missing := {f"{path.name}::{test}": sorted(ids) for (path, test), ids in found.items() if ids}):
        raise pytest.UsageError(f"marks named `oldest` name parameters that are not there: {missing}")
    items[:] = kept
    config.hook.pytest_deselected(items=left_out)
