"""How a worker process answers the one who started it: one JSON object a line, and nothing else, on standard output."""

import json
import os
import signal
from collections.abc import Callable


def open_answers() -> Callable[..., None]:
    """What writes an answer of the given fields. Whatever else is printed goes to standard error from now on.

    Ctrl-C in a terminal reaches a worker too, and is ignored: the one who asked decides what it means.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)

    def tell(**fields: object) -> None:
        print(json.dumps(fields), file=answers, flush=True)

    return tell
