"""The checkpoint of lowest validation loss outlives the newest ones, and can be loaded by that name."""

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from tiny_run import make_run

from gcompute.config.unused import check_used
from gcompute.model.checksums import verify
from gcompute.model.pretrained import CHECKPOINTS, best_saved, load, locate, saved_steps
from gcompute.train import loop
from gcompute.train.checkpoint import ITEMS, Checkpoints
from gcompute.train.corpus import TokenizedCorpus
from gcompute.train.loop import train
from gcompute.train.metrics_log import read_metrics

# Evaluated at 2, 4, ..., 12 and saved at 3, 6, 9, 12.
RUN = {"eval_every": 2, "checkpoint_every": 3, "keep": 2, "eval_batches": 3, "final_eval_batches": 5}
LOSSES = {2: 3.0, 4: 2.0, 6: 2.5, 8: 2.0, 10: 2.25, 12: 2.125}


@pytest.fixture
def judged(monkeypatch: pytest.MonkeyPatch) -> Callable[[dict[int, float]], list[int]]:
    """Evaluations that find the given losses in turn; they say over how many batches each was."""

    def losses(values: dict[int, float], last: float = 1.0) -> list[int]:
        sizes: list[int] = []
        turns = iter(values.values())

        def evaluate(programs, params, windows, most: int) -> float:
            sizes.append(most)
            return last if most == 5 else next(turns)

        monkeypatch.setattr(loop, "evaluate", evaluate)
        return sizes

    return losses


def test_the_best_is_kept_besides_the_newest(judged, corpus: TokenizedCorpus, tmp_path: Path):
    sizes = judged(LOSSES)
    train(make_run(**RUN, keep_best=True), corpus, out=tmp_path)
    # Step 4 is no checkpoint but for its loss; step 8 only equals it; at the end equal samples are compared.
    assert saved_steps(tmp_path / CHECKPOINTS) == [4, 9, 12]
    assert sizes == [3, 3, 3, 3, 3, 5, 3]
    best = best_saved(tmp_path / CHECKPOINTS)
    assert best is not None
    assert (best.step, best.loss, best.batches) == (4, 2.0, 3)
    for step in (4, 9, 12):
        assert verify(tmp_path / CHECKPOINTS / str(step), ITEMS)
    assert [row["loss"] for row in read_metrics(tmp_path / "metrics.jsonl") if row["kind"] == "eval"][-1] == 1.0


def test_without_it_the_newest_alone_stay_and_none_is_the_best(judged, corpus: TokenizedCorpus, tmp_path: Path):
    sizes = judged(LOSSES)
    train(make_run(**RUN), corpus, out=tmp_path)
    assert saved_steps(tmp_path / CHECKPOINTS) == [9, 12]
    assert sizes == [3, 3, 3, 3, 3, 5]
    with pytest.raises(ValueError, match="train with --keep-best"):
        locate(tmp_path / CHECKPOINTS / "best")


def test_a_resumed_run_remembers_its_best(judged, corpus: TokenizedCorpus, tmp_path: Path):
    run = make_run(**RUN, keep_best=True, dispatch_steps=1)
    judged(LOSSES)
    asked = iter([False] * 7)
    train(run, corpus, out=tmp_path, stopped=lambda: next(asked, True))
    assert saved_steps(tmp_path / CHECKPOINTS) == [4, 6, 7]
    judged({step: loss for step, loss in LOSSES.items() if step > 7})
    train(run, corpus, out=tmp_path, resume=True)
    assert saved_steps(tmp_path / CHECKPOINTS) == [4, 9, 12]


def test_losses_over_other_batches_do_not_compare(judged, corpus: TokenizedCorpus, tmp_path: Path):
    judged(LOSSES)
    train(make_run(**RUN, keep_best=True), corpus, out=tmp_path)
    more = make_run(**{**RUN, "eval_batches": 4, "steps": 14}, keep_best=True)
    judged({14: 2.75}, last=2.5)
    train(more, corpus, out=tmp_path, resume=True)
    best = best_saved(tmp_path / CHECKPOINTS)
    assert best is not None
    assert (best.step, best.batches) == (14, 4)


def test_best_is_a_path_that_loads(judged, corpus: TokenizedCorpus, tmp_path: Path):
    judged(LOSSES)
    train(make_run(**RUN, keep_best=True), corpus, out=tmp_path)
    corpus.tokenizer.save(tmp_path / "tokenizer.json")
    assert load(tmp_path / CHECKPOINTS / "best", notice=pytest.fail).step == 4
    assert load(tmp_path, notice=pytest.fail).step == 12
    shutil.rmtree(tmp_path / CHECKPOINTS / "4" / "meta")
    assert locate(tmp_path / CHECKPOINTS / "best")[1] == [12]


def test_what_damage_set_aside_is_not_the_best(judged, corpus: TokenizedCorpus, tmp_path: Path):
    judged({2: 3.0, 4: 2.5, 6: 2.0})
    asked = iter([False] * 6)
    run = make_run(**RUN, keep_best=True, dispatch_steps=1)
    train(run, corpus, out=tmp_path, stopped=lambda: next(asked, True))
    assert saved_steps(tmp_path / CHECKPOINTS) == [4, 6]
    (tmp_path / CHECKPOINTS / "6" / "params" / "_METADATA").write_bytes(b"")
    judged({6: 2.75, 8: 2.75, 10: 2.75, 12: 2.75})
    train(run, corpus, out=tmp_path, resume=True)
    assert saved_steps(tmp_path / CHECKPOINTS) == [4, 9, 12]
    with Checkpoints(tmp_path / CHECKPOINTS, keep=2, keep_best=True) as checkpoints:
        assert checkpoints.best is not None
        assert checkpoints.best.step == 4


def test_with_one_evaluation_it_has_no_effect():
    with pytest.raises(ValueError, match="keep_best has no effect with eval_every=0"):
        check_used(make_run(eval_every=0, keep_best=True), {"keep_best"})
