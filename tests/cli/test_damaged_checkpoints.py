"""A checkpoint that was cut short or lost files: the one before it is used, and that is said."""

import gc
import json
import shutil
from collections.abc import Iterator
from pathlib import Path

import jax
import numpy as np
import pytest
from command_line import Command

from gcompute.model.pretrained import load
from gcompute.train.metrics_log import read_metrics

# Where one file cannot be read, Orbax leaves the tasks of the others behind, unfinished.
pytestmark = pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")


@pytest.fixture(autouse=True)
def leftovers_are_collected() -> Iterator[None]:
    yield
    gc.collect()


def files(checkpoint: Path) -> list[Path]:
    return sorted(path for path in checkpoint.rglob("*") if path.is_file())


def params_of(path: Path) -> list[bytes]:
    return [np.asarray(leaf).tobytes() for leaf in jax.tree.leaves(load(path).params)]


@pytest.mark.parametrize("share", [0.0, 0.5], ids=["emptied", "halved"])
def test_any_file_of_the_newest_cut_short_never_gives_wrong_parameters(share: float, run_copy: Path):
    newest = run_copy / "checkpoints" / "6"
    good = {step: params_of(run_copy / "checkpoints" / str(step)) for step in (4, 6)}
    fell_back = []
    for path in files(newest):
        content = path.read_bytes()
        path.write_bytes(content[: int(share * len(content))])
        notices: list[str] = []
        model = load(run_copy, notice=notices.append)
        found = [np.asarray(leaf).tobytes() for leaf in jax.tree.leaves(model.params)]
        assert found == good[model.step], path
        assert len(notices) == (model.step == 4), path
        if notices:
            assert "\n" not in notices[0]
            assert f"checkpoint {newest} cannot be read" in notices[0]
            fell_back.append(path)
        path.write_bytes(content)
    assert any(newest / "params" in path.parents for path in fell_back)
    assert any(newest / "meta" in path.parents for path in fell_back)


def test_training_falls_back_and_repeats_the_lost_steps(gcompute: Command, run_copy: Path):
    whole = read_metrics(run_copy / "metrics.jsonl")
    newest = run_copy / "checkpoints" / "6"
    largest = max(files(newest / "optimizer"), key=lambda path: path.stat().st_size)
    largest.write_bytes(largest.read_bytes()[:100])
    ended = gcompute("train", "--no-fast", "--out", run_copy, "--resume")
    assert ended.status == 0, ended.err
    assert "notice: checkpoint 6 in" in ended.err
    assert "trying the one before it" in ended.err
    assert "resumed at step 4" in ended.err
    names = sorted(path.name for path in (run_copy / "checkpoints").iterdir())
    assert names == ["2", "4", "6", "6.damaged"]
    again = read_metrics(run_copy / "metrics.jsonl")
    assert [(row["step"], row["loss"]) for row in again] == [(row["step"], row["loss"]) for row in whole]


def test_a_checkpoint_that_was_half_deleted_is_no_obstacle(gcompute: Command, run_copy: Path):
    shutil.rmtree(run_copy / "checkpoints" / "2" / "params")
    (run_copy / "checkpoints" / "2" / "_CHECKPOINT_METADATA").unlink()
    ended = gcompute("train", "--no-fast", "--out", run_copy, "--resume", "--steps", "8")
    assert ended.status == 0, ended.err
    assert sorted(path.name for path in (run_copy / "checkpoints").iterdir()) == ["4", "6", "8"]


def test_what_a_killed_save_left_is_swept_away(gcompute: Command, run_copy: Path):
    checkpoints = run_copy / "checkpoints"
    shutil.copytree(checkpoints / "6", checkpoints / "8.orbax-checkpoint-tmp")
    (run_copy / "metrics.jsonl.123.tmp").write_text("half")
    (run_copy / "run.json.123.tmp").write_text("half")
    ended = gcompute("train", "--no-fast", "--out", run_copy, "--resume", "--steps", "8")
    assert ended.status == 0, ended.err
    assert "resumed at step 6" in ended.err
    assert sorted(path.name for path in checkpoints.iterdir()) == ["4", "6", "8"]
    assert not [path.name for path in run_copy.iterdir() if path.name.endswith(".tmp")]


def test_all_damaged(gcompute: Command, run_copy: Path):
    for step in (2, 4, 6):
        for path in files(run_copy / "checkpoints" / str(step)):
            path.write_bytes(b"")
    kept = sorted(path.name for path in (run_copy / "checkpoints").iterdir())
    ended = gcompute("train", "--no-fast", "--out", run_copy, "--resume")
    assert "none of the 3 checkpoints" in ended.error
    assert sorted(path.name for path in (run_copy / "checkpoints").iterdir()) == kept
    assert "can be read" in gcompute("generate", "--no-fast", run_copy, "the ").error


def test_another_tokenizer_than_the_checkpoint_was_trained_with(gcompute: Command, run_copy: Path):
    from gcompute.model.tokenizer import Tokenizer

    Tokenizer.from_spec("byte", list).save(run_copy / "tokenizer.json")
    ended = gcompute("generate", "--no-fast", run_copy, "the ")
    assert "is not the tokenizer that checkpoint 6 was trained with" in ended.error
    assert "another tokenizer" in gcompute("train", "--no-fast", "--out", run_copy, "--resume").error


def test_a_tokenizer_that_is_damaged_or_gone(gcompute: Command, run_copy: Path):
    (run_copy / "tokenizer.json").write_text("{")
    assert "tokenizer.json" in gcompute("generate", "--no-fast", run_copy, "the ").error
    (run_copy / "tokenizer.json").unlink()
    assert "has no tokenizer.json" in gcompute("generate", "--no-fast", run_copy, "the ").error


def largest_of(folder: Path) -> Path:
    return max(files(folder), key=lambda path: path.stat().st_size)


def flip_bit(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 4
    path.write_bytes(content)


def test_a_flipped_bit_is_said_and_costs_the_steps_since_the_checkpoint_before(gcompute: Command, run_copy: Path):
    whole = read_metrics(run_copy / "metrics.jsonl")
    flip_bit(largest_of(run_copy / "checkpoints" / "6" / "params"))
    one = gcompute("generate", "--no-fast", run_copy / "checkpoints" / "6", "the ")
    assert "checkpoint 6 in" in one.error
    assert "is damaged" in one.error
    ended = gcompute("train", "--no-fast", "--out", run_copy, "--resume")
    assert ended.status == 0, ended.err
    assert "resumed at step 4" in ended.err
    again = read_metrics(run_copy / "metrics.jsonl")
    assert [(row["step"], row["loss"]) for row in again] == [(row["step"], row["loss"]) for row in whole]


@pytest.mark.parametrize(
    ("section", "name", "value"), [("train", "seed", 3), ("optimizer", "learning_rate", 0.5)], ids=["seed", "rate"]
)
def test_a_run_json_that_was_edited(section: str, name: str, value: float, gcompute: Command, run_copy: Path):
    path = run_copy / "run.json"
    kept = json.loads(path.read_text())
    kept[section][name] = value
    path.write_text(json.dumps(kept))
    ended = gcompute("train", "--no-fast", "--out", run_copy, "--resume", "--steps", "8")
    assert f"{name} is " in ended.error
    assert f"{value} here" in ended.error
    assert sorted(path.name for path in (run_copy / "checkpoints").iterdir()) == ["2", "4", "6"]


def test_the_configuration_is_not_taken_from_a_damaged_checkpoint(gcompute: Command, run_copy: Path):
    (run_copy / "run.json").unlink()
    meta = run_copy / "checkpoints" / "6" / "meta" / "metadata"
    text = meta.read_text()
    meta.write_text(text.replace('"seed": 0', '"seed": 8'))
    assert meta.read_text() != text
    ended = gcompute("train", "--no-fast", "--out", run_copy, "--resume")
    assert ended.status == 0, ended.err
    assert "the configuration is taken from checkpoint 4" in ended.err
    assert json.loads((run_copy / "run.json").read_text())["train"]["seed"] == 0
