import importlib.util
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
from backend_logs import without_backend_logs

SCRIPT = Path(__file__).parents[2] / "tpu_scripts" / "train_multihost.py"
spec = importlib.util.spec_from_file_location("train_multihost", SCRIPT)
train_multihost = importlib.util.module_from_spec(spec)
sys.modules["train_multihost"] = train_multihost
spec.loader.exec_module(train_multihost)

# In the place of `gcompute train`: it fails, crashes, or waits as hosts do that sit in a collective.
STAND_IN = """
import json, os, time
import jax
from jax.experimental import multihost_utils
def main(args):
    assert jax.distributed.is_initialized()
    print("pid", os.getpid(), flush=True)
    multihost_utils.sync_global_devices("all have said who they are")
    print("arguments", json.dumps(args), flush=True)
    what, _, where = args[1].partition("@")
    if where and jax.process_index() != int(where):
        what = "wait"
    if what == "fail":
        raise SystemExit(3)
    if what == "crash":
        raise RuntimeError("boom")
    try:
        time.sleep(300 if what == "wait" else 0)
    except KeyboardInterrupt:
        print("saved", flush=True)
        raise SystemExit(130)
    raise SystemExit(0)
"""


@pytest.fixture
def stand_in(tmp_path: Path) -> dict[str, str]:
    """An environment in which `gcompute train` is STAND_IN."""
    folder = tmp_path / "package" / "gcompute" / "cli"
    folder.mkdir(parents=True)
    (folder / "__init__.py").touch()
    (folder.parent / "__init__.py").touch()
    (folder / "main.py").write_text(STAND_IN)
    return dict(os.environ) | {"PYTHONPATH": str(tmp_path / "package")}


def run(*arguments: str, environment: dict[str, str] | None = None) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(SCRIPT), *arguments]
    return subprocess.run(command, capture_output=True, text=True, env=environment, timeout=120)


def start_until(text: str, log: Path, command: list[str], environment: dict[str, str]) -> subprocess.Popen:
    """Start a command and wait until `log` holds `text`."""
    process = subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    until = time.monotonic() + 60
    while not (log.exists() and text in log.read_text()):
        assert process.poll() is None, process.communicate()[0]
        assert time.monotonic() < until, "the processes did not start"
        time.sleep(0.05)
    return process


def running(logs: list[Path]) -> list[int]:
    """The processes that wrote these logs and still live."""
    pids = [int(re.search(r"pid (\d+)", log.read_text())[1]) for log in logs]
    return [pid for pid in pids if psutil.pid_exists(pid)]


def test_two_processes_add_over_the_devices_of_both(tmp_path: Path):
    ended = run("--local-processes", "2", "--local-devices", "2", "--check", "--logs", str(tmp_path))
    assert ended.returncode == 0, ended.stdout + ended.stderr
    for i in range(2):
        log = (tmp_path / f"process_{i}.log").read_text()
        assert f"process {i} of 2: 2 of 4 cpu devices" in log
        assert f"process {i} of 2: sum over 4 devices is 10, correct" in log
    assert "process 0 of 2: sum over 4 devices is 10, correct" in ended.stdout
    assert "process 1 of 2" not in ended.stdout


def test_devices_forced_by_the_surrounding_environment_do_not_leak_in(tmp_path: Path):
    environment = dict(os.environ) | {"XLA_FLAGS": "--xla_force_host_platform_device_count=8"}
    ended = run("--local-processes", "1", "--check", "--logs", str(tmp_path), environment=environment)
    assert ended.returncode == 0
    assert "sum over 1 devices is 1, correct" in ended.stdout


def test_the_rest_of_the_arguments_reach_gcompute_train_in_order(tmp_path: Path, stand_in: dict[str, str]):
    rest = ["ok", "--mesh", "data=2", "--out", "a folder", "--check-nothing", "--time", "3", "--model=tiny"]
    ended = run("--local-processes", "1", "--logs", str(tmp_path), *rest, environment=stand_in)
    assert ended.returncode == 0, ended.stdout + ended.stderr
    quoted = ", ".join(f'"{argument}"' for argument in ["train", *rest])
    assert f"arguments [{quoted}]" in ended.stdout


@pytest.mark.parametrize(("what", "status", "said"), [("fail@1", 3, "arguments"), ("crash@1", 1, "RuntimeError: boom")])
def test_one_failing_process_stops_all_and_shows_the_end_of_its_log(
    what: str, status: int, said: str, tmp_path: Path, stand_in: dict[str, str]
):
    began = time.monotonic()
    ended = run("--local-processes", "2", "--logs", str(tmp_path), what, environment=stand_in)
    assert ended.returncode == status
    # Without leaving JAX's barrier at exit out, the failure would stay hidden for five minutes.
    assert time.monotonic() - began < 60
    assert f"error: process_1 ended with status {status}; the end of {tmp_path}/process_1.log:" in ended.stderr
    assert said in ended.stderr
    assert not running([tmp_path / f"process_{i}.log" for i in range(2)])


def test_ctrl_c_lets_every_process_save_and_stops_all(tmp_path: Path, stand_in: dict[str, str]):
    command = [sys.executable, str(SCRIPT), "--local-processes", "2", "--logs", str(tmp_path), "wait"]
    logs = [tmp_path / f"process_{i}.log" for i in range(2)]
    parent = start_until("arguments", logs[1], command, stand_in)
    while "arguments" not in logs[0].read_text():
        time.sleep(0.05)
    parent.send_signal(signal.SIGINT)
    output = parent.communicate(timeout=60)[0]
    assert parent.returncode == 130
    assert "stopping all processes" in output
    assert all(log.read_text().rstrip().endswith("saved") for log in logs)
    assert not running(logs)


@pytest.mark.parametrize("process_id", ["0", "1"])
def test_a_host_that_waits_in_vain_says_that_not_all_were_started(process_id: str):
    address = f"127.0.0.1:{train_multihost.free_port()}"
    explicit = ["--coordinator", address, "--num-processes", "2", "--process-id", process_id]
    ended = run(*explicit, "--timeout", "2", "--check")
    assert ended.returncode == 1
    assert re.fullmatch(r"error: [^\n]+\n", without_backend_logs(ended.stderr))
    assert f"process {process_id} of 2 waited 2 s and not all hosts were started" in ended.stderr
    assert "--worker=all" in ended.stderr


def test_without_a_cluster_it_says_what_to_give():
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("SLURM", "OMPI", "KUBERNETES"))}
    ended = run("--check", environment=kept | {"JAX_PLATFORMS": "cpu"})
    assert ended.returncode == 2
    assert re.fullmatch(r"error: jax found no cluster here [^\n]+\n", without_backend_logs(ended.stderr))


def test_without_gcompute_it_fails_before_the_others_wait_for_it(tmp_path: Path):
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    command = [sys.executable, "-S", str(SCRIPT), "--local-processes", "2", "--steps", "1"]
    ended = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=tmp_path, timeout=60)
    assert ended.returncode == 2
    assert "gcompute is not installed" in ended.stderr


EXPLICIT = ["--coordinator", "h:1", "--num-processes", "2", "--process-id", "0"]


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--coordinator", "h:1"], "--coordinator needs --num-processes, --process-id too"),
        (["--num-processes", "2", "--process-id", "0"], "needs --coordinator too"),
        (["--coordinator", "h", *EXPLICIT[2:]], "must be HOST:PORT"),
        (["--coordinator", "h:99999", *EXPLICIT[2:]], "must be HOST:PORT"),
        ([*EXPLICIT[:-1], "2"], "--process-id must lie between 0 and 1, got 2"),
        ([*EXPLICIT[:-1], "-1"], "must be a whole number, got '-1'"),
        ([*EXPLICIT, "--local-processes", "2"], "chooses its own addresses"),
        (["--local-processes", "0"], "must be at least 1"),
        (["--local-processes", "2", "--local-devices", "0"], "must be at least 1"),
        (["--local-processes", "two"], "must be a whole number, got 'two'"),
        (["--local-devices", "2"], "belong to --local-processes"),
        (["--check", "--steps", "3"], "--check trains nothing, so it takes no '--steps'"),
        (["--timeout", "-1"], "--timeout must be above 0 seconds"),
    ],
)
def test_bad_arguments_are_one_line_and_status_2(arguments: list[str], said: str, capsys: pytest.CaptureFixture[str]):
    with pytest.raises(SystemExit) as ended:
        train_multihost.parse(arguments)
    error = capsys.readouterr().err
    assert ended.value.code == 2
    assert re.fullmatch(r"error: [^\n]+\n", error)
    assert said in error


def test_a_double_dash_hands_over_even_our_own_flags():
    args, rest = train_multihost.parse(["--timeout", "5", "--", "--check", "--out", "x"])
    assert (args.timeout, args.check, rest) == (5, False, ["--check", "--out", "x"])


def test_no_flag_of_ours_hides_one_of_gcompute_train():
    train = pytest.importorskip("gcompute.cli.train").command
    theirs = {flag for parameter in train.params for flag in [*parameter.opts, *parameter.secondary_opts]}
    ours = set(re.findall(r'add_argument\(\s*"(--[a-z-]+)"', SCRIPT.read_text()))
    assert "--timeout" in ours
    assert "--mesh" in theirs
    assert not ours & theirs
