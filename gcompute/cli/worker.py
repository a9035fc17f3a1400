"""Start a process that compiles for other devices, and hand it its request."""

import json
import os
import subprocess
import sys
from contextlib import suppress
from typing import Any

from gcompute.aot.target import target_environment
from gcompute.hardware.target import Target


def start_worker(module: str, request: dict[str, Any], target: Target, noise: Any) -> subprocess.Popen[str]:
    """`python -m module` with the target's environment, one request on its standard input, which stays open.

    Its standard error goes to the file `noise`; a worker that could not start says why there.
    """
    process = subprocess.Popen(
        [sys.executable, "-m", module],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=noise,
        text=True,
        encoding="utf-8",
        env={**os.environ, **target_environment(target)},
    )
    assert process.stdin is not None
    try:
        with suppress(BrokenPipeError):
            process.stdin.write(json.dumps(request) + "\n")
            process.stdin.flush()
    except BaseException:
        process.kill()
        raise
    return process
