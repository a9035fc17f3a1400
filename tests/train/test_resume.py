"""A run that is stopped and goes on is the run that was never stopped, bit for bit."""

import dataclasses
from pathlib import Path

import jax
import numpy as np
import pytest
from tiny_run import bits, make_run

from gcompute.config.mesh import MeshShape
from gcompute.config.train import RunConfig
from gcompute.model.pretrained import CHECKPOINTS, saved_steps
from gcompute.train.checkpoint import Checkpoints
from gcompute.train.corpus import TokenizedCorpus
from gcompute.train.events import Notice, Stepped
from gcompute.train.loop import METRICS, train
from gcompute.train.metrics_log import read_metrics
from gcompute.train.programs import build_programs


def stop_after(num_dispatches: int):
    """A `stopped` that says yes after so many dispatches."""
    asked = iter(range(10**6))
    return lambda: next(asked) >= num_dispatches


def losses(out: Path) -> dict[str, list[int]]:
    rows = read_metrics(out / METRICS)
    assert [row["step"] for row in rows if row["kind"] == "train"] == list(
        range(1, 1 + sum(row["kind"] == "train" for row in rows))
    )
    return {kind: bits([row["loss"] for row in rows if row["kind"] == kind]) for kind in ("train", "eval")}


def leaves(run: RunConfig, out: Path) -> dict[str, np.ndarray]:
    """Parameters and optimizer state of the last checkpoint, by path."""
    with Checkpoints(out / CHECKPOINTS, keep=20) as checkpoints:
        restored = checkpoints.restore(build_programs(run).abstract_state, pytest.fail)
    assert restored is not None
    state, meta = restored
    assert int(state.step) == meta["step"] == run.train.steps
    return {
        jax.tree_util.keystr(path): np.asarray(leaf) for path, leaf in jax.tree_util.tree_flatten_with_path(state)[0]
    }


def assert_same(run: RunConfig, out: Path, expected: Path) -> None:
    assert losses(out) == losses(expected)
    ours, theirs = leaves(run, out), leaves(run, expected)
    assert ours.keys() == theirs.keys()
    for name, leaf in ours.items():
        assert leaf.tobytes() == theirs[name].tobytes(), name


@pytest.mark.parametrize(
    ("precision", "accumulation"),
    [
        pytest.param("float32", 1, id="float32"),
        pytest.param("bfloat16", 2, id="bfloat16 accumulated", marks=pytest.mark.slow),
    ],
)
def test_stopped_at_odd_places_and_resumed_equals_uninterrupted(
    precision: str, accumulation: int, corpus: TokenizedCorpus, tmp_path: Path
):
    run = make_run(precision=precision, accumulation=accumulation)
    whole = train(run, corpus, out=tmp_path / "whole")
    assert whole.finished
    assert whole.step == 12
    broken = tmp_path / "broken"
    # One step a dispatch, then many, then what the clock says: how steps are grouped changes nothing.
    plan = [(1, stop_after(0)), (1, stop_after(3)), (7, stop_after(1)), (None, stop_after(1)), (7, lambda: False)]
    reached = []
    for index, (dispatch_steps, stopped) in enumerate(plan):
        part = dataclasses.replace(run, train=dataclasses.replace(run.train, dispatch_steps=dispatch_steps))
        result = train(part, corpus, out=broken, resume=index > 0, stopped=stopped)
        reached.append(result.step)
    assert reached == [0, 3, 4, 5, 12]
    assert_same(run, broken, tmp_path / "whole")
    assert (result.val_loss, result.train_loss) == (whole.val_loss, whole.train_loss)


def test_a_crash_between_checkpoints_repeats_the_lost_steps_exactly(corpus: TokenizedCorpus, tmp_path: Path):
    run = make_run()
    train(run, corpus, out=tmp_path / "whole")
    broken = tmp_path / "broken"

    def crash(event):
        if isinstance(event, Stepped) and event.step == 7:
            raise RuntimeError("power cut")

    one = dataclasses.replace(run, train=dataclasses.replace(run.train, dispatch_steps=1))
    with pytest.raises(RuntimeError, match="power cut"):
        train(one, corpus, out=broken, report=crash)
    assert saved_steps(broken / CHECKPOINTS) == [4]
    assert read_metrics(broken / METRICS)[-1]["step"] == 7
    with (broken / METRICS).open("a") as file:
        file.write('{"kind": "train", "step": 8, "lo')  # a line that the crash tore
    train(run, corpus, out=broken, resume=True)
    assert_same(run, broken, tmp_path / "whole")


def test_resuming_without_a_checkpoint_begins_at_step_0(corpus: TokenizedCorpus, tmp_path: Path):
    run = make_run()
    train(run, corpus, out=tmp_path / "whole")
    (tmp_path / "new").mkdir()
    train(run, corpus, out=tmp_path / "new", resume=True)
    assert_same(run, tmp_path / "new", tmp_path / "whole")


def test_more_steps_go_on_and_fewer_are_refused(corpus: TokenizedCorpus, tmp_path: Path):
    run = make_run(dispatch_steps=4)
    train(run, corpus, out=tmp_path)
    before = (tmp_path / METRICS).read_bytes()
    fewer = dataclasses.replace(run, train=dataclasses.replace(run.train, steps=7))
    with pytest.raises(ValueError, match=r"is at step 12, past --steps 7\. Give at least 12"):
        train(fewer, corpus, out=tmp_path, resume=True)
    assert (tmp_path / METRICS).read_bytes() == before
    again = train(run, corpus, out=tmp_path, resume=True)
    assert (tmp_path / METRICS).read_bytes() == before
    rows = read_metrics(tmp_path / METRICS)
    assert (again.step, again.val_loss) == (12, rows[-1]["loss"])
    more = dataclasses.replace(run, train=dataclasses.replace(run.train, steps=14))
    assert train(more, corpus, out=tmp_path, resume=True).step == 14
    assert [row["step"] for row in read_metrics(tmp_path / METRICS) if row["kind"] == "train"] == list(range(1, 15))


def test_a_longer_run_keeps_its_schedule_or_says_what_changes(corpus: TokenizedCorpus, tmp_path: Path):
    run = make_run(dispatch_steps=4)
    # A warm-up that the first end cuts: stretched to its full length it would throw the rate back.
    run = dataclasses.replace(run, optimizer=dataclasses.replace(run.optimizer, warmup_steps=100, schedule="constant"))
    train(run, corpus, out=tmp_path)
    events = []
    train(run.lasting(16), corpus, out=tmp_path, resume=True, report=events.append)
    rates = [row["learning_rate"] for row in read_metrics(tmp_path / METRICS) if row["kind"] == "train"]
    assert rates[11:] == pytest.approx([1e-2] * 5)
    assert not any(isinstance(event, Notice) for event in events)
    moved = dataclasses.replace(run, train=dataclasses.replace(run.train, steps=40))
    train(moved, corpus, out=tmp_path, resume=True, report=events.append, stopped=stop_after(1))
    (notice,) = [event.text for event in events if isinstance(event, Notice)]
    said = "the learning rate of step 17 is 0.00425 and was to be 0.01: the schedule ends at step 40 now"
    assert notice == f"{said} and ended at step 12 before."


def test_other_text_is_refused_even_where_the_tokenizer_is_the_same(corpus: TokenizedCorpus, tmp_path: Path):
    run = make_run()
    train(run, corpus, out=tmp_path)
    tokens = np.array(corpus.train)
    tokens[100] = tokens[100] ^ 1
    changed = dataclasses.replace(corpus, train=tokens)
    with pytest.raises(ValueError, match="its tokens differ"):
        train(run, changed, out=tmp_path, resume=True)


def test_a_checkpoint_of_one_mesh_goes_on_on_another(corpus: TokenizedCorpus, tmp_path: Path):
    run = make_run(steps=4, dispatch_steps=1)
    train(run, corpus, out=tmp_path)
    one = leaves(run, tmp_path)
    mesh = MeshShape.parse("data=2,fsdp=2,tensor=2")
    elsewhere = dataclasses.replace(run, train=dataclasses.replace(run.train, mesh=mesh))
    with Checkpoints(tmp_path / CHECKPOINTS, keep=20) as checkpoints:
        restored = checkpoints.restore(build_programs(elsewhere).abstract_state, pytest.fail)
    assert restored is not None
    split = 0
    for path, leaf in jax.tree_util.tree_flatten_with_path(restored[0])[0]:
        assert np.asarray(leaf).tobytes() == one[jax.tree_util.keystr(path)].tobytes()
        split += bool(leaf.ndim) and leaf.addressable_shards[0].data.size < leaf.size
    # Parameters and both of Adam's moments: 7 matrices of the block and the embedding.
    assert split >= 3 * 8
    more = elsewhere.lasting(6)
    events = []
    assert train(more, corpus, out=tmp_path, resume=True, report=events.append).step == 6
    assert not any(isinstance(event, Notice) for event in events)
