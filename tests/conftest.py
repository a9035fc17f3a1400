"""The devices that tests run on, set before JAX starts, and small things that several of them need."""

import os

os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("JAX_NUM_CPU_DEVICES", "8")
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
# The tests' own programs are small and many: keeping each on disk would cost more than compiling it.
os.environ["GCOMPUTE_FAST"] = "0"
# Tests compile far more than they run: unoptimised machine code halves their time. XLA's own passes all run, and so
# do the slow tiers that start `gcompute` as a process of its own.
os.environ.setdefault("XLA_FLAGS", "--xla_backend_optimization_level=0")
