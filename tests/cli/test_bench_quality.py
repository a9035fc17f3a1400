"""gcompute bench quality on a trained run of the tests."""

import json

import pytest


@pytest.mark.oldest
@pytest.mark.slow
def test_the_loss_of_each_format_beside_bfloat16(gcompute, finished, words):
    told = json.loads(gcompute("bench", "quality", finished, "--text", words, "--json").out)
    assert [(row["weights"], row["kv"]) for row in told["rows"]] == [
        ("bfloat16", "bfloat16"),
        ("int8", "bfloat16"),
        ("bfloat16", "int8"),
        ("int8", "int8"),
    ]
    assert told["num_tokens"] > 64
    first = told["rows"][0]["nats_a_token"]
    assert all(row["difference"] == row["nats_a_token"] - first for row in told["rows"])
    # A model of a few steps is close to even odds, and eight bits move it by little.
    assert 0 < max(abs(row["difference"]) for row in told["rows"]) < 0.05
    table = gcompute("bench", "quality", finished, "--text", words).out
    assert f"{first:.5f}" in table
    assert "measured" in table


@pytest.mark.parametrize(
    ("content", "said"), [(None, "cannot be read"), (b"\xff\xfe\x00", "is not UTF-8"), (b"a", "fill no window")]
)
def test_a_text_that_is_none(gcompute, finished, tmp_path, content, said):
    path = tmp_path / "text"
    if content is not None:
        path.write_bytes(content)
    ended = gcompute("bench", "quality", finished, "--text", path)
    assert ended.status == 2
    assert said in ended.err
    assert ended.err.count("\n") == 1
