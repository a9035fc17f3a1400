"""One command line serves the first start of a run and every restart."""

import json
from pathlib import Path

from command_line import TINY, Command

from gcompute.train.metrics_log import read_metrics


def steps_of(out: Path) -> list[int]:
    return [row["step"] for row in read_metrics(out / "metrics.jsonl") if row["kind"] == "train"]


def test_the_same_command_goes_on_where_it_was(gcompute: Command, words: Path, run_copy: Path):
    before = (run_copy / "run.json").read_bytes()
    again = gcompute(*TINY, "--data", words, "--out", run_copy)
    assert again.status == 0, again.err
    assert f"notice: {run_copy} holds this run: it continues from checkpoint 6" in again.err
    assert (run_copy / "run.json").read_bytes() == before
    assert steps_of(run_copy) == list(range(1, 7))
    longer = gcompute(*TINY, "--data", words, "--out", run_copy, "--steps", "8")
    assert longer.status == 0, longer.err
    assert steps_of(run_copy) == list(range(1, 9))


def test_resume_with_every_flag_starts_and_goes_on(gcompute: Command, words: Path, tmp_path: Path):
    command = (*TINY, "--data", words, "--out", tmp_path / "out", "--resume")
    for _ in range(2):
        ended = gcompute(*command)
        assert ended.status == 0, ended.err
    assert steps_of(tmp_path / "out") == list(range(1, 7))


def test_a_longer_run_keeps_the_schedule_that_it_began_with(gcompute: Command, run_copy: Path):
    ended = gcompute("train", "--no-fast", "--out", run_copy, "--resume", "--steps", "8")
    assert (
        "schedule still ends at step 6, as the run began, and the run at step 8: --decay-steps 8 moves it" in ended.err
    )
    rates = [row["learning_rate"] for row in read_metrics(run_copy / "metrics.jsonl") if row["kind"] == "train"]
    assert rates[6] == rates[7] == min(rates)
    assert json.loads((run_copy / "run.json").read_text())["optimizer"]["decay_steps"] == 6
    ended = gcompute("train", "--no-fast", "--out", run_copy, "--resume", "--steps", "10", "--decay-steps", "10")
    assert "the learning rate of step 9 is 0.000205 and was to be 0.0001: the schedule ends at step 10 now" in ended.err


def test_a_warm_up_that_the_run_cuts_is_said(gcompute: Command, words: Path, tmp_path: Path):
    ended = gcompute(*TINY, "--data", words, "--out", tmp_path / "out", "--warmup-steps", "100")
    assert "notice: the warm-up of 100 steps is cut to the 6 of the schedule" in ended.err


def test_a_tokenizer_file_is_found_from_any_folder(
    gcompute: Command, words: Path, run_copy: Path, tmp_path: Path, monkeypatch
):
    (tmp_path / "here").mkdir()
    (run_copy / "tokenizer.json").rename(tmp_path / "here" / "tokens.json")
    monkeypatch.chdir(tmp_path / "here")
    command = (*TINY, "--tokenizer", "tokens.json", "--data", words, "--out", tmp_path / "out")
    for more in ((), ("--steps", "7")):
        ended = gcompute(*command, *more)
        assert ended.status == 0, ended.err
    monkeypatch.chdir(tmp_path)
    ended = gcompute("train", "--no-fast", "--out", tmp_path / "out", "--resume", "--steps", "8")
    assert ended.status == 0, ended.err
    assert steps_of(tmp_path / "out") == list(range(1, 9))
