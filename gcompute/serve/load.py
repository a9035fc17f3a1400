"""The load that a benchmark puts on a server: when requests are sent, and what is in them. No JAX, no network.

Everything follows from a seed, so that two servers can be given the same requests at the same moments.
"""

import itertools
import json
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

# Common short words: a tokenizer of any model has most of them as one token each.
WORDS = (
    *("time", "year", "people", "way", "day", "man", "thing", "woman", "life", "child", "world", "school", "state"),
    *("family", "student", "group", "country", "problem", "hand", "part", "place", "case", "week", "company", "system"),
    *("program", "question", "work", "night", "point", "home", "water", "room", "mother", "area", "money", "story"),
    *("fact", "month", "lot", "right", "study", "book", "eye", "job", "word", "business", "issue", "side", "kind"),
)
# Streams of random numbers that must not depend on each other.
ARRIVALS, LENGTHS, TEXT, PREFIX = range(4)

Prompt = str | list[int]


@dataclass(frozen=True, slots=True, kw_only=True)
class Arrivals:
    """When requests are sent: open-loop at `rate` a second whatever the server does, closed-loop where it is None.

    burstiness: shape of the gamma distribution of the gaps, whose mean is 1 / rate: 1 is a Poisson process, less comes
    in bursts, more is steadier. An infinite rate sends all at once. concurrency: requests under way at most; a closed
    loop keeps as many.

    Raises:
      ValueError: a figure is not above 0, or neither rate nor concurrency is given.
    """

    rate: float | None = None
    burstiness: float = 1.0
    concurrency: int | None = None

    def __post_init__(self) -> None:
        if self.rate is None and self.concurrency is None:
            raise ValueError("a load needs a rate or a concurrency: give --rate or --concurrency.")
        if self.rate is not None and not self.rate > 0:
            raise ValueError(f"--rate {self.rate:g} must be above 0 requests a second; inf sends all at once.")
        if not (self.burstiness > 0 and math.isfinite(self.burstiness)):
            raise ValueError(f"--burstiness {self.burstiness:g} must be a number above 0; 1 is Poisson.")
        if self.concurrency is not None and self.concurrency < 1:
            raise ValueError(f"--concurrency {self.concurrency} must be at least 1.")

    @property
    def all_at_once(self) -> bool:
        return self.rate is not None and math.isinf(self.rate)

    def offsets_s(self, seed: int) -> Iterator[float]:
        """Seconds from the start at which request 0, 1, 2 ... is due; all 0 in a closed loop, where none is."""
        if self.rate is None or self.all_at_once:
            yield from itertools.repeat(0.0)
            return
        random = np.random.default_rng((seed, ARRIVALS))
        at_s = 0.0
        while True:
            for gap_s in random.gamma(self.burstiness, 1 / (self.rate * self.burstiness), size=256).tolist():
                yield at_s
                at_s += gap_s

    def __str__(self) -> str:
        if self.rate is None:
            return f"{self.concurrency} at a time"
        kind = "" if self.burstiness == 1 else f", burstiness {self.burstiness:g}"
        rate = "all at once" if self.all_at_once else f"{self.rate:g} requests/s{kind}"
        return rate if self.concurrency is None else f"{rate}, at most {self.concurrency} at a time"


@dataclass(frozen=True, slots=True, kw_only=True)
class Ask:
    """One request: its prompt, how many tokens that is if known, and how many it asks for."""

    prompt: Prompt
    prompt_tokens: int | None
    output: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Lengths:
    """Tokens of prompts and outputs: uniform within `spread` of these, as a share of them.

    Raises:
      ValueError: a length is below 1, or the spread is not from 0 to below 1.
    """

    prompt: int
    output: int
    spread: float = 0.0

    def __post_init__(self) -> None:
        for flag, value in (("--prompt", self.prompt), ("--output", self.output)):
            if value < 1:
                raise ValueError(f"{flag} {value} must be at least 1 token.")
        if not 0 <= self.spread < 1:
            raise ValueError(f"--spread {self.spread:g} must be from 0 to below 1: a share of the lengths.")

    @property
    def most(self) -> int:
        """Tokens that the longest request can come to."""
        return self._range(self.prompt)[1] + self._range(self.output)[1]

    @property
    def least_prompt(self) -> int:
        return self._range(self.prompt)[0]

    def draw(self, random: np.random.Generator) -> tuple[int, int]:
        """Tokens of one prompt and of its output."""
        prompt, output = (
            int(random.integers(*self._range(mean), endpoint=True)) for mean in (self.prompt, self.output)
        )
        return prompt, output

    def _range(self, mean: int) -> tuple[int, int]:
        return max(1, math.ceil(mean * (1 - self.spread))), math.floor(mean * (1 + self.spread))


@dataclass(frozen=True, slots=True, kw_only=True)
class RandomPrompts:
    """Prompts of random token ids below `vocab`, or of random words where that is None.

    words_per_token, words_more: a prompt of n tokens is made of words_per_token n + words_more words. prefix: tokens
    with which the prompts of each of `num_prefixes` groups begin; request i is of group i modulo their number.

    Raises:
      ValueError: a prefix is not shorter than every prompt, or there is no token to choose from.
    """

    lengths: Lengths
    seed: int = 0
    vocab: int | None = None
    words_per_token: float = 1.0
    words_more: float = 0.0
    prefix: int = 0
    num_prefixes: int = 1

    def __post_init__(self) -> None:
        if not 0 <= self.prefix < self.lengths.least_prompt:
            raise ValueError(
                f"--shared-prefix {self.prefix} must be below the shortest prompt, {self.lengths.least_prompt} tokens."
            )
        if self.num_prefixes < 1:
            raise ValueError(f"--prefixes {self.num_prefixes} must be at least 1.")
        if self.vocab is not None and self.vocab < 1:
            raise ValueError(f"--vocab {self.vocab} must be at least 1.")

    def ask(self, index: int) -> Ask:
        """Request `index`: the same whenever it is asked for."""
        prompt, output = self.lengths.draw(np.random.default_rng((self.seed, LENGTHS, index)))
        own = self._draw((self.seed, TEXT, index), prompt - self.prefix, whole=not self.prefix)
        if self.prefix:
            own = self._draw((self.seed, PREFIX, index % self.num_prefixes), self.prefix, whole=True) + own
        if self.vocab is None:
            return Ask(prompt=" ".join(WORDS[one] for one in own), prompt_tokens=None, output=output)
        return Ask(prompt=own, prompt_tokens=prompt, output=output)

    def _draw(self, seed: tuple[int, ...], tokens: int, *, whole: bool) -> list[int]:
        size = tokens
        if self.vocab is None:
            # What a prompt has beside its words, it has once.
            size = max(1, round(self.words_per_token * tokens + (self.words_more if whole else 0)))
        return np.random.default_rng(seed).integers(self.vocab or len(WORDS), size=size).tolist()


@dataclass(frozen=True, slots=True, kw_only=True)
class GivenPrompts:
    """Prompts from a file, in order and then again from the first; those without a length of output get `output`."""

    prompts: tuple[Prompt, ...]
    outputs: tuple[int | None, ...]
    output: int

    def ask(self, index: int) -> Ask:
        at = index % len(self.prompts)
        prompt = self.prompts[at]
        tokens = len(prompt) if isinstance(prompt, list) else None
        return Ask(prompt=prompt, prompt_tokens=tokens, output=self.outputs[at] or self.output)


Prompts = RandomPrompts | GivenPrompts


def read_prompts(path: Path, *, output: int) -> GivenPrompts:
    """Prompts of a file: one a line, or JSONL whose objects have "prompt" (text or token ids) and maybe "max_tokens".

    Raises:
      ValueError: the file cannot be read, has no prompt, or a line is not as said.
    """
    try:
        lines = path.read_text(encoding="utf-8-sig").splitlines()
    except OSError as error:
        raise ValueError(f"--prompts {path} cannot be read: {error.strerror}.") from None
    except UnicodeDecodeError:
        raise ValueError(f"--prompts {path} is not UTF-8 text.") from None
    numbered = [(number, line) for number, line in enumerate(lines, 1) if line.strip()]
    if not numbered:
        raise ValueError(f"--prompts {path} holds no prompt: give one a line.")
    if path.suffix != ".jsonl" and not numbered[0][1].lstrip().startswith("{"):
        return GivenPrompts(prompts=tuple(line for _, line in numbered), outputs=(None,) * len(numbered), output=output)
    read = [_read_object(line, f"--prompts {path}, line {number}") for number, line in numbered]
    return GivenPrompts(prompts=tuple(one for one, _ in read), outputs=tuple(own for _, own in read), output=output)


def _read_object(line: str, where: str) -> tuple[Prompt, int | None]:
    try:
        fields = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{where} is not JSON: {error}.") from None
    prompt = fields.get("prompt") if isinstance(fields, dict) else None
    is_ids = isinstance(prompt, list) and all(type(one) is int and one >= 0 for one in prompt)
    if not prompt or not (isinstance(prompt, str) or is_ids):
        raise ValueError(f'{where} has no "prompt" that is text or token ids, and not empty.')
    output = fields.get("max_tokens")
    if output is not None and (type(output) is not int or output < 1):
        raise ValueError(f'{where}: "max_tokens" must be a whole number of at least 1, got {str(output)[:40]}.')
    return prompt, output


def fit_words(samples: Sequence[tuple[int, int]]) -> tuple[float, float]:
    """(words_per_token, words_more) from two prompts of so many (words, tokens).

    >>> fit_words([(10, 25), (20, 45)])
    (0.5, -2.5)

    Raises:
      ValueError: more words made no more tokens.
    """
    (words_a, tokens_a), (words_b, tokens_b) = samples
    if (tokens_b - tokens_a) * (words_b - words_a) <= 0:
        raise ValueError(
            f"the server counts {tokens_a} tokens for {words_a} words and {tokens_b} for {words_b}: the length of"
            " prompts cannot be set. Give --vocab, or --prompts FILE."
        )
    slope = (words_b - words_a) / (tokens_b - tokens_a)
    return slope, words_a - slope * tokens_a
