"""Texts of a model while it trains: what the model would draw, at their steps, and nothing of the training changes."""

import dataclasses
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from float64 import float64
from tiny_run import bits, make_run

from gcompute.config.mesh import MeshShape
from gcompute.config.unused import check_used
from gcompute.model.transformer import Execution, forward, init
from gcompute.train.corpus import TokenizedCorpus
from gcompute.train.events import Sampled
from gcompute.train.loop import train
from gcompute.train.metrics_log import read_metrics
from gcompute.train.programs import build_programs
from gcompute.train.sampling import PROMPT_TOKENS, TEMPERATURE, continuation, make_sampler, sample_prompt

MODEL = make_run(model={"layers": 2}).model
PROMPT = np.array([3, 1, 2], np.int32)


@pytest.mark.oldest
def test_tokens_are_draws_from_the_models_own_distributions():
    with float64(True):
        execution = Execution(compute=jnp.dtype("float64"), residual=jnp.dtype("float64"), unroll=MODEL.layers)
        params = jax.tree.map(lambda leaf: 20 * leaf.astype(jnp.float64), init(MODEL, jax.random.key(0)))
        key, vocab = jax.random.key(7), MODEL.vocab - 5
        settings = {"config": MODEL, "execution": execution}
        drawn = jax.jit(partial(continuation, **settings, length=12, vocab=vocab))(params, PROMPT, key)
        tokens = PROMPT.tolist()
        whole = jax.jit(partial(forward, **settings))
        while len(tokens) < 12:
            padded = jnp.asarray([tokens + [0] * (12 - len(tokens))])
            logits = whole(params, padded)[0][0, len(tokens) - 1, :vocab] / TEMPERATURE
            noise = jax.random.gumbel(jax.random.fold_in(key, len(tokens) - 1), (MODEL.vocab,), logits.dtype)[:vocab]
            tokens.append(int(jnp.argmax(logits + noise)))
        assert drawn.tolist() == tokens[3:]
        assert len(set(tokens[3:])) > 3


def test_what_pads_the_vocabulary_is_never_drawn():
    execution = Execution(compute=jnp.dtype("float32"), unroll=MODEL.layers)
    params = init(MODEL, jax.random.key(0))
    vocab = 7
    favoured = params["embedding_VD"].at[vocab:].multiply(100)
    draw = partial(continuation, config=MODEL, execution=execution, length=16)
    drawn = jax.jit(partial(draw, vocab=vocab))({**params, "embedding_VD": favoured}, PROMPT, jax.random.key(0))
    assert int(drawn.max()) < vocab
    free = jax.jit(partial(draw, vocab=MODEL.vocab))({**params, "embedding_VD": favoured}, PROMPT, jax.random.key(0))
    assert int(free.max()) >= vocab


def test_samples_come_at_their_steps_and_change_no_bit(corpus: TokenizedCorpus, tmp_path: Path):
    events: list = []
    train(make_run(), corpus, out=tmp_path / "without")
    run = make_run(sample_every=5)
    train(run, corpus, out=tmp_path / "whole", report=events.append)
    asked = iter([False] * 7)
    one = dataclasses.replace(run, train=dataclasses.replace(run.train, dispatch_steps=1))
    train(one, corpus, out=tmp_path / "parts", stopped=lambda: next(asked, True))
    train(one, corpus, out=tmp_path / "parts", resume=True)
    rows = {name: read_metrics(tmp_path / name / "samples.jsonl") for name in ("whole", "parts")}
    assert [row["step"] for row in rows["whole"]] == [5, 10, 12]
    assert rows["whole"] == rows["parts"]
    assert [(event.step, event.text) for event in events if isinstance(event, Sampled)] == [
        (row["step"], row["text"]) for row in rows["whole"]
    ]
    start = corpus.tokenizer.decode(corpus.val[: min(PROMPT_TOKENS, run.model.context // 2)].tolist())
    assert {row["prompt"] for row in rows["whole"]} == {start}
    assert not (tmp_path / "without" / "samples.jsonl").exists()
    losses = [
        bits([row["loss"] for row in read_metrics(tmp_path / name / "metrics.jsonl")]) for name in ("without", "whole")
    ]
    assert losses[0] == losses[1]


def test_a_mesh_samples_what_one_device_does(corpus: TokenizedCorpus):
    run = make_run(sample_every=1, sample_prompt="the ", model={"vocab": 64})
    prompt = sample_prompt(run, corpus)
    assert prompt is not None
    texts = []
    for shape in (MeshShape(), MeshShape(fsdp=2, tensor=2)):
        placed = dataclasses.replace(run, train=dataclasses.replace(run.train, mesh=shape))
        programs = build_programs(placed)
        params = programs.init(jax.random.key(0)).params
        texts.append(make_sampler(placed, corpus.tokenizer, prompt, programs.execution)(params, 3))
    assert texts[0] == texts[1]
    # A character tokenizer has as many characters as tokens, and padding ids none.
    assert len(texts[0]) == run.model.context - len("the ")


def test_prompts_that_cannot_be_continued(corpus: TokenizedCorpus):
    for text, said in (("", "is 0 tokens"), ("the of and to in", "less than the model's context=16"), ("ZZ", "'Z'")):
        with pytest.raises(ValueError, match=said):
            sample_prompt(make_run(sample_every=1, sample_prompt=text), corpus)
    assert sample_prompt(make_run(), corpus) is None
    with pytest.raises(ValueError, match="sample_prompt has no effect with sample_every=0"):
        check_used(make_run(sample_prompt="the"), {"sample_prompt"})


def test_a_job_of_several_processes_refuses(corpus: TokenizedCorpus, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    with pytest.raises(ValueError, match="sample_every=1 is for a job of one process, and this one has 2"):
        sample_prompt(make_run(sample_every=1), corpus)
