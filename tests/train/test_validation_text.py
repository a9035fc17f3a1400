"""A validation text of one's own: read as the training text is, part of what the tokens are, found again on resume."""

import json
import os
import shutil
from pathlib import Path

import pytest

from gcompute.config.train import DataConfig
from gcompute.train.corpus import prepare

TRAIN, VAL = "the lark sings at dawn. " * 40, "the owl is awake at night; "


@pytest.fixture
def texts(tmp_path: Path) -> dict[str, Path]:
    paths = {"train": tmp_path / "train.txt", "val": tmp_path / "val.txt"}
    paths["train"].write_text(TRAIN)
    paths["val"].write_text(VAL)
    return paths


def config(texts: dict[str, Path], tokenizer: str = "byte", **fields) -> DataConfig:
    return DataConfig(data=str(texts["train"]), validation=str(texts["val"]), tokenizer=tokenizer, **fields)


@pytest.mark.oldest
@pytest.mark.parametrize("tokenizer", ["byte", "char", "bpe:270"])
def test_all_of_one_text_trains_and_all_of_the_other_validates(texts, tmp_path: Path, tokenizer: str):
    made = prepare(config(texts, tokenizer), tmp_path / "tokens")
    assert made.tokenizer.decode(made.train.tolist()) == TRAIN
    assert made.tokenizer.decode(made.val.tolist()) == VAL
    assert (made.num_train_bytes, made.num_val_bytes) == (len(TRAIN), len(VAL))
    assert prepare(config(texts, tokenizer), tmp_path / "tokens").reused


def test_a_bpe_learns_from_the_training_text_alone(texts, tmp_path: Path):
    alone = prepare(config(texts, "bpe:300"), tmp_path / "one").tokenizer
    texts["val"].write_text("zebra zebra zebra " * 50)
    assert prepare(config(texts, "bpe:300"), tmp_path / "two").tokenizer.fingerprint == alone.fingerprint


def test_tokens_are_of_both_texts_and_of_no_fraction(texts, tmp_path: Path):
    directory = tmp_path / "tokens"
    prepare(config(texts), directory)
    assert prepare(config(texts, val_fraction=0.5), directory).reused
    os.utime(texts["val"])
    assert prepare(config(texts), directory).reused
    assert not prepare(DataConfig(data=str(texts["train"]), tokenizer="byte"), directory).reused
    assert not prepare(config(texts), directory).reused
    texts["val"].write_text(VAL + "and hunts.")
    again = prepare(config(texts), directory)
    assert not again.reused
    assert again.tokenizer.decode(again.val.tolist()).endswith("hunts.")


def test_text_mb_limits_the_training_text_alone(texts, tmp_path: Path):
    made = prepare(config(texts, text_mb=1e-4), tmp_path / "tokens")
    assert (made.num_train_bytes, made.num_val_bytes) == (100, len(VAL))


def test_folders_and_records_end_as_documents_do(texts, tmp_path: Path):
    folder = tmp_path / "held_out"
    folder.mkdir()
    (folder / "a.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in ("one", "two")))
    (folder / "b.txt").write_text("three")
    (folder / "c.bin").write_bytes(bytes(range(256)))
    made = prepare(config({**texts, "val": folder}), tmp_path / "tokens")
    assert made.tokenizer.decode(made.val.tolist()) == "one<|endoftext|>two<|endoftext|>three<|endoftext|>"
    assert made.tokenizer.decode(made.train.tolist()) == TRAIN + "<|endoftext|>"
    assert made.left_out.startswith("1 of 4 files left out: 1 binary (c.bin)")


def test_a_text_that_is_not_there_or_empty_is_named(texts, tmp_path: Path):
    missing = {**texts, "val": tmp_path / "missing.txt"}
    with pytest.raises(ValueError, match=r"the validation text: data '.*missing.txt' cannot be read"):
        prepare(config(missing), tmp_path / "tokens")
    texts["val"].write_text("")
    with pytest.raises(ValueError, match=r"val.txt' is empty"):
        prepare(config(texts), tmp_path / "tokens")
    texts["val"].write_text("a")
    with pytest.raises(ValueError, match=r"val.txt' is too short: its val split has 1 tokens"):
        prepare(config(texts), tmp_path / "tokens")


def test_a_moved_text_is_the_same_tokens(texts, tmp_path: Path):
    first = prepare(config(texts), tmp_path / "one")
    moved = {**texts, "val": tmp_path / "elsewhere.txt"}
    shutil.move(texts["val"], moved["val"])
    second = prepare(config(moved), tmp_path / "two")
    assert first.val.tolist() == second.val.tolist()
