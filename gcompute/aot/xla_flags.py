"""Which flags in XLA_FLAGS, and which options of a compilation, the jaxlib at hand knows.

jaxlib aborts the process that has an unknown flag in XLA_FLAGS, and flags come and go between its versions. So a flag
is first tried in a process that may abort; the answer is kept by jaxlib's version. An unknown option of one
compilation raises, so that is tried in this process.

Importing this module does not load JAX: XLA_FLAGS must be set before it starts.
"""

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from gcompute.measure.cache import cache_directory

# For programs that are many, small and run for milliseconds (certificates, tests): XLA's own passes stay as they are,
# and so do the program and its collectives; machine code is not optimized, which halves their time.
FAST_COMPILES = "--xla_backend_optimization_level=0"
ANSWERS = "xla_flags.json"
# jaxlib reads the flags when the first client is made.
PROBE = "import jax; jax.devices('cpu')"
PROBE_S = 120
UNKNOWN_FLAG = "Unknown flag"
REFUSED = "INVALID_ARGUMENT"


def known_flags(*flags: str, knows: Callable[[str], bool | None] | None = None) -> tuple[str, ...]:
    """Those of `flags`, as in "--xla_gpu_autotune_level=0", with which jaxlib starts.

    The first call for a flag starts a process, for about a second; its answer is kept in gcompute's cache directory. A
    flag of which the process says nothing, for it fails for another reason, is left out and asked for again next time.

    Args:
      knows: asks jaxlib; default: in a process of its own.
    """
    from importlib.metadata import version  # takes 50 ms, and --help wants no flag

    path, jaxlib = cache_directory() / ANSWERS, version("jaxlib")
    kept = _read(path)
    answers = kept.get(jaxlib, {})
    asked = {flag: (knows or jaxlib_knows)(flag) for flag in flags if flag not in answers}
    told = {flag: answer for flag, answer in asked.items() if answer is not None}
    if told:
        _write(path, {**kept, jaxlib: {**answers, **told}})
    return tuple(flag for flag in flags if {**answers, **told}.get(flag))


def add_flags(present: str, *flags: str) -> str:
    """The value of XLA_FLAGS `present` with those of `flags` that jaxlib knows and whose names it does not hold."""
    names = {flag.split("=")[0] for flag in present.split()}
    missing = [flag for flag in flags if flag.split("=")[0] not in names]
    return " ".join([*present.split(), *known_flags(*missing)])


def jaxlib_knows(flag: str) -> bool | None:
    """Whether a process starts JAX with `flag` alone in XLA_FLAGS; None where it fails for another reason."""
    environment = {**os.environ, "XLA_FLAGS": flag, "JAX_PLATFORMS": "cpu"}
    command = [sys.executable, "-c", PROBE]
    try:
        done = subprocess.run(
            command, env=environment, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=PROBE_S
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    if done.returncode == 0:
        return True
    return False if UNKNOWN_FLAG in done.stderr else None


def known_options(options: Mapping[str, Any], device: Any) -> dict[str, Any]:
    """Those of `options`, as `Lowered.compile` takes them, that the compiler for `device` takes with these values.

    Each is tried on a program that makes a zero. The device may be a description of one that is not here.
    """
    if not options:
        return {}
    import jax
    import jax.numpy as jnp

    zero = jax.jit(lambda: jnp.zeros(()), out_shardings=jax.sharding.SingleDeviceSharding(device)).lower()

    def is_known(name: str) -> bool:
        try:
            zero.compile({name: options[name]})
        except jax.errors.JaxRuntimeError as error:
            if REFUSED not in str(error):
                raise
            return False
        return True

    return {name: value for name, value in options.items() if is_known(name)}


def _read(path: Path) -> dict[str, dict[str, bool]]:
    """{jaxlib's version: {flag: known}}; empty where the file is missing or damaged."""
    try:
        kept = json.loads(path.read_text(encoding="utf-8"))
        return {jaxlib: {flag: bool(known) for flag, known in flags.items()} for jaxlib, flags in kept.items()}
    except (OSError, ValueError, AttributeError, RecursionError):
        return {}


def _write(path: Path, kept: Mapping[str, Mapping[str, bool]]) -> None:
    """Replace the file as a whole; where that cannot be, the next process asks again."""
    with suppress(OSError):
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile("w", dir=path.parent, prefix=ANSWERS, delete=False, encoding="utf-8") as file:
            json.dump(kept, file, indent=1, sort_keys=True)
        os.replace(file.name, path)
