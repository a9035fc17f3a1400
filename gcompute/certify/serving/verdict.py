"""Hold every token of the engine's answers against the reference's choice, and say what differs and by how much."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, fields, replace
from typing import Any

import numpy as np
from jaxtyping import Float

from gcompute.certify.serving.choice import Draw, adjusted
from gcompute.certify.serving.reference import Reference, noise
from gcompute.certify.serving.rounding import LOCAL_ORDERS, Rounding, measure_moves
from gcompute.certify.serving.traffic import Arrival
from gcompute.serve.request import Sampling
from gcompute.serve.stream import Completion, Reason, TokenLogprobs


@dataclass(frozen=True, slots=True, kw_only=True)
class Difference:
    """A token that is not the reference's choice. position: in the output. An end that is not shown is token None.

    unstable: the reference's own logits move there by more than anywhere, and the bound is made of that.
    """

    request: int
    position: int
    token: int | None
    expected: int
    gap: float
    bound: float
    unstable: bool = False

    @property
    def within(self) -> bool:
        # Written so that NaN is a violation.
        return self.gap <= self.bound

    def __str__(self) -> str:
        chosen = "an end" if self.token is None else f"token {self.token}"
        word = "within" if self.within else "BEYOND"
        return (
            f"request {self.request}, output {self.position}: {chosen} where the reference has {self.expected};"
            f" gap {self.gap:.2e}, {word} the bound {self.bound:.2e}"
            + (" of a place where reordering moves the reference itself" if self.unstable else "")
        )

    def to_dict(self) -> dict[str, Any]:
        names = ("request", "position", "token", "expected", "unstable")
        # JSON has no infinity.
        gap = self.gap if np.isfinite(self.gap) else str(self.gap)
        return {**{name: getattr(self, name) for name in names}, "gap": gap, "bound": self.bound, "within": self.within}


@dataclass(slots=True, kw_only=True)
class Findings:
    """What the comparison of some answers found. faults: what is wrong besides tokens, as sentences.

    logprob_ratios: of each log-probability that was reported, its distance from the reference's over the bound;
    beyond_logprobs says which are above 1.
    """

    num_requests: int = 0
    num_cancelled: int = 0
    num_tokens: int = 0
    num_sampled: int = 0
    differences: list[Difference] = field(default_factory=list)
    faults: list[str] = field(default_factory=list)
    beyond_logprobs: list[str] = field(default_factory=list)
    logprob_ratios: list[float] = field(default_factory=list)

    @property
    def beyond(self) -> list[str]:
        """What rounding does not explain."""
        return [*(str(one) for one in self.differences if not one.within), *self.beyond_logprobs]

    @property
    def violations(self) -> list[str]:
        return [*self.beyond, *self.faults]

    def to_dict(self) -> dict[str, Any]:
        within = sum(one.within for one in self.differences)
        ratios = np.array(self.logprob_ratios or [0.0])
        return {
            "requests": self.num_requests,
            "cancelled": self.num_cancelled,
            "tokens": self.num_tokens,
            "sampled": self.num_sampled,
            "equal": self.num_tokens - len(self.differences),
            "within_bound": within,
            "unstable": sum(one.within and one.unstable for one in self.differences),
            "violations": len(self.violations),
            "logprobs": len(self.logprob_ratios),
            "logprob_error_over_bound": {
                name: float(np.quantile(ratios, share))
                for name, share in {"median": 0.5, "p99": 0.99, "largest": 1.0}.items()
            },
            "differences": [one.to_dict() for one in self.differences],
            "faults": [*self.beyond_logprobs, *self.faults],
        }


def check_answers(
    arrivals: Sequence[Arrival],
    answers: Sequence[Completion],
    *,
    reference: Reference,
    rounding: Rounding,
    end: int | None,
) -> Findings:
    """Every token of every answer; `end` is the end-of-text token, if there is one.

    Where an answer is beyond the bounds, the reference's own moves at its places are measured and may widen them.
    """
    texts = [(*one.request.prompt, *answer.ids) for one, answer in zip(arrivals, answers, strict=True)]
    checked, unexplained = {}, {}
    for index, logits_TV in reference.logits(texts):
        roundings = [rounding] * len(logits_TV)
        checked[index] = _check_answer(index, arrivals[index], answers[index], logits_TV, roundings, end)
        if checked[index].beyond:
            unexplained[index] = logits_TV
    moves = measure_moves(reference, [texts[index] for index in unexplained], LOCAL_ORDERS)
    for (index, logits_TV), moves_T in zip(unexplained.items(), moves, strict=True):
        local = [replace(rounding, local=float(move)) for move in moves_T]
        checked[index] = _check_answer(index, arrivals[index], answers[index], logits_TV, local, end)
    return merged(checked[index] for index in sorted(checked))


def merged(several: Iterable[Findings]) -> Findings:
    """All of them as one."""
    whole = Findings()
    for one in several:
        for item in fields(Findings):
            setattr(whole, item.name, getattr(whole, item.name) + getattr(one, item.name))
    return whole


def _check_answer(
    index: int,
    arrival: Arrival,
    answer: Completion,
    logits_TV: Float[np.ndarray, "t v"],
    roundings: Sequence[Rounding],
    end: int | None,
) -> Findings:
    """One answer; a rounding for each place of its text."""
    sampling, prompt = arrival.request.sampling, arrival.request.prompt
    ends = {*sampling.stop_token_ids, *(() if end is None or sampling.ignore_eos else (end,))}
    # The place before the first token of the output gives that token's logits.
    own_NV, own_N = logits_TV[len(prompt) - 1 :], roundings[len(prompt) - 1 :]
    tokens = [*answer.ids, *([None] if answer.reason is Reason.STOP else [])]
    ratios, beyond = _check_logprobs(answer, own_NV, sampling, own_N)
    return Findings(
        num_requests=1,
        num_cancelled=int(answer.reason is Reason.CANCELLED),
        num_tokens=len(tokens),
        num_sampled=len(tokens) if sampling.temperature > 0 else 0,
        differences=list(_differences(index, tokens, prompt, own_NV, sampling, ends, own_N)),
        faults=[f"request {index} {fault}" for fault in _ending_faults(arrival, answer, ends)],
        beyond_logprobs=[f"request {index} {fault}" for fault in beyond],
        logprob_ratios=ratios,
    )


def _ending_faults(arrival: Arrival, answer: Completion, ends: set[int]) -> Iterable[str]:
    most, num = arrival.request.sampling.max_tokens, len(answer.ids)
    counted = num + (answer.reason is Reason.STOP)
    if answer.usage.completion_tokens != counted or answer.usage.prompt_tokens != len(arrival.request.prompt):
        yield f"counts {answer.usage}, with {len(arrival.request.prompt)} tokens read and {counted} made"
    if ends & set(answer.ids):
        yield f"shows a token that ends it: {sorted(ends & set(answer.ids))}"
    shown = answer.ids if arrival.request.sampling.logprobs is not None else ()
    if tuple(one.token for one in answer.logprobs) != shown:
        yield "reports log-probabilities of other tokens than it shows, or was not asked for them"
    if answer.reason is Reason.ERROR:
        yield f"failed: {answer.error}"
    if answer.reason is Reason.CANCELLED and arrival.cancel_after is None:
        yield "was cancelled, and nobody asked for it"
    if answer.reason is Reason.LENGTH and num != most:
        yield f"ended at {num} tokens as if at max_tokens={most}"
    if num + (answer.reason is Reason.STOP) > most:
        yield f"has more than max_tokens={most} tokens"


def _differences(
    index: int,
    tokens: Sequence[int | None],
    prompt: Sequence[int],
    logits_NV: Float[np.ndarray, "n v"],
    sampling: Sampling,
    ends: set[int],
    roundings: Sequence[Rounding],
) -> Iterable[Difference]:
    vocab = logits_NV.shape[1]
    in_prompt_V, count_V = np.zeros(vocab, bool), np.zeros(vocab, np.int64)
    in_prompt_V[list(prompt)] = True
    noise_NV = np.zeros((len(tokens), 1), np.float32)
    if sampling.temperature > 0 and tokens:
        assert sampling.seed is not None
        noise_NV = noise(sampling.seed, len(prompt), len(tokens), vocab)
    for position, token in enumerate(tokens):
        x_V = adjusted(logits_NV[position], sampling, in_prompt_V=in_prompt_V, count_V=count_V, ends=sorted(ends))
        draw = Draw(x_V=x_V, noise_V=noise_NV[position], sampling=sampling)
        allowed = {token} if token is not None else ends
        if draw.token not in allowed:
            rounding = roundings[position]
            yield Difference(
                request=index,
                position=position,
                token=token,
                expected=draw.token,
                gap=min((draw.gap(one) for one in allowed), default=np.inf),
                bound=rounding.gap_bound(logits_NV[position], x_V, sampling),
                unstable=rounding.unstable,
            )
        if token is not None:
            count_V[token] += 1


def _check_logprobs(
    answer: Completion, logits_NV: Float[np.ndarray, "n v"], sampling: Sampling, roundings: Sequence[Rounding]
) -> tuple[list[float], list[str]]:
    """The model's own log-probabilities, whatever the settings."""
    if sampling.logprobs is None:
        return [], []
    ratios, faults = [], []
    for position, one in enumerate(answer.logprobs[: len(logits_NV)]):
        own_V = logits_NV[position].astype(np.float64)
        logprob_V = own_V - own_V.max()
        logprob_V -= np.log(np.exp(logprob_V).sum())
        errors = _logprob_errors(one, logprob_V, sampling.logprobs)
        bound = roundings[position].logprob_bound(logits_NV[position])
        ratios += [error / bound for error in errors]
        if not all(error <= bound for error in errors):
            faults.append(f"output {position}: a log-probability is off by {max(errors):.2e}, the bound is {bound:.2e}")
    return ratios, faults


def _logprob_errors(one: TokenLogprobs, logprob_V: Float[np.ndarray, "v"], num_top: int) -> list[float]:
    """Distances of the chosen token's, of each likeliest token's, and of the n-th likeliest from the n-th largest."""
    if len(one.top) != num_top or len({token for token, _ in one.top}) != num_top:
        return [float("inf")]
    falling = np.sort(logprob_V)[::-1]
    return [
        abs(one.logprob - float(logprob_V[one.token])),
        *(abs(logprob - float(logprob_V[token])) for token, logprob in one.top),
        *(abs(logprob - float(falling[n])) for n, (_, logprob) in enumerate(one.top)),
    ]
