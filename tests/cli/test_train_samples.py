"""gcompute train --sample-every prints texts and keeps them; a padded vocabulary trains, and is never sampled."""

import json
from pathlib import Path

from command_line import TINY, Command


def test_samples_are_printed_and_kept(gcompute: Command, words: Path, tmp_path: Path):
    flags = ("--sample-every", "3", "--sample-prompt", "the ", "--vocab", "64", "--dropout", "0.1")
    ended = gcompute(*TINY, "--data", words, "--out", tmp_path / "run", *flags)
    assert ended.status == 0, ended.err
    rows = [json.loads(line) for line in (tmp_path / "run" / "samples.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == [3, 6]
    for row in rows:
        assert f"step {row['step']:>6}  sample 'the ' -> {row['text']!r}" in ended.err
        # The context has 16 places, and every id that is drawn is one of the text's characters.
        assert len(row["text"]) == 12
        assert set(row["text"]) <= set(words.read_text())


def test_a_prompt_that_the_tokenizer_does_not_know(gcompute: Command, words: Path, tmp_path: Path):
    flags = ("--sample-every", "3", "--sample-prompt", "@")
    ended = gcompute(*TINY, "--data", words, "--out", tmp_path / "run", *flags)
    assert "the char tokenizer does not know '@'" in ended.error
    assert not (tmp_path / "run" / "run.json").exists()
