"""Pages and their prefixes, driven by Hypothesis against a model that keeps plain lists."""

import itertools
from collections import Counter

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from gcompute.serve.blocks import BlockManager, digest_of, digests

PAGE = 2
texts = st.lists(st.integers(0, 1), max_size=12)


@pytest.mark.oldest
def test_a_digest_stands_for_a_page_and_all_that_is_before_it():
    text = [1, 2, 3, 4, 1, 2]
    first, second, third = digests(text, PAGE)
    assert len({first, second, third}) == 3, "the same page after another beginning is another page"
    assert digests([1, 2, 3, 4, 5], PAGE) == [first, second]
    assert digests(text, PAGE, [first]) == [first, second, third]
    assert digests([1], PAGE) == []
    assert digest_of(first, [3, 4]) == second
    assert digest_of(first, [3, 4]) != digest_of(first, [4, 3])
    assert digest_of(b"", [256]) != digest_of(b"", [1, 0])


def test_digests_of_all_short_texts_differ():
    everything = [text for size in range(5) for text in itertools.product(range(3), repeat=size)]
    assert len({tuple(digests(text, 1)) for text in everything}) == len(everything)


@pytest.mark.oldest
def test_the_least_recently_used_page_is_evicted_first_and_of_one_request_the_last():
    blocks = BlockManager(4, first=10)
    old, new = blocks.allocate(2), blocks.allocate(2)
    for page in (*old, *new):
        blocks.publish(page, bytes([page]))
    blocks.release(old)
    blocks.release(new)
    assert (blocks.num_free, blocks.num_cached, blocks.num_used, blocks.num_available) == (0, 4, 0, 4)
    assert blocks.find([bytes([page]) for page in old]) == old
    assert blocks.allocate(1) == old[1:]
    blocks.take(old[:1])
    blocks.release(old[:1])
    assert set(blocks.allocate(2)) == {new[1], new[0]}
    assert blocks.find([bytes([old[0]])]) == [old[0]]
    with pytest.raises(AssertionError):
        blocks.allocate(2)


class Pages(RuleBasedStateMachine):
    """Requests that hold pages, and what the pages hold; the model's own lists decide what is expected."""

    @initialize(total=st.integers(1, 9), first=st.integers(0, 5))
    def start(self, total, first):
        self.blocks = BlockManager(total, first=first)
        self.total = total
        self.free = set(range(first, first + total))
        self.lru: list[int] = []
        self.holders: Counter[int] = Counter()
        self.requests: list[tuple[list[int], list[bytes]]] = []
        self.contents: dict[int, bytes] = {}
        self.page_of: dict[bytes, int] = {}

    def known(self, wanted: list[bytes]) -> list[int]:
        return [self.page_of[digest] for digest in itertools.takewhile(self.page_of.__contains__, wanted)]

    @rule(text=texts, extra=st.integers(0, 2), reuse=st.booleans())
    def admit(self, text, extra, reuse):
        wanted = digests(text, PAGE)
        hits = self.blocks.find(wanted)
        assert hits == self.known(wanted)
        assert all(self.contents[page] == digest for page, digest in zip(hits, wanted, strict=False))
        hits = hits if reuse else []
        idle = [page for page in hits if not self.holders[page]]
        assert self.blocks.num_idle(hits) == len(idle)
        need = len(wanted) - len(hits) + extra
        assert self.blocks.num_available == len(self.free) + len(self.lru)
        if need > self.blocks.num_available - len(idle):
            return
        self.blocks.take(hits)
        self.lru = [page for page in self.lru if page not in hits]
        self.holders.update(hits)
        self.grow(hits, wanted, need)

    def grow(self, pages: list[int], wanted: list[bytes], num: int) -> None:
        new = self.blocks.allocate(num)
        assert len(set(new)) == num
        num_evicted = max(0, num - len(self.free))
        evicted, self.lru = self.lru[:num_evicted], self.lru[num_evicted:]
        # Free pages first; then those used longest ago, and no other.
        assert set(new) <= self.free | set(evicted)
        assert set(evicted) <= set(new)
        assert not any(self.holders[page] for page in new)
        self.free -= set(new)
        for page in evicted:
            del self.page_of[self.contents[page]]
        for page in new:
            self.contents[page] = b"written over"
        self.holders.update(new)
        self.requests.append((pages + new, wanted))

    @precondition(lambda self: self.requests)
    @rule(data=st.data(), num=st.integers(1, 6))
    def publish(self, data, num):
        pages, wanted = data.draw(st.sampled_from(self.requests))
        for page, digest in list(zip(pages, wanted, strict=False))[:num]:
            assert self.contents[page] in (b"written over", digest)
            self.contents[page] = digest
            self.page_of.setdefault(digest, page)
            self.blocks.publish(page, digest)

    @precondition(lambda self: self.requests)
    @rule(data=st.data())
    def release(self, data):
        pages, _ = self.requests.pop(data.draw(st.integers(0, len(self.requests) - 1)))
        self.blocks.release(pages)
        for page in reversed(pages):
            self.holders[page] -= 1
            if self.holders[page]:
                continue
            if self.page_of.get(self.contents[page]) == page:
                self.lru.append(page)
            else:
                self.free.add(page)

    @precondition(lambda self: not self.requests)
    @rule()
    def clear(self):
        self.blocks.clear()
        self.free |= set(self.lru)
        self.lru.clear()
        self.page_of.clear()

    @invariant()
    def agree(self):
        blocks = self.blocks
        blocks.check()
        assert blocks.num_free + blocks.num_cached + blocks.num_used == self.total
        assert (blocks.num_free, blocks.num_cached) == (len(self.free), len(self.lru))
        assert dict(blocks.held) == dict(+self.holders)

    @invariant()
    def found_only_while_intact(self):
        for digest, page in self.page_of.items():
            assert self.blocks.find([digest]) == [page]
            assert self.contents[page] == digest


TestPages = Pages.TestCase
TestPages.settings = settings(max_examples=40, stateful_step_count=40, deadline=None, derandomize=True)


@pytest.mark.slow
class TestPagesLong(Pages.TestCase):
    settings = settings(max_examples=300, stateful_step_count=60, deadline=None)
