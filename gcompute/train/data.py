"""Tokens to batches: training batches as a pure function of (seed, step), validation windows, and a prefetcher.

Nothing here has a position to save. The batch of any step is computed from the seed and the step alone, so a run that
stops anywhere and resumes sees the same batches, and each host of a pod can compute just its own rows.
"""

import threading
from collections import deque
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Generic, Self, TypeVar

import numpy as np
from jaxtyping import Float32, Int32, Integer, UInt64

from gcompute.train.mapped import check_mapped

FEISTEL_ROUNDS = 8
MASK_64 = (1 << 64) - 1
# The last evaluation takes about this share of the training's work; a forward pass is a third of a step.
VALIDATION_SHARE, FORWARD_SHARE = 0.1, 1 / 3

T = TypeVar("T")


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class BatchSource:
    """Shuffled windows of `tokens`, epoch after epoch.

    An epoch visits, in a random order, num_windows windows of seq + 1 tokens, window i starting at
    offset + i * seq. Order and offset depend on (seed, epoch) alone. The offset moves the cuts from epoch to epoch, and
    with them the tokens at both ends that are left out, at most 2 seq - 2. Row r of step s is sample s * batch + r of
    that endless sequence, so a batch may straddle epochs, and holds several when there are fewer windows than rows.

    Raises:
      ValueError: the tokens are fewer than seq + 1, or seq or batch is below 1.
    """

    tokens: Integer[np.ndarray, "n"]
    seq: int
    batch: int
    seed: int

    def __post_init__(self) -> None:
        if self.seq < 1 or self.batch < 1:
            raise ValueError(f"seq and batch must be at least 1, got seq={self.seq}, batch={self.batch}.")
        if len(self.tokens) <= self.seq:
            num = len(self.tokens)
            remedy = f"Use seq={num - 1} or less, or more text" if num > 1 else "Give more text"
            raise ValueError(f"the data has {num} tokens, and seq={self.seq} needs {self.seq + 1}. {remedy}.")

    @property
    def num_windows(self) -> int:
        """Windows in an epoch: as many as fit whichever offset below seq is drawn, and at least one."""
        return max(1, (len(self.tokens) - self.seq) // self.seq)

    def batch_at(self, step: int) -> tuple[Int32[np.ndarray, "b t"], Int32[np.ndarray, "b t"]]:
        """The inputs of step `step`, counted from 0, and their targets: the same tokens one place on."""
        return self.rows(step, 0, self.batch)

    def rows(self, step: int, start: int, stop: int) -> tuple[Int32[np.ndarray, "b t"], Int32[np.ndarray, "b t"]]:
        """Rows start to stop of `batch_at(step)`, without reading the others: one host's share.

        Raises:
          ValueError: step is negative, or the rows are not within the batch.
          OSError: the file that `tokens` is mapped from was cut short.
        """
        if step < 0 or not 0 <= start <= stop <= self.batch:
            raise ValueError(f"no rows {start} to {stop} of step {step}: steps begin at 0, rows end at {self.batch}.")
        epochs, indices = np.divmod(np.arange(start, stop) + step * self.batch, self.num_windows)
        starts = np.empty_like(indices)
        for epoch in np.unique(epochs):
            here = epochs == epoch
            starts[here] = self._offset(int(epoch)) + self.seq * permuted(
                indices[here], self.num_windows, self.seed, int(epoch)
            )
        check_mapped(self.tokens)
        windows = self.tokens[starts[:, None] + np.arange(self.seq + 1)].astype(np.int32)
        return np.ascontiguousarray(windows[:, :-1]), np.ascontiguousarray(windows[:, 1:])

    def stack(self, first_step: int, num_steps: int) -> tuple[Int32[np.ndarray, "n b t"], Int32[np.ndarray, "n b t"]]:
        """The batches of num_steps steps from first_step on, stacked, for several steps in one dispatch."""
        batches = [self.batch_at(step) for step in range(first_step, first_step + num_steps)]
        return np.stack([inputs for inputs, _ in batches]), np.stack([targets for _, targets in batches])

    def _offset(self, epoch: int) -> int:
        spare = len(self.tokens) - 1 - self.num_windows * self.seq
        return _mixed_int(self.seed, epoch, FEISTEL_ROUNDS) % (spare + 1)


def permuted(indices: Integer[np.ndarray, "k"], num: int, seed: int, epoch: int) -> Integer[np.ndarray, "k"]:
    """Where a random permutation of range(num), fixed by (seed, epoch), sends each index; no table is made.

    A Feistel network permutes range(4^b), the smallest such power not below num: (l, r) -> (r, l xor f(r)), which its
    own steps undo, so it is a bijection whatever f is. What lands at num or above is sent through again until it lands
    below, which keeps it a bijection of range(num), in at most 4 passes on average. It is written out here because a
    library's generator may change its stream from one version to the next, and a resumed run may not.

    Raises:
      ValueError: an index is not in range(num).
    Source: Luby and Rackoff 1988 (Feistel permutations); Black and Rogaway 2002, "Ciphers with arbitrary finite
      domains" (cycle walking); Steele, Lea and Flood 2014, SplitMix64 (the mixing function f).
    """
    if len(indices) and not 0 <= indices.min() <= indices.max() < num:
        raise ValueError(f"indices must be from 0 to {num - 1}, got {indices.min()} to {indices.max()}.")
    half_bits = max(1, ((num - 1).bit_length() + 1) // 2)
    mask = np.uint64((1 << half_bits) - 1)
    keys = [np.uint64(_mixed_int(seed, epoch, turn)) for turn in range(FEISTEL_ROUNDS)]
    values = indices.astype(np.uint64)
    outside = np.ones(len(values), bool)
    while outside.any():
        walking = values[outside]
        left, right = walking >> np.uint64(half_bits), walking & mask
        for key in keys:
            left, right = right, left ^ (_mixed(right ^ key) & mask)
        values[outside] = (left << np.uint64(half_bits)) | right
        outside = values >= num
    return values.astype(np.int64)


def _mixed(values: UInt64[np.ndarray, "k"]) -> UInt64[np.ndarray, "k"]:
    """SplitMix64's finalizer, modulo 2^64: every bit of the result depends on every bit of the argument."""
    values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return values ^ (values >> np.uint64(31))


def _mixed_int(*numbers: int) -> int:
    """One 64-bit number from several, none of which a simple change of another can make up for."""
    state = 0
    for number in numbers:
        state = (state + number + 1) * 0x9E3779B97F4A7C15 & MASK_64
        state = int(_mixed(np.array([state], np.uint64))[0])
    return state


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class ValidationWindows:
    """Every target of `tokens` once, in order, as batches of one fixed shape.

    Window i reads tokens i * seq to (i + 1) * seq and predicts each next one; together the weights are 1 on the n - 1
    targets and 0 on what pads the last window and the last batch. mean loss = sum(weights * loss) / sum(weights).

    Raises:
      ValueError: there are fewer than 2 tokens, or seq or batch is below 1.
    """

    tokens: Integer[np.ndarray, "n"]
    seq: int
    batch: int

    def __post_init__(self) -> None:
        if self.seq < 1 or self.batch < 1:
            raise ValueError(f"seq and batch must be at least 1, got seq={self.seq}, batch={self.batch}.")
        if len(self.tokens) < 2:
            raise ValueError(f"validation needs at least 2 tokens, got {len(self.tokens)}: give more text.")

    @property
    def num_targets(self) -> int:
        return len(self.tokens) - 1

    def __len__(self) -> int:
        return -(-self.num_targets // (self.seq * self.batch))

    def sample(self, most: int) -> list[int]:
        """Which batches stand for the split where `most` are evaluated: always the same, spread evenly over it.

        The files of a split are in order of their names, so its first batches are all of one kind.
        """
        most = min(most, len(self))
        return [index * len(self) // most for index in range(most)]

    def stretches(self, most: int) -> list[slice]:
        """The tokens of those batches, each with the target of its last: for a model that is judged on the same."""
        size = self.batch * self.seq
        return [slice(index * size, (index + 1) * size + 1) for index in self.sample(most)]

    def final(self, final_batches: int | None, *, steps: int, eval_batches: int | None) -> int:
        """Batches of the last evaluation of a run: those configured, 0 for all, or a tenth of `steps`' work.

        Left open it is at least `eval_batches`, all with none given, so that a short run is not mostly validation and a
        long one is judged on more.
        """
        if final_batches is None:
            final_batches = max(int(VALIDATION_SHARE * steps / FORWARD_SHARE), eval_batches or len(self))
        return min(final_batches or len(self), len(self))

    def __iter__(
        self,
    ) -> Iterator[tuple[Int32[np.ndarray, "b t"], Int32[np.ndarray, "b t"], Float32[np.ndarray, "b t"]]]:
        return (self.batch_at(index) for index in range(len(self)))

    def batch_at(
        self, index: int
    ) -> tuple[Int32[np.ndarray, "b t"], Int32[np.ndarray, "b t"], Float32[np.ndarray, "b t"]]:
        """Inputs, targets and weights of batch `index`.

        Raises:
          ValueError: there is no such batch.
          OSError: the file that `tokens` is mapped from was cut short.
        """
        if not 0 <= index < len(self):
            raise ValueError(f"no validation batch {index}: they are numbered 0 to {len(self) - 1}.")
        size = self.batch * self.seq
        check_mapped(self.tokens)
        read = self.tokens[index * size : (index + 1) * size + 1].astype(np.int32)
        num_targets = len(read) - 1
        inputs, targets, weights = np.zeros(size, np.int32), np.zeros(size, np.int32), np.zeros(size, np.float32)
        inputs[:num_targets], targets[:num_targets], weights[:num_targets] = read[:-1], read[1:], 1
        shape = (self.batch, self.seq)
        return inputs.reshape(shape), targets.reshape(shape), weights.reshape(shape)


class Prefetcher(Generic[T]):
    """Iterates over `items` in a thread of its own, at most `depth` ahead of the consumer.

    An exception of `items` reaches the consumer in its turn, after the items before it, and again at every later call.
    `close`, or leaving the with block, stops the thread and waits for it; the item that it is making is finished first.

    Raises:
      ValueError: depth is below 1.
    """

    def __init__(self, items: Iterable[T], *, depth: int = 2) -> None:
        if depth < 1:
            raise ValueError(f"depth must be at least 1, got {depth}: a prefetcher holds at least the next item.")
        self._items = items
        self._depth = depth
        self._ready: deque[T] = deque()
        self._end: BaseException | None = None
        self._closed = False
        self._changed = threading.Condition()
        self._thread = threading.Thread(target=self._produce, name="prefetch", daemon=True)
        self._thread.start()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __iter__(self) -> Self:
        return self

    def __next__(self) -> T:
        with self._changed:
            self._changed.wait_for(lambda: self._ready or self._end is not None or self._closed)
            if self._closed:
                raise ValueError("the prefetcher is closed: it has no more items.")
            if self._ready:
                item = self._ready.popleft()
                self._changed.notify_all()
                return item
            assert self._end is not None
            raise self._end

    def close(self) -> None:
        """Stop the thread, wait for it, and drop what is ready; closing twice is allowed."""
        with self._changed:
            self._closed = True
            self._ready.clear()
            self._changed.notify_all()
        self._thread.join()

    def _produce(self) -> None:
        end: BaseException = StopIteration()
        try:
            for item in self._items:
                with self._changed:
                    self._changed.wait_for(lambda: len(self._ready) < self._depth or self._closed)
                    if self._closed:
                        return
                    self._ready.append(item)
                    self._changed.notify_all()
        except BaseException as error:  # an interrupt or an exit is the consumer's to act on, too
            end = error
        with self._changed:
            self._end = end
            self._changed.notify_all()
