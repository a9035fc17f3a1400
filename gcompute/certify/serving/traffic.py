"""Random requests and when they arrive, by a seed: prompts that share beginnings, every sampling setting mixed, bursts
and trickles, duplicates under several seeds, requests that are called off, and answers taken as they come or whole.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from gcompute.serve.request import Request, Sampling

MOST_TOKENS = 32
SHARING = 0.6
WHOLE = 0.15
DUPLICATED = 0.08
CANCELLED = 0.08


@dataclass(frozen=True, slots=True, kw_only=True)
class Arrival:
    """One request. streamed: its events are taken as they come. cancel_after: called off after so many tokens."""

    request: Request
    streamed: bool
    cancel_after: int | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Wave:
    """Requests that arrive together, after `pause` events of those before were heard."""

    arrivals: tuple[Arrival, ...]
    pause: int


def random_traffic(num: int, *, vocab: int, max_context: int, end: int | None, seed: int) -> tuple[Wave, ...]:
    """`num` requests in waves; `end`: the end-of-text token, if there is one."""
    rng = np.random.default_rng(seed)
    arrivals: list[Arrival] = []
    prompts: list[tuple[int, ...]] = []
    while len(arrivals) < num:
        prompt = _prompt(rng, prompts, vocab, max_context - 1)
        prompts.append(prompt)
        room = min(max_context - len(prompt), MOST_TOKENS)
        sampling = _sampling(rng, room, vocab, end)
        copies = int(rng.integers(2, 5)) if rng.random() < DUPLICATED else 1
        for copy in range(min(copies, num - len(arrivals))):
            # As n completions of one prompt do it.
            own = replace(sampling, seed=(sampling.seed or 0) % 2**63 + copy) if copy else sampling
            cancel = int(rng.integers(0, own.max_tokens)) if rng.random() < CANCELLED else None
            request = Request(prompt=prompt, sampling=own)
            arrivals.append(Arrival(request=request, streamed=bool(rng.random() < 0.5), cancel_after=cancel))
    return in_waves(arrivals, rng)


def in_waves(arrivals: Sequence[Arrival], rng: np.random.Generator) -> tuple[Wave, ...]:
    """The same arrivals, in order, in bursts and trickles."""
    waves, start = [], 0
    while start < len(arrivals):
        size = int(rng.integers(4, 25)) if rng.random() < 0.4 else int(rng.integers(1, 3))
        waves.append(Wave(arrivals=tuple(arrivals[start : start + size]), pause=int(rng.integers(0, 7))))
        start += size
    return tuple(waves)


def _prompt(rng: np.random.Generator, before: list[tuple[int, ...]], vocab: int, longest: int) -> tuple[int, ...]:
    shared: tuple[int, ...] = ()
    if before and rng.random() < SHARING:
        base = before[int(rng.integers(len(before)))]
        if rng.random() < WHOLE:
            return base
        shared = base[: int(rng.integers(0, len(base) + 1))]
    least = 0 if shared else 1
    own = int(rng.integers(least, longest - len(shared) + 1))
    return shared + tuple(rng.integers(0, vocab, own).tolist())


def _sampling(rng: np.random.Generator, room: int, vocab: int, end: int | None) -> Sampling:
    def maybe(chance: float, value: Any, otherwise: Any) -> Any:
        return value() if rng.random() < chance else otherwise

    def ids(num: int) -> list[int]:
        return rng.choice(vocab, size=num, replace=False).tolist()

    max_tokens = int(rng.integers(1, room + 1))
    temperature = maybe(0.7, lambda: float(rng.choice([0.01, 0.3, 0.7, 1.0, 1.0, 1.3, 5.0])), 0.0)
    stops = maybe(0.3, lambda: ids(int(rng.integers(1, 5))), [])
    bias = {token: float(rng.uniform(-8, 8)) for token in maybe(0.2, lambda: ids(int(rng.integers(1, 9))), [])}
    # Ends that come up, now and then in the first tokens.
    if rng.random() < 0.3:
        bias |= {token: float(rng.uniform(1, 5)) for token in [*stops, *([] if end is None else [end])]}
    if rng.random() < 0.03:
        bias |= dict.fromkeys(ids(1), 100.0)
    return Sampling(
        max_tokens=max_tokens,
        temperature=temperature,
        top_k=maybe(0.3, lambda: int(rng.integers(1, vocab + 5)), 0)
        if rng.random() < 0.5
        else maybe(0.3, lambda: 5, 0),
        top_p=maybe(0.35, lambda: float(rng.choice([0.1, 0.5, 0.9, 0.95, 0.99])), 1.0),
        min_p=maybe(0.25, lambda: float(rng.choice([0.001, 0.05, 0.3])), 0.0),
        seed=int(rng.integers(-(2**63), 2**63)) if temperature > 0 or rng.random() < 0.5 else None,
        stop_token_ids=tuple(stops),
        ignore_eos=bool(rng.random() < 0.5),
        min_tokens=maybe(0.25, lambda: int(rng.integers(0, max_tokens + 1)), 0),
        presence_penalty=maybe(0.25, lambda: float(rng.uniform(-2, 2)), 0.0),
        frequency_penalty=maybe(0.25, lambda: float(rng.uniform(-2, 2)), 0.0),
        repetition_penalty=maybe(0.25, lambda: float(rng.uniform(0.7, 1.8)), 1.0),
        logit_bias=tuple(bias.items()),
        logprobs=maybe(0.4, lambda: int(rng.integers(0, min(vocab, 20) + 1)), None),
    )
