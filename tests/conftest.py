"""The devices that tests run on, set before JAX starts, and small things that several of them need."""

import os

os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("JAX_NUM_CPU_DEVICES", "8")
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
# The tests' own programs are small and many: keeping each on disk would cost more than compiling it.
os.environ["GCOMPUTE_FAST"] = "0"
