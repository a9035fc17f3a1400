"""What a process of `bounded_process` does: answers JSON lines, one at a time, each within an alarm's time."""

import json
import os
import queue
import resource
import signal
import sys
import threading
from collections.abc import Callable
from contextlib import suppress
from typing import Any

# Of the alarm, after the time in which an answer is waited for.
GRACE_S = 1.0
MEMORY = "it needs more memory than it may have"

Answerer = Callable[[dict[str, Any]], dict[str, Any]]


def answer_lines(start: Answerer, answer: Answerer) -> None:
    """Answer the first line by `start` and all others by `answer` until the input ends; what they raise is an answer.

    Whoever started this process ends it when a line is not answered in time; an alarm does where nobody is left to.
    """
    signal.signal(signal.SIGALRM, signal.SIG_DFL)
    lines: queue.SimpleQueue[bytes] = queue.SimpleQueue()
    threading.Thread(target=_listen, args=(lines,), daemon=True).start()
    hello = _tried(start, json.loads(lines.get()))
    _say(hello)
    if "error" in hello:
        return
    while True:
        question = json.loads(lines.get())
        signal.setitimer(signal.ITIMER_REAL, question["time_s"] + GRACE_S)
        found = _tried(answer, question)
        signal.setitimer(signal.ITIMER_REAL, 0)
        try:
            _say(found)
        except MemoryError:
            _say({"error": MEMORY})


def bound_memory(size: int) -> None:
    """Limit the address space of this process; where the system has no such limit, time alone bounds it."""
    for limit, most in ((resource.RLIMIT_AS, size), (resource.RLIMIT_CORE, 0)):
        with suppress(OSError, ValueError):
            resource.setrlimit(limit, (most, most))


def _tried(answer: Answerer, question: dict[str, Any]) -> dict[str, Any]:
    try:
        return answer(question)
    except MemoryError:
        return {"error": MEMORY}
    except RecursionError:
        return {"error": "it is nested too deeply"}
    except BaseException as error:  # a panic of an extension is no Exception
        return {"error": " ".join(str(error)[:1000].split()).rstrip(".") or type(error).__name__}


def _listen(lines: "queue.SimpleQueue[bytes]") -> None:
    for line in sys.stdin.buffer:
        lines.put(line)
    os._exit(0)


def _say(value: dict[str, Any]) -> None:
    sys.stdout.buffer.write(json.dumps(value).encode() + b"\n")
    sys.stdout.buffer.flush()
