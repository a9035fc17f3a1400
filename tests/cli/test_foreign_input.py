"""What comes from outside: paths, names, locks, caches, keys, files that are not what they should be."""

import json
import os
from pathlib import Path

import click
import pytest
from command_line import TINY, Command

from gcompute.cli import main as entry
from gcompute.cli.api_key import chosen_key
from gcompute.cli.flags import local_path, read_toml
from gcompute.cli.run_directory import LOCK, SECTIONS, only_writer
from gcompute.config.plain import from_plain
from gcompute.config.train import TrainConfig
from gcompute.measure.cache import cache_directory, writable_cache
from gcompute.measure.whole_file import write_whole
from gcompute.train.checkpoint import check_path
from gcompute.train.metrics_log import read_metrics


def test_a_tilde_is_the_home_directory(tmp_path: Path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    assert local_path("~/runs/x") == f"{tmp_path}/runs/x"
    assert local_path("a~/b") == "a~/b"
    (tmp_path / "run.toml").write_text('[data]\ndata = "~/t.txt"\n')
    assert read_toml(tmp_path / "run.toml", SECTIONS)["data"]["data"] == f"{tmp_path}/t.txt"
    monkeypatch.setenv("HOME", "")
    with pytest.raises(ValueError, match="HOME is not set"):
        local_path("~/runs/x")


@pytest.mark.parametrize(
    "arguments",
    [
        ("train", "--out", "gs://bucket/run"),
        ("train", "--data", "s3://bucket/text"),
        ("train", "--model", "gs://bucket/config.json"),
        ("generate", "gs://bucket/run", "the"),
        ("serve", "gs://bucket/run"),
        ("chips", "--file", "gs://bucket/chips.toml"),
        ("plan", "train", "gs://bucket/config.json", "--on", "v5e:4x4"),
    ],
)
def test_a_bucket_is_refused_before_anything_is_made(
    arguments: tuple[str, ...], gcompute: Command, tmp_path: Path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    assert "is not a path on this machine" in gcompute(*arguments).error
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("name", ["a\\b", "a[b]", "gs:/x", "s3:/x", "bad\udcff"])
def test_a_name_that_orbax_cannot_encode(name: str, tmp_path: Path):
    with pytest.raises(ValueError, match="cannot keep checkpoints"):
        check_path(tmp_path / name)
    check_path(tmp_path / "ü 日 $x {y} 'z' a:b")


def test_dollar_signs_in_a_name_and_a_picture_that_fails(gcompute: Command, words: Path, tmp_path: Path, monkeypatch):
    out = tmp_path / "q[red]x"
    ended = gcompute(*TINY, "--data", words, "--out", out)
    assert "stands for other characters" in ended.error
    out = tmp_path / "$^$"
    ended = gcompute(*TINY, "--data", words, "--out", out)
    assert ended.status == 0, ended.err
    assert (out / "loss.png").is_file()
    assert f"loss.png in {out}" in ended.err

    def broken(*args, **kwargs) -> None:
        raise ImportError("no backend")

    monkeypatch.setattr("gcompute.cli.session.plot_loss", broken)
    ended = gcompute("train", "--no-fast", "--out", out, "--resume", "--steps", "8")
    assert ended.status == 0, ended.err
    assert f"notice: {out / 'loss.png'} could not be drawn (no backend)" in ended.err
    assert f"checkpoint and metrics.jsonl in {out}" in ended.err


@pytest.mark.parametrize("content", ["precious", ""])
def test_a_lock_that_is_a_link_is_left_alone(content: str, tmp_path: Path):
    target = tmp_path / "target"
    target.write_text(content)
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / LOCK).symlink_to(target)
    with pytest.raises(ValueError, match="not the lock of a run"), only_writer(tmp_path / "run"):
        pass
    assert target.read_text() == content


def test_a_lock_of_another_kind_and_files_that_are_not_ours(tmp_path: Path):
    (tmp_path / LOCK).write_text("lock = mine\n")
    with pytest.raises(ValueError, match="Move it away"), only_writer(tmp_path):
        pass
    (tmp_path / LOCK).write_text("4711")
    kept, ours = tmp_path / "notes.2024.tmp", tmp_path / "run.json.4711.tmp"
    for path in (kept, ours):
        path.write_text("x")
    with only_writer(tmp_path):
        assert (tmp_path / LOCK).read_text() == str(os.getpid())
    assert kept.exists()
    assert not ours.exists()


def test_a_file_is_never_written_through_a_link(tmp_path: Path):
    target, path = tmp_path / "target", tmp_path / "run.json"
    target.write_text("precious")
    path.symlink_to(target)
    path.with_name(f"run.json.{os.getpid()}.tmp").symlink_to(target)
    write_whole(path, "{}")
    assert (target.read_text(), path.read_text()) == ("precious", "{}")
    assert not path.is_symlink()
    assert sorted(one.name for one in tmp_path.iterdir()) == ["run.json", "target"]


def test_no_home_and_a_cache_that_cannot_be_written(tmp_path: Path, monkeypatch):
    for name in ("GCOMPUTE_CACHE", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", "")
    with pytest.raises(ValueError, match="Set GCOMPUTE_CACHE"):
        cache_directory()
    (tmp_path / "file").touch()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    with pytest.raises(ValueError, match=r"cannot be written: Not a directory\. Set GCOMPUTE_CACHE"):
        writable_cache()
    monkeypatch.setenv("GCOMPUTE_CACHE", str(tmp_path / "cache"))
    assert writable_cache() == tmp_path / "cache"


class PanicException(BaseException):
    """As the tokenizers package raises it."""


@pytest.mark.parametrize(
    ("error", "status", "said"),
    [
        (KeyError("loss"), 70, "error: KeyError: 'loss'. gcompute did not expect that: GCOMPUTE_TRACEBACK=1 shows"),
        (PanicException("index out of bounds"), 70, "error: PanicException: index out of bounds."),
        (RecursionError("maximum"), 2, "error: a file that was read nests too deep."),
        (RuntimeError("Unable to initialize backend 'tpu': none."), 2, "Unset JAX_PLATFORMS=tpu, or name what is here"),
    ],
)
def test_what_no_command_foresaw_is_one_line(
    error: BaseException, status: int, said: str, gcompute: Command, monkeypatch
):
    @click.command
    def broken() -> None:
        raise error

    monkeypatch.setattr(entry.LazyGroup, "get_command", lambda *args: broken)
    monkeypatch.setenv("JAX_PLATFORMS", "tpu")
    ended = gcompute("chips")
    assert ended.status == status
    assert said in ended.err
    assert len(ended.err.splitlines()) == 1
    monkeypatch.setenv("GCOMPUTE_TRACEBACK", "1")
    with pytest.raises(type(error)):
        entry.main(["chips"])


def test_null_and_deep_values_of_a_run(run_copy: Path, gcompute: Command):
    with pytest.raises(ValueError, match=r"steps must be of type int, got null"):
        from_plain(TrainConfig, {"steps": None}, source="here")
    assert from_plain(TrainConfig, {"mesh": None}, source="here") == {"mesh": None}
    stored = json.loads((run_copy / "run.json").read_text())
    stored["model"]["layers"] = None
    for text in (json.dumps(stored), "[" * 100_000):
        (run_copy / "run.json").write_text(text)
        ended = gcompute("train", "--no-fast", "--out", run_copy, "--resume")
        assert ended.status == 0, ended.err
        assert "is damaged" in ended.err


def test_rows_that_lack_their_numbers_are_left_out(tmp_path: Path):
    path = tmp_path / "metrics.jsonl"
    whole = {"kind": "train", "step": 1, "loss": 2.0}
    rows = [whole, {"kind": "train", "step": 2}, {"kind": "eval", "step": 2, "loss": None}, {"kind": [], "step": 3}]
    rows.append({"kind": "eval", "step": 4, "loss": 1.0, "batches": 2})
    path.write_text("".join(json.dumps(row) + "\n" for row in rows) + "[" * 100_000 + "\n")
    assert read_metrics(path) == [whole]


def test_the_key_of_a_server(tmp_path: Path, monkeypatch):
    monkeypatch.delenv("GCOMPUTE_API_KEY", raising=False)
    file = tmp_path / "key"
    file.write_text("secret\n")
    assert (chosen_key(None, None), chosen_key("k", None), chosen_key(None, file)) == (None, "k", "secret")
    for key, given in (("k", file), ("", None), (None, tmp_path / "missing")):
        with pytest.raises(ValueError, match="key"):
            chosen_key(key, given)
    file.write_text("\n")
    with pytest.raises(ValueError, match="is empty"):
        chosen_key(None, file)
    monkeypatch.setenv("GCOMPUTE_API_KEY", "")
    with pytest.raises(ValueError, match="set and empty"):
        chosen_key(None, None)
