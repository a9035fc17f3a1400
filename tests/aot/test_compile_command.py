"""`gcompute compile` as a user types it: what it prints, its exit status, and that no worker is left behind."""

import json
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from gcompute.cli import compile as compile_module
from gcompute.cli.compile import advice, verdict
from gcompute.cli.main import main
from gcompute.config.mesh import MeshShape
from gcompute.config.presets import model_config
from gcompute.config.train import DataConfig, OptimizerConfig, RunConfig, TrainConfig

TINY = ("compile", "train", "test-tiny", "--on", "cpu:2", "--mesh", "fsdp=2", "--batch", "2", "--unroll", "1")


def status(*args: str) -> int:
    with pytest.raises(SystemExit) as ended:
        main(list(args))
    assert isinstance(ended.value.code, int)
    return ended.value.code


@pytest.mark.oldest
def test_compiles_the_train_step(capsys: pytest.CaptureFixture[str], tmp_path: Path):
    assert status(*TINY, "--json", "--hlo", str(tmp_path / "step.txt")) == 0
    answer = json.loads(capsys.readouterr().out)
    assert answer["fits"]
    assert answer["num_devices"] == 2
    assert answer["limit_bytes"] is None
    assert answer["run"]["train"]["mesh"] == "fsdp=2"
    assert {one["kind"] for one in answer["collectives"]} >= {"all-gather"}
    assert all(one["axes"] == ["fsdp"] for one in answer["collectives"])
    assert (tmp_path / "step.txt").read_text(encoding="utf-8").startswith("HloModule")


@pytest.mark.parametrize(
    ("args", "said"),
    [
        (["test", "--on", "cpu:8", "--mesh", "data=2"], "mesh data=2 is of 2 devices and cpu:8 has 8."),
        (["tst", "--on", "cpu:8"], "model 'tst' is not a preset"),
        (["test", "--on", "v5e:3x3"], "v5e:3x3 is not a slice that exists. Nearest: v5e:2x4, v5e:4x4."),
        (["test", "--on", "cpu:8", "--seq", "99"], "seq=99 is longer than the model's context=32."),
        (["test", "--on", "cpu:8", "--hlo", "/nonexistent/step.txt"], "--hlo /nonexistent/step.txt: there is no"),
        (["test", "--on", "cpu:8", "--remat", "some"], "'some' is not one of"),
        (["test"], "Missing option '--on'"),
    ],
)
def test_refused_before_anything_starts(args: list[str], said: str, capsys, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(compile_module, "compile_elsewhere", lambda request, target: pytest.fail("it started"))
    assert status("compile", "train", *args) == 2
    error = capsys.readouterr().err
    assert said in error
    assert error.count("\n") == 1


def test_unknown_program(capsys):
    assert status("compile", "serv") == 2
    assert "compile 'serv' is not known. Did you mean 'serve'?" in capsys.readouterr().err
    assert status("compile") == 0
    assert "train" in capsys.readouterr().out


def report(**changes) -> dict:
    memory = dict.fromkeys(compile_module.MEMORY_ROWS, 2**30)
    whole = {"target": "v5e:4x4", "num_devices": 16, "compile_s": 1.0, "accumulation": 1}
    whole |= {"precision": "bfloat16", "fits": True}
    whole |= {"needed_bytes": 10 * 2**30, "limit_bytes": 16 * 2**30, "memory": memory, "largest": []}
    return {**whole, "collectives": [], "unreadable": None, **changes}


TOO_LARGE = {"fits": False, "needed_bytes": 24 * 2**30, "largest": [{"size_bytes": 2**33, "arrays": "f32[8,64]"}]}


def test_exit_status_and_words_where_it_does_not_fit(capsys, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(compile_module, "check_installed", lambda target: None)
    monkeypatch.setattr(compile_module, "compile_elsewhere", lambda request, target: report(**TOO_LARGE))
    monkeypatch.setenv("COLUMNS", "200")
    assert status("compile", "train", "llama3-8b", "--on", "v5e:4x4", "--mesh", "fsdp=16", "--batch", "32") == 1
    out = capsys.readouterr().out
    assert "does not fit: it needs 24.00 GiB of 16.00 GiB a device. What would help: --remat full;" in out
    assert "8.00 GiB  f32[8,64]" in out
    monkeypatch.setattr(compile_module, "compile_elsewhere", lambda request, target: report(unreadable="unreadable: x"))
    assert status("compile", "train", "llama3-8b", "--on", "v5e:4x4", "--mesh", "fsdp=16", "--batch", "32") == 0
    out = capsys.readouterr().out
    assert "fits: 10.00 GiB of 16.00 GiB a device, 62%." in out
    assert "collectives: unreadable: x" in out


SERVE = ("compile", "serve", "test", "--on", "cpu:4", "--mesh", "data=2,tensor=2", "--slots", "4")


@pytest.mark.oldest
@pytest.mark.slow
def test_compiles_the_serving_programs(capsys: pytest.CaptureFixture[str], tmp_path: Path):
    assert status(*SERVE, "--context", "24", "--precision", "float32", "--json") == 0
    answer = json.loads(capsys.readouterr().out)
    assert (answer["mesh"], answer["slots"], answer["context"], answer["prompt"]) == ("data=2,tensor=2", 4, 24, 12)
    # Pages of 16 cells, [P, S, K, H] of float32, for keys and values of 2 layers. A device has one of 2 key/value heads
    # and the pages of 2 of 4 slots: two for each, and one that padding is written to.
    pool_bytes = 2 * 2 * (2 * 2 + 1) * 16 * 1 * 8 * 4
    # All rows of requests are on every device: 1,024 biases and their tokens, 17 ends, the text in two pages of cells,
    # a bit for each of 64 tokens, 13 more words and 3 flags.
    rows_bytes = 4 * ((2 * 1024 + 17 + 2 * 16 + 2 + 13) * 4 + 3)
    for program in ("prefill", "decode"):
        report = answer["programs"][program]
        assert report["fits"]
        assert report["memory"]["aliased_bytes"] == pool_bytes + rows_bytes
        assert any(one["axes"] == ["tensor"] and one["kind"] == "all-reduce" for one in report["collectives"])
    assert answer["fits"]
    assert status(*SERVE, "--program", "decode", "--hlo", str(tmp_path / "decode.txt")) == 0
    out = capsys.readouterr().out
    assert "test: decode on cpu:4 (4 devices), mesh data=2,tensor=2, 4 slots of 32, bfloat16; compiled in" in out
    assert "collectives of one decode step" in out
    assert "prefill" not in out
    assert (tmp_path / "decode.txt").read_text(encoding="utf-8").startswith("HloModule")


@pytest.mark.parametrize(
    ("args", "said"),
    [
        (["test", "--on", "v5x:2x4"], "'v5x' is not known"),
        (["test", "--on", "cpu:8", "--mesh", "tensor=2"], "mesh tensor=2 is of 2 devices and cpu:8 has 8."),
        (["test", "--on", "cpu:8"], "mesh tensor=8 does not divide heads=4. Legal: tensor=1, 2, 4."),
        (["test", "--on", "cpu:2", "--context", "64"], "context=64 exceeds the model's context. Use at most 32."),
        (["test", "--on", "cpu:2", "--prompt", "40"], "prompt=40 does not fit context=32."),
        (["test", "--on", "cpu:2", "--mesh", "data=2", "--slots", "3"], "slots=3 does not divide over data=2"),
        (["test", "--on", "cpu:2", "--hlo", "decode.txt"], "--hlo is for one program: give --program"),
        (["test", "--on", "cpu:2", "--program", "insert"], "'insert' is not one of"),
    ],
)
def test_what_cannot_be_served_is_refused_in_one_line(args: list[str], said: str, capsys):
    assert status("compile", "serve", *args) == 2
    error = capsys.readouterr().err
    assert said in error
    assert error.count("\n") == 1


def test_serving_without_the_compiler_says_how_to_install_it(capsys, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("gcompute.aot.target._is_here", lambda module: False)
    assert status("compile", "serve", "llama3-8b", "--on", "v5e:2x4") == 2
    error = capsys.readouterr().err
    assert "pip install gcompute[tpu-aot]" in error
    assert error.count("\n") == 1


def test_exit_status_where_a_serving_program_does_not_fit(capsys, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(compile_module, "check_installed", lambda target: None)
    answer = {"fits": False, "programs": {"prefill": report(), "decode": report(**TOO_LARGE)}}
    monkeypatch.setattr(compile_module, "compile_elsewhere", lambda request, target: answer)
    monkeypatch.setenv("COLUMNS", "200")
    assert status("compile", "serve", "llama3-8b", "--on", "v5e:4x4", "--mesh", "data=2,tensor=8") == 1
    out = capsys.readouterr().out
    assert "prefill fits: 10.00 GiB of 16.00 GiB a device, 62%." in out
    assert "decode does not fit: it needs 24.00 GiB of 16.00 GiB a device. What would help: fewer --slots;" in out


@pytest.mark.parametrize(
    ("mesh", "batch", "remat", "expected"),
    [
        (
            *("fsdp=16", 32, "none"),
            (
                "--remat full; --no-collective-matmul; --accumulation 2 or a smaller --batch (2 sequences a device"
                " now); more chips"
            ),
        ),
        (
            *("data=4,fsdp=4", 16, "full"),
            (
                "--no-collective-matmul; a shorter --seq, or splitting it: --mesh with tensor or context above 1;"
                " splitting the parameters over the data axis too: --mesh with fsdp=16; more chips"
            ),
        ),
        ("fsdp=4,tensor=4", 4, "full", "--no-collective-matmul; more chips"),
    ],
)
def test_advice(mesh: str, batch: int, remat: str, expected: str):
    run = RunConfig(
        model=model_config("llama3-8b"),
        optimizer=OptimizerConfig(),
        train=TrainConfig(batch=batch, remat=remat, mesh=MeshShape.parse(mesh)),
        data=DataConfig(),
    )
    assert advice(run, report()) == expected
    assert expected in verdict(run, report(**TOO_LARGE))


def test_a_worker_ends_with_the_one_who_asked():
    """However the asker ends, its end of the pipe closes."""
    run = RunConfig(
        model=model_config("test-tiny"),
        optimizer=OptimizerConfig(),
        train=TrainConfig(mesh=MeshShape(data=1)),
        data=DataConfig(),
    )
    ended = subprocess.run(
        [sys.executable, "-m", "gcompute.cli.compile_worker"],
        input=json.dumps({"target": "cpu:1", "run": run.to_dict(), "hlo": None}) + "\n",
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert ended.returncode == 1
    assert "report" not in ended.stdout


def workers(pid: int) -> list[int]:
    """The workers that process `pid` has started, once they run their program."""
    started = Path(f"/proc/{pid}/task/{pid}/children").read_text(encoding="utf-8").split()
    return [int(child) for child in started if runs_a_worker(int(child))]


def runs_a_worker(pid: int) -> bool:
    try:
        return b"compile_worker" in Path(f"/proc/{pid}/cmdline").read_bytes()
    except OSError:
        return False


def wait_until(condition: Callable[[], Any]) -> None:
    until = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < until
        time.sleep(0.02)


def interrupt(asker: subprocess.Popen) -> str:
    """What `asker` says on standard error after Ctrl-C, pressed again where nothing happens.

    Python drops an interrupt that comes while a callback of its import system runs.
    """
    while True:
        asker.send_signal(signal.SIGINT)
        try:
            return asker.communicate(timeout=2)[1]
        except subprocess.TimeoutExpired:
            assert asker.poll() is None


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
def test_interrupt_ends_the_worker():
    with subprocess.Popen([sys.executable, "-m", "gcompute", *TINY], stderr=subprocess.PIPE, text=True) as asker:
        wait_until(lambda: workers(asker.pid))
        started = workers(asker.pid)
        error = interrupt(asker)
    # Python ends by the signal, which a shell shows as 130 too, where it came while dataclasses execute a string.
    assert asker.returncode in (130, -signal.SIGINT), error
    assert error.splitlines()[-1] == "interrupted."
    wait_until(lambda: not any(runs_a_worker(pid) for pid in started))
