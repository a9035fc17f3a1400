"""Ctrl-C, SIGTERM and kill -9: nothing is lost, and the run that goes on is the run that was never stopped."""

import os
import random
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from command_line import TINY, Command

from gcompute.cli.train import StopRequest
from gcompute.model.pretrained import saved_steps
from gcompute.train.events import Stepped
from gcompute.train.metrics_log import read_metrics

KILLS = 20
NUM_STEPS = 2000
LONG = ("--steps", f"{NUM_STEPS}", "--checkpoint-every", "20", "--eval-every", "1000", "--dispatch-steps", "4")


def rows(out: Path) -> list[tuple[str, int, float]]:
    return [(row["kind"], row["step"], row["loss"]) for row in read_metrics(out / "metrics.jsonl")]


def start(*args: str | Path, log: Path) -> subprocess.Popen:
    with log.open("w") as file:
        environment = {**os.environ, "JAX_NUM_CPU_DEVICES": "1"}
        command = [sys.executable, "-m", "gcompute", *map(str, args)]
        return subprocess.Popen(command, stdout=file, stderr=subprocess.STDOUT, env=environment)


def test_a_signal_before_the_loop_asks_interrupts_at_once_and_later_only_the_second_does():
    request = StopRequest()
    with pytest.raises(KeyboardInterrupt):
        request.ask(signal.SIGINT, None)
    # Had the exception been lost, in a finalizer, the loop would stop when it first asks.
    assert request
    request = StopRequest()
    assert not request
    request.ask(signal.SIGINT, None)
    assert request
    with pytest.raises(KeyboardInterrupt):
        request.ask(signal.SIGTERM, None)


def test_a_terminal_that_closes_may_hang_up_twice():
    request = StopRequest()
    assert not request
    for number in (signal.SIGHUP, signal.SIGHUP, signal.SIGTERM, signal.SIGHUP):
        request.ask(number, None)
    assert request
    with pytest.raises(KeyboardInterrupt):
        request.ask(signal.SIGINT, None)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_a_signal_in_training_saves_and_says_how_to_go_on(
    number: signal.Signals, gcompute: Command, words: Path, finished: Path, tmp_path: Path, monkeypatch
):
    from gcompute.cli import session

    show = session.TrainProgress.__call__

    def signal_at_step_3(self, event) -> None:
        if isinstance(event, Stepped) and event.step == 3:
            os.kill(os.getpid(), number)
        show(self, event)

    out = tmp_path / "with spaces"
    with monkeypatch.context() as patch:
        patch.setattr(session.TrainProgress, "__call__", signal_at_step_3)
        ended = gcompute(*TINY, "--data", words, "--out", out)
    assert ended.status == 130
    assert ended.err.splitlines()[-1] == f"stopped at step 3. Go on with: gcompute train --out '{out}' --resume"
    assert 3 in saved_steps(out / "checkpoints")
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL
    assert gcompute("train", "--no-fast", "--out", out, "--resume").status == 0
    assert rows(out) == rows(finished)


@pytest.mark.parametrize("place", ["prepare", "resolve_mesh", "predict"])
def test_a_signal_before_the_first_step_ends_at_once(
    place: str, gcompute: Command, words: Path, tmp_path: Path, monkeypatch
):
    from gcompute.cli import session

    original = getattr(session, place)

    def interrupted(*args, **kwargs):
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(1)
        return original(*args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(session, place, interrupted)
        ended = gcompute(*TINY, "--data", words, "--out", tmp_path / "out")
    assert ended.status == 130
    last = ended.err.splitlines()[-1]
    if place == "predict":
        assert last == f"interrupted. Go on with: gcompute train --out {tmp_path / 'out'} --resume"
        ended = gcompute("train", "--no-fast", "--out", tmp_path / "out", "--resume")
        assert ended.status == 0, ended.err
        assert "has no whole checkpoint yet: the run begins at step 0" in ended.err
    else:
        assert last == "interrupted. Nothing was trained yet: start again."


def wait_for(text: str, log: Path, process: subprocess.Popen) -> None:
    until = time.monotonic() + 240
    while text not in log.read_text():
        assert process.poll() is None, log.read_text()
        assert time.monotonic() < until, log.read_text()
        time.sleep(0.02)


@pytest.mark.slow
def test_signals_to_a_process_of_its_own(environment, gcompute: Command, words: Path, tmp_path: Path):
    out, log = tmp_path / "out", tmp_path / "log"
    process = start(*TINY, *LONG, "--steps", "100000", "--data", words, "--out", out, log=log)
    wait_for("validation loss", log, process)
    process.send_signal(signal.SIGTERM)
    assert process.wait(60) == 130
    assert "Traceback" not in log.read_text()
    stopped = int(re.search(r"stopped at step (\d+)\. Go on with:", log.read_text())[1])
    assert saved_steps(out / "checkpoints")[-1] == stopped
    process = start("train", "--no-fast", "--out", out, "--resume", log=log)
    wait_for("vocabulary", log, process)
    process.send_signal(signal.SIGINT)
    assert process.wait(60) == 130
    assert "Traceback" not in log.read_text()


@pytest.mark.slow
def test_two_trainers_at_once(environment, gcompute: Command, words: Path, tmp_path: Path):
    out, log = tmp_path / "out", tmp_path / "log"
    process = start(*TINY, *LONG, "--steps", "100000", "--data", words, "--out", out, log=log)
    try:
        wait_for("vocabulary", log, process)
        for command in ((*TINY, "--data", words), ("train", "--no-fast", "--resume")):
            ended = gcompute(*command, "--out", out)
            assert ended.status == 2
            assert f"another process ({process.pid}) is training" in ended.err or "already holds a run" in ended.err
    finally:
        process.kill()
        process.wait()


@pytest.mark.slow
def test_kill_9_at_random_moments_changes_no_bit(environment, words: Path, tmp_path: Path):
    seed = int(os.environ.get("KILL_SEED") or time.time())
    print(f"KILL_SEED={seed}")
    moments = random.Random(seed)
    whole, broken, log = tmp_path / "whole", tmp_path / "broken", tmp_path / "log"
    run = (*TINY, *LONG, "--data", words)
    began = time.monotonic()
    process = start(*run, "--out", whole, log=log)
    wait_for("compiled in", log, process)
    start_s = time.monotonic() - began
    assert process.wait(600) == 0, log.read_text()
    seen = []
    for _ in range(KILLS):
        resume = (broken / "run.json").is_file()
        command = ("train", "--no-fast", "--resume") if resume else run
        process = start(*command, "--out", broken, log=log)
        # Half of the kills fall anywhere up to the first steps, half among steps and checkpoints.
        if moments.random() < 0.5:
            # No longer than its start takes now, or a start that was measured beside other work lets it end.
            until = time.monotonic() + moments.uniform(0, 1.1 * start_s)
            while time.monotonic() < until and "compiled in" not in log.read_text():
                time.sleep(0.01)
        else:
            wait_for("compiled in", log, process)
            time.sleep(moments.uniform(0, 0.5))
        if process.poll() == 0 and len(seen) >= KILLS // 2:
            break
        assert process.poll() is None, f"seed {seed}: not killed: {log.read_text()}"
        process.send_signal(signal.SIGKILL)
        process.wait()
        steps = saved_steps(broken / "checkpoints")
        seen.append(steps[-1] if steps else 0)
    assert seen == sorted(seen), f"seed {seed}: a checkpoint was lost: {seen}"
    print("last checkpoint after each kill:", seen)
    while not (broken / "run.json").is_file():
        assert start(*run, "--out", broken, log=log).wait(600) == 0, log.read_text()
    assert start("train", "--no-fast", "--resume", "--out", broken, log=log).wait(600) == 0, log.read_text()
    assert rows(broken) == rows(whole), f"seed {seed}"
    steps = [step for kind, step, _ in rows(broken) if kind == "train"]
    assert steps == list(range(1, NUM_STEPS + 1))
    left = [path.name for path in broken.rglob("*") if "tmp" in path.name or "damaged" in path.name]
    assert not left
    assert saved_steps(broken / "checkpoints") == saved_steps(whole / "checkpoints")
