"""What a user may get wrong: one line, exit status 2, and nothing lost."""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from command_line import TINY, Command, Ended

from gcompute.train.metrics_log import read_metrics


def snapshot(directory: Path) -> dict[str, bytes]:
    """Every file but the lock, whose content says who held it last."""
    return {
        str(path.relative_to(directory)): path.read_bytes()
        for path in sorted(directory.rglob("*"))
        if path.is_file() and path.name != ".lock"
    }


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (None, "cannot be read: No such file or directory"),
        (b"", "is empty"),
        (b"\x89PNG\r\n\x00\x01\x02" * 100, "is not UTF-8 text: byte 0x89 at offset 0"),
        (b"text with a zero\x00byte " * 50, "is not UTF-8 text: byte 0x00 at offset 16"),
        (b"a short text of 28 letters. ", "the data has 25 tokens, and seq=32 needs 33. Use seq=24 or less"),
        (b"ab", "is too short"),
    ],
    ids=["missing", "empty", "binary", "zero byte", "shorter than a window", "hardly any"],
)
def test_bad_data(content: bytes | None, said: str, gcompute: Command, tmp_path: Path):
    data, out = tmp_path / "data.txt", tmp_path / "out"
    if content is not None:
        data.write_bytes(content)
    ended = gcompute(*TINY, "--context", "32", "--data", data, "--out", out)
    assert said in ended.error
    assert not (out / "run.json").exists()


def test_a_device_as_data(gcompute: Command, tmp_path: Path):
    assert "is a device or a socket" in gcompute(*TINY, "--data", "/dev/zero", "--out", tmp_path / "out").error


def test_a_folder_without_text_says_what_is_in_it(gcompute: Command, tmp_path: Path):
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "a.txt").write_text("café", encoding="latin-1")
    (tmp_path / "data" / "b.png").write_bytes(b"\x89PNG\0")
    said = gcompute(*TINY, "--data", tmp_path / "data", "--out", tmp_path / "out").error
    assert "holds no text: 1 not UTF-8 (a.txt), 1 binary (b.png)" in said


def test_an_empty_directory_of_data(gcompute: Command, tmp_path: Path):
    (tmp_path / "data").mkdir()
    assert "holds no files" in gcompute(*TINY, "--data", tmp_path / "data", "--out", tmp_path / "out").error


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--lerning-rate", "1"], "No such option '--lerning-rate'. Did you mean '--learning-rate'?"),
        (["--model", "nano-smal"], "Did you mean 'nano-small'?"),
        (["--model", "llama3"], "model 'llama3' is not a preset"),
        (["--optimizer", "adamm"], "'adamm' is not one of 'adamw'"),
        (["--tokenizer", "chars"], "Did you mean 'char'?"),
        (["--tokenizer", "bpe:many"], "bpe"),
        (["--tokenizer", "missing.json"], "missing.json"),
        (["--mesh", "dta=2"], "mesh axis 'dta' is not known. Did you mean 'data'?"),
        (["--mesh", "data=two"], "needs a whole number above 0"),
        (["--mesh", "data=0"], "needs a whole number above 0"),
        (["--mesh", "data=-2"], "needs a whole number above 0, as in data=2, or -1 for the rest"),
        (["--mesh", "data=-1,tensor=-1"], "mesh axes data and tensor are both -1"),
        (["--mesh", "data=-1,tensor=3"], "does not fit 8 devices: the axes besides data are 3"),
        (["--per-device-batch", "2"], "batch=4 and per_device_batch=2 say the same twice"),
        (["--mesh", "tensor=3", "--batch", "6"], "tensor=3"),
        (["--mesh", "data=3"], "batch=4"),
        (["--mesh", "data=64", "--batch", "64"], "needs 64 devices and there are 8"),
        (["--mesh", "stage=2"], "stage"),
        (["--batch", "5", "--accumulation", "2"], "batch=5 does not divide into accumulation=2"),
        (["--seq", "17"], "seq=17 is longer than the model's context=16"),
        (["--heads", "5"], "dim=32 does not divide into heads=5"),
        (["--heads", "4", "--kv-heads", "3"], "do not group over kv_heads=3"),
        (["--optimizer", "adam", "--weight-decay", "0.5"], "weight_decay=0.5 has no effect with optimizer=adam"),
        (["--zero", "1"], "zero=1 has no effect on mesh data=1"),
        (["--vocab", "3"], "below the tokenizer's"),
        (["--learning-rate", "nan"], "learning_rate must be above 0"),
        (["--learning-rate", "inf"], "learning_rate must be above 0"),
        (["--learning-rate", "0"], "learning_rate must be above 0"),
        (["--learning-rate", "fast"], "'fast' is not a valid float"),
        (["--weight-decay", "-1"], "weight_decay must be at least 0"),
        (["--clip", "nan"], "clip must be at least 0"),
        (["--b1", "1"], "b1 and b2 must be below 1"),
        (["--steps", "0"], "steps must be above 0"),
        (["--steps", "-3"], "steps must be above 0"),
        (["--batch", "0"], "batch must be above 0"),
        (["--seed", "-1"], "seed must be at least 0"),
        (["--seed", str(2**32)], "seed must be at most 4294967295"),
        (["--val-fraction", "nan"], "val_fraction must lie between 0 and 1"),
        (["--val-fraction", "1"], "val_fraction must lie between 0 and 1"),
        (["--eval-every", "-1"], "eval_every must be at least 0"),
        (["--keep", "0"], "keep must be above 0"),
        (["--dropout", "1"], "dropout must be at least 0 and below 1"),
        (["--keep-best", "--eval-every", "0"], "keep_best has no effect with eval_every=0"),
        (["--validation", "no.txt"], "the validation text: data 'no.txt' cannot be read: No such file or directory"),
        (["--validation", "stdlib", "--val-fraction", "0.2"], "val_fraction=0.2 has no effect with validation=stdlib"),
        (["--batch", str(10**12)], "tokens a step"),
        (["--rope-theta", "inf"], "rope_theta must be above 0"),
        (["extra"], "unexpected extra argument"),
        (["--config", "no.toml"], "no.toml cannot be read: No such file or directory"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_bad_flags(flags: list[str], said: str, gcompute: Command, words: Path, tmp_path: Path):
    out = tmp_path / "out"
    ended = gcompute(*TINY, "--data", words, "--out", out, *flags)
    assert said in ended.error
    assert not (out / "run.json").exists()
    assert not (out / "checkpoints").exists()


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("[train]\nstepps = 3", "[train]: 'stepps' is not known. Did you mean 'steps'?"),
        ("[trane]\nsteps = 3", "section 'trane' is not known. Did you mean 'train'?"),
        ("steps = 3", "section 'steps' is not known"),
        ("[train]\nsteps = 'many'", "steps must be of type int, got 'many'"),
        ("[train]\nsteps = true", "steps must be of type int, got True"),
        ("[train]\nsteps = 2.5", "steps must be of type int, got 2.5"),
        ("[train]\nmesh = 'dta=2'", "mesh axis 'dta' is not known"),
        ("[train]\nmesh = 2", "mesh must be of type MeshShape, got 2"),
        ("[model]\nbias = 'no'", "bias must be of type bool, got 'no'"),
        ("[optimizer]\noptimizer = 'muonn'", "optimizer='muonn' is not known. Did you mean 'muon'?"),
        ("[optimizer]\nlearning_rate = nan", "learning_rate must be above 0, got nan"),
        ("[optimizer]\noptimizer = 'lion'\neps = 0.1", "eps=0.1 has no effect with optimizer=lion"),
        ("[train\nsteps = 3", "does not parse as TOML"),
        ("\x00", "does not parse as TOML"),
    ],
)
def test_bad_toml(text: str, said: str, gcompute: Command, words: Path, tmp_path: Path):
    path = tmp_path / "run.toml"
    path.write_text(text)
    command = ("train", "--no-fast", "--config", path, "--data", words, "--out", tmp_path / "out")
    assert said in gcompute(*command).error


@pytest.mark.parametrize("name", ["m.json", "m.toml"])
def test_files_that_begin_with_a_byte_order_mark(name: str, gcompute: Command, words: Path, tmp_path: Path):
    text = {"m.json": '{"layerss": 3}', "m.toml": "layerss = 3"}[name]
    (tmp_path / name).write_text(text, encoding="utf-8-sig")
    (tmp_path / "run.toml").write_text("[train]\nstepps = 3", encoding="utf-8-sig")
    command = ("train", "--no-fast", "--data", words, "--out", tmp_path / "out")
    assert "Did you mean 'layers'?" in gcompute(*command, "--model", tmp_path / name).error
    assert "Did you mean 'steps'?" in gcompute(*command, "--config", tmp_path / "run.toml").error


@pytest.mark.parametrize(
    ("name", "text", "said"),
    [
        ("m.json", '{"layerss": 3}', "'layerss' is not known. Did you mean 'layers'?"),
        ("m.json", '{"model": 3}', "fields and their values are wanted, got 3"),
        ("m.json", "[1]", "fields and their values are wanted, got [1]"),
        ("m.json", '{"dim": 32.5}', "dim must be of type int, got 32.5"),
        ("m.json", '{"dim": "wide"}', "dim must be of type int, got 'wide'"),
        ("m.json", '{"dim":', "does not parse"),
        ("m.toml", "dim = ", "does not parse"),
    ],
)
def test_bad_model_files(name: str, text: str, said: str, gcompute: Command, words: Path, tmp_path: Path):
    (tmp_path / name).write_text(text)
    ended = gcompute(*TINY, "--model", tmp_path / name, "--data", words, "--out", tmp_path / "out")
    assert said in ended.error


def test_a_file_in_place_of_the_run_directory(gcompute: Command, words: Path, tmp_path: Path):
    (tmp_path / "out").write_text("mine")
    ended = gcompute(*TINY, "--data", words, "--out", tmp_path / "out")
    assert "cannot be written: File exists. Choose another directory" in ended.error
    assert (tmp_path / "out").read_text() == "mine"
    assert "cannot be written" in gcompute(*TINY, "--data", words, "--out", "/proc/nowhere").error


def test_a_file_in_place_of_the_checkpoints(gcompute: Command, words: Path, tmp_path: Path):
    (tmp_path / "checkpoints").write_text("mine")
    assert "checkpoint" in gcompute(*TINY, "--data", words, "--out", tmp_path).error
    assert (tmp_path / "checkpoints").read_text() == "mine"


def test_a_path_that_checkpoints_could_not_be_read_from(gcompute: Command, words: Path, tmp_path: Path):
    ended = gcompute(*TINY, "--data", words, "--out", tmp_path / "run[1]")
    assert "cannot keep checkpoints: [ in its path stands for other characters" in ended.error
    assert not (tmp_path / "run[1]").exists()


def test_writing_into_the_directory_of_the_data(gcompute: Command, words: Path, tmp_path: Path):
    shutil.copy(words, tmp_path)
    ended = gcompute(*TINY, "--data", tmp_path, "--out", tmp_path / "runs" / "a")
    assert f"lies in --data {tmp_path}, and would be read as text next time" in ended.error


def test_a_directory_that_holds_a_run_is_not_overwritten(gcompute: Command, words: Path, run_copy: Path):
    before = snapshot(run_copy)
    again = (*TINY, "--data", words, "--out", run_copy)
    assert "already holds a run. Go on with --resume" in gcompute(*again, "--resume", "no").error
    error = gcompute(*again, "--learning-rate", "0.5").error
    assert "already holds a run, and another one: learning_rate is 0.001 there and 0.5 here" in error
    assert "already holds a run, and another one: layers is 1 there" in gcompute(*TINY[:2], "--out", run_copy).error
    assert snapshot(run_copy) == before


def test_two_trainers_in_one_directory(gcompute: Command, run_copy: Path):
    import fcntl

    before = snapshot(run_copy)
    with (run_copy / ".lock").open("a+") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        lock.truncate(0)
        lock.write("4711")
        lock.flush()
        ended = gcompute("train", "--no-fast", "--out", run_copy, "--resume", "--steps", "8")
        assert f"another process (4711) is training in {run_copy}" in ended.error
    assert snapshot(run_copy) == before


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--learning-rate", "0.5"], "learning_rate was 0.001 and cannot become 0.5"),
        (["--batch", "8"], "batch was 4 and cannot become 8"),
        (["--tokenizer", "byte"], "tokenizer was 'char' and cannot become 'byte'"),
        (["--layers", "3"], "layers was 1 and cannot become 3"),
        (["--model", "demo"], "--resume takes the model from the run"),
        (["--steps", "5"], "is at step 6, past --steps 5. Give at least 6"),
        (["--data", "/dev/null"], "is empty"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_resuming_with_what_contradicts_the_run(flags: list[str], said: str, gcompute: Command, run_copy: Path):
    before = snapshot(run_copy)
    assert said in gcompute("train", "--no-fast", "--out", run_copy, "--resume", *flags).error
    assert snapshot(run_copy) == before


def test_a_resumed_run_whose_text_is_gone(gcompute: Command, words: Path, tmp_path: Path, monkeypatch):
    (tmp_path / "here").mkdir()
    (tmp_path / "there").mkdir()
    text = tmp_path / "here" / "text.txt"
    text.write_text(words.read_text())
    monkeypatch.chdir(tmp_path / "here")
    assert gcompute(*TINY, "--data", "text.txt", "--out", tmp_path / "out").status == 0
    resumed = ("train", "--no-fast", "--out", tmp_path / "out", "--resume", "--steps", "7")
    monkeypatch.chdir(tmp_path / "there")
    assert gcompute(*resumed).status == 0
    text.rename(tmp_path / "there" / "moved.txt")
    assert f"the run's data {text} is not there. Say where the text is now with --data" in gcompute(*resumed).error
    assert gcompute(*resumed, "--data", "moved.txt").status == 0


def test_resuming_where_there_is_no_run(gcompute: Command, tmp_path: Path):
    ended = gcompute("train", "--no-fast", "--out", tmp_path / "no", "--resume")
    assert "holds no run to go on with" in ended.error
    assert not (tmp_path / "no").exists()


def test_resuming_on_other_text(gcompute: Command, words: Path, run_copy: Path, tmp_path: Path):
    moved = tmp_path / "moved.txt"
    moved.write_text(words.read_text())
    assert gcompute("train", "--no-fast", "--out", run_copy, "--resume", "--data", moved).status == 0
    before = snapshot(run_copy)
    text = words.read_text()
    moved.write_text("e" + text[1:] if text[0] != "e" else "t" + text[1:])
    ended = gcompute("train", "--no-fast", "--out", run_copy, "--resume")
    assert "its tokens differ" in ended.error
    moved.write_text(text + " zebra")
    assert "another tokenizer" in gcompute("train", "--no-fast", "--out", run_copy, "--resume").error
    assert snapshot(run_copy) == before


@pytest.mark.oldest('{"model": {}}')
@pytest.mark.parametrize(
    "damage", [b"", b"{", b"[]", b'{"model": {}}', b'{"model": 3, "optimizer": 1, "train": 1, "data": 1}']
)
def test_a_damaged_run_json_is_read_from_a_checkpoint(damage: bytes, gcompute: Command, run_copy: Path):
    good = (run_copy / "run.json").read_bytes()
    (run_copy / "run.json").write_bytes(damage)
    ended = gcompute("train", "--no-fast", "--out", run_copy, "--resume")
    assert ended.status == 0, ended.err
    assert "the configuration is taken from checkpoint 6" in ended.err
    assert (run_copy / "run.json").read_bytes() == good


def test_a_damaged_run_json_without_checkpoints(gcompute: Command, tmp_path: Path):
    (tmp_path / "run.json").write_text("{")
    assert "run.json is damaged" in gcompute("train", "--no-fast", "--out", tmp_path, "--resume").error


def test_a_loss_that_is_not_finite_ends_the_run_and_keeps_the_checkpoint(
    gcompute: Command, words: Path, tmp_path: Path
):
    # A cosine from 1e30 at step 1: what the first update leaves overflows in the second forward pass.
    rate = ("--learning-rate", "1e30", "--clip", "0", "--checkpoint-every", "1")
    ended = gcompute(*TINY, "--data", words, "--out", tmp_path / "out", *rate)
    assert "is not finite. Checkpoint 1 stands: start again in another --out" in ended.error
    rows = read_metrics(tmp_path / "out" / "metrics.jsonl")
    assert [row["step"] for row in rows] == [1]
    json.loads((tmp_path / "out" / "metrics.jsonl").read_text(), parse_constant=pytest.fail)


@contextmanager
def small_disk(where: Path, size: str) -> Iterator[Path]:
    """A file system of its own, of a given size."""
    where.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", where], capture_output=True)
    if mounted.returncode:
        pytest.skip("mounting a small file system needs root")
    try:
        yield where
    finally:
        subprocess.run(["umount", "-l", where], check=True)


def fill(disk: Path, leave_bytes: int) -> None:
    free = os.statvfs(disk).f_bavail * os.statvfs(disk).f_frsize
    (disk / "filler").write_bytes(b"x" * max(0, free - leave_bytes))


@pytest.mark.slow
def test_a_disk_that_is_full_at_a_checkpoint(gcompute: Command, run_copy: Path, tmp_path: Path):
    """In a process of its own, where what Orbax leaves behind would be printed."""
    more = ("train", "--no-fast", "--resume", "--steps", "12", "--out")
    with small_disk(tmp_path / "disk", "8m") as disk:
        out = Path(shutil.copytree(run_copy, disk / "run"))
        fill(disk, 60_000)
        command = [sys.executable, "-m", "gcompute", *more, out]
        process = subprocess.run(command, capture_output=True, text=True, timeout=300)
        ended = Ended(status=process.returncode, out=process.stdout, err=process.stderr)
        assert "could not be written (No space left on device). Checkpoint 6 stands: make room" in ended.error
        (disk / "filler").unlink()
        ended = gcompute(*more, out)
        assert ended.status == 0, ended.err
        again = read_metrics(out / "metrics.jsonl")
        left = [path.name for path in out.rglob("*") if "tmp" in path.name]
    assert not left
    assert gcompute(*more, run_copy).status == 0
    whole = read_metrics(run_copy / "metrics.jsonl")
    assert [(row["step"], row["loss"]) for row in again] == [(row["step"], row["loss"]) for row in whole]


def test_a_disk_that_is_full_from_the_start(gcompute: Command, words: Path, tmp_path: Path):
    with small_disk(tmp_path / "disk", "1m") as disk:
        fill(disk, 0)
        ended = gcompute(*TINY, "--data", words, "--out", disk / "run")
        assert "No space left on device" in ended.error


def test_a_disk_that_is_full_at_a_line_of_metrics(gcompute: Command, run_copy: Path, monkeypatch):
    from gcompute.train.metrics_log import MetricsLog

    init = MetricsLog.__init__

    def on_full_device(self, path: Path, *, last_step: int) -> None:
        init(self, path, last_step=last_step)
        self._file.close()
        self._file = open("/dev/full", "a", encoding="utf-8")  # noqa: SIM115

    before = snapshot(run_copy / "checkpoints")
    with monkeypatch.context() as patch:
        patch.setattr(MetricsLog, "__init__", on_full_device)
        ended = gcompute("train", "--no-fast", "--out", run_copy, "--resume", "--steps", "8")
    assert (
        "metrics.jsonl cannot be written: No space left on device. Make room there, then go on with --resume"
        in ended.error
    )
    assert snapshot(run_copy / "checkpoints") == before
    assert gcompute("train", "--no-fast", "--out", run_copy, "--resume", "--steps", "8").status == 0


def test_a_model_whose_state_exceeds_the_memory(gcompute: Command, words: Path, tmp_path: Path):
    error = gcompute(*TINY, "--data", words, "--out", tmp_path / "out", "--vocab", "2000000000", "--dim", "64").error
    assert "parameters, gradients and optimizer need 1," in error
    assert "GiB" in error
    assert not any((tmp_path / "out" / "checkpoints").glob("*"))


def test_tensorboard_without_its_package(
    gcompute: Command, words: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setitem(sys.modules, "tensorboardX", None)
    ended = gcompute(*TINY, "--data", words, "--out", tmp_path / "out", "--tensorboard")
    assert "pip install 'gcompute[tensorboard]'" in ended.error
    assert not (tmp_path / "out").exists()
