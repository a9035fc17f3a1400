"""The CPU kernels compiled for another processor and run by an emulator, a process a call: see kernels_alone.cc."""

import os
import struct
import subprocess
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from gcompute.serve.native import build

DRIVER = Path(__file__).with_suffix(".cc")
# XLA's codes.
DTYPES = {"bool": 1, "int8": 2, "int32": 4, "uint16": 7, "uint32": 8, "float32": 11, "bfloat16": 16}


def compile_alone(compiler: str, to: Path) -> Path:
    """A program of all kernels, which needs no library of its processor's."""
    flags = [flag for flag in build.FLAGS if flag not in ("-shared", "-fPIC")]
    include = ["-I", os.fspath(build.HERE), "-isystem", jax.ffi.include_dir()]
    command = [compiler, *flags, "-static", *include, os.fspath(DRIVER), "-o", os.fspath(to), "-lpthread"]
    subprocess.run(command, check=True)
    return to


class Emulated:
    """Takes the place of `jax.ffi.ffi_call` for kernels whose name ends with `suffix`; calls are eager."""

    def __init__(self, command: Sequence[str], folder: Path, suffix: str, otherwise: Callable[..., Any]) -> None:
        self._command, self._folder, self._suffix, self._otherwise = command, folder, suffix, otherwise

    def __call__(self, name: str, results: Any, **options: Any) -> Callable[..., Any]:
        if not name.endswith(self._suffix):
            return self._otherwise(name, results, **options)
        kernel = name.removeprefix(build.PREFIX).removesuffix(self._suffix)
        return lambda *args, **attributes: self._run(kernel, args, results, attributes)

    def _run(self, kernel: str, args: Sequence[Any], results: Any, attributes: dict[str, Any]) -> Any:
        leaves = jax.tree.leaves(results)
        call, found = self._folder / "call", self._folder / "results"
        message = [_text(kernel), _numbers(len(args))]
        for arg in map(np.asarray, args):
            message += [_shape(arg), np.ascontiguousarray(arg).tobytes()]
        message += [_numbers(len(leaves)), *map(_shape, leaves), _numbers(len(attributes))]
        for name, value in sorted(attributes.items()):
            bits = np.asarray(value)
            message += [_text(name), _numbers(DTYPES[bits.dtype.name]), bits.tobytes().ljust(8, b"\0")]
        call.write_bytes(b"".join(message))
        done = subprocess.run([*self._command, call, found], capture_output=True, text=True, check=False)
        if done.returncode:
            raise RuntimeError(done.stderr)
        data, arrays, at = found.read_bytes(), [], 0
        for leaf in leaves:
            size = leaf.size * leaf.dtype.itemsize
            array = np.frombuffer(data[at : at + size], leaf.dtype)
            arrays.append(jnp.asarray(array.reshape(leaf.shape)))
            at += size
        return jax.tree.unflatten(jax.tree.structure(results), arrays)


def _numbers(*numbers: int) -> bytes:
    return struct.pack(f"<{len(numbers)}q", *numbers)


def _text(text: str) -> bytes:
    return _numbers(len(text)) + text.encode()


def _shape(array: Any) -> bytes:
    return _numbers(DTYPES[array.dtype.name], len(array.shape), *array.shape)
