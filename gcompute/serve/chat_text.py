"""Text that knows which of its characters a chat template wrote and which came from a message.

Every operation of a template that keeps characters keeps their origin too. One that does not (a `%` with widths, a
filter that rebuilds its input) gives plain `str`, whose characters count as a message's: such text can lose a special
token, and never gain one.
"""

import re
from collections.abc import Callable, Iterable, Iterator
from typing import Any, SupportsIndex, cast

PERCENT = re.compile("%[s%]")
FIELD = re.compile(r"\{\{|\}\}|\{([A-Za-z0-9]*)\}")


class Text(str):
    """A string; `_own` has one byte per character, 1 where the template wrote it."""

    __slots__ = ("_own",)
    _own: bytes

    def __new__(cls, value: Any = "", own: bytes | None = None) -> "Text":
        text = super().__new__(cls, value)
        text._own = origin(value) if own is None else own
        return text

    def __str__(self) -> "Text":
        return self

    def __add__(self, other: str) -> "Text":
        if hasattr(other, "__html__"):
            # What a template called safe escapes whatever is put beside it.
            return NotImplemented
        return Text(str.__add__(self, other), self._own + origin(other))

    def __radd__(self, other: str) -> "Text":
        return Text(str.__add__(other, self), origin(other) + self._own)

    def __mul__(self, times: SupportsIndex) -> "Text":
        return Text(str.__mul__(self, times), self._own * times)

    def __rmul__(self, times: SupportsIndex) -> "Text":
        return self * times

    def __getitem__(self, at: Any) -> "Text":
        own = self._own[at]
        return Text(str.__getitem__(self, at), bytes((own,)) if isinstance(own, int) else own)

    def __iter__(self) -> Iterator["Text"]:
        return (self[at] for at in range(len(self)))

    def __mod__(self, values: Any) -> str:
        whole = str.__mod__(self, values)
        given = list(values) if isinstance(values, tuple) else [values]
        pieces = _filled(self, PERCENT, lambda found: "%" if found[0] == "%%" else given.pop(0))
        # Another conversion than %s: what it made is not known piece by piece.
        return pieces if pieces == whole else whole

    def join(self, parts: Iterable[str]) -> "Text":
        parts = list(parts)
        return Text(str.join(self, parts), self._own.join(map(origin, parts)))

    def strip(self, chars: str | None = None) -> "Text":
        return self.lstrip(chars).rstrip(chars)

    def lstrip(self, chars: str | None = None) -> "Text":
        return self[len(self) - len(str.lstrip(self, chars)) :]

    def rstrip(self, chars: str | None = None) -> "Text":
        return self[: len(str.rstrip(self, chars))]

    def removeprefix(self, prefix: str) -> "Text":
        return self[len(self) - len(str.removeprefix(self, prefix)) :]

    def removesuffix(self, suffix: str) -> "Text":
        return self[: len(str.removesuffix(self, suffix))]

    def split(self, sep: str | None = None, maxsplit: SupportsIndex = -1) -> list[Any]:
        return self._found(str.split(self, sep, maxsplit), sep)

    def rsplit(self, sep: str | None = None, maxsplit: SupportsIndex = -1) -> list[Any]:
        return self._found(str.rsplit(self, sep, maxsplit), sep)

    def splitlines(self, keepends: bool = False) -> list[Any]:
        whole = self._found(str.splitlines(self, True), "")
        return whole if keepends else [line[: len(str.splitlines(line)[0])] for line in whole]

    def partition(self, sep: str) -> tuple["Text", "Text", "Text"]:
        before, middle, _ = str.partition(self, sep)
        return self._cut(len(before), len(middle))

    def rpartition(self, sep: str) -> tuple["Text", "Text", "Text"]:
        before, middle, _ = str.rpartition(self, sep)
        return self._cut(len(before), len(middle))

    def replace(self, old: str, new: str, count: SupportsIndex = -1) -> str:  # pyright: ignore[reportIncompatibleMethodOverride]
        if not old:
            return str.replace(self, old, new, count)
        return Text(new).join(self.split(old, count))

    def lower(self) -> "Text":
        return self._mapped(str.lower)

    def upper(self) -> "Text":
        return self._mapped(str.upper)

    def casefold(self) -> "Text":
        return self._mapped(str.casefold)

    def swapcase(self) -> "Text":
        return self._mapped(str.swapcase)

    def capitalize(self) -> "Text":
        return self._mapped(str.capitalize)

    def title(self) -> "Text":
        return self._mapped(str.title)

    def _cut(self, before: int, middle: int) -> tuple["Text", "Text", "Text"]:
        return self[:before], self[before : before + middle], self[before + middle :]

    def _found(self, parts: list[str], between: str | None) -> list["Text"]:
        """Parts of this text, in order; `between` lies between two of them, and None is any white space."""
        found, at = [], 0
        for part in parts:
            at = str.index(self, part, at) if between is None else at
            found.append(self[at : at + len(part)])
            at += len(part) + len(between or "")
        return found

    def _mapped(self, change: Callable[[str], str]) -> "Text":
        whole = change(self)
        if len(whole) == len(self):
            return Text(whole, self._own)
        # A few characters become two or three.
        own = b"".join(mark * len(change(char)) for char, mark in zip(str(self), _bytes(self._own), strict=True))
        return Text(whole, own if len(own) == len(whole) else bytes(len(whole)))


def _bytes(own: bytes) -> Iterator[bytes]:
    return (own[at : at + 1] for at in range(len(own)))


def origin(value: Any) -> bytes:
    """One byte per character of a string: all 0 where it is not known that a template wrote it."""
    return value._own if isinstance(value, Text) else bytes(len(value))


def written(value: str) -> Text:
    """A string that is the template's own."""
    return Text(str.__str__(value), b"\1" * len(value))


def received(value: Any) -> Any:
    """A JSON value with all its strings as a message's."""
    if isinstance(value, str):
        return Text(value)
    if isinstance(value, dict):
        return {name: received(one) for name, one in value.items()}
    return [received(one) for one in value] if isinstance(value, list) else value


def joined(parts: Iterable[Any]) -> Text:
    """What jinja's `~` and its output make of the parts."""
    return Text().join(map(str, parts))


def formatted(text: Text, usual: Callable[..., str], *args: Any, **named: Any) -> str:
    """`text.format(...)`, piece by piece where its fields are plain; `usual` is the sandbox's own."""
    whole = usual(*args, **named)
    numbered = iter(args)

    def value(found: re.Match[str]) -> Any:
        if found[0] in ("{{", "}}"):
            return found[0][0]
        name = found[1]
        return next(numbered) if not name else args[int(name)] if name.isdigit() else named[name]

    try:
        pieces = _filled(text, FIELD, value)
    except (LookupError, StopIteration):
        return whole
    return pieces if pieces == whole else whole


def _filled(text: Text, pattern: re.Pattern[str], value: Callable[[re.Match[str]], Any]) -> Text:
    parts: list[Any] = []
    at = 0
    for found in pattern.finditer(text):
        try:
            parts += [text[at : found.start()], value(found)]
        except IndexError:
            break
        at = found.end()
    return joined([*parts, text[at:]])


def spans(text: str) -> list[tuple[int, int]]:
    """Where the template's own characters lie: (start, end) pairs, in order."""
    return [found.span() for found in re.finditer(b"\1+", cast(bytes, origin(text)))]
