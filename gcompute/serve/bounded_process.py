"""A process for work that may never end: one JSON line in, one out, each within a time, and killed after it."""

import json
import os
import queue
import selectors
import subprocess
import sys
import threading
import time
import weakref
from collections.abc import Mapping
from contextlib import suppress
from typing import Any

# To start Python on a machine that is busy.
START_S = 30.0
# For the work of others: before another process is started, and the most after that.
PATIENCE_S = 0.2
WAIT_S = 30.0
PIECE_BYTES = 1 << 20


class OutOfTime(Exception):
    """The process did not answer in time, or ended; it is gone, and the next call starts another."""


class BoundedPool:
    """Up to `most` processes of one kind, for any thread; another one starts only where those there are slow.

    So whoever sends what takes all of its time holds up few others. hello: what the first process answered. wait_s: the
    longest that a call waits for the work of others.

    Raises:
      ValueError: the first process does not start.
    """

    def __init__(self, module: str, first: Mapping[str, Any], *, most: int = 4, wait_s: float | None = None):
        self._module, self._first = module, first
        self._wait_s = min(WAIT_S, wait_s or WAIT_S)
        self._idle: queue.LifoQueue[BoundedProcess] = queue.LifoQueue()
        self._to_start = threading.Semaphore(most - 1)
        process = BoundedProcess(module, first)
        self.hello = process.hello
        self._idle.put(process)

    def ask(self, question: Mapping[str, Any], *, time_s: float) -> dict[str, Any]:
        """The answer to one line, which is given its time once a process is free.

        Raises:
          OutOfTime: there is none. TimeoutError: others take too long. ValueError: no process can be started.
        """
        process = self._take()
        try:
            return process.ask(question, time_s=time_s)
        finally:
            self._idle.put(process)

    def _take(self) -> "BoundedProcess":
        with suppress(queue.Empty):
            return self._idle.get(timeout=PATIENCE_S)
        if self._to_start.acquire(blocking=False):
            try:
                return BoundedProcess(self._module, self._first)
            except BaseException:
                self._to_start.release()
                raise
        try:
            return self._idle.get(timeout=self._wait_s)
        except queue.Empty:
            raise TimeoutError(f"every process of {self._module} is busy.") from None


class BoundedProcess:
    """`python -m module`, kept running, one line at a time; a process that is killed is replaced at the next call.

    For one thread at a time. first: the line that every such process begins with; `hello` is its answer. It ends with
    this process, however that ends: its input does.

    Raises:
      ValueError: the process does not start.
    """

    def __init__(self, module: str, first: Mapping[str, Any]):
        self._module = module
        self._first = first
        self.running: subprocess.Popen[bytes] | None = None
        self._end = lambda: None
        self.hello = self._start()

    def ask(self, question: Mapping[str, Any], *, time_s: float) -> dict[str, Any]:
        """The answer to one line.

        Raises:
          OutOfTime: there is none. ValueError: no process can be started.
        """
        if self.running is None or self.running.poll() is not None:
            self._start()
        return self._exchange(question, time_s)

    def _start(self) -> dict[str, Any]:
        self._kill()
        try:
            # The child finds what this process does, however it was started; it is in no terminal's group.
            process = subprocess.Popen(
                [sys.executable, "-m", self._module],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
                env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
                start_new_session=True,
            )
        except OSError as error:
            raise ValueError(f"no process can be started for {self._module}: {error.strerror}.") from None
        self.running = process
        self._end = weakref.finalize(self, _end, process)
        for pipe in (process.stdin, process.stdout):
            assert pipe is not None
            os.set_blocking(pipe.fileno(), False)
        try:
            return self._exchange(self._first, START_S)
        except OutOfTime as error:
            raise ValueError(f"the process of {self._module} did not start: {error}.") from None

    def _exchange(self, question: Mapping[str, Any], time_s: float) -> dict[str, Any]:
        process = self.running
        assert process is not None
        assert process.stdin is not None
        assert process.stdout is not None
        to, of = process.stdin.fileno(), process.stdout.fileno()
        unsent, answer = memoryview(json.dumps(question).encode() + b"\n"), bytearray()
        until_s = time.monotonic() + time_s
        try:
            with selectors.DefaultSelector() as ready:
                ready.register(of, selectors.EVENT_READ)
                ready.register(to, selectors.EVENT_WRITE)
                while not answer.endswith(b"\n"):
                    found = ready.select(max(0.0, until_s - time.monotonic()))
                    if not found:
                        raise OutOfTime(f"it took longer than {time_s:g} s")
                    for key, _ in found:
                        if key.fd == to:
                            unsent = unsent[os.write(to, unsent[:PIECE_BYTES]) :]
                            if not unsent:
                                ready.unregister(to)
                        elif not (piece := os.read(of, PIECE_BYTES)):
                            raise OutOfTime("its process ended, as one that needs too much memory does")
                        else:
                            answer += piece
            return json.loads(bytes(answer))
        except BaseException as error:
            self._kill()
            if isinstance(error, BrokenPipeError):
                raise OutOfTime("its process ended") from None
            raise

    def _kill(self) -> None:
        self._end()
        self.running = None


def _end(process: subprocess.Popen[bytes]) -> None:
    process.kill()
    process.wait()
    for pipe in (process.stdin, process.stdout):
        assert pipe is not None
        # What it holds unsent is for nobody.
        with suppress(OSError):
            pipe.close()
