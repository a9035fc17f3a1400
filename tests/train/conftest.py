"""Tiny real text as tokens."""

import random
from pathlib import Path

import pytest

from gcompute.config.train import DataConfig
from gcompute.train.corpus import TokenizedCorpus, prepare

WORDS = ("the", "of", "and", "to", "in", "is", "that", "it", "was", "for", "on", "are", "with", "as", "his", "they")


@pytest.fixture(scope="session")
def text_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Four thousand words of English, in an order of their own."""
    path = tmp_path_factory.mktemp("text") / "words.txt"
    path.write_text(" ".join(random.Random(0).choices(WORDS, k=4000)), encoding="utf-8")
    return path


@pytest.fixture(scope="session")
def corpus(text_file: Path, tmp_path_factory: pytest.TempPathFactory) -> TokenizedCorpus:
    return prepare(DataConfig(data=str(text_file), tokenizer="char"), tmp_path_factory.mktemp("corpus"))
