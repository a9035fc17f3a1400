"""The process that serves a checkpoint for `gcompute bench serve`, so that server and client share no interpreter lock.

It reads one JSON request from standard input and writes one JSON object a line to standard output: {"doing": ...},
then {"ready": ...}, or {"error": ...} for what was asked wrongly. A second line asks it to end, which it does with
{"stats": ...}; when standard input closes instead, the one who asked is gone, and it ends at once.
"""

import dataclasses
import json
import os
import signal
import sys
from typing import Any

from gcompute.cli.answers import open_answers
from gcompute.cli.environment import quiet_backends, use_compilation_cache
from gcompute.config.fields import to_plain
from gcompute.config.serve import ServeConfig


def main() -> None:
    """Serve what standard input asks for."""
    tell = open_answers()
    # The one who asked stops the load by it, and then this process.
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    request = json.loads(sys.stdin.readline())
    try:
        serve_checkpoint(request, tell)
    except (ValueError, OSError) as error:
        tell(error=str(error))


def serve_checkpoint(request: dict[str, Any], tell: Any) -> None:
    """Serve `request["checkpoint"]` until a line comes, or standard input closes."""
    quiet_backends()
    asked = ServeConfig(**{**request["serve"], "host": "127.0.0.1", "port": 0})
    use_compilation_cache()
    from gcompute.model.pretrained import load
    from gcompute.serve.engine import Engine
    from gcompute.serve.precision import settle
    from gcompute.serve.server import background

    config, _ = settle(asked)
    model = load(request["checkpoint"], notice=lambda text: tell(notice=text))
    chip = None
    if request["measure"]:
        # Before the engine takes the device, and before anything is timed.
        tell(doing="measuring the roofline")
        from gcompute.cli.chips import measured_chip

        chip = dataclasses.asdict(measured_chip())
        chip.pop("figures")
    engine = Engine(model.params, model.config, model.tokenizer, config)
    try:
        engine.start(lambda done, total, what: tell(doing=f"compiling {done} of {total}"))
        engine.wait_ready()
        with background(engine, config, model_name=model.name) as url:
            tell(
                ready={
                    "url": url,
                    "name": model.name,
                    "step": model.step,
                    "model": to_plain(model.config),
                    "slots": config.slots,
                    "max_context": engine.max_context,
                    "precision": config.precision,
                    "chip": chip,
                }
            )
            if not sys.stdin.readline():
                os._exit(1)
            tell(stats=dataclasses.asdict(engine.stats()))
    finally:
        engine.close(finish=False)


if __name__ == "__main__":
    main()
