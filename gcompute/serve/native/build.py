"""Compile the kernels for the processor that is here, once, and tell XLA of them.

The library lies in the cache under a name made of all that went into it, so that another processor, compiler or jaxlib
makes another. Without a compiler serving goes on by XLA's own products.
"""

import ctypes
import hashlib
import os
import platform
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from functools import cache as remember
from pathlib import Path

import jax

from gcompute.measure.cache import cache_directory
from gcompute.measure.instructions import CPUINFO_FILE

HERE = Path(__file__).parent
SOURCE = HERE / "kernels.cc"
PARTS = tuple(sorted((*HERE.glob("*.cc"), *HERE.glob("*.h"))))
KERNELS = (
    *("product_float32", "product_bfloat16", "product_int8"),
    *("gated_product_float32", "gated_product_bfloat16"),
    *("attention_paged", "norm_add_rms", "cells_store", "cells_place", "choice_largest"),
)
PREFIX = "gcompute_"
FLAGS = ("-std=c++17", "-O3", "-ffp-contract=fast", "-shared", "-fPIC", "-w")
NATIVE = ("-march=native", "-mcpu=native")
# Set to 0 to serve by XLA's products alone.
SWITCH = "GCOMPUTE_NATIVE"
# More flags for the compiler, to measure what a lesser processor would have: -mno-avx512f makes kernels for AVX2.
MORE_FLAGS = "GCOMPUTE_NATIVE_FLAGS"
SECONDS = 120


class BuildError(RuntimeError):
    """The kernels cannot be compiled here; the message says why."""


def available() -> bool:
    """Whether XLA on CPU can call the kernels."""
    return why_not() is None


@remember
def why_not() -> str | None:
    """Why it cannot, or None; the first call compiles and registers them."""
    if os.environ.get(SWITCH) == "0":
        return f"{SWITCH}=0"
    try:
        register(build(compiler(), cache_directory() / "native", os.environ.get(MORE_FLAGS, "").split()))
    except (BuildError, OSError) as error:
        return str(error)
    return None


def compiler() -> str:
    """The C++ compiler: $CXX, or the first of c++, g++ and clang++.

    Raises:
      BuildError: there is none.
    """
    for name in (os.environ.get("CXX"), "c++", "g++", "clang++"):
        found = shutil.which(name) if name else None
        if found:
            return found
    raise BuildError("no C++ compiler was found (install g++ or clang++, or set CXX)")


def build(command: str, directory: Path, flags: Sequence[str] = ()) -> Path:
    """The library that `command` makes of the kernels, from `directory` if it lies there; `flags` come last.

    Raises:
      BuildError: the compiler fails, with its first error.
      OSError: the directory cannot be written.
    """
    include = jax.ffi.include_dir()
    version = subprocess.run([command, "--version"], capture_output=True, text=True, check=False).stdout
    texts = [path.read_text(encoding="utf-8") for path in PARTS]
    made_of = (*texts, version, *FLAGS, *flags, _processor(), include, jax.__version__)
    name = hashlib.blake2b("\0".join(made_of).encode(), digest_size=12).hexdigest()
    library = directory / f"kernels-{name}.so"
    if library.exists():
        return library
    directory.mkdir(parents=True, exist_ok=True)
    errors = ""
    for native in NATIVE:
        # Other processes may make the same library: each writes its own file, and the last one there wins.
        with tempfile.TemporaryDirectory(dir=directory) as own:
            made = Path(own) / library.name
            files = [os.fspath(SOURCE), "-o", os.fspath(made)]
            arguments = [command, *FLAGS, native, *flags, "-isystem", include, *files]
            if sys.platform == "darwin":
                arguments += ["-undefined", "dynamic_lookup"]
            try:
                done = subprocess.run(arguments, capture_output=True, text=True, check=False, timeout=SECONDS)
            except subprocess.TimeoutExpired as error:
                raise BuildError(f"{command} took more than {SECONDS} s") from error
            if done.returncode == 0:
                made.replace(library)
                return library
            errors = errors or done.stderr
    first = next((line for line in errors.splitlines() if "error" in line), errors.strip()[:200])
    raise BuildError(f"{command} failed: {first}")


def register(library: Path, suffix: str = "") -> None:
    """Tell XLA of every kernel in a library as `target` names it, for its CPU backend.

    Raises:
      OSError: it cannot be loaded.
    """
    loaded = ctypes.CDLL(os.fspath(library))
    for name in KERNELS:
        capsule = jax.ffi.pycapsule(getattr(loaded, name))
        jax.ffi.register_ffi_target(target(name, suffix), capsule, platform="cpu")


def target(name: str, suffix: str = "") -> str:
    """What XLA calls a kernel."""
    return f"{PREFIX}{name}{suffix}"


def _processor() -> str:
    """What decides which instructions there are."""
    try:
        described = CPUINFO_FILE.read_text(encoding="utf-8")
    except OSError:
        described = ""
    lines = {line for line in described.splitlines() if re.match(r"(model name|flags|Features|CPU part)\b", line)}
    return "\n".join([platform.machine(), platform.processor(), *sorted(lines)])
