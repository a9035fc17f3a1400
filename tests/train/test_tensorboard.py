"""--tensorboard writes what metrics.jsonl has, once per step also after a resume, and says what to install."""

import sys
from pathlib import Path

import pytest
from tiny_run import make_run

from gcompute.train.corpus import TokenizedCorpus
from gcompute.train.loop import train
from gcompute.train.metrics_log import read_metrics
from gcompute.train.tensorboard import scalars

UNITS = {"tokens_per_step": 64, "flops_per_step": 1e6, "peak_flops_per_s": 1e9}


@pytest.mark.oldest
def test_a_row_is_its_scalars():
    row = {"kind": "train", "step": 3, "loss": 2.0, "gradient_norm": 0.5, "learning_rate": 1e-3, "step_s": 0.25}
    assert dict(scalars(row, **UNITS)) == {
        "loss/train": 2.0,
        "gradient_norm": 0.5,
        "learning_rate": 1e-3,
        "tokens_per_s": 256.0,
        "mfu": 0.004,
    }
    assert "mfu" not in dict(scalars(row, **{**UNITS, "peak_flops_per_s": None}))
    assert dict(scalars({**row, "balance": 1.5}, **UNITS))["balance"] == 1.5
    assert dict(scalars({"kind": "eval", "step": 3, "loss": 2.5}, **UNITS)) == {"loss/validation": 2.5}


def test_without_the_package_nothing_is_trained(
    corpus: TokenizedCorpus, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setitem(sys.modules, "tensorboardX", None)
    with pytest.raises(ValueError, match=r"pip install 'gcompute\[tensorboard\]'"):
        train(make_run(tensorboard=True), corpus, out=tmp_path / "run")
    assert not (tmp_path / "run").exists()


def read_events(directory: Path) -> list[tuple[str, int, float]]:
    """(name, step, value) of every scalar that TensorBoard shows: later files purge the steps that they begin at."""
    from tensorboardX.proto.event_pb2 import Event, SessionLog
    from tensorboardX.record_writer import struct

    found: list[tuple[str, int, float]] = []
    for path in sorted(directory.glob("events.out.tfevents.*"), key=lambda path: path.stat().st_mtime_ns):
        content = path.read_bytes()
        while content:
            # A record: length, CRC of it, content, CRC of that.
            (length,) = struct.unpack("<Q", content[:8])
            event = Event.FromString(content[12 : 12 + length])
            content = content[16 + length :]
            if event.session_log.status == SessionLog.START:
                found = [one for one in found if one[1] < event.step]
            found += [(value.tag, event.step, value.simple_value) for value in event.summary.value]
    return found


def test_the_files_hold_the_metrics_once_per_step(corpus: TokenizedCorpus, tmp_path: Path):
    pytest.importorskip("tensorboardX")
    run = make_run(tensorboard=True, dispatch_steps=1)
    asked = iter([False] * 7)
    train(run, corpus, out=tmp_path, stopped=lambda: next(asked, True), peak_flops_per_s=1e12)
    train(run, corpus, out=tmp_path, resume=True, peak_flops_per_s=1e12)
    rows, found = read_metrics(tmp_path / "metrics.jsonl"), read_events(tmp_path / "tensorboard")
    for name, kind in (("loss/train", "train"), ("loss/validation", "eval")):
        shown = [(step, value) for tag, step, value in found if tag == name]
        assert [step for step, _ in shown] == [row["step"] for row in rows if row["kind"] == kind]
        # Event files hold float32.
        assert [value for _, value in shown] == pytest.approx([row["loss"] for row in rows if row["kind"] == kind])
    assert {name for name, *_ in found} >= {"learning_rate", "gradient_norm", "tokens_per_s", "mfu"}
