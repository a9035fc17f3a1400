"""gcompute train --validation: another text to validate on, kept in run.json and found from any folder."""

import json
from pathlib import Path

import pytest
from command_line import TINY, Command


def test_a_run_validates_on_it_and_goes_on_from_elsewhere(
    gcompute: Command, words: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    held_out = tmp_path / "held_out.txt"
    held_out.write_text(words.read_text()[::-1])
    monkeypatch.chdir(tmp_path)
    out = tmp_path / "run"
    command = (*TINY, "--data", words, "--validation", "held_out.txt", "--out", out)
    ended = gcompute(*command)
    assert ended.status == 0, ended.err
    assert f"{len(words.read_text()):,} training and {len(words.read_text()):,} validation tokens" in ended.err
    assert json.loads((out / "run.json").read_text())["data"]["validation"] == str(held_out)
    monkeypatch.chdir("/")
    assert gcompute("train", "--no-fast", "--out", out, "--resume", "--steps", "8").status == 0
    held_out.write_text(words.read_text())
    changed = gcompute("train", "--no-fast", "--out", out, "--resume", "--steps", "9")
    assert "its tokens differ" in changed.error
    held_out.unlink()
    gone = gcompute("train", "--no-fast", "--out", out, "--resume", "--steps", "9")
    assert f"the run's validation {held_out} is not there" in gone.error
    assert "--validation PATH" in gone.error


def test_an_out_in_the_validation_folder_is_refused(gcompute: Command, words: Path, tmp_path: Path):
    (tmp_path / "a.txt").write_text(words.read_text())
    ended = gcompute(*TINY, "--data", words, "--validation", tmp_path, "--out", tmp_path / "run")
    assert f"lies in --validation {tmp_path}, and would be read as text next time" in ended.error
