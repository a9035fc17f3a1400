"""A rendered chat to token ids, as its tokenizer encodes the whole text, but for whom its characters are from."""

import json
import re
import secrets
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from typing import Any

import tokenizers
from tokenizers import AddedToken

from gcompute.model.tokenizer import Tokenizer, panics_as_errors

FLAGS = ("single_word", "lstrip", "rstrip", "normalized")
# Of each end of a stand-in: no text that a person types.
EDGE = "\uf8ff"
MAX_TRIED_CHARS = 1 << 24


class PromptEncoder:
    """Encodes text in which only the template's own characters may spell control tokens.

    Each control token that the template wrote has a stand-in, an added token with the same flags and a name that
    nobody can guess, and the text is encoded once, as a whole: prefix spaces, stripping and merges are those that
    Hugging Face's tokenizers give. A control token spelled by a message stays the ordinary text that it is.

    control: control tokens beside the special ones. flags: those of added tokens that differ from tokenizer.json's.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        control: Collection[str] = (),
        flags: Mapping[str, Mapping[str, bool]] | None = None,
    ):
        self._tokenizer = tokenizer
        known = {name: tokenizer.id_of(name) for name in (*tokenizer.special_tokens, *control) if name}
        self.control = {name: token_id for name, token_id in known.items() if token_id is not None}
        self._number = {name: at for at, name in enumerate(self.control)}
        self._edge = EDGE + secrets.token_hex(16)
        description = tokenizer.description()
        added = _with_flags(description["added_tokens"], self.control, flags or {})
        self._single = {one["content"] for one in added if one["single_word"]}
        # A longer added token wins where both begin, control or not.
        contents = sorted((one["content"] for one in added), key=len, reverse=True)
        self._pattern = re.compile("|".join(map(re.escape, contents)) or "(?!)")
        with panics_as_errors("the tokenizer does not take its control tokens"):
            backend = tokenizers.Tokenizer.from_str(json.dumps({**description, "added_tokens": added}))
            of_name = {one["content"]: {flag: one[flag] for flag in FLAGS} for one in added}
            backend.add_tokens(
                [AddedToken(self._alias(at), special=False, **of_name[name]) for name, at in self._number.items()]
            )
        backend.encode_special_tokens = True
        self._encode_texts = tokenizer.encoding(backend)
        aliases = {backend.token_to_id(self._alias(at)): self.control[name] for name, at in self._number.items()}
        self._ids = {alias: token_id for alias, token_id in aliases.items() if alias is not None}

    def encode(self, text: str, spans: Iterable[tuple[int, int]]) -> list[int]:
        """The ids of `text`, of which the characters in `spans`, (start, end) pairs, are the template's.

        Raises:
          ValueError: the tokenizer cannot encode it.
        """
        if self._edge in text:
            raise ValueError("the text has a name in it that stands for a control token.")
        self._tokenizer.check(text)
        found = self._found(text, spans)
        ids = self._with_aliases(text, found)
        if self._num_aliases(ids) != len(found):
            # Some are looked for in normalized text alone, and not all are found there: those are text.
            found = self._matched(text, found)
            ids = self._with_aliases(text, found)
            if self._num_aliases(ids) != len(found):
                ids = self._with_aliases(text, [])
        return [self._ids.get(one, one) for one in ids]

    def _with_aliases(self, text: str, found: Sequence[tuple[int, str]]) -> list[int]:
        return self._encode_texts([self._aliased(text, found)])[0]

    def _aliased(self, text: str, found: Sequence[tuple[int, str]]) -> str:
        parts, at = [], 0
        for start, name in found:
            parts += [text[at:start], self._alias(self._number[name])]
            at = start + len(name)
        return "".join([*parts, text[at:]])

    def _num_aliases(self, ids: Iterable[int]) -> int:
        return sum(one in self._ids for one in ids)

    def _matched(self, text: str, found: Sequence[tuple[int, str]]) -> list[tuple[int, str]]:
        """Those that the tokenizer finds, each tried alone; none where that takes too long."""
        if len(text) * len(found) > MAX_TRIED_CHARS:
            return []
        tried = self._encode_texts([self._aliased(text, [one]) for one in found])
        return [one for one, ids in zip(found, tried, strict=True) if self._num_aliases(ids)]

    def written(self, text: str, spans: Iterable[tuple[int, int]]) -> set[str]:
        """The added tokens, control or not, that the characters in `spans` spell."""
        return {name for _, name in self._spelled(text, spans)}

    def _spelled(self, text: str, spans: Iterable[tuple[int, int]]) -> Iterator[tuple[int, str]]:
        """Where the template's own characters spell added tokens, and which; a message's are not looked at."""
        for start, end in spans:
            for found in self._pattern.finditer(text[start:end]):
                yield start + found.start(), found[0]

    def _found(self, text: str, spans: Iterable[tuple[int, int]]) -> list[tuple[int, str]]:
        return [
            (at, name)
            for at, name in self._spelled(text, spans)
            if name in self.control and (name not in self._single or _alone(text, at, at + len(name)))
        ]

    def _alias(self, index: int) -> str:
        return f"{self._edge}{index}{EDGE}"


def _alone(text: str, start: int, end: int) -> bool:
    """Whether no letter, digit or underscore stands beside it."""
    return not re.search(r"\w", text[max(0, start - 1) : start] + text[end : end + 1])


def _with_flags(
    added: Sequence[dict[str, Any]], control: Mapping[str, int], flags: Mapping[str, Mapping[str, bool]]
) -> list[dict[str, Any]]:
    """The added tokens of a tokenizer.json, with control tokens special and with the flags given."""
    plain = dict.fromkeys(FLAGS, False)
    described = {one["content"]: {**plain, "special": False, **one} for one in added}
    for name, token_id in control.items():
        described.setdefault(name, {"id": token_id, "content": name, **plain})["special"] = True
    for name, one in described.items():
        one |= {flag: value for flag, value in flags.get(name, {}).items() if flag in FLAGS}
    return sorted(described.values(), key=lambda one: one["id"])
