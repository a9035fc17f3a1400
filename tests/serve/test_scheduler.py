"""The scheduler: what it asks for in plain cases, and random traces on a model of the pool's contents."""

from collections import Counter
from dataclasses import replace
from random import Random

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from pool_model import NUM_TOKENS, PoolModel, until

from gcompute.serve.blocks import digests
from gcompute.serve.buckets import make_buckets
from gcompute.serve.limits import Limits
from gcompute.serve.request import QueueFull
from gcompute.serve.scheduler import Scheduler
from gcompute.serve.work import Decode, Prefill, Row, SwapIn, SwapOut

LIMITS = Limits(
    slots=2,
    max_queue=3,
    max_context=64,
    decode_steps=4,
    page=8,
    num_pages=32,
    chunk=32,
    token_budget=100,
)
# Room for one request of the largest size and one page more.
TIGHT = replace(LIMITS, max_context=32, num_pages=5, chunk=16)
ALONE = replace(LIMITS, slots=1)


@pytest.mark.oldest
def test_buckets_are_powers_of_two_that_end_at_the_context():
    assert make_buckets(256) == (32, 64, 128, 256)
    assert make_buckets(100) == (32, 64, 100)
    assert make_buckets(2) == (2,)
    assert LIMITS.buckets == (32, 64)
    assert replace(LIMITS, max_context=60, drafts=5).buckets == (32, 64, 72)


def test_limits_that_contradict_themselves_are_refused():
    for wrong in ({"chunk": 12}, {"shares": 3}, {"num_pages": 7}, {"deterministic": True}, {"chunk": 72}):
        with pytest.raises(AssertionError):
            replace(LIMITS, **wrong)
    with pytest.raises(AssertionError):
        replace(LIMITS, deterministic=True, swap=True, drafts=2)


@pytest.mark.oldest
def test_waiting_requests_fill_free_slots_before_anything_decodes():
    plan = Scheduler(LIMITS)
    for request_id, num_prompt in enumerate((5, 20, 3)):
        plan.add(request_id, prompt=[request_id] * num_prompt, max_tokens=4)
    first = plan.next_work()
    assert isinstance(first, Prefill)
    assert first == Prefill(
        request_id=0, slot=0, pages=(1,), start=0, num_tokens=5, chunk=32, bucket=32, first=True, last=True
    )
    plan.record_prefill(first, 7)
    second = plan.next_work()
    assert isinstance(second, Prefill)
    assert second == Prefill(
        request_id=1, slot=1, pages=(2, 3, 4), start=0, num_tokens=20, chunk=32, bucket=32, first=True, last=True
    )
    plan.record_prefill(second, 7)
    rows = (Row(request_id=0, slot=0, pages=(1,)), Row(request_id=1, slot=1, pages=(2, 3, 4)))
    assert plan.next_work() == Decode(rows=rows, bucket=32, speculate=False, num_steps=3, until_free=True)
    plan.remove(0)
    third = plan.next_work()
    assert isinstance(third, Prefill)
    assert (third.request_id, third.slot) == (2, 0)


def test_a_dispatch_never_leaves_its_length_bucket_nor_exceeds_the_largest_need():
    model = PoolModel(replace(ALONE, decode_steps=8))
    model.arrive([0] * 30, 12)
    decodes = [(work.num_steps, work.bucket) for work in model.finish() if isinstance(work, Decode)]
    assert decodes == [(2, 32), (8, 64), (1, 64)]


def test_the_queue_is_bounded_beyond_what_slots_can_take():
    plan = Scheduler(LIMITS)
    for request_id in range(5):
        plan.add(request_id, prompt=[1], max_tokens=1)
    with pytest.raises(QueueFull, match="at most 3 may"):
        plan.add(5, prompt=[1], max_tokens=1)
    plan.remove(4)
    plan.add(6, prompt=[1], max_tokens=1)
    assert plan.num_waiting == 5


def test_a_known_beginning_is_not_read_again_but_always_the_last_token():
    model = PoolModel(ALONE)
    prompt = [0, 1, 2, 0] * 8
    for expected in ((0, 32), (24, 8), (24, 8)):
        model.arrive(prompt, 2)
        reads = [(work.start, work.num_tokens) for work in model.finish() if isinstance(work, Prefill)]
        assert reads == [expected]
    model.arrive([*prompt, 1], 2)
    assert [work.start for work in model.finish() if isinstance(work, Prefill)] == [32]
    model.arrive([*prompt[:20], 1, 1, 1, 1, *prompt[24:]], 2)
    assert [work.start for work in model.finish() if isinstance(work, Prefill)] == [16]
    assert model.scheduler.num_hit_tokens == 24 + 24 + 32 + 16
    model.arrive(prompt, 2, reuse=False)
    assert [work.start for work in model.finish() if isinstance(work, Prefill)] == [0]


def test_what_a_request_was_given_is_found_by_one_that_goes_on_from_it():
    model = PoolModel(ALONE)
    model.arrive([0, 1] * 5, 14)
    model.finish()
    model.arrive([*model.texts[0], 1], 2)
    # Of the 24 tokens the last was never fed back, so the third page is not whole.
    assert [work.start for work in model.finish() if isinstance(work, Prefill)] == [16]


def test_two_that_run_share_the_pages_of_their_beginning():
    model = PoolModel(LIMITS)
    first, second = model.arrive([0] * 20, 8), model.arrive([0] * 20, 8)
    until(model, lambda work: isinstance(work, Decode))
    running = model.scheduler.running
    assert running[first].pages[:2] == running[second].pages[:2]
    assert set(running[first].pages[2:]).isdisjoint(running[second].pages[2:])
    model.finish()


@pytest.mark.oldest
def test_a_long_prompt_is_read_between_the_steps_of_those_that_decode():
    model = PoolModel(replace(LIMITS, chunk=16, token_budget=16))
    model.arrive([0], 30)
    until(model, lambda work: isinstance(work, Decode))
    model.arrive([1] * 60, 2)
    kinds = [type(work).__name__ for work in model.finish()[:8]]
    assert kinds == ["Prefill", "Decode"] * 4
    wide = PoolModel(replace(LIMITS, chunk=16, token_budget=33))
    wide.arrive([0], 30)
    until(wide, lambda work: isinstance(work, Decode))
    wide.arrive([1] * 60, 2)
    works = wide.finish()
    assert [type(work).__name__ for work in works[:5]] == ["Prefill", "Prefill", "Decode", "Prefill", "Prefill"]
    # More could be read at once: those that decode take one step and no more.
    assert [work.num_steps for work in works if isinstance(work, Decode)][:2] == [1, 4]


def test_who_came_last_gives_way_and_its_text_is_read_again():
    model = PoolModel(replace(TIGHT, slots=3))
    ids = [model.arrive([token] * 9, 20, reuse=False) for token in range(3)]
    works = model.finish()
    assert model.scheduler.num_preemptions >= 2
    reads = [(work.request_id, work.start) for work in works if isinstance(work, Prefill) and work.first]
    assert reads[:2] == [(ids[0], 0), (ids[1], 0)]
    assert (ids[1], 0) in reads[2:]
    # The first came first: nobody takes anything from it.
    assert [request_id for request_id, _ in reads].count(ids[0]) == 1


def test_what_gave_way_is_found_again_where_nobody_needed_its_pages():
    model = PoolModel(replace(TIGHT, page=4, num_pages=10))
    model.arrive([0] * 9, 20)
    second = model.arrive([1] * 9, 20)
    reads = [work.start for work in model.finish() if isinstance(work, Prefill) and work.request_id == second]
    assert model.scheduler.num_preemptions == 1
    assert reads[0] == 0
    # Its first pages were given away last.
    assert 0 < reads[1] < 29


@pytest.mark.oldest
def test_who_gives_way_by_swapping_goes_on_where_it_was():
    model = PoolModel(replace(TIGHT, swap=True))
    model.arrive([0] * 9, 20)
    second = model.arrive([1] * 9, 20)
    third = model.arrive([2] * 3, 20)
    works = model.finish()
    turns = [(type(work), work.request_id) for work in works if not isinstance(work, Decode)]
    # It comes back before one that came later.
    assert turns[:2] == [(Prefill, 0), (Prefill, second)]
    assert turns[2:5] == [(SwapOut, second), (SwapIn, second), (Prefill, third)]


def test_a_cancelled_request_that_was_swapped_out_leaves_nothing():
    model = PoolModel(replace(TIGHT, swap=True))
    model.arrive([0] * 9, 20)
    model.arrive([1] * 9, 20)
    out = until(model, lambda work: isinstance(work, SwapOut))
    assert isinstance(out, SwapOut)
    assert model.scheduler.saved == [out.request_id]
    model.end(out.request_id)
    assert model.scheduler.saved == []
    assert not any(isinstance(work, SwapIn) for work in model.finish())


@pytest.mark.oldest
def test_shares_do_not_lend_and_a_request_goes_where_its_beginning_is():
    limits = replace(LIMITS, slots=4, shares=2)
    model = PoolModel(limits)
    first = model.arrive([0] * 17, 2)
    until(model, lambda work: isinstance(work, Prefill))
    share = model.scheduler.running[first].share
    other = model.arrive([1] * 17, 2)
    until(model, lambda work: isinstance(work, Prefill))
    assert model.scheduler.running[other].share != share, "the other share has more room"
    again = model.arrive([0] * 17, 2)
    work = until(model, lambda work: isinstance(work, Prefill))
    assert isinstance(work, Prefill)
    assert (model.scheduler.running[again].share, work.start) == (share, 16)
    model.finish()


DETERMINISTIC = replace(LIMITS, slots=3, chunk=16, deterministic=True, swap=True)


def test_reading_goes_on_where_all_that_decoded_gave_way():
    """One that came back reads in the other share, while the only one that decodes has no page left."""
    model = PoolModel(
        Limits(
            slots=4,
            max_queue=9,
            max_context=17,
            decode_steps=2,
            page=2,
            num_pages=22,
            chunk=2,
            token_budget=3,
            shares=2,
        )
    )
    random = Random(1683)
    for num_prompt, max_tokens, num_work in ((10, 4, 4), (2, 11, 1), (11, 4, 1), (3, 12, 4), (6, 6, 1)):
        model.arrive([random.randrange(NUM_TOKENS) for _ in range(num_prompt)], max_tokens)
        for _ in range(num_work):
            model.work()
    model.finish()
    assert model.seen["recomputed"] > 0


def test_deterministic_rows_of_one_dispatch_have_one_bucket_and_buckets_take_turns():
    model = PoolModel(DETERMINISTIC)
    model.arrive([0], 12)
    model.arrive([1] * 40, 12)
    model.arrive([2], 12)
    decodes = [work for work in model.finish() if isinstance(work, Decode)]
    assert {len(work.rows) for work in decodes} == {3}
    assert [work.bucket for work in decodes[:4]] == [32, 64, 32, 64]
    assert [row.request_id for row in decodes[0].rows if row] == [0, 2]


def test_deterministic_chunks_are_whole_and_only_what_they_wrote_is_found():
    model = PoolModel(DETERMINISTIC)
    prompt = [0, 1] * 20
    model.arrive(prompt, 20)
    works = model.finish()
    reads = [(work.start, work.num_tokens, work.chunk) for work in works if isinstance(work, Prefill)]
    assert reads == [(0, 16, 16), (16, 16, 16), (32, 8, 16)]
    text = model.texts[0]
    assert len(model.scheduler.blocks[0].find(digests(text, 8))) == 4, "two chunks of two pages, of 60 tokens"
    model.arrive(text[:50], 2)
    assert next(work.start for work in model.finish() if isinstance(work, Prefill)) == 32
    # One page alone is known of the second chunk: that chunk is read whole.
    model.arrive([*prompt[:24], *[2] * 10], 2)
    assert next(work.start for work in model.finish() if isinstance(work, Prefill)) == 16


# Random traces -------------------------------------------------------------------------------------------------------


@st.composite
def some_limits(draw, *, deterministic=False, swap=False):
    """Small pools, most of them too small for all slots."""
    drafts = 0 if deterministic else draw(st.sampled_from((0, 0, 3)))
    shares, page, max_context = (
        draw(st.sampled_from((1, 2))),
        draw(st.sampled_from((2, 4))),
        draw(st.sampled_from((36, 30, 17, 4))),
    )
    longest = make_buckets(max_context + drafts, page)[-1]
    a_row = longest // page
    slots = shares * draw(st.sampled_from((3, 3, 2, 1)))
    return Limits(
        slots=slots,
        max_queue=draw(st.integers(3, 6)),
        max_context=max_context,
        decode_steps=draw(st.integers(1, 5)),
        page=page,
        num_pages=shares * (a_row + draw(st.integers(0, a_row // 4))),
        chunk=min(page * draw(st.sampled_from((1, 2, 4))), longest),
        token_budget=draw(st.integers(1, 40)),
        shares=shares,
        drafts=drafts,
        draft_batch=draw(st.integers(1, slots)),
        prefix_cache=draw(st.sampled_from((True, True, False))),
        swap=swap,
        deterministic=deterministic,
    )


@st.composite
def a_request(draw):
    """Often the beginning that others have, and long enough to fill the pool with few others."""
    return {
        "common": draw(st.sampled_from((1, 1, 3, 20))),
        "own": draw(st.lists(st.integers(0, NUM_TOKENS - 1), max_size=6)),
        "output": draw(st.sampled_from((34, 34, 20, 1))),
        "ends_after": draw(st.sampled_from((None, None, None, 1, 9))),
        "reuse": draw(st.sampled_from((True, True, False))),
    }


# As many of a kind as its share of the actions.
KINDS = ("arrive",) * 9 + ("work",) * 9 + ("cancel",) + ("fail", "lose")


@st.composite
def an_action(draw):
    kind = draw(st.sampled_from(KINDS))
    what = {"arrive": a_request(), "work": st.integers(1, 8), "cancel": st.integers(0, 9)}
    return kind, draw(what.get(kind, st.none()))


actions = st.lists(an_action(), min_size=20, max_size=50)


def arrive(model: PoolModel, common, own, output, ends_after, reuse) -> None:
    limits = model.limits
    prompt = [*[token % NUM_TOKENS for token in range(common)], *own][: limits.max_context - 1] or [0]
    room = model.scheduler.num_waiting < limits.max_queue + model.scheduler.num_free_slots
    try:
        model.arrive(prompt, min(output, limits.max_context - len(prompt)), ends_after=ends_after, reuse=reuse)
    except QueueFull:
        assert not room
    else:
        assert room


def trace(limits: Limits, steps, accepted) -> Counter[str]:
    """Do it all, and whatever is left to do after it; the model asserts."""
    model = PoolModel(limits, accepted)
    for kind, what in steps:
        match kind:
            case "arrive":
                arrive(model, **what)
            case "work":
                for _ in range(what):
                    model.work()
            case "cancel" if model.alive:
                model.end(sorted(model.alive)[what % len(model.alive)])
            case "fail":
                model.work(fails=True)
            case "lose":
                model.lose_contents()
        model.check()
    model.finish()
    return model.seen


def check_traces(limits_strategy, wanted, **how) -> None:
    seen: Counter[str] = Counter()

    @settings(deadline=None, suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large], **how)
    @given(limits=limits_strategy, steps=actions, accepted=st.lists(st.integers(0, 3), min_size=1, max_size=5))
    def run(limits, steps, accepted):
        seen.update(trace(limits, steps, accepted))

    run()
    rare = [f"{kind} came {seen[kind]} times" for kind in wanted if seen[kind] < 10]
    assert not rare, f"traces that never come to it test little: {rare}"


KINDS_OF_ENGINE = {
    "recompute": (some_limits(), ("recomputed", "hits")),
    "swap": (some_limits(swap=True), ("SwapOut", "SwapIn", "hits")),
    "deterministic": (some_limits(swap=True, deterministic=True), ("SwapOut", "SwapIn", "hits")),
}


@pytest.mark.parametrize("kind", KINDS_OF_ENGINE)
def test_random_traces_read_the_right_cells_and_serve_everyone(kind):
    check_traces(*KINDS_OF_ENGINE[kind], max_examples=30, derandomize=True)


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS_OF_ENGINE)
def test_many_random_traces(kind):
    check_traces(*KINDS_OF_ENGINE[kind], max_examples=1000)
