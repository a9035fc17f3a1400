"""The engine on pages: what is found in them, what gives way, what fails. Every output is held to one without a cache.

After each piece of work the scheduler's books are checked, and after each test nothing is held any more.
"""

import logging
import re
import threading
from contextlib import ExitStack
from dataclasses import replace
from functools import partial

import jax
import pytest
from greedy import assert_holds, random_prompts, solo_greedy
from tiers import mostly_slow

from gcompute.config.serve import ServeConfig
from gcompute.model.transformer import abstract_params
from gcompute.serve import assembly
from gcompute.serve.compilation import compile_program, list_programs
from gcompute.serve.engine import Engine
from gcompute.serve.native import build
from gcompute.serve.request import Request, Sampling
from gcompute.serve.scheduler import Scheduler
from gcompute.serve.state import Weights, empty_state
from gcompute.serve.stream import Reason, Tokens
from gcompute.serve.weights import serving_weights
from gcompute.serve.work import Decode, Prefill, Work

SERVE = ServeConfig(slots=2, max_queue=16, max_context=32, page=8, chunk=16, decode_steps=4, precision="float32")
# Pages of one request of the largest size and one more, so that two never both come to their end.
TIGHT = 5


class Watched:
    """An engine and the work that it did."""

    def __init__(self, engine: Engine, num_pages: int | None):
        self.engine = engine
        if num_pages is not None:
            engine._scheduler = Scheduler(replace(engine._runner.shape.limits, num_pages=num_pages))
        self.scheduler = engine._scheduler
        self.done: list[Work] = []

    def check_all_free(self) -> None:
        assert self.scheduler.num_free_slots == self.scheduler.limits.slots
        assert (self.scheduler.num_waiting, self.scheduler.blocks[0].num_used) == (0, 0)
        assert not self.engine._outputs
        assert not self.engine._runner._saved
        assert not self.engine._cancelled

    def kinds(self) -> list[str]:
        return [type(work).__name__ for work in self.done]


@pytest.fixture
def start(make_engine, checked_books):
    """Engines that run until the test ends, and hold nothing then."""
    with ExitStack() as ends:

        def start(*, num_pages: int | None = None, **changes) -> Watched:
            watched = Watched(make_engine(replace(SERVE, **changes)), num_pages)
            ends.callback(watched.check_all_free)
            ends.enter_context(checked_books(watched.engine, watched.done.append))
            ends.enter_context(watched.engine)
            return watched

        yield start


def greedy(num: int) -> Sampling:
    return Sampling(max_tokens=num, temperature=0, ignore_eos=True)


def some(prompts, *, up_to: int = 32) -> list[Sampling]:
    return [greedy(up_to - len(prompt)) for prompt in prompts]


# Prefixes ------------------------------------------------------------------------------------------------------------


@pytest.mark.oldest
def test_what_is_found_gives_the_tokens_of_what_is_read(start, params, config):
    watched = start()
    engine = watched.engine
    common = random_prompts(1, longest=1, seed=8)[0] * 17
    prompts = [(*common, 1, 2, 3), (*common, 4), (*common[:12], 9, 9, 9, 9, 9), (*common, 1, 2, 3)]
    hits = []
    for prompt in prompts:
        before = engine.stats().num_hit_tokens
        (done,) = engine.generate([prompt], greedy(8))
        hits.append(engine.stats().num_hit_tokens - before)
        assert done.ids == solo_greedy(params, config, prompt, 8)
    assert hits == [0, 16, 8, 16]
    # Twenty tokens are two chunks.
    assert [work.start for work in watched.done if isinstance(work, Prefill)] == [0, 16, 16, 8, 16]
    stats = engine.stats()
    assert stats.num_pages == stats.num_pages_free + stats.num_pages_cached
    assert stats.num_pages_cached > 0


@pytest.mark.parametrize("num_prompt", [8, 16, 24])
def test_a_prompt_that_is_wholly_cached_is_served_again_and_again(start, params, config, num_prompt):
    """Its last token must be read again, for what comes after it."""
    engine = start().engine
    prompt = tuple(range(100, 100 + num_prompt))
    expected = solo_greedy(params, config, prompt, 8)
    for _ in range(3):
        assert engine.generate([prompt], greedy(8))[0].ids == expected
    assert engine.stats().num_hit_tokens == 2 * (num_prompt - 8)
    assert [done.ids for done in engine.generate([prompt] * 3, greedy(8))] == [expected] * 3
    sampled = Sampling(max_tokens=8, temperature=1.0, seed=3, ignore_eos=True, frequency_penalty=1.0)
    once, again = (start(prefix_cache=on).engine.generate([prompt], sampled)[0].ids for on in (False, True))
    assert once == again == engine.generate([prompt], sampled)[0].ids


def test_without_a_prefix_cache_nothing_is_found(start):
    engine = start(prefix_cache=False).engine
    engine.generate([(1,) * 20] * 2, greedy(4))
    stats = engine.stats()
    assert (stats.num_hit_tokens, stats.num_pages_cached) == (0, 0)


# Giving way ----------------------------------------------------------------------------------------------------------


@pytest.mark.oldest("swap")
@pytest.mark.parametrize("preemption", ["recompute", "swap"])
def test_those_that_give_way_go_on_exactly(start, params, config, preemption):
    watched = start(num_pages=TIGHT, preemption=preemption)
    prompts = random_prompts(6, longest=12, seed=4)
    done = watched.engine.generate(prompts, some(prompts))
    for prompt, one in zip(prompts, done, strict=True):
        assert one.ids == solo_greedy(params, config, prompt, 32 - len(prompt))
        assert one.timing.queued_s <= one.timing.first_token_s <= one.timing.total_s
    assert watched.engine.stats().num_preemptions >= 3
    assert (watched.kinds().count("SwapIn") > 0) == (preemption == "swap")
    assert watched.kinds().count("SwapIn") == watched.kinds().count("SwapOut")


@pytest.mark.parametrize("preemption", ["recompute", "swap"])
def test_settings_that_look_back_are_not_changed_by_giving_way(start, preemption):
    prompts = random_prompts(4, longest=10, seed=5)
    each = [
        Sampling(max_tokens=20, temperature=1.0, seed=seed, ignore_eos=True, repetition_penalty=1.3, presence_penalty=1)
        for seed in range(4)
    ]
    roomy, watched = start(prefix_cache=False), start(num_pages=TIGHT, preemption=preemption)
    expected = [roomy.engine.generate([prompt], own)[0].ids for prompt, own in zip(prompts, each, strict=True)]
    assert [done.ids for done in watched.engine.generate(prompts, each)] == expected
    assert watched.engine.stats().num_preemptions > 0


def test_scored_prompts_are_reported_whole_though_read_in_chunks_or_twice(start, params, config):
    watched = start(num_pages=TIGHT)
    prompts = [tuple(range(at, at + size)) for at, size in ((3, 31), (20, 15), (60, 14))]
    each = [replace(one, prompt_logprobs=2) for one in some(prompts)]
    assert each[0].max_tokens == 1
    for prompt, one in zip(prompts, watched.engine.generate(prompts, each), strict=True):
        assert_holds(params, config, prompt, one.prompt_logprobs, 2)
        assert one.ids == solo_greedy(params, config, prompt, 32 - len(prompt))
    assert watched.engine.stats().num_preemptions > 0
    assert sum(isinstance(work, Prefill) for work in watched.done) > len(prompts)


def test_those_that_give_way_find_their_beginning(start, params, config):
    watched = start(num_pages=TIGHT)
    common = tuple(range(50, 58))
    prompts = [(*common, token) for token in (1, 2, 3, 4)]
    done = watched.engine.generate(prompts, some(prompts))
    for prompt, one in zip(prompts, done, strict=True):
        assert one.ids == solo_greedy(params, config, prompt, 23)
    stats = watched.engine.stats()
    assert stats.num_preemptions > 0
    # What a request finds of its own when it comes back is not counted.
    assert stats.num_hit_tokens == 8 * 3
    entered = [work for work in watched.done if isinstance(work, Prefill) and work.first]
    assert len(entered) == 4 + stats.num_preemptions
    assert all(work.start >= 8 for work in entered[1:])


@pytest.mark.parametrize("when", ["saved", "being saved"])
def test_a_request_that_gave_way_can_be_cancelled(start, params, config, before_each, when):
    watched = start(num_pages=TIGHT, preemption="swap")
    engine = watched.engine
    reached, leave = threading.Event(), threading.Event()

    def hold() -> None:
        if watched.scheduler.saved and not reached.is_set():
            reached.set()
            assert leave.wait(30)

    prompts = [(1, 2, 3), (4, 5, 6)]
    with before_each(engine, "decode" if when == "saved" else "swap_out", hold):
        submitted = engine.submit_all([Request(prompt=prompt, sampling=greedy(29)) for prompt in prompts])
        streams = {stream.request_id: stream for stream in submitted}
        assert reached.wait(60)
        (victim,) = watched.scheduler.saved
        engine.cancel(streams[victim])
        leave.set()
        done = [stream.result() for stream in submitted]
    assert [one.reason for one in done] == [Reason.LENGTH, Reason.CANCELLED]
    assert done[0].ids == solo_greedy(params, config, prompts[0], 29)
    assert "SwapIn" not in watched.kinds()


# Chunks --------------------------------------------------------------------------------------------------------------


def test_those_that_decode_get_tokens_between_the_chunks_of_a_long_prompt(start, params, config):
    watched = start(token_budget=1)
    long = tuple(range(30))
    streams = watched.engine.submit_all(
        [Request(prompt=(7,), sampling=greedy(31)), Request(prompt=long, sampling=greedy(2))]
    )
    first, second = [list(stream) for stream in streams]
    assert watched.kinds()[:5] == ["Prefill", "Decode", "Prefill", "Decode", "Prefill"]
    ids = [
        tuple(token for event in events if isinstance(event, Tokens) for token in event.ids)
        for events in (first, second)
    ]
    assert ids == [solo_greedy(params, config, (7,), 31), solo_greedy(params, config, long, 2)]
    # Single steps while more is to be read.
    assert [len(event.ids) for event in first if isinstance(event, Tokens)][:3] == [1, 1, 1]


# Failures ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["admit", "prefill", "decode", "swap_out", "swap_in"])
def test_a_failed_dispatch_harms_its_own_requests_alone(start, params, config, before_each, caplog, kind):
    caplog.set_level(logging.CRITICAL)
    watched = start(num_pages=TIGHT, preemption="swap", token_budget=1)
    failed: set[int] = set()

    def fail() -> None:
        work = watched.done[-1]
        # The first decode dispatch whose neighbour's prompt is being read.
        if failed or (kind == "decode" and len(watched.scheduler.running) < 2):
            return
        rows = [row.request_id for row in work.rows if row] if isinstance(work, Decode) else [work.request_id]
        failed.update(rows)
        raise RuntimeError("forced")

    prompts = [(1,), tuple(range(17)), (3, 4), (5, 6, 7)]
    with before_each(watched.engine, kind, fail):
        submitted = watched.engine.submit_all(
            [Request(prompt=prompt, sampling=own) for prompt, own in zip(prompts, some(prompts), strict=True)]
        )
        done = {stream.request_id: stream.result() for stream in submitted}
    assert len(failed) == 1
    for prompt, (request_id, one) in zip(prompts, done.items(), strict=True):
        if request_id in failed:
            assert one.reason is Reason.ERROR
            assert "forced" in one.error
        else:
            assert one.ids == solo_greedy(params, config, prompt, 32 - len(prompt))
    assert watched.engine.stats().status == "ready"
    assert watched.engine.generate([(9,)], greedy(4))[0].ids == solo_greedy(params, config, (9,), 4)


def test_a_lost_state_ends_what_was_saved_too_and_nothing_is_found_in_it(start, params, config, before_each, caplog):
    caplog.set_level(logging.CRITICAL)
    watched = start(num_pages=TIGHT, preemption="swap")
    lost = []

    def lose() -> None:
        if watched.scheduler.saved and not lost:
            lost.extend([*watched.scheduler.running, *watched.scheduler.saved])
            for leaf in jax.tree.leaves(watched.engine._runner.state):
                leaf.delete()
            raise RuntimeError("forced")

    prompts = [(1, 2, 3), (4, 5, 6), tuple(range(9, 29))]
    with before_each(watched.engine, "decode", lose):
        done = watched.engine.generate(prompts, some(prompts))
    assert sorted(lost) == [0, 1]
    assert [one.reason for one in done] == [Reason.ERROR, Reason.ERROR, Reason.LENGTH]
    assert done[2].ids == solo_greedy(params, config, prompts[2], 12)


def test_pools_that_cannot_hold_one_request_are_refused(make_engine, monkeypatch):
    with pytest.raises(ValueError, match="kv_tokens=24 cannot hold one request of max_context=32") as caught:
        make_engine(replace(SERVE, kv_tokens=24))
    assert "Use at least 32" in str(caught.value)
    assert make_engine(replace(SERVE, kv_tokens=39)).stats().num_pages == 4
    monkeypatch.setattr(assembly, "device_bytes", lambda: 1000)
    with pytest.raises(
        ValueError, match=r"need \d+\.\d\d GiB .*\(predicted\), and 0\.00 GiB are usable\. Use a smaller"
    ):
        make_engine(SERVE)


def test_memory_decides_how_many_pages_there_are(make_engine, config, monkeypatch):
    budget = assembly.memory_budget(config, SERVE, 32, assembly.MeshShape())
    need = budget.weights + budget.workspace + 6 * budget.page
    monkeypatch.setattr(assembly, "device_bytes", lambda: int(need / assembly.USABLE) + 1)
    assert make_engine(SERVE).stats().num_pages == 6
    monkeypatch.setattr(assembly, "device_bytes", lambda: 1 << 40)
    assert make_engine(SERVE).stats().num_pages == 8


@pytest.mark.parametrize(
    "more",
    mostly_slow([{}, {"speculate": "ngram"}, {"weights": "int8", "kv": "int8"}], {}),
)
def test_programs_of_the_kernels_work_with_no_more_memory_than_is_predicted(config, more):
    if not build.available():
        pytest.skip(f"needs the CPU kernels: {build.why_not()}")
    wide, serve = replace(config, vocab=4096), replace(SERVE, **more)
    shape = assembly.engine_shape(wide, serve)
    lay_out = partial(
        serving_weights, config=wide, compute=shape.execution.compute, layout=shape.layout, int8=shape.int8
    )
    weights = Weights(model=jax.eval_shape(lay_out, abstract_params(wide)))
    predicted = assembly.memory_budget(wide, serve, 32, assembly.MeshShape()).workspace
    for kind in {program.kind for program in list_programs(shape.limits)} & {"decode", "prefill", "speculate"}:
        largest = [program for program in list_programs(shape.limits) if program.kind == kind][-1]
        compiled = compile_program(largest, weights, shape)
        assert compiled.memory_analysis().temp_size_in_bytes <= predicted
        # New cells go to the pool that was given, and to no copy of it.
        layer = jax.eval_shape(lambda: empty_state(shape)).pool.k[0].shape
        pool = ",".join(map(str, layer))
        assert f"[{pool}]" in compiled.as_text()
        assert not re.search(rf"\[{pool}\]\S* copy\(", compiled.as_text())


# Deterministic -------------------------------------------------------------------------------------------------------


def test_deterministic_ids_and_logprobs_are_the_same_bits_whatever_else_runs(start):
    """Alone, in a crowd, by what was found, after giving way, and however many steps a dispatch takes."""
    prompts = [(1,), tuple(range(16)), tuple(range(25)), (5,) * 7, (*range(16), 9, 9), tuple(range(30))]
    each = [
        Sampling(
            max_tokens=32 - len(prompt),
            temperature=(0, 0.9)[index % 2],
            top_p=0.95,
            seed=index,
            ignore_eos=True,
            logprobs=3,
            frequency_penalty=(0, 0, 0.5)[index % 3],
        )
        for index, prompt in enumerate(prompts)
    ]

    def outcome(done) -> list:
        return [(one.ids, one.logprobs) for one in done]

    alone = start(deterministic=True, decode_steps=8, prefix_cache=False).engine
    expected = outcome(alone.generate([prompt], own)[0] for prompt, own in zip(prompts, each, strict=True))
    assert all(len(logprobs) == len(ids) > 0 for ids, logprobs in expected)
    assert outcome(alone.generate(prompts, each)) == expected
    for decode_steps in (8, 1):
        watched = start(deterministic=True, decode_steps=decode_steps)
        assert outcome(watched.engine.generate(prompts, each)) == expected
        before = watched.engine.stats().num_hit_tokens
        backwards = watched.engine.generate(prompts[::-1], each[::-1])
        assert outcome(backwards[::-1]) == expected
        assert watched.engine.stats().num_hit_tokens > before
        tight = start(deterministic=True, decode_steps=decode_steps, num_pages=TIGHT)
        assert outcome(tight.engine.generate(prompts, each)) == expected
        assert {"SwapOut", "SwapIn"} <= set(tight.kinds())
