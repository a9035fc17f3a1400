"""Penalties, bias, held ends and log-probabilities against a NumPy sampler that shares no code with the engine's."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from greedy import assert_holds

from gcompute.config.serve import ServeConfig
from gcompute.model.tokenizer import Tokenizer
from gcompute.model.transformer import Execution, forward
from gcompute.serve.adjustments import NO_TOKEN, AdjustmentRows, adjust
from gcompute.serve.engine import Engine
from gcompute.serve.request import Sampling
from gcompute.serve.state import new_row
from gcompute.serve.stream import Reason

V = 257
STRONG = {"presence_penalty": 1.5, "frequency_penalty": 0.7, "repetition_penalty": 1.4}


def softmax(x: np.ndarray) -> np.ndarray:
    p = np.exp(x.astype(np.float64) - x.max())
    return p / p.sum()


def reference_adjust(logits: np.ndarray, sampling: Sampling, prompt, output, ends) -> np.ndarray:
    """One row, a token at a time, in the order that `Sampling` states."""
    x = logits.astype(np.float32).copy()
    for token, bias in sampling.logit_bias:
        x[token] += np.float32(bias)
    r = np.float32(sampling.repetition_penalty)
    for token in {*prompt, *output}:
        x[token] = x[token] / r if x[token] > 0 else x[token] * r
    for token in set(output):
        times = np.float32(output.count(token))
        x[token] -= np.float32(sampling.frequency_penalty) * times + np.float32(sampling.presence_penalty)
    if len(output) < sampling.min_tokens:
        for token in ends:
            x[token] = -np.inf
    return x


def reference_choice(x: np.ndarray, sampling: Sampling, position: int) -> int:
    """Greedy, or the largest of log p + Gumbel noise among the tokens that sorting keeps."""
    if sampling.temperature == 0:
        return int(np.argmax(x))
    scaled = (x - x.max()) / np.float32(sampling.temperature)
    p = softmax(scaled)
    order = np.argsort(-p, kind="stable")
    if sampling.top_k:
        p[order[sampling.top_k :]] = 0
    p /= p.sum()
    p[order[np.cumsum(p[order]) - p[order] >= sampling.top_p]] = 0
    p[p < sampling.min_p * p.max()] = 0
    key = jax.random.fold_in(jax.random.wrap_key_data(np.array([0, sampling.seed], np.uint32)), position)
    noise = np.asarray(jax.random.gumbel(key, (len(x),)))
    return int(np.argmax(np.where(p > 0, scaled + noise, -np.inf)))


class Reference:
    """The model without a cache, compiled once for the whole context."""

    def __init__(self, params, config):
        run = lambda tokens_1T: forward(params, tokens_1T, config=config, execution=Execution(compute=jnp.float32))[0]  # noqa: E731
        self._run, self._context = jax.jit(run), config.context

    def logits(self, tokens) -> np.ndarray:
        padded = np.zeros((1, self._context), np.int32)
        padded[0, : len(tokens)] = tokens
        return np.asarray(self._run(padded))[0, len(tokens) - 1]

    def generate(self, prompt, sampling: Sampling, end: int) -> tuple[tuple[int, ...], Reason]:
        ends = {*sampling.stop_token_ids, *([] if sampling.ignore_eos else [end])}
        output: list[int] = []
        while len(output) < sampling.max_tokens:
            x = reference_adjust(self.logits([*prompt, *output]), sampling, prompt, output, ends)
            token = reference_choice(x, sampling, len(prompt) + len(output))
            if token in ends:
                return tuple(output), Reason.STOP
            output.append(token)
        return tuple(output), Reason.LENGTH


@pytest.fixture(scope="module")
def reference(params, config) -> Reference:
    return Reference(params, config)


def all_kinds() -> list[Sampling]:
    """Every setting alone and in company, greedy and sampled."""
    kinds = [
        {"presence_penalty": 2.0},
        {"frequency_penalty": 1.0},
        {"frequency_penalty": -0.5},
        {"repetition_penalty": 1.5},
        {"repetition_penalty": 0.8},
        {"logit_bias": ((5, 100.0),), **STRONG},
        {"logit_bias": tuple((token, float(token % 7) - 3) for token in range(64))},
        {"min_tokens": 9, "stop_token_ids": tuple(range(16)), "logit_bias": tuple((token, 20.0) for token in range(8))},
        {"stop_token_ids": (7, 9), "logit_bias": ((7, 12.0), (9, 12.0))},
        STRONG,
        {},
    ]
    sampled = {"temperature": 0.9, "top_k": 60, "top_p": 0.97, "min_p": 0.001}
    greedy = [Sampling(max_tokens=20, temperature=0.0, **kind) for kind in kinds]
    return greedy + [Sampling(max_tokens=20, seed=row, **sampled, **kind) for row, kind in enumerate(kinds)]


@pytest.mark.oldest
def test_whole_generations_equal_the_reference_in_a_crowd_and_alone(engine, reference, tokenizer):
    each = all_kinds()
    rng = np.random.default_rng(0)
    prompts = [tuple(rng.integers(0, 256, rng.integers(1, 30)).tolist()) for _ in each]
    crowd = engine.generate(prompts, each)
    for prompt, own, got in zip(prompts, each, crowd, strict=True):
        assert (got.ids, got.reason) == reference.generate(prompt, own, tokenizer.end_of_text), own
    order = rng.permutation(len(each))
    again = engine.generate([prompts[row] for row in order], [each[row] for row in order])
    assert [got.ids for got in again] == [crowd[row].ids for row in order]
    for row in (0, 5, len(each) - 2):
        assert engine.generate([prompts[row]], each[row])[0].ids == crowd[row].ids


def test_penalties_bias_and_held_ends_do_what_they_are_for(engine):
    greedy = Sampling(max_tokens=24, temperature=0.0, ignore_eos=True)
    prompt = (65, 66, 67)
    forced = engine.generate([prompt], dataclasses.replace(greedy, logit_bias=((42, 100.0),)))[0]
    assert forced.ids == (42,) * 24
    varied = engine.generate(
        [prompt], dataclasses.replace(greedy, logit_bias=((42, 10.0),), presence_penalty=2.0, frequency_penalty=2.0)
    )[0]
    assert 1 <= varied.ids.count(42) < 24
    never = engine.generate([prompt], dataclasses.replace(greedy, logit_bias=((forced.ids[0], -100.0),)))[0]
    assert 42 not in never.ids
    ends = dataclasses.replace(greedy, stop_token_ids=(42,), logit_bias=((42, 100.0),))
    at_once = engine.generate([prompt], ends)[0]
    assert (at_once.ids, at_once.reason, at_once.usage.completion_tokens) == ((), Reason.STOP, 1)
    held = engine.generate([prompt], dataclasses.replace(ends, min_tokens=10))[0]
    assert (len(held.ids), held.reason, held.usage.completion_tokens) == (10, Reason.STOP, 11)
    assert 42 not in held.ids


def test_a_hundred_tokens_can_be_kept_out(engine):
    greedy = Sampling(max_tokens=24, temperature=0.0, ignore_eos=True)
    banned = tuple((token, -100.0) for token in range(256) if token % 5)
    chosen = engine.generate([(65,)], dataclasses.replace(greedy, logit_bias=banned))[0].ids
    assert len(banned) > 200
    assert all(token % 5 == 0 for token in chosen)


@pytest.fixture(scope="module")
def padded(params, config):
    """An engine of a model with 257 rows for 11 characters."""
    tokenizer = Tokenizer.from_spec("char", lambda: ["hello, world"])
    serve = ServeConfig(slots=2, max_context=16, decode_steps=2, precision="float32", speculate="ngram", draft_batch=1)
    with Engine(params, config, tokenizer, serve) as engine:
        assert engine.unused == (range(tokenizer.vocab_size, config.vocab),)
        yield engine


def test_ids_that_the_tokenizer_does_not_have_are_never_chosen(padded):
    most = padded.tokenizer.vocab_size
    unused = ((most, 100.0), (256, 100.0))
    each = [
        Sampling(max_tokens=8, temperature=0.0, logprobs=20),
        Sampling(max_tokens=8, temperature=100.0, seed=1, repetition_penalty=0.01),
        Sampling(max_tokens=8, temperature=0.0, logit_bias=unused, logprobs=1),
        Sampling(max_tokens=8, temperature=1.0, logit_bias=unused, frequency_penalty=-2.0),
    ]
    # In one crowd, and one at a time, which speculates.
    crowd = padded.generate(["hell"] * len(each), each)
    alone = [padded.generate(["hell"], one)[0] for one in each]
    for completion in (*crowd, *alone):
        assert len(completion.ids) == len(completion.text) == 8
        assert max(completion.ids) < most
    assert [one.ids for one in (crowd[0], crowd[2])] == [one.ids for one in (alone[0], alone[2])]
    # Nor do they take a share of what is reported.
    for one in crowd[0].logprobs:
        assert sum(np.exp(logprob) for _, logprob in one.top[:most]) == pytest.approx(1, abs=1e-5)
        assert all(token < most for token, _ in one.top[:most])


def test_min_tokens_also_puts_off_stop_strings(engine):
    greedy = Sampling(max_tokens=20, temperature=0.0, ignore_eos=True, logit_bias=((ord("a"), 100.0),))
    text = engine.generate(["x"], dataclasses.replace(greedy, stop=("a",), min_tokens=5))[0].text
    assert text == "aaaa"


def test_logprobs_are_the_models_own_whatever_the_settings(engine, reference):
    prompts = [(1, 2, 3), (9,), (5, 5, 5, 5)]
    each = [
        Sampling(max_tokens=9, temperature=0.0, ignore_eos=True, logprobs=20),
        Sampling(max_tokens=9, temperature=1.5, seed=3, ignore_eos=True, logprobs=3, top_k=5, **STRONG),
        Sampling(max_tokens=9, temperature=0.0, ignore_eos=True, logprobs=0, logit_bias=((77, 100.0),)),
    ]
    for prompt, own, got in zip(prompts, each, engine.generate(prompts, each), strict=True):
        assert [one.token for one in got.logprobs] == list(got.ids)
        for step, one in enumerate(got.logprobs):
            p = softmax(reference.logits([*prompt, *got.ids[:step]]))
            # float32 against float64 over 257 terms.
            assert one.logprob == pytest.approx(np.log(p[one.token]), abs=2e-4)
            assert len(one.top) == own.logprobs
            assert [token for token, _ in one.top] == np.argsort(-p, kind="stable")[: own.logprobs].tolist()
            np.testing.assert_allclose([lp for _, lp in one.top], np.log(p[[t for t, _ in one.top]]), atol=2e-4)
    assert engine.generate([(1,)], Sampling(max_tokens=2))[0].logprobs == ()


def test_what_the_model_held_of_a_prompt_is_reported_too(engine, params, config):
    rng = np.random.default_rng(4)
    # Twice the same: what the prefix cache has of it is not taken from there.
    prompts = [tuple(rng.integers(0, 256, size).tolist()) for size in (1, 2, 40)]
    prompts.append(prompts[-1])
    asked = [
        Sampling(max_tokens=3, temperature=0.0, prompt_logprobs=top, logit_bias=((7, 9.0),)) for top in (0, 3, 20, 1)
    ]
    plain = [dataclasses.replace(one, prompt_logprobs=None) for one in asked]
    mixed = engine.generate([*prompts, *prompts], [*asked, *plain])
    for prompt, one, got, unasked in zip(prompts, asked, mixed, mixed[len(prompts) :], strict=False):
        assert_holds(params, config, prompt, got.prompt_logprobs, one.prompt_logprobs)
        assert got.ids == unasked.ids
        assert unasked.prompt_logprobs == ()
        assert got.usage.cached_tokens == 0


def test_a_row_that_ends_takes_no_more_steps(engine):
    before = engine.stats().num_decode_steps
    held = Sampling(max_tokens=60, temperature=0.0, stop_token_ids=(42,), logit_bias=((42, 100.0),), min_tokens=2)
    assert len(engine.generate([(65,)], held)[0].ids) == 2
    # The first of the three tokens is the prefill's; a dispatch has up to 4 steps.
    assert engine.stats().num_decode_steps == before + 2


def blank_rows(num: int) -> AdjustmentRows:
    return AdjustmentRows(
        presence=jnp.zeros(num),
        frequency=jnp.zeros(num),
        repetition=jnp.ones(num),
        bias_ids=jnp.full((num, 4), NO_TOKEN),
        bias=jnp.zeros((num, 4)),
        ends=jnp.full((num, 2), NO_TOKEN),
        num_prompt=jnp.full(num, 3),
        min_tokens=jnp.zeros(num, jnp.int32),
        constrained=jnp.zeros(num, bool),
        allowed=jnp.zeros((num, 9), jnp.uint32),
    )


def test_a_row_that_asks_for_nothing_keeps_every_bit_among_rows_that_ask():
    logits = np.random.default_rng(0).standard_normal((3, V)).astype(np.float32)
    logits[:, 0] = -0.0
    rows = dataclasses.replace(
        blank_rows(3), frequency=jnp.array([0.0, 1.0, 1.0]), min_tokens=jnp.array([0, 0, 5]), ends=jnp.full((3, 2), 4)
    )
    tokens = jnp.tile(jnp.arange(8), (3, 1))
    live = jnp.array([True, True, False])
    got = np.asarray(adjust(jnp.asarray(logits), rows, tokens, jnp.full(3, 6), live))
    assert got[0].tobytes() == logits[0].tobytes()
    assert got[2].tobytes() == logits[2].tobytes(), "a row that is not live is left alone"
    changed = np.flatnonzero(got[1] != logits[1]).tolist()
    assert changed == [3, 4, 5], "the output is positions 3 to 5, and no later cell counts"


@pytest.mark.oldest
def test_adjusted_logits_equal_the_reference_row_by_row():
    rng = np.random.default_rng(1)
    kinds = all_kinds()
    logits = (4 * rng.standard_normal((len(kinds), V))).astype(np.float32)
    prompts = [tuple(rng.integers(0, V, 5).tolist()) for _ in kinds]
    outputs = [rng.integers(0, V, 40).tolist() for _ in kinds]
    admitted = [
        new_row(own, prompt, num_prompt=len(prompt), num_cells=16, num_words=9, length=0, end=256, seed=0).adjustments
        for prompt, own in zip(prompts, kinds, strict=True)
    ]
    rows = jax.tree.map(lambda *leaves: jnp.concatenate(leaves), *admitted)
    tokens = jnp.array([[*prompt, *output, 0, 0] for prompt, output in zip(prompts, outputs, strict=True)])
    for made in (3, 40):
        live = jnp.ones(len(kinds), bool)
        got = np.asarray(adjust(jnp.asarray(logits), rows, tokens, jnp.full(len(kinds), 5 + made), live))
        for row, own in enumerate(kinds):
            expected = reference_adjust(logits[row], own, prompts[row], outputs[row][:made], {256, *own.stop_token_ids})
            held = np.isinf(expected)
            # A product and a sum in one rounding or in two.
            np.testing.assert_allclose(got[row][~held], expected[~held], rtol=1e-6, atol=1e-6, err_msg=str(own))
            assert (got[row][held] <= -1e29).all()


def test_steps_without_adjustments_compute_no_histogram():
    """Everything of the vocabulary's size happens in the branches of a conditional."""
    jaxpr = jax.make_jaxpr(adjust)(
        jnp.zeros((2, V)), blank_rows(2), jnp.zeros((2, 8), jnp.int32), jnp.full(2, 4), jnp.ones(2, bool)
    )
    names = {equation.primitive.name for equation in jaxpr.jaxpr.eqns}
    assert "cond" in names
    assert not any(name.startswith("scatter") for name in names)
    large = [e for e in jaxpr.jaxpr.eqns if any(V in getattr(v.aval, "shape", ()) for v in e.outvars)]
    assert {e.primitive.name for e in large} == {"cond"}
