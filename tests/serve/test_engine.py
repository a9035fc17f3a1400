import logging
import threading
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from greedy import random_prompts, solo_greedy

import gcompute.serve.engine as engine_module
from gcompute.config.presets import PRESETS
from gcompute.config.serve import ServeConfig
from gcompute.model.tokenizer import StreamDecoder
from gcompute.model.transformer import init
from gcompute.serve.assembly import engine_shape
from gcompute.serve.compilation import compile_program, list_programs
from gcompute.serve.engine import Engine, Status
from gcompute.serve.request import NotReady, QueueFull, Request, RequestError, Sampling
from gcompute.serve.state import Weights
from gcompute.serve.stream import Reason
from gcompute.serve.weights import Layout, serving_weights

GREEDY = Sampling(max_tokens=20, temperature=0, ignore_eos=True)
COMPILE_EVENT = "/jax/core/compile/backend_compile_duration"


@pytest.mark.oldest
def test_concurrent_greedy_requests_equal_solo_decoding_without_a_cache(engine, params, config):
    prompts = random_prompts(12, longest=40)
    lengths = [int(n) for n in np.random.default_rng(1).integers(1, 25, len(prompts))]
    each = [Sampling(max_tokens=n, temperature=0, ignore_eos=True) for n in lengths]
    done = engine.generate(prompts, each)
    for prompt, length, completion in zip(prompts, lengths, done, strict=True):
        assert completion.ids == solo_greedy(params, config, prompt, length)
        assert completion.reason is Reason.LENGTH
        assert (completion.usage.prompt_tokens, completion.usage.completion_tokens) == (len(prompt), length)
    assert len({completion.ids[:1] for completion in done}) > 3


@pytest.mark.slow
def test_the_gpt2_form_is_served_exactly_up_to_its_whole_context(tokenizer):
    config = PRESETS["test-gpt2"]
    params = jax.tree.map(lambda leaf: 4 * leaf if leaf.ndim > 1 else leaf, init(config, jax.random.key(1)))
    serve = ServeConfig(slots=2, max_queue=4, decode_steps=3, precision="float32")
    prompts = [(1,), tuple(range(20)), (5, 4, 3), tuple(range(31))]
    lengths = [31, 12, 2, 1]
    with Engine(params, config, None, serve) as engine:
        done = engine.generate(prompts, [Sampling(max_tokens=n, temperature=0) for n in lengths])
    for prompt, length, completion in zip(prompts, lengths, done, strict=True):
        assert completion.ids == solo_greedy(params, config, prompt, length)


@pytest.mark.oldest
def test_seeded_sampling_is_the_same_alone_and_in_a_crowd(engine):
    prompts = random_prompts(8, longest=10)
    each = [Sampling(max_tokens=20, temperature=0.9, top_k=40, top_p=0.95, min_p=0.01, seed=s) for s in range(8)]
    crowd = engine.generate(prompts, each)
    alone = [engine.generate([prompt], own)[0] for prompt, own in zip(prompts, each, strict=True)]
    assert [done.ids for done in crowd] == [done.ids for done in alone]
    assert crowd[0].ids != engine.generate([prompts[0]], Sampling(max_tokens=20, temperature=0.9, seed=99))[0].ids


def test_requests_without_a_seed_differ(engine):
    done = engine.generate([(1, 2, 3)] * 3, Sampling(max_tokens=20, temperature=2.0, ignore_eos=True))
    assert len({completion.ids for completion in done}) == 3


def test_an_end_of_text_token_ends_the_output_unless_ignored(engine, tokenizer):
    end = tokenizer.end_of_text
    on = [Sampling(max_tokens=40, temperature=50.0, seed=s, ignore_eos=True) for s in range(40)]
    ignored = engine.generate([(1,)] * 40, on)
    with_end = [seed for seed, completion in enumerate(ignored) if end in completion.ids]
    assert with_end, "no draw held the end token: choose other seeds"
    for seed in with_end[:5]:
        full = ignored[seed]
        assert (len(full.ids), full.reason) == (40, Reason.LENGTH)
        cut = engine.generate([(1,)], Sampling(max_tokens=40, temperature=50.0, seed=seed))[0]
        at = full.ids.index(end)
        assert (cut.ids, cut.reason, cut.usage.completion_tokens) == (full.ids[:at], Reason.STOP, at + 1)


def test_text_is_the_decoded_ids_and_stop_strings_cut_it(engine, tokenizer):
    ascii_only = Sampling(max_tokens=30, temperature=0, ignore_eos=True)
    whole = engine.generate(["once upon"], ascii_only)[0]
    assert whole.text == tokenizer.decode(whole.ids)
    middle = whole.text[5:8]
    stopped = engine.generate(["once upon"], Sampling(max_tokens=30, temperature=0, ignore_eos=True, stop=(middle,)))[0]
    assert stopped.text == whole.text[: whole.text.index(middle)]
    assert stopped.reason is Reason.STOP
    assert stopped.usage.completion_tokens < 30


def test_nothing_compiles_after_warmup(engine):
    events = []
    listener = lambda name, *_, **__: events.append(name) if name == COMPILE_EVENT else None  # noqa: E731
    jax.monitoring.register_event_duration_secs_listener(listener)
    engine.generate(random_prompts(9, longest=50, seed=3), [Sampling(max_tokens=n, seed=n) for n in range(1, 10)])
    assert events == []
    jax.jit(lambda x: x + 1)(np.float32(1))
    assert events, "the listener must hear a compilation for the silence above to mean anything"
    # Beside those that score prompts, which come with the first that asks for it.
    scoring = [program for program in engine._runner.compiled if program.kind == "score"]
    assert engine.stats().num_programs - len(scoring) == len(engine.programs())
    assert [str(program) for program in engine.programs()] == [
        *("init", "admit", "bind"),
        *("prefill[32,32]", "prefill[32,64]", "prefill[64,64]"),
        *(f"decode[{rows},{cells}]" for rows in (1, 3) for cells in (32, 64)),
    ]


def test_the_state_is_donated_and_stays_in_place(params, config):
    serve = ServeConfig(slots=2, max_context=16, decode_steps=2, precision="float32", preemption="swap")
    shape = engine_shape(config, serve)
    lay_out = partial(serving_weights, config=config, compute=jnp.float32, layout=Layout.FUSED)
    ready = Weights(model=jax.jit(lay_out)(params))
    # The first of each kind: others differ in size alone.
    programs = {program.kind: program for program in reversed(list_programs(shape.limits))}
    for program in programs.values():
        if program.kind in ("init", "swap_out"):
            continue
        text = compile_program(program, ready, shape).as_text()
        aliased = text.split("input_output_alias={", 1)[1].split("entry_computation_layout", 1)[0]
        num_leaves = 2 * config.layers + 5 + 10 + 5
        assert aliased.count("may-alias") + aliased.count("must-alias") == num_leaves, str(program)


@pytest.mark.oldest
def test_weights_are_cast_once_and_norms_stay_float32(params, config):
    ready = serving_weights(params, config, compute=jnp.bfloat16, layout=Layout.PLAIN)
    block = ready["blocks"][1]
    assert block["attention"]["q_DNH"].dtype == block["mlp"]["down_FD"].dtype == jnp.bfloat16
    assert ready["embedding_VD"].dtype == jnp.bfloat16
    assert block["attention_norm"]["scale"].dtype == ready["norm"]["scale"].dtype == jnp.float32


def test_cancelled_requests_free_slots_and_queue_places_and_others_go_on(engine, params, gate, config):
    requests = [Request(prompt=(i + 1,), sampling=GREEDY) for i in range(6)]
    streams = engine.submit_all(requests)
    assert gate.reached.wait(30)
    assert (engine.stats().num_running, engine.stats().num_waiting) == (3, 3)
    engine.cancel(streams[5])  # waiting
    assert streams[5].result().reason is Reason.CANCELLED
    engine.cancel(streams[0])  # running
    engine.cancel(streams[0])
    gate.open.set()
    done = [stream.result() for stream in streams[:5]]
    assert [each.reason for each in done] == [Reason.CANCELLED] + [Reason.LENGTH] * 4
    for i in range(1, 5):
        assert done[i].ids == solo_greedy(params, config, (i + 1,), 20)
    engine.cancel(streams[1])  # long ended: nothing happens
    assert (engine.stats().num_running, engine.stats().num_waiting) == (0, 0)


def test_a_full_queue_refuses_all_or_nothing(engine, gate):
    request = Request(prompt=(1,), sampling=GREEDY)
    streams = engine.submit_all([request] * 3)
    assert gate.reached.wait(30)
    streams += engine.submit_all([request] * 3)
    with pytest.raises(QueueFull):
        engine.submit_all([request] * 2)
    assert engine.stats().num_waiting == 3
    streams.append(engine.submit(request))
    gate.open.set()
    assert {stream.result().reason for stream in streams} == {Reason.LENGTH}


def test_output_that_cannot_be_decoded_ends_its_own_request_alone(engine, params, monkeypatch, caplog, config):
    made = []

    class Fails(StreamDecoder):
        def __init__(self, tokenizer):
            super().__init__(tokenizer)
            made.append(self)

        def push(self, token_id):
            if self is made[1]:
                raise KeyError("forced")
            return super().push(token_id)

        def flush(self):
            if self is made[2]:
                raise KeyError("forced at last")
            return super().flush()

    monkeypatch.setattr(engine_module, "StreamDecoder", Fails)
    caplog.set_level(logging.CRITICAL)
    done = engine.generate([(1,), (2,), (3,), (4,)], GREEDY)
    assert [each.reason for each in done] == [Reason.LENGTH, Reason.ERROR, Reason.ERROR, Reason.LENGTH]
    assert "forced" in done[1].error
    assert "forced at last" in done[2].error
    for at in (0, 3):
        assert done[at].ids == solo_greedy(params, config, (at + 1,), 20)


def test_a_failed_prefill_ends_its_own_request_and_a_lost_state_those_that_ran(
    engine, params, caplog, config, before_each
):
    caplog.set_level(logging.CRITICAL)
    calls = []

    def fail_second():
        calls.append(1)
        if len(calls) == 2:
            raise RuntimeError("forced")

    with before_each(engine, "prefill", fail_second):
        done = engine.generate([(1,), (2,), (3,)], GREEDY)
    assert [each.reason for each in done] == [Reason.LENGTH, Reason.ERROR, Reason.LENGTH]
    assert done[0].ids == solo_greedy(params, config, (1,), 20)

    def lose_state():
        jax.tree.map(lambda leaf: leaf.delete(), engine._runner.state)
        raise RuntimeError("forced")

    with before_each(engine, "decode", lose_state):
        done = engine.generate([(1,), (2,)], GREEDY)
    assert [each.reason for each in done] == [Reason.ERROR] * 2
    assert engine.stats().status is Status.READY
    assert engine.generate([(4,)], GREEDY)[0].ids == solo_greedy(params, config, (4,), 20)


def test_closing_finishes_what_was_accepted_and_takes_no_more(small_engine, params, config):
    heard = []
    greedy = Sampling(max_tokens=10, temperature=0, ignore_eos=True)
    with pytest.raises(NotReady, match="loading"):
        small_engine.submit(Request(prompt=(1,), sampling=greedy))
    small_engine.start(lambda done, total, name: heard.append((done, total, name)))
    small_engine.wait_ready()
    names = ["init", "admit", "bind", "prefill[16,16]", "decode[1,16]", "decode[2,16]", "ready"]
    assert heard == [(done, 6, name) for done, name in enumerate(names)]
    streams = small_engine.submit_all([Request(prompt=(i,), sampling=greedy) for i in range(5)])
    small_engine.close()
    assert [stream.result().ids for stream in streams] == [solo_greedy(params, config, (i,), 10) for i in range(5)]
    assert small_engine.stats().status is Status.CLOSED
    with pytest.raises(NotReady, match="closed"):
        small_engine.submit(Request(prompt=(1,), sampling=greedy))
    small_engine.close()


def test_closing_without_finishing_cancels(small_engine, before_each, wait_until):
    small_engine.start()
    small_engine.wait_ready()
    reached, leave = threading.Event(), threading.Event()

    def hold():
        reached.set()
        assert leave.wait(30)

    with before_each(small_engine, "decode", hold):
        streams = small_engine.submit_all([Request(prompt=(1,), sampling=Sampling(max_tokens=12, ignore_eos=True))] * 4)
        assert reached.wait(30)
        closing = threading.Thread(target=small_engine.close, kwargs={"finish": False})
        closing.start()
        wait_until(small_engine, lambda: len(small_engine._cancelled) == 2)
        leave.set()
        closing.join()
    assert {stream.result().reason for stream in streams} == {Reason.CANCELLED}


def test_a_warmup_that_fails_is_reported_to_who_waits(params, caplog, config):
    caplog.set_level(logging.CRITICAL)
    engine = Engine(params, config, None, ServeConfig(max_context=16))

    def fail(*_):
        raise MemoryError("forced")

    engine.start(fail)
    with pytest.raises(NotReady, match="failed") as caught:
        engine.wait_ready()
    assert isinstance(caught.value.__cause__, MemoryError)
    engine.close()


def test_bad_engines_and_requests_are_refused(engine, params, tokenizer, config):
    with pytest.raises(ValueError, match="Use at most 64"):
        Engine(params, config, tokenizer, ServeConfig(max_context=65))
    with pytest.raises(ValueError, match="max_context must be at least 2"):
        Engine(params, config, tokenizer, ServeConfig(max_context=1))
    with pytest.raises(ValueError, match="give the model's own"):
        Engine(params, PRESETS["test"], tokenizer)
    with pytest.raises(RequestError, match="one a prompt"):
        engine.generate([(1,)], [GREEDY, GREEDY])
    with pytest.raises(RequestError, match="half of a surrogate"):
        engine.generate(["\ud800"])
    bare = Engine(params, config, None, ServeConfig(max_context=16))
    with pytest.raises(RequestError, match="no tokenizer"):
        bare.generate(["text"])
    with pytest.raises(RequestError, match="stop needs a tokenizer"):
        bare.submit(Request(prompt=(1,), sampling=Sampling(max_tokens=4, stop=("x",))))
