"""Start a server for a checkpoint in a process of its own, and end it whatever happens."""

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from gcompute.cli.environment import HUGE_PAGES, fast_environment
from gcompute.config.model import ModelConfig
from gcompute.config.presets import model_from_dict
from gcompute.hardware.chip import Chip

END_WAIT_S = 30.0


@dataclass(frozen=True, slots=True, kw_only=True)
class ServedCheckpoint:
    """A server that answers. chip: the device it runs on, measured, if that was asked for."""

    url: str
    name: str
    step: int
    model: ModelConfig
    slots: int
    max_context: int
    precision: str
    chip: Chip | None


class CheckpointServer:
    """The server's process; `stats` are the engine's, after `stop`."""

    def __init__(self, process: subprocess.Popen[str], noise: IO[bytes]):
        self.process = process
        self.stats: dict[str, Any] | None = None
        self._noise = noise

    def wait_ready(self, doing: Callable[[str], None]) -> ServedCheckpoint:
        """Raises ValueError where it cannot serve."""
        while (answer := self._read()) is not None:
            if "error" in answer:
                raise ValueError(answer["error"])
            if "ready" in answer:
                ready = answer["ready"]
                ready["model"] = model_from_dict(ready["model"], source="the server")
                ready["chip"] = Chip(**ready["chip"]) if ready["chip"] else None
                return ServedCheckpoint(**ready)
            doing(answer.get("doing") or f"notice: {answer.get('notice')}")
        raise ValueError(f"the server did not start: {self.last_words()}")

    def last_words(self) -> str:
        """How the process ended, and the last that it said on standard error."""
        self._noise.seek(0)
        said = self._noise.read().decode("utf-8", errors="replace").strip().splitlines()
        status = self.process.poll()
        how = "it runs" if status is None else f"exit status {status}"
        return f"{how}, {said[-1].strip()[:200]}" if said else f"{how}."

    def stop(self) -> None:
        """Ask it to end, and wait for that."""
        assert self.process.stdin is not None
        with suppress(OSError):
            self.process.stdin.write("stop\n")
            self.process.stdin.flush()
            while (answer := self._read()) is not None:
                self.stats = answer.get("stats", self.stats)

    def _read(self) -> dict[str, Any] | None:
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        return json.loads(line) if line else None


@contextmanager
def checkpoint_server(checkpoint: Path, serve: dict[str, Any], *, measure: bool) -> Iterator[CheckpointServer]:
    """A process that serves `checkpoint` while the block runs; measure: the roofline of its device too."""
    environment = dict(os.environ)
    with suppress(OSError):
        environment = fast_environment(environment, HUGE_PAGES.read_text(encoding="utf-8")) or environment
    with tempfile.TemporaryFile() as noise:
        process = subprocess.Popen(
            [sys.executable, "-m", "gcompute.cli.bench_worker"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=noise,
            text=True,
            encoding="utf-8",
            env=environment,
        )
        try:
            assert process.stdin is not None
            with suppress(BrokenPipeError):
                process.stdin.write(
                    json.dumps({"checkpoint": str(checkpoint), "serve": serve, "measure": measure}) + "\n"
                )
                process.stdin.flush()
            server = CheckpointServer(process, noise)
            yield server
            server.stop()
            with suppress(subprocess.TimeoutExpired):
                process.wait(END_WAIT_S)
        finally:
            process.kill()
            process.wait()
            for pipe in (process.stdin, process.stdout):
                with suppress(OSError):
                    if pipe is not None:
                        pipe.close()
