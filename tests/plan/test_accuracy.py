"""Each class of prediction says how it was examined, and what of a question was not."""

import dataclasses
import json
import math

import pytest

from gcompute.plan.accuracy import RECORD, Accuracy, Unseen, accuracy_of

KINDS = (
    "train memory, TPU compiler",
    "train memory, GPU compiler",
    "train step, TPU",
    "train step, GPU",
    "serve memory, TPU compiler",
    "serving times, worked problems",
)


@pytest.mark.parametrize("kind", KINDS)
def test_every_class_was_examined(kind: str):
    found = accuracy_of(kind, {})
    assert found.num >= 1
    assert found.outside == ()
    assert all(math.isfinite(share) for share in (found.median, found.worst, found.low))
    assert 0 <= found.median <= found.worst < 1
    assert found.low >= 0
    assert f"of {found.num} examined" in str(found)


def test_what_lies_outside_is_named(monkeypatch: pytest.MonkeyPatch):
    record = {
        "train step, TPU": {
            "num": 7, "median": 0.04, "worst": 0.2, "low": 0.1,
            "examined": {"chip": ["v5e", "v5p"], "axis": ["fsdp", "tensor"], "layers": ["dense"]},
        }
    }  # fmt: skip
    unseen = {"train step, TPU": {"num": 3, "median": 0.11, "worst": 0.24}}
    monkeypatch.setattr("gcompute.plan.accuracy._document", lambda: {"classes": record, "unseen": unseen})
    inside = accuracy_of("train step, TPU", {"chip": "v5p", "axis": ("fsdp",), "layers": ("dense",)})
    looked = Accuracy(kind="train step, TPU", num=7, median=0.04, worst=0.2, low=0.1)
    assert inside == dataclasses.replace(looked, unseen=Unseen(num=3, median=0.11, worst=0.24))
    assert str(inside) == (
        "median 4.0%, worst 20.0% of 7 examined; median 11%, worst 24% of 3 published that no fit saw"
    )
    outside = accuracy_of("train step, TPU", {"chip": "v6e", "axis": ("fsdp", "stage"), "precision": "float32"})
    assert outside.outside == ("chip v6e", "axis stage", "precision float32")
    assert str(outside).endswith("; outside what was examined: chip v6e, axis stage, precision float32")
    with pytest.raises(ValueError, match=r"'train step, NPU' have not been examined\. Legal: train step, TPU"):
        accuracy_of("train step, NPU", {})
    assert accuracy_of("train step, TPU", {}, unseen="serving, NPU").unseen is None


@pytest.mark.oldest
def test_all_that_is_asked_for_is_in_the_record():
    assert set(KINDS) <= set(json.loads(RECORD.read_text(encoding="utf-8"))["classes"])
