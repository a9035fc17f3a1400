import itertools
import subprocess
import sys
import threading
from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gcompute.train.data import BatchSource, Prefetcher, ValidationWindows, permuted

sizes = st.tuples(st.integers(2, 200), st.integers(1, 12), st.integers(1, 9)).filter(lambda size: size[0] > size[1])


def source(num_tokens, seq, batch, seed=0):
    # Token i is i, so that a window tells where it began.
    return BatchSource(tokens=np.arange(num_tokens, dtype=np.uint16), seq=seq, batch=batch, seed=seed)


@given(st.integers(1, 3000), st.integers(0, 2**70), st.integers(0, 10**9))
@settings(deadline=None)
def test_permuted_is_a_bijection(num, seed, epoch):
    assert sorted(permuted(np.arange(num), num, seed, epoch)) == list(range(num))


@given(st.integers(1, 10**12), st.data())
@settings(deadline=None)
def test_permuted_treats_each_index_alone(num, data):
    indices = np.array(data.draw(st.lists(st.integers(0, num - 1), min_size=1, max_size=5)))
    together = permuted(indices, num, 1, 2)
    assert together.max() < num
    assert list(together) == [permuted(np.array([index]), num, 1, 2)[0] for index in indices]


@pytest.mark.parametrize("num", [2, 3, 4])
def test_every_order_is_about_equally_likely(num):
    seen = Counter(tuple(permuted(np.arange(num), num, 7, epoch)) for epoch in range(1200))
    expected = 1200 / len(list(itertools.permutations(range(num))))
    # Chi-squared with at most 23 degrees of freedom stays below 60 but for one time in 20,000; the draw is fixed.
    assert sum((seen[order] - expected) ** 2 / expected for order in itertools.permutations(range(num))) < 60


def test_large_order_looks_random():
    order = permuted(np.arange(10_000), 10_000, 0, 0)
    assert abs(np.corrcoef(np.arange(10_000), order)[0, 1]) < 0.05  # 5 standard deviations
    assert (np.abs(np.diff(order)) == 1).mean() < 0.002  # 1 in 5,000 expected


def test_permuted_refuses_what_it_does_not_permute():
    with pytest.raises(ValueError, match="from 0 to 4, got 0 to 5"):
        permuted(np.array([0, 5]), 5, 0, 0)


def test_the_stream_is_fixed_for_ever():
    # Known answers: a change here would break the bit-exact resumption of every run there is.
    assert permuted(np.arange(8), 8, 1337, 3).tolist() == [5, 2, 4, 0, 7, 1, 6, 3]
    inputs, _ = source(100, 7, 4, seed=1337).batch_at(5)
    assert inputs[:, 0].tolist() == [2, 44, 9, 79]


@given(sizes, st.integers(0, 2**63))
@settings(deadline=None, max_examples=25)
def test_an_epoch_visits_each_window_once(size, seed):
    num_tokens, seq, batch = size
    batches = source(num_tokens, seq, batch, seed)
    num = batches.num_windows
    for epoch in (0, 3):
        samples = range(epoch * num, (epoch + 1) * num)
        starts = sorted(
            int(batches.rows(sample // batch, sample % batch, sample % batch + 1)[0][0, 0]) for sample in samples
        )
        assert np.diff(starts).tolist() == [seq] * (num - 1)
        assert starts[0] >= 0
        assert starts[-1] + seq < num_tokens


@given(sizes, st.integers(0, 10**6))
@settings(deadline=None)
def test_targets_are_the_next_tokens(size, step):
    num_tokens, seq, batch = size
    inputs, targets = source(num_tokens, seq, batch).batch_at(step)
    assert inputs.shape == targets.shape == (batch, seq)
    assert inputs.dtype == targets.dtype == np.int32
    assert inputs.flags.c_contiguous
    assert targets.flags.c_contiguous
    np.testing.assert_array_equal(targets, inputs + 1)
    np.testing.assert_array_equal(inputs, inputs[:, :1] + np.arange(seq))


@given(sizes, st.integers(0, 1000), st.data())
@settings(deadline=None)
def test_batches_are_pure_and_rows_and_stacks_are_parts_of_them(size, step, data):
    num_tokens, seq, batch = size
    inputs, targets = source(num_tokens, seq, batch).batch_at(step)
    used = source(num_tokens, seq, batch)
    for other in (step + 1, 0):
        used.batch_at(other)
    np.testing.assert_array_equal(used.batch_at(step)[0], inputs)
    start = data.draw(st.integers(0, batch))
    stop = data.draw(st.integers(start, batch))
    for part, whole in zip(used.rows(step, start, stop), (inputs, targets), strict=True):
        np.testing.assert_array_equal(part, whole[start:stop])
    for stacked, whole in zip(used.stack(step, 3), (inputs, targets), strict=True):
        assert stacked.shape == (3, batch, seq)
        np.testing.assert_array_equal(stacked[0], whole)
    np.testing.assert_array_equal(used.stack(step, 3)[1][2], used.batch_at(step + 2)[1])


def test_another_process_computes_the_same_batch():
    code = (
        "import numpy as np; from gcompute.train.data import BatchSource\n"
        "tokens = np.arange(1000, dtype=np.uint16)\n"
        "print(BatchSource(tokens=tokens, seq=9, batch=5, seed=3).batch_at(77)[0].tolist())"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == str(source(1000, 9, 5, seed=3).batch_at(77)[0].tolist())


def test_seed_epoch_and_offset_change_the_order():
    starts = [source(1000, 10, 98, seed).batch_at(step)[0][:, 0] for seed in (0, 1) for step in (0, 1)]
    assert source(1000, 10, 98).num_windows == 99
    for one, other in itertools.combinations(starts, 2):
        assert not np.array_equal(one, other)
    batches = source(1000, 10, 99)
    offsets = {int(batches.batch_at(epoch)[0][:, 0].min()) for epoch in range(200)}
    assert offsets == set(range(10))


def test_fewer_windows_than_rows_wraps_epochs():
    batches = source(10, 3, 7)
    assert batches.num_windows == 2
    inputs, _ = batches.batch_at(0)
    for epoch in range(3):
        pair = inputs[2 * epoch : 2 * epoch + 2, 0]
        assert abs(int(pair[0]) - int(pair[1])) == 3


def test_memory_mapped_tokens_give_plain_arrays(tmp_path):
    np.arange(100, dtype=np.uint16).tofile(tmp_path / "tokens.bin")
    tokens = np.memmap(tmp_path / "tokens.bin", np.uint16, "r")
    inputs, targets = BatchSource(tokens=tokens, seq=5, batch=4, seed=0).batch_at(2)
    np.testing.assert_array_equal(inputs, source(100, 5, 4).batch_at(2)[0])
    assert type(inputs) is type(targets) is np.ndarray


def test_large_ids_survive():
    tokens = np.full(10, 128_255, np.uint32)
    assert BatchSource(tokens=tokens, seq=4, batch=1, seed=0).batch_at(0)[0].max() == 128_255


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: source(8, 8, 1), "8 tokens, and seq=8 needs 9. Use seq=7 or less"),
        (lambda: source(0, 8, 1), "0 tokens, and seq=8 needs 9. Give more text"),
        (lambda: source(8, 0, 1), "seq=0"),
        (lambda: source(8, 2, 0), "batch=0"),
        (lambda: source(8, 2, 4).rows(0, 2, 5), "no rows 2 to 5"),
        (lambda: source(8, 2, 4).batch_at(-1), "step -1"),
        (lambda: ValidationWindows(tokens=np.zeros(1, np.uint16), seq=2, batch=1), "at least 2 tokens, got 1"),
        (lambda: ValidationWindows(tokens=np.zeros(5, np.uint16), seq=2, batch=0), "batch=0"),
        (lambda: ValidationWindows(tokens=np.zeros(5, np.uint16), seq=2, batch=1).batch_at(2), "numbered 0 to 1"),
        (lambda: Prefetcher([], depth=0), "depth must be at least 1"),
    ],
)
def test_bad_arguments_say_what_to_do(call, message):
    with pytest.raises(ValueError, match=message) as caught:
        call()
    assert "\n" not in str(caught.value)


@given(sizes)
@settings(deadline=None)
def test_validation_windows_cover_every_target_once(size):
    num_tokens, seq, batch = size
    tokens = np.arange(1, num_tokens + 1, dtype=np.uint32)
    windows = ValidationWindows(tokens=tokens, seq=seq, batch=batch)
    batches = list(windows)
    assert len(batches) == len(windows)
    for inputs, targets, weights in batches:
        assert inputs.shape == targets.shape == weights.shape == (batch, seq)
        assert (inputs.dtype, targets.dtype, weights.dtype) == (np.int32, np.int32, np.float32)
        assert weights.any()
    inputs, targets, weights = (np.concatenate(parts).reshape(-1) for parts in zip(*batches, strict=True))
    assert weights.sum() == windows.num_targets == num_tokens - 1
    assert targets[weights == 1].tolist() == tokens[1:].tolist()
    assert inputs[weights == 1].tolist() == tokens[:-1].tolist()
    assert not inputs[weights == 0].any()
    assert not targets[weights == 0].any()


def test_prefetcher_gives_the_items_in_order_then_stops():
    with Prefetcher(range(20), depth=3) as items:
        assert list(items) == list(range(20))
        assert next(items, "end") == "end"


def test_prefetcher_works_ahead_but_only_so_far():
    made = []
    third_made = threading.Event()

    def items():
        for index in range(10):
            made.append(index)
            if index == 2:
                third_made.set()
            yield index

    with Prefetcher(items(), depth=2) as prefetcher:
        assert third_made.wait(10)  # two are ready, and the third, in hand, waits for room
        assert made == [0, 1, 2]
        assert next(prefetcher) == 0
        assert [next(prefetcher) for _ in range(9)] == list(range(1, 10))


def test_prefetcher_passes_an_exception_on_in_its_turn():
    def items():
        yield 1
        raise OSError("the disk is gone")

    with Prefetcher(items()) as prefetcher:
        assert next(prefetcher) == 1
        for _ in range(2):
            with pytest.raises(OSError, match="the disk is gone"):
                next(prefetcher)


def test_close_ends_a_thread_that_waits_for_room():
    prefetcher = Prefetcher(itertools.count(), depth=1)
    assert next(prefetcher) == 0
    prefetcher.close()
    prefetcher.close()
    assert not any(thread.name == "prefetch" for thread in threading.enumerate())
    with pytest.raises(ValueError, match="closed"):
        next(prefetcher)


def test_close_wakes_a_consumer_that_waits():
    let_go = threading.Event()
    outcome = []

    def items():
        let_go.wait(10)
        yield 1

    prefetcher = Prefetcher(items())

    def consume():
        try:
            next(prefetcher)
        except ValueError as error:
            outcome.append(str(error))
        let_go.set()

    consumer = threading.Thread(target=consume)
    consumer.start()
    prefetcher.close()
    consumer.join(10)
    assert outcome == ["the prefetcher is closed: it has no more items."]


def test_the_thread_does_not_outlive_the_with_block_on_an_error():
    with pytest.raises(KeyError, match="consumer"), Prefetcher(itertools.count()):
        raise KeyError("consumer")
    assert not any(thread.name == "prefetch" for thread in threading.enumerate())


def test_a_sample_is_spread_over_the_split_and_its_stretches_are_its_tokens():
    windows = ValidationWindows(tokens=np.arange(1001, dtype=np.uint16), seq=5, batch=4)
    assert len(windows) == 50
    assert windows.sample(5) == [0, 10, 20, 30, 40]
    assert windows.sample(50) == windows.sample(99) == list(range(50))
    for index, stretch in zip(windows.sample(7), windows.stretches(7), strict=True):
        inputs, targets, weights = windows.batch_at(index)
        tokens = windows.tokens[stretch]
        np.testing.assert_array_equal(tokens[:-1], inputs.ravel()[weights.ravel() > 0])
        np.testing.assert_array_equal(tokens[1:], targets.ravel()[weights.ravel() > 0])


@pytest.mark.parametrize(
    ("configured", "steps", "eval_batches", "batches"),
    [
        (None, 20, 20, 20),  # a short run is not mostly validation
        (None, 100, 20, 30),  # a tenth of its work: a forward pass is a third of a step
        (None, 400, 20, 50),
        (None, 20, None, 50),
        (0, 20, 20, 50),
        (3, 400, 20, 3),
        (99, 20, 20, 50),
    ],
)
def test_the_last_evaluation_is_sized_by_the_training(configured, steps, eval_batches, batches):
    windows = ValidationWindows(tokens=np.zeros(1001, np.uint16), seq=5, batch=4)
    assert windows.final(configured, steps=steps, eval_batches=eval_batches) == batches
