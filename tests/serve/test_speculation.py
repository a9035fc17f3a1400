"""Speculative decoding gives what plain decoding gives, token for token, and says how often it guessed right."""

import dataclasses
from collections import Counter

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from greedy import random_prompts, solo_greedy
from tiers import mostly_slow

from gcompute.config.model import ModelConfig
from gcompute.config.serve import ServeConfig
from gcompute.model.transformer import Execution, forward, init
from gcompute.serve.engine import Engine
from gcompute.serve.request import Sampling
from gcompute.serve.speculation import propose_by_ngram
from gcompute.serve.stream import Reason

# One bucket, so that few programs are compiled.
TINY = ModelConfig(vocab=48, layers=1, dim=32, heads=4, kv_heads=2, ffn=64, context=32)
PLAIN = ServeConfig(slots=2, max_queue=64, max_context=29, page=32, chunk=32, decode_steps=3, precision="float32")
DRAFTS = 3


def large(config, seed):
    return jax.tree.map(lambda leaf: 4 * leaf if leaf.ndim > 1 else leaf, init(config, jax.random.key(seed)))


@pytest.fixture(scope="module")
def tiny():
    return large(TINY, 0)


@pytest.fixture(scope="module")
def plain(tiny):
    with Engine(tiny, TINY, None, PLAIN) as engine:
        yield engine


@pytest.fixture(scope="module")
def by_ngram(tiny):
    serve = dataclasses.replace(PLAIN, speculate="ngram", draft_tokens=DRAFTS)
    with Engine(tiny, TINY, None, serve) as engine:
        yield engine


@pytest.fixture(scope="module")
def by_model(tiny):
    """The draft model is nearly the model: it is right often, and wrong too."""
    noise = large(TINY, 1)
    near = jax.tree.map(lambda leaf, other: leaf + 0.05 * other if leaf.ndim > 1 else leaf, tiny, noise)
    serve = dataclasses.replace(PLAIN, speculate="draft", draft_tokens=DRAFTS)
    with Engine(tiny, TINY, None, serve, draft=(near, TINY)) as engine:
        yield engine


@pytest.fixture(params=mostly_slow(["by_ngram", "by_model"], "by_ngram"))
def speculating(request):
    return request.getfixturevalue(request.param)


@pytest.mark.oldest
@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ([1, 2, 3, 9, 1, 2, 3], [9, 1, 2]),  # three match
        ([5, 3, 8, 1, 2, 3, 7, 7, 7, 6, 2, 3], [7, 7, 7]),  # two match, though one matches elsewhere
        ([4, 1, 5, 4, 2, 5, 4], [2, 5, 4]),  # the latest of equals
        ([1, 2, 1, 2], [1, 2, 1]),  # a repeating text goes on repeating
        ([6, 6], [6, 6, 6]),
    ],
)
def test_ngrams_propose_what_followed_before(text, expected):
    history = jnp.array([[*text, *[40] * (16 - len(text))]])
    assert propose_by_ngram(history, jnp.array([len(text) - 1]), 3)[0].tolist() == expected


@pytest.mark.oldest
def test_greedy_output_is_that_of_decoding_alone(speculating, tiny):
    prompts = random_prompts(12, longest=14, vocab=TINY.vocab)
    prompts += [(7, 8, 9) * 4, (1, 2) * 6]
    done = speculating.generate(prompts, Sampling(max_tokens=15, temperature=0))
    assert [one.ids for one in done] == [solo_greedy(tiny, TINY, prompt, 15) for prompt in prompts]
    stats = speculating.stats()
    assert 0 < stats.num_accepted < stats.num_drafted
    assert stats.num_late_compilations == 0


def test_a_step_is_one_reading_of_the_weights_however_many_tokens_it_gives(speculating):
    before = speculating.stats()
    (done,) = speculating.generate([(1, 2) * 6], Sampling(max_tokens=15, temperature=0))
    after = speculating.stats()
    num_steps = after.num_decode_steps - before.num_decode_steps
    accepted = after.num_accepted - before.num_accepted
    # The first token is the prompt's; a step gives those that were accepted and one more.
    assert len(done.ids) - 1 == num_steps + accepted
    assert accepted > 0
    assert after.decode_tokens_per_s * after.last_decode_step_s > 1


def test_sampled_output_is_that_of_plain_decoding(speculating, plain):
    prompts = random_prompts(16, longest=12, vocab=TINY.vocab, seed=2)
    each = [
        Sampling(
            max_tokens=3 + seed,
            temperature=0.5 + 0.1 * seed,
            seed=seed,
            top_p=0.9 if seed % 2 else 1.0,
            top_k=20 if seed % 3 == 0 else 0,
            repetition_penalty=1.0 + 0.05 * (seed % 4),
            presence_penalty=0.3 * (seed % 3),
            frequency_penalty=0.2 * (seed % 2),
            min_tokens=seed % 4,
            stop_token_ids=(5, 6, 7) if seed % 2 else (),
            logit_bias=((3, 2.0),) if seed % 5 == 0 else (),
            logprobs=2,
        )
        for seed in range(14)
    ]
    expected, done = (engine.generate(prompts[:14], each) for engine in (plain, speculating))
    assert [one.ids for one in done] == [one.ids for one in expected]
    assert [one.reason for one in done] == [one.reason for one in expected]
    assert {Reason.STOP, Reason.LENGTH} == {one.reason for one in done}
    for one, other in zip(done, expected, strict=True):
        # Sums over another number of rows: rounding of float32.
        np.testing.assert_allclose(
            [report.logprob for report in one.logprobs], [report.logprob for report in other.logprobs], atol=1e-4
        )


def test_sampled_tokens_have_the_models_distribution(by_model, tiny):
    """Chi-square of the second token, whose draft the first dispatch already judges, over 600 seeds."""
    prompt, num = (3, 1, 4), 600
    each = [Sampling(max_tokens=2, temperature=1.0, seed=seed) for seed in range(num)]
    done = []
    for at in range(0, num, 60):
        done += by_model.generate([prompt] * 60, each[at : at + 60])
    pairs = Counter(one.ids for one in done)

    def probabilities(tokens):
        padded = jnp.array([[*tokens, *[0] * (8 - len(tokens))]])
        logits, _ = forward(tiny, padded, config=TINY, execution=Execution(compute=jnp.float32))
        return np.asarray(jax.nn.softmax(logits[0, len(tokens) - 1]), np.float64)

    first = probabilities(prompt)
    likely = np.argsort(-first)[:3].tolist()
    for token in likely:
        then = probabilities((*prompt, token))
        seen = sum(count for ids, count in pairs.items() if ids[0] == token)
        expected = seen * then
        counts = np.array([pairs[(token, second)] for second in range(TINY.vocab)])
        # Rare tokens together, so that every class is expected 5 times at least.
        common = expected >= 5
        observed = [*counts[common], counts[~common].sum()]
        wanted = [*expected[common], expected[~common].sum()]
        statistic = sum((o - w) ** 2 / w for o, w in zip(observed, wanted, strict=True) if w > 0)
        # Mean n - 1 and variance 2 (n - 1): five standard deviations, for seeds that never change.
        assert statistic < len(wanted) + 5 * (2 * len(wanted)) ** 0.5, (token, statistic, len(wanted))


def test_drafts_that_cannot_be_are_refused(tiny):
    with pytest.raises(ValueError, match="go together"):
        Engine(tiny, TINY, None, PLAIN, draft=(tiny, TINY))
    serve = dataclasses.replace(PLAIN, speculate="draft")
    with pytest.raises(ValueError, match="go together"):
        Engine(tiny, TINY, None, serve)
    other = dataclasses.replace(TINY, vocab=64)
    with pytest.raises(ValueError, match="it needs vocab=48"):
        Engine(tiny, TINY, None, serve, draft=(large(other, 0), other))
    with pytest.raises(ValueError, match="exclude each other"):
        ServeConfig(deterministic=True, speculate="ngram")
