"""`gcompute train` as several processes of one job, against one process with as many devices."""

import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from gcompute.measure.roofline import load_or_measure
from gcompute.model.pretrained import saved_steps
from gcompute.train.metrics_log import read_metrics

pytestmark = pytest.mark.slow

SCRIPT = Path(__file__).parents[2] / "tpu_scripts" / "train_multihost.py"
TINY = (
    *("--no-fast", "--model", "test", "--layers", "1", "--context", "16", "--tokenizer", "char", "--batch", "8"),
    *("--mesh", "data=2", "--precision", "float32", "--checkpoint-every", "2", "--eval-every", "3"),
    *("--warmup-steps", "1", "--dispatch-steps", "1"),
)


@pytest.fixture(scope="module")
def environment(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    cache = tmp_path_factory.mktemp("cache")
    load_or_measure(cache / "roofline.json", seconds=0.05)
    return {**os.environ, "GCOMPUTE_CACHE": str(cache)}


@pytest.fixture(scope="module")
def words(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("words") / "words.txt"
    path.write_text(" ".join(random.Random(0).choices(("the", "of", "and", "to", "in"), k=2000)), encoding="utf-8")
    return path


def start_processes(
    *args: str | Path, logs: Path, environment: dict[str, str], num: int = 2, devices: int = 1
) -> subprocess.Popen:
    local = ("--local-processes", num, "--local-devices", devices, "--logs", logs)
    command = [str(word) for word in (sys.executable, SCRIPT, *local, *args)]
    return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def several_processes(
    *args: str | Path, logs: Path, environment: dict[str, str], num: int = 2, devices: int = 1
) -> str:
    process = start_processes(*args, logs=logs, environment=environment, num=num, devices=devices)
    output = process.communicate(timeout=300)[0]
    assert process.returncode == 0, output + (logs / "process_1.log").read_text()
    return output


def one_process(*args: str | Path, environment: dict[str, str], devices: int = 2) -> None:
    command = [sys.executable, "-m", "gcompute", "train", *map(str, args)]
    environment = {**environment, "JAX_NUM_CPU_DEVICES": str(devices)}
    process = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert process.returncode == 0, process.stderr


def losses(out: Path) -> list[tuple[str, int, float]]:
    return [(row["kind"], row["step"], row["loss"]) for row in read_metrics(out / "metrics.jsonl")]


def assert_same_run(out: Path, expected: Path) -> None:
    ours, theirs = losses(out), losses(expected)
    assert [row[:2] for row in ours] == [row[:2] for row in theirs]
    # The gradients of two halves of a batch are added: a + b is b + a, whoever adds. What may differ is how each
    # program was compiled, so this allows two units in the last place of a float32 loss near 4.
    np.testing.assert_allclose([row[2] for row in ours], [row[2] for row in theirs], rtol=0, atol=1e-6)


def test_two_processes_train_as_one_does_and_write_once(environment: dict[str, str], words: Path, tmp_path: Path):
    run = (*TINY, "--steps", "6", "--data", words)
    one_process(*run, "--out", tmp_path / "one", environment=environment)
    output = several_processes(*run, "--out", tmp_path / "two", logs=tmp_path / "logs", environment=environment)
    assert_same_run(tmp_path / "two", tmp_path / "one")
    assert saved_steps(tmp_path / "two" / "checkpoints") == [2, 4, 6]
    assert {path.name for path in (tmp_path / "two").iterdir()} == {path.name for path in (tmp_path / "one").iterdir()}
    for step in (3, 6):
        assert output.count(f"step      {step}  validation loss") == 1
    assert "validation loss" not in (tmp_path / "logs" / "process_1.log").read_text()

    # The run goes on with two processes, past a checkpoint that both find damaged, and then with one.
    for path in (tmp_path / "two" / "checkpoints" / "6" / "params").rglob("*"):
        if path.is_file():
            path.write_bytes(b"")
    more = ("--no-fast", "--resume", "--steps", "9", "--out", tmp_path / "two")
    output = several_processes(*more, logs=tmp_path / "logs", environment=environment)
    assert "checkpoint 6 in" in output
    assert "resumed at step 4" in output
    one_process("--no-fast", "--resume", "--steps", "9", "--out", tmp_path / "one", environment=environment)
    steps = [step for kind, step, _ in losses(tmp_path / "two") if kind == "train"]
    assert steps == list(range(1, 10))
    one_process("--no-fast", "--resume", "--steps", "12", "--out", tmp_path / "two", environment=environment)
    assert losses(tmp_path / "two")[-1][:2] == ("eval", 12)


# Devices are in the order of their processes, so with one device each every axis of size 2 or more crosses processes.
ACROSS = {
    "fsdp and tensor": {"mesh": "fsdp=2,tensor=2", "num": 4, "devices": 1},
    "stage and context": {"mesh": "stage=2,context=2", "num": 4, "devices": 1},
    "fsdp, tensor within": {"mesh": "fsdp=2,tensor=2", "num": 2, "devices": 2},
}


@pytest.mark.parametrize("case", ACROSS)
def test_axes_that_cross_processes_train_as_within_one(
    case: str, environment: dict[str, str], words: Path, tmp_path: Path
):
    mesh, job = ACROSS[case]["mesh"], {key: ACROSS[case][key] for key in ("num", "devices")}
    run = (*TINY, "--layers", "2", "--accumulation", "2", "--mesh", mesh, "--steps", "4", "--data", words)
    one_process(*run, "--out", tmp_path / "one", environment=environment, devices=4)
    several_processes(*run, "--out", tmp_path / "many", logs=tmp_path / "logs", environment=environment, **job)
    assert_same_run(tmp_path / "many", tmp_path / "one")
    # Their checkpoint goes on in one process on another mesh, with the batches that were to come.
    more = ("--no-fast", "--resume", "--steps", "6", "--mesh", "data=2")
    for out in ("many", "one"):
        one_process(*more, "--out", tmp_path / out, environment=environment)
    assert_same_run(tmp_path / "many", tmp_path / "one")


def test_ctrl_c_stops_both_at_one_step_and_they_go_on(environment: dict[str, str], words: Path, tmp_path: Path):
    out, logs = tmp_path / "out", tmp_path / "logs"
    run = (*TINY, "--steps", "100000", "--checkpoint-every", "0", "--data", words, "--out", out)
    process = start_processes(*run, logs=logs, environment=environment)
    until = time.monotonic() + 120
    while not any(row[0] == "eval" for row in losses(out)):
        assert process.poll() is None, process.communicate()[0]
        assert time.monotonic() < until, "no step was made"
        time.sleep(0.1)
    process.send_signal(signal.SIGINT)
    output = process.communicate(timeout=120)[0]
    assert process.returncode == 130, output
    (step,) = saved_steps(out / "checkpoints")
    assert f"stopped at step {step}. Go on with:" in output
    assert losses(out)[-1][1] == step
    more = ("--no-fast", "--resume", "--steps", str(step + 2), "--out", out)
    several_processes(*more, logs=logs, environment=environment)
    assert saved_steps(out / "checkpoints")[-1] == step + 2


def test_bad_input_ends_both_with_one_line(environment: dict[str, str], words: Path, tmp_path: Path):
    run = (*TINY, "--mesh", "data=3", "--steps", "6", "--data", words, "--out", tmp_path / "out")
    process = start_processes(*run, logs=tmp_path / "logs", environment=environment)
    output = process.communicate(timeout=120)[0]
    assert process.returncode == 2, output
    errors = [line for line in (tmp_path / "logs" / "process_0.log").read_text().splitlines() if "error" in line]
    assert len(errors) == 1
    assert "data=3" in errors[0]
    assert "Traceback" not in output
