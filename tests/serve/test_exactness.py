"""The proof of exactness on small engines: right ones pass, and each wrong one is a violation."""

import ast
import dataclasses
import inspect
from dataclasses import replace
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiers import mostly_slow

from gcompute.certify.serving import choice, reference, rounding
from gcompute.certify.serving.certificate import Subject, prove_default, prove_deterministic
from gcompute.certify.serving.drive import drive
from gcompute.certify.serving.models import FORMS, small_params
from gcompute.certify.serving.traffic import Arrival, Wave, random_traffic
from gcompute.certify.serving.verdict import check_answers
from gcompute.certify.serving.ways import Way, differing, measure_cost
from gcompute.config.serve import ServeConfig
from gcompute.serve import blocks, next_token, programs
from gcompute.serve import engine as engine_module
from gcompute.serve.adjustments import NO_TOKEN
from gcompute.serve.native import build
from gcompute.serve.request import Request, Sampling
from gcompute.serve.stream import Reason

SMALL = ServeConfig(slots=3, max_queue=8, max_context=16, decode_steps=3, precision="float32")


@pytest.fixture(scope="module")
def subject(params, config, tokenizer, engine):
    serve = ServeConfig(precision="float32", max_context=engine.max_context)
    return Subject(name="tiny", params=params, config=config, tokenizer=tokenizer, serve=serve)


@pytest.fixture(scope="module")
def judge(subject):
    """Findings of answers, by one reference."""
    compiled = reference.Reference(subject.params, subject.config, "float32")
    rng = np.random.default_rng(0)
    measured = rounding.measure_rounding(compiled, rng.integers(0, 257, (16, 60)).tolist())
    return partial(check_answers, reference=compiled, rounding=measured, end=subject.end)


def serve_and_check(engine, subject, judge, num, seed=0):
    waves = subject.traffic(num, seed)
    answers = drive(engine, waves)
    return judge([one for wave in waves for one in wave.arrivals], answers)


@pytest.mark.oldest
def test_every_token_of_random_traffic_is_the_references_choice(engine, subject, judge):
    found = serve_and_check(engine, subject, judge, 60)
    assert found.violations == []
    # The sums of this model are short: no choice of these lies within rounding.
    assert found.differences == []
    assert found.num_requests == 60
    assert found.num_tokens > 400
    assert 0 < found.num_sampled < found.num_tokens
    assert found.num_cancelled > 0
    assert len(found.logprob_ratios) > 1000
    assert max(found.logprob_ratios) < 0.5


def test_traffic_mixes_everything_and_is_the_same_for_a_seed(config):
    make = partial(random_traffic, vocab=257, max_context=64, end=256)
    waves = make(300, seed=1)
    assert waves == make(300, seed=1)
    assert waves != make(300, seed=2)
    arrivals = [one for wave in waves for one in wave.arrivals]
    assert len(arrivals) == 300
    requests = [one.request for one in arrivals]
    # What has its own proof: strings that end text, reports of a prompt, grammars, and control tokens in text.
    elsewhere = {"stop", "prompt_logprobs", "json_schema", "skip_special_tokens"}
    for field in dataclasses.fields(Sampling):
        if field.name not in elsewhere:
            assert any(getattr(one.sampling, field.name) != field.default for one in requests), field.name
    sizes = [len(wave.arrivals) for wave in waves]
    assert sizes.count(1) > 10
    assert max(sizes) > 15
    prompts = [one.prompt for one in requests]
    shared = [max(_common(a, b) for b in prompts[:at]) / len(a) for at, a in enumerate(prompts) if at]
    assert min(shared) == 0
    assert max(shared) == 1
    assert sum(0 < share < 1 for share in shared) > 50
    assert {one.streamed for one in arrivals} == {True, False}
    assert any(one.cancel_after == 0 for one in arrivals)
    assert all(len(one.prompt) + one.sampling.max_tokens <= 64 for one in requests)
    assert all(one.sampling.seed is not None for one in requests if one.sampling.temperature > 0)


def _common(a, b):
    return next((n for n, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))


def test_the_reference_shares_no_code_with_the_engine():
    allowed = {"gcompute.serve.request"}
    for module in (reference, choice, rounding):
        tree = ast.parse(inspect.getsource(module))
        names = {node.module for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}
        assert {name for name in names if name.startswith("gcompute.serve")} <= allowed


# Wrong engines, by what reaches the device for a request --------------------------------------------------------------


def _sampling(row, **changes):
    return replace(row, sampling=replace(row.sampling, **changes))


def _adjustments(row, **changes):
    return replace(row, adjustments=replace(row.adjustments, **changes))


WRONG_REQUESTS = {
    "another seed": lambda new: _sampling(new, seed=new.sampling.seed[:, ::-1].copy()),
    "a temperature that is 2% too high": lambda new: _sampling(
        new, temperature=new.sampling.temperature * np.float32(1.02)
    ),
    "top-k keeps one too many": lambda new: _sampling(new, top_k=new.sampling.top_k + (new.sampling.top_k > 0)),
    "top-p is not applied": lambda new: _sampling(new, top_p=np.ones_like(new.sampling.top_p)),
    "min-p is not applied": lambda new: _sampling(new, min_p=np.zeros_like(new.sampling.min_p)),
    "a penalty takes the prompt for output": lambda new: _adjustments(new, num_prompt=new.adjustments.num_prompt * 0),
    "a penalty that divides all by it": lambda new: _adjustments(new, repetition=1 / new.adjustments.repetition),
    "an end one token early": lambda new: _adjustments(new, min_tokens=new.adjustments.min_tokens - 1),
    "a bias is forgotten": lambda new: _adjustments(new, bias=new.adjustments.bias * 0),
    "stop ids are forgotten": lambda new: _adjustments(new, ends=np.full_like(new.adjustments.ends, NO_TOKEN)),
    "the first token of the prompt is another": lambda new: replace(
        new, tokens=np.concatenate([(new.tokens[:, :1] + 1) % 256, new.tokens[:, 1:]], axis=1)
    ),
}


@pytest.mark.parametrize("what", mostly_slow(WRONG_REQUESTS, "another seed", "top-p is not applied"))
def test_a_request_that_is_read_wrong_is_a_violation(what, engine, subject, judge, monkeypatch):
    right = engine_module.new_row
    monkeypatch.setattr(engine_module, "new_row", lambda *args, **kwargs: WRONG_REQUESTS[what](right(*args, **kwargs)))
    assert serve_and_check(engine, subject, judge, 60, seed=5).violations


def test_a_prefix_that_is_found_after_other_tokens_is_a_violation(engine, subject, judge, monkeypatch):
    right = blocks.digest_of
    monkeypatch.setattr(blocks, "digest_of", lambda before, tokens: right(blocks.ROOT, tokens))
    page = engine.stats().page_tokens
    same, other = tuple(range(1, 1 + page)), tuple(range(101, 101 + page))
    asked = Sampling(max_tokens=8, temperature=0, ignore_eos=True)
    # The last finds its first page after the second's, and its second page after the first's.
    prompts = [((200,) * page + same + (7,)), ((201,) * page + other + (7,)), ((201,) * page + same + (7,))]
    arrivals = [Arrival(request=Request(prompt=prompt, sampling=asked), streamed=False) for prompt in prompts]
    answers = [drive(engine, [Wave(arrivals=(one,), pause=0)])[0] for one in arrivals]
    assert judge(arrivals, answers).violations


def test_answers_that_change_places_are_violations(engine, subject, judge):
    waves = subject.traffic(12, 3)
    arrivals = [replace(one, cancel_after=None) for wave in waves for one in wave.arrivals]
    answers = drive(engine, [Wave(arrivals=tuple(arrivals), pause=0)])
    assert judge(arrivals, answers).violations == []
    swapped = [answers[1], answers[0], *answers[2:]]
    assert judge(arrivals, swapped).violations
    lost = [replace(answers[0], ids=answers[0].ids[:-1]), *answers[1:]]
    assert judge(arrivals, lost).violations
    never = [replace(answers[0], reason=Reason.CANCELLED), *answers[1:]]
    assert "nobody asked" in " ".join(judge(arrivals, never).violations)


# Wrong engines, by what is compiled -----------------------------------------------------------------------------------


def _off_by_one(right):
    def forward(params, tokens_BT, *, positions_BT, **rest):
        shift = 1 if tokens_BT.shape[1] == 1 else 0
        return right(params, tokens_BT, positions_BT=positions_BT + shift, **rest)

    return forward


def _swapped_slots(right):
    def forward(params, tokens_BT, *, cache, **rest):
        if tokens_BT.shape[1] == 1:
            cache = jax.tree.map(lambda leaf: jnp.roll(leaf, 1, axis=0), cache)
        return right(params, tokens_BT, cache=cache, **rest)

    return forward


def _noise_by_slot(right):
    return lambda logits, rows, positions, **how: right(logits, rows, positions + jnp.arange(len(positions)), **how)


def _forgets_the_prompt(right):
    def adjust(logits, rows, tokens, positions, live):
        cells = jnp.arange(tokens.shape[1])[None]
        return right(logits, rows, jnp.where(cells < rows.num_prompt[:, None], NO_TOKEN, tokens), positions, live)

    return adjust


WRONG_PROGRAMS = {
    "positions of decoding are one too high": (programs, "forward", _off_by_one),
    "each slot reads its neighbour's keys": (programs, "forward", _swapped_slots),
    "noise is keyed by slot": (next_token, "sample", _noise_by_slot),
    "penalties forget the prompt": (next_token, "adjust", _forgets_the_prompt),
}


@pytest.mark.slow
@pytest.mark.parametrize("what", WRONG_PROGRAMS)
def test_a_wrong_program_is_a_violation(what, params, config, tokenizer, monkeypatch):
    module, name, wrong = WRONG_PROGRAMS[what]
    monkeypatch.setattr(module, name, wrong(getattr(module, name)))
    small = Subject(name="small", params=params, config=config, tokenizer=tokenizer, serve=SMALL)
    # So many that a penalty meets a token of a prompt, in texts as short as these.
    assert prove_default(small, 300)["violations"] > 0


# The deterministic comparison -----------------------------------------------------------------------------------------

FIXED = replace(SMALL, deterministic=True)
ALONE, CROWD = Way(name="alone", alone=True), Way(name="in a crowd")


def test_ways_that_share_their_shapes_agree_to_the_bit(params, config, tokenizer):
    """One bucket holds everything, so no neighbour changes a program."""
    small = Subject(name="small", params=params, config=config, tokenizer=tokenizer, serve=FIXED)
    told = prove_deterministic(small, 30, ways=(ALONE, CROWD, CROWD), cost=False)
    assert told["violations"] == 0, told["faults"]
    assert [way["bitwise_equal"] for way in told["ways"]] == [30, 30, 30]
    assert told["tokens"] > 80


@pytest.mark.slow
def test_ways_that_differ_in_steps_agree_and_a_way_that_shows_nothing_is_a_fault(params, config, tokenizer):
    small = Subject(name="small", params=params, config=config, tokenizer=tokenizer, serve=FIXED)
    steps = Way(name="one step a dispatch", changes={"decode_steps": 1})
    idle = Way(name="idle", shows="num_late_compilations")
    told = prove_deterministic(small, 40, ways=(CROWD, steps, idle), cost=False)
    assert [way["bitwise_equal"] for way in told["ways"]] == [40, 40, 40]
    assert told["faults"] == ["idle: the engine's num_late_compilations did not rise, so this way has shown nothing"]


@pytest.mark.slow
def test_the_cost_of_a_mode_is_a_ratio_within_one_run(params, config, tokenizer):
    served = {"params": params, "config": config, "tokenizer": tokenizer}
    waves = random_traffic(20, vocab=257, max_context=16, end=256, seed=0)
    arrivals = [one for wave in waves for one in wave.arrivals]
    cost = measure_cost(arrivals, **served, serve=SMALL, cheap=SMALL)
    # The same engine twice: a ratio near 1, whatever else the machine does.
    assert 0.2 < cost["speed_ratio"] < 5
    assert min(cost["deterministic_tokens_per_s"], cost["default_tokens_per_s"]) > 0


@pytest.mark.slow
def test_programs_that_a_neighbour_chooses_are_seen_in_the_bits(params, config, tokenizer, monkeypatch):
    """Without the deterministic mode a longer neighbour means a larger bucket: in XLA, other sums."""
    monkeypatch.setattr(build, "available", lambda: False)
    serve = ServeConfig(precision="float32", slots=4)
    loose = Subject(name="loose", params=params, config=config, tokenizer=tokenizer, serve=serve)
    told = prove_deterministic(loose, 60, ways=(ALONE, CROWD), cost=False)
    assert told["ways"][1]["bitwise_equal"] < 60
    assert told["violations"] >= 60 - told["ways"][1]["bitwise_equal"] > 0


def test_one_bit_is_a_difference_and_a_cancelled_answer_counts_as_far_as_it_goes(engine):
    sampling = Sampling(max_tokens=5, temperature=0, ignore_eos=True, logprobs=2)
    arrival = Arrival(request=Request(prompt=(1, 2), sampling=sampling), streamed=True)
    (answer,) = drive(engine, [Wave(arrivals=(arrival,), pause=0)])
    assert differing([answer], [answer]) == {}
    last = answer.logprobs[-1]
    nudged = replace(last, logprob=float(np.nextafter(np.float32(last.logprob), np.float32(0))))
    assert "output 4" in differing([answer], [replace(answer, logprobs=(*answer.logprobs[:-1], nudged))])[0]
    cut = replace(answer, ids=answer.ids[:2], logprobs=answer.logprobs[:2], reason=Reason.CANCELLED)
    assert differing([answer], [cut]) == {}
    assert differing([answer], [replace(cut, reason=Reason.LENGTH)]) != {}


# All of it ------------------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
@pytest.mark.parametrize("form", FORMS)
def test_a_thousand_requests_of_each_form(form, precision):
    serve = ServeConfig(precision=precision)
    whole = Subject(name=form, params=small_params(FORMS[form]), config=FORMS[form], tokenizer=None, serve=serve)
    told = prove_default(whole, 1000)
    assert told["violations"] == 0, (told["faults"], [one for one in told["differences"] if not one["within"]])
    assert told["equal"] >= (0.999 if precision == "float32" else 0.97) * told["tokens"]


@pytest.mark.slow
@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_a_thousand_requests_are_the_same_to_the_bit_in_every_way(precision):
    form = "Llama form"
    serve = ServeConfig(precision=precision, chunk=32)
    whole = Subject(name=form, params=small_params(FORMS[form]), config=FORMS[form], tokenizer=None, serve=serve)
    told = prove_deterministic(whole, 1000)
    assert told["violations"] == 0, told["faults"]
    assert {way["bitwise_equal"] for way in told["ways"]} == {1000}
    assert told["cost"]["speed_ratio"] > 0
