import json
from pathlib import Path

import pytest

from gcompute.train.metrics_log import MetricsLog, read_metrics


def row(step: int, kind: str = "train") -> dict:
    return {"kind": kind, "step": step, "loss": 1 / step}


@pytest.mark.oldest
def test_rows_are_there_at_once_and_in_order(tmp_path: Path):
    path = tmp_path / "metrics.jsonl"
    assert read_metrics(path) == []
    with MetricsLog(path, last_step=0) as log:
        log.write([row(1), row(2)])
        # Another process reads them before this one closes the file.
        assert read_metrics(path) == [row(1), row(2)]
        log.write([row(2, "eval")])
    assert [json.loads(line) for line in path.read_text().splitlines()] == [row(1), row(2), row(2, "eval")]


@pytest.mark.oldest
def test_going_on_drops_what_is_past_the_checkpoint(tmp_path: Path):
    path = tmp_path / "metrics.jsonl"
    with MetricsLog(path, last_step=0) as log:
        log.write([row(1), row(2), row(2, "eval"), row(3)])
    with MetricsLog(path, last_step=2) as log:
        assert log.last == {"train": row(2), "eval": row(2, "eval")}
        log.write([row(3)])
    assert [(r["kind"], r["step"]) for r in read_metrics(path)] == [
        ("train", 1),
        ("train", 2),
        ("eval", 2),
        ("train", 3),
    ]
    assert [entry.name for entry in tmp_path.iterdir()] == ["metrics.jsonl"]


@pytest.mark.parametrize(
    "torn",
    [b'{"kind": "train", "step": 2, "lo', b"\x00\x00\xff", b"17", b"[1]", b'{"loss": 1}', b'{"step": "2"}', b"\n"],
)
def test_a_line_that_is_no_row_is_left_out(torn: bytes, tmp_path: Path):
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(json.dumps(row(1)).encode() + b"\n" + torn)
    assert read_metrics(path) == [row(1)]
    with MetricsLog(path, last_step=1) as log:
        log.write([row(2)])
    assert read_metrics(path) == [row(1), row(2)]


def test_a_full_device_is_told_in_one_line(tmp_path: Path):
    log = MetricsLog(tmp_path / "metrics.jsonl", last_step=0)
    log._file.close()
    log._file = open("/dev/full", "a", encoding="utf-8")  # noqa: SIM115
    message = r"metrics.jsonl cannot be written: No space left on device\. Make room there"
    with pytest.raises(OSError, match=message), log:
        log.write([row(1)])


def test_a_place_that_cannot_be_written(tmp_path: Path):
    (tmp_path / "metrics.jsonl").mkdir()
    with pytest.raises(OSError, match=r"metrics.jsonl"):
        MetricsLog(tmp_path / "metrics.jsonl", last_step=0)
    assert [entry.name for entry in tmp_path.iterdir()] == ["metrics.jsonl"]
