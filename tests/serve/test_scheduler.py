import pytest
from hypothesis import given
from hypothesis import strategies as st

from gcompute.serve.request import QueueFull
from gcompute.serve.scheduler import Decode, Prefill, Scheduler, make_buckets


def scheduler(slots=2, max_queue=3, max_context=64, decode_steps=4) -> Scheduler:
    return Scheduler(slots=slots, max_queue=max_queue, max_context=max_context, decode_steps=decode_steps)


def test_buckets_are_powers_of_two_that_end_at_the_context():
    assert make_buckets(256) == (16, 32, 64, 128, 256)
    assert make_buckets(100) == (16, 32, 64, 100)
    assert make_buckets(2) == (2,)


def test_waiting_requests_fill_free_slots_before_anything_decodes():
    plan = scheduler()
    for request_id, num_prompt in enumerate((5, 20, 3)):
        plan.add(request_id, num_prompt=num_prompt, max_tokens=4)
    first, second = plan.next_work(), plan.next_work()
    assert first == Prefill(request_id=0, slot=0, bucket=16)
    assert second == Prefill(request_id=1, slot=1, bucket=32)
    plan.advance(0, 1, prefill=True)
    plan.advance(1, 1, prefill=True)
    assert plan.next_work() == Decode(num_steps=3, bucket=32, until_free=True)
    plan.remove(0)
    assert plan.next_work() == Prefill(request_id=2, slot=0, bucket=16)


def test_a_dispatch_never_leaves_its_length_bucket_nor_exceeds_the_largest_need():
    plan = scheduler(slots=1, decode_steps=8)
    plan.add(0, num_prompt=14, max_tokens=12)
    plan.next_work()
    plan.advance(0, 1, prefill=True)
    assert plan.next_work() == Decode(num_steps=2, bucket=16, until_free=False)
    plan.advance(0, 2)
    assert plan.next_work() == Decode(num_steps=8, bucket=32, until_free=False)
    plan.advance(0, 8)
    assert plan.next_work() == Decode(num_steps=1, bucket=32, until_free=False)


def test_the_queue_is_bounded_beyond_what_slots_can_take():
    plan = scheduler(slots=2, max_queue=3)
    for request_id in range(5):
        plan.add(request_id, num_prompt=1, max_tokens=1)
    with pytest.raises(QueueFull, match="at most 3 may"):
        plan.add(5, num_prompt=1, max_tokens=1)
    plan.remove(4)
    plan.add(6, num_prompt=1, max_tokens=1)
    assert plan.num_waiting == 5


@given(
    slots=st.integers(1, 4),
    max_queue=st.integers(1, 4),
    decode_steps=st.integers(1, 8),
    actions=st.lists(
        st.one_of(
            st.tuples(st.just("add"), st.integers(1, 40), st.integers(1, 24)),
            st.tuples(st.just("work"), st.integers(0, 8), st.integers(0, 3)),
            st.tuples(st.just("cancel"), st.integers(0, 100), st.just(0)),
        ),
        max_size=60,
    ),
)
def test_random_traces_keep_the_invariants_and_serve_everyone(slots, max_queue, decode_steps, actions):
    plan = scheduler(slots=slots, max_queue=max_queue, max_context=64, decode_steps=decode_steps)
    need: dict[int, int] = {}  # tokens each living request may still make, kept apart from the scheduler's own count
    cached: dict[int, int] = {}
    waiting: list[int] = []
    num_added = 0

    def check() -> None:
        plan.check()
        assert plan.num_free + len(plan.running) == slots
        assert plan.num_waiting == len(waiting)
        assert plan.num_waiting <= max_queue + plan.num_free
        assert set(plan.running) == set(need) - set(waiting)
        for request_id, entry in plan.running.items():
            assert (entry.cached, entry.remaining) == (cached[request_id], need[request_id])

    def end(request_id: int) -> None:
        plan.remove(request_id)
        del need[request_id], cached[request_id]
        if request_id in waiting:
            waiting.remove(request_id)

    def run(shorten: int, num_ended: int) -> bool:
        """One dispatch; some rows may end before their length, as on an end-of-text token."""
        work = plan.next_work()
        if work is None:
            assert not need
            return False
        if isinstance(work, Prefill):
            assert work.request_id == waiting.pop(0)
            assert work.bucket >= cached[work.request_id]
            plan.advance(work.request_id, 1, prefill=True)
            need[work.request_id] -= 1
            if need[work.request_id] == 0:
                end(work.request_id)
            return True
        running = list(plan.running)
        assert running
        assert not (waiting and plan.num_free)
        assert 1 <= work.num_steps <= min(decode_steps, max(need[r] for r in running))
        assert max(cached[r] for r in running) + work.num_steps <= work.bucket <= 64
        assert work.until_free == bool(waiting)
        steps = max(1, work.num_steps - shorten)
        for place, request_id in enumerate(running):
            made = min(steps, need[request_id])
            plan.advance(request_id, made)
            need[request_id] -= made
            cached[request_id] += made
            if need[request_id] == 0 or place < num_ended:
                end(request_id)
        return True

    for kind, first, second in actions:
        if kind == "add":
            room = plan.num_waiting < max_queue + plan.num_free
            try:
                plan.add(num_added, num_prompt=first, max_tokens=second)
            except QueueFull:
                assert not room
            else:
                assert room
                need[num_added], cached[num_added] = second, first
                waiting.append(num_added)
                num_added += 1
        elif kind == "work":
            run(first, second)
        elif need:
            end(sorted(need)[first % len(need)])
        check()
    for _ in range(10_000):
        if not run(0, 0):
            break
        check()
    assert not need
    assert plan.num_free == slots
