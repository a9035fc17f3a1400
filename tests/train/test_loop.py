"""What the loop does and when: the same steps however they are grouped, evaluations and checkpoints in their places."""

import itertools
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny_run import make_run

from gcompute.config.mesh import MeshShape
from gcompute.model.pretrained import CHECKPOINTS, saved_steps
from gcompute.model.transformer import forward
from gcompute.train.corpus import TokenizedCorpus
from gcompute.train.events import Evaluated, Event, Notice, Saved, Started, Stepped
from gcompute.train.loop import advice_on_memory, evaluate, open_data, train
from gcompute.train.programs import build_programs, resolve_mesh


@pytest.mark.oldest
def test_events_come_in_order_and_at_their_steps(corpus: TokenizedCorpus, tmp_path: Path):
    run = make_run(dispatch_steps=4, final_eval_batches=0)
    events: list = []
    result = train(run, corpus, out=tmp_path, report=events.append)
    assert isinstance(events[0], Started)
    assert [event.step for event in events if isinstance(event, Evaluated)] == [5, 10, 12]
    whole = [event.num_batches == event.of_batches for event in events if isinstance(event, Evaluated)]
    assert whole == [False, False, True]
    assert [event.step for event in events if isinstance(event, Saved)] == [4, 8, 12]
    assert saved_steps(tmp_path / CHECKPOINTS) == [4, 8, 12]
    stepped = [event.step for event in events if isinstance(event, Stepped)]
    # Never more steps together than asked for, and none past an evaluation or a checkpoint.
    assert stepped == [4, 5, 8, 10, 12]
    assert result.finished
    assert (result.step, result.accumulation) == (12, 1)


def test_only_so_many_checkpoints_are_kept(corpus: TokenizedCorpus, tmp_path: Path):
    train(make_run(dispatch_steps=4, checkpoint_every=1, keep=2), corpus, out=tmp_path)
    assert saved_steps(tmp_path / CHECKPOINTS) == [11, 12]


def test_the_validation_loss_is_the_mean_over_every_token_of_the_split(corpus: TokenizedCorpus):
    run = make_run(dispatch_steps=4)
    programs = build_programs(run)
    _, windows = open_data(run, corpus)
    params = programs.init(jax.random.key(0)).params
    ours = evaluate(programs, params, windows, len(windows))
    tokens = np.asarray(corpus.val, np.int64)
    losses = []
    one_pass = jax.jit(partial(forward, config=run.model, execution=programs.execution))
    for start in range(0, len(tokens) - 1, run.seq):
        window = tokens[start : start + run.seq + 1]
        logits, _ = one_pass(params, jnp.asarray(window[None, :-1]))
        logits = np.asarray(logits[0], np.float64)
        norms = np.log(np.exp(logits - logits.max(-1, keepdims=True)).sum(-1)) + logits.max(-1)
        losses.extend(norms - np.take_along_axis(logits, window[1:, None], -1)[:, 0])
    assert len(losses) == len(tokens) - 1
    # float32 sums of up to 64 losses near 4, in another order.
    assert ours == pytest.approx(np.mean(losses), rel=2e-6)
    # A few batches stand for the split: not the same number, yet the same quantity.
    assert evaluate(programs, params, windows, 3) == pytest.approx(ours, abs=0.1)


def test_the_program_is_the_one_for_the_mesh_and_its_state_is_donated():
    programs = build_programs(make_run(dispatch_steps=4, mesh=MeshShape(data=2)))
    text = programs.steps.as_text()
    assert "all-reduce" in text
    # Every array of the state is given back in its own buffer.
    num_arrays = len(jax.tree.leaves(programs.abstract_state))
    header = text.splitlines()[0]
    assert header.count("may-alias") + header.count("must-alias") == num_arrays


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"mesh": MeshShape(data=16), "batch": 16}, "needs 16 devices and there are 8"),
        ({"mesh": MeshShape(data=3)}, "batch=4"),
        ({"mesh": None}, "batch=4 does not divide over 8 devices"),
        ({"mesh": MeshShape(tensor=8)}, "tensor=8"),
        ({"mesh": MeshShape(fsdp=4), "accumulation": 2}, "batch=4"),
        ({"mesh": MeshShape(expert=2)}, "expert=2"),
    ],
)
def test_what_does_not_go_together(changes: dict, said: str):
    with pytest.raises(ValueError, match=said):
        resolve_mesh(make_run(**changes))


def test_memory_that_is_not_enough_is_told_with_advice():
    def runs_out():
        return jax.block_until_ready(jnp.ones(1 << 46, jnp.uint8))  # 64 TiB: more than is anywhere

    with pytest.raises(MemoryError, match="Use a smaller --batch or --seq"), advice_on_memory():
        runs_out()
    with pytest.raises(jax.errors.JaxRuntimeError):
        runs_out()


def test_a_stop_before_the_first_step_is_saved_as_step_0(corpus: TokenizedCorpus, tmp_path: Path):
    asked = itertools.count()
    result = train(make_run(dispatch_steps=4), corpus, out=tmp_path, stopped=lambda: next(asked) >= 0)
    assert (result.step, result.finished, result.train_loss) == (0, False, None)
    assert saved_steps(tmp_path / CHECKPOINTS) == [0]


@pytest.mark.parametrize(
    ("steps", "dispatch_steps", "first"), [(1, None, 0), (2, None, 0), (4, 4, 0), (6, 2, 0), (3, None, 2), (2, None, 2)]
)
def test_a_profile_of_a_short_run(
    steps: int, dispatch_steps: int | None, first: int, corpus: TokenizedCorpus, tmp_path: Path, monkeypatch
):
    """It leaves one trace, or says why there is none."""
    traces = []

    @contextmanager
    def traced(directory: Path):
        yield traces.append(directory)

    monkeypatch.setattr("gcompute.train.loop.trace", traced)
    if first:
        train(make_run(steps=first), corpus, out=tmp_path)
    events: list[Event] = []
    run = make_run(steps=first or steps, dispatch_steps=dispatch_steps).lasting(steps)
    train(run, corpus, out=tmp_path, resume=bool(first), profile=True, report=events.append)
    said = [event.text for event in events if isinstance(event, Notice)]
    if first == steps:
        assert not traces
        assert said == ["--profile left no trace: no step was left to run."]
    else:
        assert traces == [tmp_path / "profile"]
        assert not said
