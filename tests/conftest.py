"""The devices that tests run on, set before JAX starts, and small things that several of them need."""

import os
import signal

pytest_plugins = ["selection", "shared_programs"]

# Shells start what runs in the background with Ctrl-C ignored, and so would be the programs that tests interrupt.
if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)
os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("JAX_NUM_CPU_DEVICES", "8")
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
# XLA's threads: collectives of 8 devices side by side each hold one until all have come (see cli/environment.py).
os.environ.setdefault("NPROC", "64")
os.environ["GCOMPUTE_FAST"] = "0"
# Tests compile far more than they run: unoptimised machine code halves their time. XLA's own passes all run, and so
# do the slow tiers that start `gcompute` as a process of its own.
os.environ.setdefault("XLA_FLAGS", "--xla_backend_optimization_level=0")
