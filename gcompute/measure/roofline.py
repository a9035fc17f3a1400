"""This machine's measured roofline: how fast it multiplies matrices, and how fast it reads memory."""

import contextlib
import dataclasses
import json
import math
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import psutil
from jaxtyping import Array, Float

from gcompute.measure.machine import Machine, host_memory_bytes, look
from gcompute.measure.timing import measure

DTYPES = {"float32": jnp.float32, "bfloat16": jnp.bfloat16}
CPU_SIZES, ACCELERATOR_SIZES = (1024, 2048), (4096, 8192)
# Well past the last level cache of any processor so far, yet little to ask of a small machine.
CPU_READ_BYTES, ACCELERATOR_READ_BYTES = 256 << 20, 1 << 30
MIN_REPEATS, MAX_REPEATS = 3, 50
# On a quiet machine the median of a few repeats lies this near to the shortest; another round is measured again.
QUIET_SPREAD = 0.1
# Of the host's processor time just before measuring, what others may use.
QUIET_LOAD, LOOK_S = 0.2, 0.2
MAX_ROUNDS = 3
# One that was measured beside other work each time is not believed for ever: a job may have run all day.
DOUBTED_S = 3600.0
MEMORY = "memory"
PROGRESS_NAME = "measuring the roofline"

# What is done, steps done, steps in all.
Progress = Callable[[str, int, int], None]


@dataclass(frozen=True, slots=True, kw_only=True)
class MeasuredRoofline:
    """Ceilings of one device, as measured.

    matmul_flops_per_s: by dtype of the operands; results are float32. "bfloat16" is bfloat16 in, float32 out.
    memory_bytes_per_s: bytes read a second from an array that no cache holds.
    On CPU one device is all the cores that XLA uses. `num_devices_measured` is 1: nothing else ran meanwhile.
    spread: by dtype and "memory", how far the median of a ceiling's repeats lies above the shortest, as a share of it.
    load: share of the host's processor time that others used just before (the load average still knows of what ended).
    num_sessions: how often it was measured, see `load_or_measure`; measured_at_s: when last, in seconds since 1970.
    """

    matmul_flops_per_s: dict[str, float]
    memory_bytes_per_s: float
    backend: str
    device_kind: str
    num_devices_measured: int
    spread: dict[str, float]
    load: float
    num_sessions: int
    measured_at_s: float

    @property
    def disturbed(self) -> str | None:
        """Why the ceilings may be too low: other work here, or repeats that differ; None where neither was seen."""
        reasons = []
        if self.load > QUIET_LOAD:
            reasons.append(f"other work took {self.load:.0%} of the processors")
        reasons += [f"repeats of {name} differ by {by:.0%}" for name, by in self.spread.items() if by > QUIET_SPREAD]
        return ", ".join(reasons) or None

    def to_dict(self) -> dict[str, Any]:
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> "MeasuredRoofline":
        """The inverse of `to_dict`.

        Raises:
          ValueError: a field is missing, unknown or of the wrong kind, or a ceiling is not above 0.
        """
        try:
            roofline = cls(
                **{
                    **values,
                    "matmul_flops_per_s": {name: float(values["matmul_flops_per_s"][name]) for name in DTYPES},
                    "memory_bytes_per_s": float(values["memory_bytes_per_s"]),
                    "num_devices_measured": int(values["num_devices_measured"]),
                    "spread": {name: float(values["spread"][name]) for name in (*DTYPES, MEMORY)},
                    "load": float(values["load"]),
                    "num_sessions": int(values["num_sessions"]),
                    "measured_at_s": float(values["measured_at_s"]),
                }
            )
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            raise ValueError(f"not a measured roofline ({type(error).__name__}: {error}). Measure it again.") from None
        ceilings = (*roofline.matmul_flops_per_s.values(), roofline.memory_bytes_per_s)
        if not all(math.isfinite(ceiling) and ceiling > 0 for ceiling in ceilings):
            raise ValueError(f"a measured roofline has ceilings above 0, got {ceilings}. Measure it again.")
        return roofline


def matmul(a_MD: Float[Array, "m d"], w_DF: Float[Array, "d f"]) -> Float[Array, "m f"]:
    """a @ w with a float32 result: the form of every product of the model, and on CPU the fast one for bfloat16."""
    return jnp.einsum("md,df->mf", a_MD, w_DF, preferred_element_type=jnp.float32)


def measure_roofline(
    *,
    seconds: float = 3.0,
    progress: Progress | None = None,
    sizes: tuple[int, ...] | None = None,
    read_bytes: int | None = None,
) -> MeasuredRoofline:
    """Measure this process's first device within about `seconds`, compiling included.

    A ceiling is the best over sizes of the median over repeats (at least 3): 2 size^3 / time for square matrices, bytes
    / time for a sum over one array. A size that would overrun its share of the time is left out. Where repeats disagree
    something else was running: the ceiling is measured again, up to 3 times, and the best round counts.

    Args:
      progress: called with what is measured, how many ceilings are done, and how many there are.
      sizes: of the square matrices, ascending; `read_bytes`: of the array to sum. Defaults suit the backend.

    Raises:
      ValueError: seconds is not above 0, or there are no sizes.
    """
    if not seconds > 0:
        raise ValueError(f"seconds must be above 0, got {seconds}.")
    device = jax.local_devices()[0]
    on_cpu = device.platform == "cpu"
    sizes = tuple(sorted(sizes if sizes is not None else CPU_SIZES if on_cpu else ACCELERATOR_SIZES))
    if not sizes or sizes[0] < 1:
        raise ValueError(f"sizes must name at least one size above 0, got {sizes}.")
    if read_bytes is None:
        # The sum holds its input alone; an eighth leaves a small machine room to breathe.
        read_bytes = min(CPU_READ_BYTES, host_memory_bytes()[1] // 8) if on_cpu else ACCELERATOR_READ_BYTES
    report = progress or (lambda what, done, total: None)
    num_ceilings = len(DTYPES) + 1
    share_s = seconds / num_ceilings
    flops_per_s, spread = {}, {}
    load = _load()
    with jax.default_device(device):
        for index, (name, dtype) in enumerate(DTYPES.items()):
            report(PROGRESS_NAME, index, num_ceilings)
            flops_per_s[name], spread[name] = _best_round(partial(_matmul_flops_per_s, dtype, sizes, share_s=share_s))
        report(PROGRESS_NAME, len(DTYPES), num_ceilings)
        memory_bytes_per_s, spread[MEMORY] = _best_round(partial(_read_bytes_per_s, read_bytes, share_s=share_s))
    report(PROGRESS_NAME, num_ceilings, num_ceilings)
    return MeasuredRoofline(
        matmul_flops_per_s=flops_per_s,
        memory_bytes_per_s=memory_bytes_per_s,
        backend=jax.default_backend(),
        device_kind=device.device_kind,
        num_devices_measured=1,
        spread=spread,
        load=load,
        num_sessions=1,
        measured_at_s=time.time(),
    )


def load_or_measure(
    path: Path | str, *, seconds: float = 3.0, progress: Progress | None = None, again: bool = False
) -> MeasuredRoofline:
    """The roofline of this machine from the JSON file `path`, measured and added to it where it is missing.

    The file holds one entry for each machine, backend and version (`cache_key`). One that does not parse is measured
    over, and a file that cannot be written loses the cache, not the measurement. One that was measured beside other
    work is measured again when it is next asked for, up to 3 times in all and then once an hour; what else runs only
    lowers a ceiling, so the higher of both counts.
    """
    path, key = Path(path), cache_key(look())
    entries = _read_entries(path)
    kept = None
    if not again and key in entries:
        with contextlib.suppress(ValueError):
            kept = MeasuredRoofline.from_dict(entries[key])
    if kept:
        age_s = abs(time.time() - kept.measured_at_s)
        if kept.disturbed is None or (kept.num_sessions >= MAX_ROUNDS and age_s < DOUBTED_S):
            return kept
    roofline = measure_roofline(seconds=seconds, progress=progress)
    if kept:
        roofline = _higher(kept, roofline)
    with contextlib.suppress(OSError):
        _write_atomically(path, json.dumps({**entries, key: roofline.to_dict()}, indent=2) + "\n")
    return roofline


def cache_key(machine: Machine) -> str:
    """What a measured roofline depends on: processor, instruction set, cores, device, jaxlib and huge pages."""
    processor = (machine.cpu, machine.instruction_set, f"{machine.cores} cores")
    parts = (*processor, machine.backend, machine.device_kind, f"jaxlib {machine.jaxlib}")
    pages = "huge pages" if machine.uses_huge_pages else "small pages"
    return ", ".join(str(part) for part in (*parts, pages))


def _higher(one: MeasuredRoofline, other: MeasuredRoofline) -> MeasuredRoofline:
    """The higher of each ceiling of two measurements of one machine, with its spread; the lower load of the two."""
    flops_per_s, spread = {}, {}
    for name in DTYPES:
        best = max((one, other), key=lambda roofline: roofline.matmul_flops_per_s[name])
        flops_per_s[name], spread[name] = best.matmul_flops_per_s[name], best.spread[name]
    best = max((one, other), key=lambda roofline: roofline.memory_bytes_per_s)
    return dataclasses.replace(
        other,
        matmul_flops_per_s=flops_per_s,
        memory_bytes_per_s=best.memory_bytes_per_s,
        spread={**spread, MEMORY: best.spread[MEMORY]},
        load=min(one.load, other.load),
        num_sessions=one.num_sessions + other.num_sessions,
    )


def _load() -> float:
    return psutil.cpu_percent(interval=LOOK_S) / 100


def _best_round(measure_once: Callable[[], tuple[float, float]]) -> tuple[float, float]:
    """The highest of up to MAX_ROUNDS rates, and the spread of its round; the first whose repeats agree is the last."""
    rounds = []
    for _ in range(MAX_ROUNDS):
        rounds.append(measure_once())
        if rounds[-1][1] <= QUIET_SPREAD:
            break
    return max(rounds)


def _matmul_flops_per_s(dtype: Any, sizes: tuple[int, ...], *, share_s: float) -> tuple[float, float]:
    program = jax.jit(matmul)
    deadline_s = time.perf_counter() + share_s
    best = (0.0, 0.0)
    for size in sizes:
        if best[0] and MIN_REPEATS * 2 * size**3 / best[0] > deadline_s - time.perf_counter():
            break
        key_a, key_w = jax.random.split(jax.random.key(0))
        a, w = (jax.random.normal(key, (size, size), jnp.float32).astype(dtype) for key in (key_a, key_w))
        median_s, spread = _median_s(partial(program, a, w), _until(deadline_s, size, sizes))
        best = max(best, (2 * size**3 / median_s, spread))
    return best


def _until(deadline_s: float, size: int, sizes: tuple[int, ...]) -> float:
    """When to stop repeating: the smaller sizes leave three quarters of what is left to the larger."""
    left_s = deadline_s - time.perf_counter()
    return deadline_s if size == sizes[-1] else deadline_s - 0.75 * left_s


def _read_bytes_per_s(num_bytes: int, *, share_s: float) -> tuple[float, float]:
    deadline_s = time.perf_counter() + share_s
    values = jnp.ones((max(1, num_bytes // 4),), jnp.float32)
    median_s, spread = _median_s(partial(jax.jit(jnp.sum), values), deadline_s)
    return values.nbytes / median_s, spread


def _median_s(run: Callable[[], Any], deadline_s: float) -> tuple[float, float]:
    """The median time of repeats until the deadline, and how far it lies above the shortest, as a share of that."""
    samples = list(measure(run, repeats=MIN_REPEATS, warmup=2).samples_s)
    while time.perf_counter() < deadline_s and len(samples) < MAX_REPEATS:
        samples += measure(run, repeats=1, warmup=0).samples_s
    median_s = statistics.median(samples)
    return median_s, median_s / min(samples) - 1


def _read_entries(path: Path) -> dict[str, Any]:
    try:
        entries = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return {}
    return entries if isinstance(entries, dict) else {}


def _write_atomically(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    descriptor, temporary = tempfile.mkstemp(dir=path.parent, prefix=path.name, suffix=".tmp")
    try:
        with os.fdopen(descriptor, "w", encoding="utf-8") as file:
            file.write(text)
        os.replace(temporary, path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise
