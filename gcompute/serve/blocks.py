"""Pages of the key/value pool: which are free, which are held and by how many, and which hold a prefix to be found.

    free -> used (allocate) -> cached (release of a page with a known prefix) -> used (take) or free (evicted)

A page with a digest holds the keys and values of one page of tokens after exactly the tokens before it. Invariant:
free + cached + used = total, each page in one of the three. No arrays here.

Source: Kwon et al. 2023 (PagedAttention), section 4; vLLM's automatic prefix caching (hashed blocks), read 2025.
"""

import hashlib
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from itertools import islice
from types import MappingProxyType

Digest = bytes
ROOT: Digest = b""


def digest_of(before: Digest, tokens: Sequence[int]) -> Digest:
    """The digest of a page of tokens that comes after what `before` stands for."""
    text = b"".join(token.to_bytes(4, "little") for token in tokens)
    return hashlib.blake2b(before + text, digest_size=16).digest()


def digests(tokens: Sequence[int], page: int, known: Sequence[Digest] = ()) -> list[Digest]:
    """The digests of all whole pages of `tokens`; `known` are the first of them."""
    found = list(known)
    for at in range(len(found) * page, len(tokens) - page + 1, page):
        found.append(digest_of(found[-1] if found else ROOT, tokens[at : at + page]))
    return found


class BlockManager:
    """`num_pages` pages, numbered from `first`; the least recently used cached page is evicted first."""

    def __init__(self, num_pages: int, *, first: int = 0):
        assert num_pages >= 1
        self.num_pages = num_pages
        self._all = range(first, first + num_pages)
        self._free = list(reversed(self._all))
        self._held: dict[int, int] = {}
        # Pages that nobody holds, least recently used first.
        self._cached: OrderedDict[int, Digest] = OrderedDict()
        self._page_of: dict[Digest, int] = {}
        self._digest_of: dict[int, Digest] = {}

    @property
    def num_free(self) -> int:
        return len(self._free)

    @property
    def num_cached(self) -> int:
        return len(self._cached)

    @property
    def num_used(self) -> int:
        return len(self._held)

    @property
    def held(self) -> Mapping[int, int]:
        """How many hold each used page."""
        return MappingProxyType(self._held)

    @property
    def num_available(self) -> int:
        """Pages that `allocate` can give."""
        return len(self._free) + len(self._cached)

    def find(self, wanted: Sequence[Digest]) -> list[int]:
        """Pages of the longest known beginning of `wanted`, held or cached."""
        found = []
        for digest in wanted:
            page = self._page_of.get(digest)
            if page is None:
                break
            found.append(page)
        return found

    def num_idle(self, pages: Sequence[int]) -> int:
        """How many of them nobody holds: taking them leaves so many fewer available."""
        return sum(page not in self._held for page in pages)

    def take(self, pages: Sequence[int]) -> None:
        """Hold pages that `find` gave."""
        for page in pages:
            self._cached.pop(page, None)
            self._held[page] = self._held.get(page, 0) + 1

    def allocate(self, num: int) -> list[int]:
        """Pages whose contents nobody needs, held once each."""
        assert num <= self.num_available, (num, self.num_available)
        evicted = list(islice(self._cached, max(0, num - len(self._free))))
        for page in evicted:
            del self._cached[page]
            self._forget(page)
            self._free.append(page)
        pages = [self._free.pop() for _ in range(num)]
        self._held.update(dict.fromkeys(pages, 1))
        return pages

    def publish(self, page: int, digest: Digest) -> None:
        """Let a held page, whose contents are whole, be found. Of two pages with one prefix the first is found."""
        assert page in self._held
        if digest not in self._page_of and page not in self._digest_of:
            self._page_of[digest] = page
            self._digest_of[page] = digest

    def release(self, pages: Sequence[int]) -> None:
        """Let go of a request's pages, in the order of its tokens; the last are evicted first."""
        for page in reversed(pages):
            self._held[page] -= 1
            if self._held[page]:
                continue
            del self._held[page]
            digest = self._digest_of.get(page)
            if digest is None:
                self._free.append(page)
            else:
                self._cached[page] = digest

    def clear(self) -> None:
        """Forget all contents. Nothing may be held."""
        assert not self._held
        for page in list(self._cached):
            self._forget(page)
            self._free.append(page)
        self._cached.clear()

    def check(self) -> None:
        """Assert the invariant."""
        everywhere = [*self._free, *self._cached, *self._held]
        assert sorted(everywhere) == list(self._all), everywhere
        assert all(holders > 0 for holders in self._held.values())
        assert {page: digest for digest, page in self._page_of.items()} == self._digest_of
        assert self._digest_of.keys() <= self._cached.keys() | self._held.keys()
        assert all(self._digest_of[page] == digest for page, digest in self._cached.items())

    def _forget(self, page: int) -> None:
        del self._page_of[self._digest_of.pop(page)]
