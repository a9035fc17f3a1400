"""`gcompute serve` where the engine fails: one line that says why."""

from pathlib import Path

from command_line import Command

from gcompute.hardware.catalogue import find_chip
from gcompute.serve.runner import Runner


def test_an_engine_that_cannot_be_compiled(gcompute: Command, finished: Path, monkeypatch):
    def fail(*_: object) -> None:
        raise RuntimeError("RESOURCE_EXHAUSTED: Out of memory allocating 9 bytes.\nAllocations: many lines")

    monkeypatch.setattr(Runner, "compile", fail)
    monkeypatch.setattr("gcompute.cli.chips.measured_chip", lambda: find_chip("v5e"))
    ended = gcompute("serve", finished, "--port", "0", "--no-fast", "--precision", "bfloat16")
    assert ended.error == "error: the engine did not start: RESOURCE_EXHAUSTED: Out of memory allocating 9 bytes."
