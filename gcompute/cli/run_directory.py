"""The directory of one run: made, kept to one writer, and read back.

It holds run.json, tokenizer.json, metrics.jsonl, loss.png, checkpoints/, a lock and, where asked for,
samples.jsonl and tensorboard/.
"""

import errno
import fcntl
import json
import os
import re
import stat
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, fields
from functools import partial
from pathlib import Path
from typing import IO, Any

from gcompute.config.model import ModelConfig
from gcompute.config.plain import from_plain
from gcompute.config.train import DataConfig, OptimizerConfig, RunConfig, TrainConfig

RUN = "run.json"
LOCK = ".lock"
MOST_DIGITS = 20
# What `make_directory`, `write_whole` and `Tokenizer.save` leave where their process is killed.
WRITTEN = r"run\.json|(?:metrics|samples)\.jsonl|loss\.png|session\.json|serving\.json|report\.html"
LEFT = re.compile(rf"\.write-\d+|(?:{WRITTEN})\.\d+\.tmp|\.tokenizer\.json\.[0-9a-f]{{32}}\.tmp")
CHOSEN = "chosen"
SECTIONS: dict[str, type] = {
    "model": ModelConfig,
    "optimizer": OptimizerConfig,
    "train": TrainConfig,
    "data": DataConfig,
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Choices:
    """What a run left open and was settled for the device that it began on: why, by field, and for which mesh."""

    mesh: str
    reasons: dict[str, str]


def run_json(run: RunConfig, choices: Choices) -> str:
    """What run.json holds: the configuration with every choice made, and which of it was chosen for the device."""
    return json.dumps({**run.to_dict(), CHOSEN: asdict(choices)}, indent=2) + "\n"


def stored_choices(out: Path) -> Choices | None:
    """The choices that run.json tells of, or else the newest checkpoint that does; None with neither."""
    from gcompute.model.pretrained import CHECKPOINTS, saved_steps

    steps = reversed(saved_steps(out / CHECKPOINTS))
    for read in (partial((out / RUN).read_text, encoding="utf-8-sig"), *(partial(_meta, out, step) for step in steps)):
        with suppress(OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
            chosen = json.loads(read())[CHOSEN]
            reasons = {str(name): str(reason) for name, reason in chosen["reasons"].items()}
            if reasons.keys() <= {field.name for field in fields(TrainConfig)}:
                return Choices(mesh=str(chosen["mesh"]), reasons=reasons)
    return None


def _meta(out: Path, step: int) -> str:
    """What a checkpoint says of its run.

    Raises:
      ValueError: it is damaged.
      OSError: it cannot be read.
    """
    from gcompute.model.checksums import verify
    from gcompute.model.pretrained import CHECKPOINTS, META

    directory = out / CHECKPOINTS / str(step)
    verify(directory, (META,))
    return (directory / META / "metadata").read_text(encoding="utf-8")


def make_directory(out: Path) -> None:
    """Create a run directory and see that it can be written.

    Raises:
      ValueError: it cannot be created or written.
    """
    probe = out / f".write-{os.getpid()}"
    try:
        out.mkdir(parents=True, exist_ok=True)
        probe.unlink(missing_ok=True)
        probe.open("xb").close()
        probe.unlink()
    except OSError as error:
        raise ValueError(f"--out {out} cannot be written: {error.strerror}. Choose another directory.") from None


def check_outside(directory: Path, what: str, data: str, flag: str = "--data") -> None:
    """Refuse to write into the directory that the text is read from: what is written would be read as text next time.

    Raises:
      ValueError: `directory` lies in the directory `data`, and not under a hidden name, which the data leaves out.
    """
    root = Path(data)
    if data == "stdlib" or not root.is_dir():
        return
    inside, outside = directory.resolve(), root.resolve()
    if inside.is_relative_to(outside) and not any(part.startswith(".") for part in inside.relative_to(outside).parts):
        raise ValueError(
            f"{what} {directory} lies in {flag} {data}, and would be read as text next time. Choose a place outside,"
            " or one whose name begins with a dot."
        )


@contextmanager
def only_writer(out: Path) -> Iterator[None]:
    """Hold the lock of a run directory; the system lets go of it when the process ends, however it ends.

    What a killed process left half-written is removed, and nothing else.

    Raises:
      ValueError: another process holds it, or something else lies in its place.
    """
    with _open_lock(out / LOCK) as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            lock.seek(0)
            holder = lock.read().strip() or "unknown"
            raise ValueError(
                f"another process ({holder}) is training in {out}. Wait for it or stop it, or choose another --out."
            ) from None
        except OSError:
            pass  # a file system without locks: nothing is known, so nothing is refused
        lock.truncate(0)
        lock.write(str(os.getpid()))
        lock.flush()
        for path in out.iterdir():
            if LEFT.fullmatch(path.name):
                path.unlink(missing_ok=True)
        yield


def _open_lock(path: Path) -> IO[str]:
    """The lock file: a number of a process, or empty.

    Raises:
      ValueError: what lies there is a link, no file, or a file that holds something else.
    """
    try:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND | os.O_NOFOLLOW | os.O_CLOEXEC, 0o666)
    except OSError as error:
        if error.errno not in (errno.ELOOP, errno.EISDIR):
            raise
    else:
        lock = os.fdopen(descriptor, "r+", encoding="utf-8", errors="replace")
        if stat.S_ISREG(os.fstat(descriptor).st_mode) and re.fullmatch("[0-9]*", lock.read(MOST_DIGITS + 1).strip()):
            return lock
        lock.close()
    raise ValueError(f"{path} is not the lock of a run, and is left as it is. Move it away, or choose another --out.")


def run_from_plain(values: Any, *, source: str) -> RunConfig:
    """A RunConfig from what `RunConfig.to_dict` gave.

    Raises:
      ValueError: a section is missing, or a field is unknown or wrong.
    """
    if not isinstance(values, Mapping) or not values.keys() >= SECTIONS.keys():
        raise ValueError(f"{source} lacks one of the sections {', '.join(SECTIONS)}.")
    parts = {
        name: kind(**from_plain(kind, values[name], source=f"{source} [{name}]")) for name, kind in SECTIONS.items()
    }
    return RunConfig(**parts)


def stored_run(out: Path) -> tuple[RunConfig, str | None] | None:
    """The configuration of the run in `out`, and a notice where it was not to be had from run.json.

    Every checkpoint holds the configuration too. None when there is no run.

    Raises:
      ValueError: neither run.json nor a checkpoint can be read.
    """
    from gcompute.model.pretrained import CHECKPOINTS, saved_steps

    path = out / RUN
    found = path.is_file()
    reason = "is missing"
    if found:
        try:
            return run_from_plain(json.loads(path.read_text(encoding="utf-8-sig")), source=str(path)), None
        except (OSError, ValueError, RecursionError) as error:
            reason = f"is damaged ({error})"
    steps = saved_steps(out / CHECKPOINTS)
    for step in reversed(steps):
        with suppress(OSError, ValueError, RecursionError):
            run = run_from_plain(json.loads(_meta(out, step)), source=f"checkpoint {step}")
            return run, f"{path} {reason}: the configuration is taken from checkpoint {step}."
    if found or steps:
        raise ValueError(f"{path} {reason}. Copy it back, or start again in another --out.")
    return None
