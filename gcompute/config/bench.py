"""How a server is benchmarked: the load, and what is in the requests."""

import math
from dataclasses import dataclass

from gcompute.config.fields import check_numbers, option

DEFAULT_CONCURRENCY = 4
DEFAULT_PROMPT, DEFAULT_OUTPUT = 128, 64
RATE, CONCURRENCY = "rate", "concurrency"


@dataclass(frozen=True, slots=True, kw_only=True)
class LoadConfig:
    """When requests are sent, and for how long."""

    rate: float | None = option(None, "requests a second, sent whatever the server does; inf: all at once")
    burstiness: float = option(1.0, "shape of the gamma-distributed gaps: 1 is Poisson, less is burstier")
    concurrency: int | None = option(None, "requests under way: a closed loop, or with --rate the most (default: 4)")
    sweep: str | None = option(None, "several loads in turn: 1,2,4,8 (concurrencies) or rate=0.5,1,2")
    requests: int | None = option(None, "requests of a load (default: 100 at a rate; else 8 a sender, at least 20)")
    duration: float | None = option(None, "seconds of sending; what is under way then is waited for")
    warmup: int = option(4, "requests sent before, and not counted")
    timeout: float | None = option(600.0, "longest that a request may take, in seconds")
    seed: int = option(0, "seed of arrivals, lengths and prompts")

    def __post_init__(self) -> None:
        check_numbers(self, positive=("requests", "duration", "timeout"), at_least_zero=("warmup", "seed"))
        if self.sweep is not None and (self.rate is not None or self.concurrency is not None):
            raise ValueError("--sweep names the loads: leave out --rate and --concurrency.")

    def loads(self) -> list[tuple[float | None, int | None]]:
        """(rate, concurrency) of each load in turn.

        Raises:
          ValueError: the sweep is not a list of numbers above 0.
        """
        if self.sweep is None:
            alone = self.rate is None and self.concurrency is None
            return [(self.rate, DEFAULT_CONCURRENCY if alone else self.concurrency)]
        kind, separator, values = self.sweep.partition("=")
        kind, values = (kind.strip(), values) if separator else (CONCURRENCY, self.sweep)
        try:
            if kind not in (RATE, CONCURRENCY):
                raise ValueError
            read = [float(value) for value in values.split(",")]
            whole = kind == RATE or all(math.isfinite(value) and value == int(value) for value in read)
            if not whole or not all(value > 0 for value in read):
                raise ValueError
        except ValueError:
            raise ValueError(
                f"--sweep {self.sweep!r} is not understood. Give concurrencies, as in 1,2,4,8, or rates above 0, as in"
                " rate=0.5,1,2."
            ) from None
        return [(value, None) if kind == RATE else (None, int(value)) for value in read]

    def num_requests(self, rate: float | None, concurrency: int | None) -> int | None:
        """Requests of one load; None where the duration alone ends it."""
        if self.requests is not None or (self.duration is not None and rate != math.inf):
            return self.requests
        return 100 if rate is not None else max(20, 8 * (concurrency or 1))


@dataclass(frozen=True, slots=True, kw_only=True)
class PromptConfig:
    """What is in the requests."""

    prompt: int | None = option(None, "tokens of a prompt (default: 128, or half the context)")
    output: int | None = option(None, "tokens of an answer (default: 64, or a quarter of the context)")
    spread: float = option(0.0, "lengths vary evenly by so much either way, as a share: 0.5 is half to one and a half")
    prompts: str | None = option(
        None, 'file of prompts: one a line, or JSONL with "prompt" and maybe "max_tokens"', path=True
    )
    shared_prefix: int = option(0, "tokens with which all prompts begin alike")
    prefixes: int = option(1, "groups of prompts, each with a shared prefix of its own")
    vocab: int | None = option(None, "send random token ids below this (default: the model's, else random words)")
    chat: bool = option(False, "call /v1/chat/completions; prompts are text then")
    ignore_eos: bool = option(True, "go on past the end of text, so that lengths are as asked")
    temperature: float = option(0.0, "0 takes the likeliest token each time")
    body: str | None = option(None, 'more fields of each call as JSON, as in {"top_p": 0.9}')

    def __post_init__(self) -> None:
        check_numbers(
            self,
            positive=("prompt", "output", "prefixes", "vocab"),
            at_least_zero=("spread", "shared_prefix", "temperature"),
        )
        if self.prompts is not None and (self.prompt is not None or self.shared_prefix or self.vocab is not None):
            raise ValueError("--prompts is the file of prompts: leave out --prompt, --shared-prefix and --vocab.")
        if self.chat and self.vocab is not None:
            raise ValueError("--chat sends text, and --vocab token ids: give one.")


@dataclass(frozen=True, slots=True, kw_only=True)
class PlanConfig:
    """What the measured figures are set beside: limits, a price, the plan's prediction."""

    slo_ttft: float | None = option(None, "most seconds to the first token; goodput counts what keeps all limits")
    slo_tpot: float | None = option(None, "most seconds a token after it")
    slo_e2e: float | None = option(None, "most seconds in all")
    on: str | None = option(None, "what serves: v5e:2x4, h100:8, or this (measured): its price, and the plan's figures")
    model: str | None = option(
        None, "the served model, for the plan: a preset, or a config.json (a checkpoint's own)", path=True
    )
    mesh: str | None = option(None, "the server's mesh, as in tensor=8 (default: the best one found)")
    weights: str | None = option(
        None, "weights in memory; int8: a checkpoint's server keeps them so (default: bfloat16, or its --precision)"
    )
    kv: str | None = option(None, "keys and values in memory, as for --weights (default: the same)")
    usd_per_hour: float | None = option(None, "price of a chip (default: the catalogue's, of --on)")
