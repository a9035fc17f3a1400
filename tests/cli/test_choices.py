"""What a run chooses for the device at hand is said, kept, and not chosen again where it is resumed."""

import json
from pathlib import Path

import pytest
from command_line import Command

from gcompute.train import loop


def test_a_run_says_what_it_chose_and_keeps_it(gcompute: Command, run_copy: Path):
    stored = json.loads((run_copy / "run.json").read_text())
    assert stored["train"]["precision"] in ("float32", "bfloat16")
    assert stored["train"]["residual"] in ("float32", "bfloat16")
    assert isinstance(stored["train"]["accumulation"], int)
    chosen = stored["chosen"]["reasons"]
    ended = gcompute("train", "--no-fast", "--out", run_copy, "--resume", "--steps", "8")
    assert ended.status == 0, ended.err
    for name, reason in chosen.items():
        assert f"{name} {stored['train'][name]} ({reason})" in ended.err
    assert json.loads((run_copy / "run.json").read_text())["chosen"] == stored["chosen"]


def test_another_processor_is_refused_unless_other_rounding_is_asked_for(
    gcompute: Command, run_copy: Path, monkeypatch: pytest.MonkeyPatch
):
    here = loop.rounding()
    monkeypatch.setattr(loop, "rounding", lambda: {**here, "instruction_set": "SSE4_2"})
    resume = ("train", "--no-fast", "--out", run_copy, "--resume", "--steps", "8")
    refused = gcompute(*resume)
    assert refused.status == 2
    assert f"instruction set {here['instruction_set']} there and SSE4_2 here" in refused.error
    assert "--inexact" in refused.error
    assert json.loads((run_copy / "run.json").read_text())["train"]["steps"] == 6
    allowed = gcompute(*resume, "--inexact")
    assert allowed.status == 0, allowed.err
    assert "round otherwise than those before" in allowed.err


def test_inexact_is_of_a_resumed_run(gcompute: Command, tmp_path: Path):
    assert "goes with --resume" in gcompute("train", "--no-fast", "--out", tmp_path / "out", "--inexact").error
