"""The check of exercise 05, on models whose sizes all differ, so that no two formulas give the same number."""

from collections.abc import Callable
from dataclasses import dataclass

from gcompute.config.model import ModelConfig
from gcompute.config.presets import PRESETS
from gcompute.plan.params import count_params

UNSOLVED = "Not solved yet, and meant to fail until it is: write requests_that_fit() in exercise.py, then run it again."
GIB = 2**30


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """One model on one chip, and how many requests fit, counted by adding one after another."""

    name: str
    config: ModelConfig
    memory_bytes: int
    context: int
    weight_bytes: int
    cache_bytes: int

    @property
    def num_params(self) -> int:
        return count_params(self.config).total

    @property
    def token_values(self) -> int:
        """Values cached for one token: the keys and the values of every layer."""
        return sum(self.config.num_kv_heads * self.config.head_size for _ in range(self.config.layers) for _ in "kv")

    @property
    def expected(self) -> int:
        used, count = self.num_params * self.weight_bytes, 0
        while (used := used + self.token_values * self.context * self.cache_bytes) <= self.memory_bytes:
            count += 1
        return count

    def mistakes(self) -> dict[str, float]:
        """What common wrong formulas give, by their hint."""
        config = self.config
        left = self.memory_bytes - self.num_params * self.weight_bytes
        one = self.token_values * self.context * self.cache_bytes
        return {
            "Half of the cache is missing: a token has a key and a value.": 2 * left // one,
            "Every layer has a cache of its own: multiply by config.layers.": config.layers * left // one,
            "Query heads share keys and values: count config.num_kv_heads, not config.heads.": left
            * config.num_kv_heads
            // (one * config.heads),
            "A key has num_kv_heads x head_size values, not dim.": left
            * config.num_kv_heads
            * config.head_size
            // (one * config.dim),
            "The weights take their share first: subtract them.": self.memory_bytes // one,
            "The cache keeps all tokens of a request: multiply by context.": left * self.context // one,
            "A parameter may take other bytes than a cached value: use both sizes.": (
                self.memory_bytes - self.num_params * self.cache_bytes
            )
            // one,
            "Only whole requests fit: round down.": left // one + 1,
        }


CASES = (
    Case(
        name="a small model with all sizes unlike",
        config=ModelConfig(vocab=1000, layers=5, dim=288, heads=12, kv_heads=3, head_dim=40, ffn=700, context=700),
        memory_bytes=97_000_001,
        context=577,
        weight_bytes=4,
        cache_bytes=2,
    ),
    Case(
        name="llama3-8b, 8-bit weights, on a chip of 16 GiB",
        config=PRESETS["llama3-8b"],
        memory_bytes=16 * GIB,
        context=3000,
        weight_bytes=1,
        cache_bytes=2,
    ),
    Case(
        name="llama3-8b, bfloat16 weights, on a chip of 12 GiB, where the weights alone do not fit",
        config=PRESETS["llama3-8b"],
        memory_bytes=12 * GIB,
        context=3000,
        weight_bytes=2,
        cache_bytes=2,
    ),
)


def check(requests_that_fit: Callable[..., object]) -> str | None:
    """None if `requests_that_fit` is right, else a hint at what is wrong with it."""
    for case in CASES:
        try:
            answer = requests_that_fit(
                case.config,
                num_params=case.num_params,
                memory_bytes=case.memory_bytes,
                context=case.context,
                weight_bytes=case.weight_bytes,
                cache_bytes=case.cache_bytes,
            )
        except NotImplementedError:
            return UNSOLVED
        except Exception as error:
            return f"requests_that_fit() stopped with {type(error).__name__}: {error} ({case.name})."
        if isinstance(answer, bool) or not isinstance(answer, (int, float)):
            return f"The answer must be one whole number, and is of type {type(answer).__name__} ({case.name})."
        if answer == case.expected:
            if isinstance(answer, float):
                return f"{answer} is right but for its type: return a whole number, as // gives it."
            continue
        if answer < 0:
            return f"{answer} requests cannot be: where the weights alone do not fit, none does ({case.name})."
        if int(answer) == case.expected:
            return f"Only whole requests fit: round {answer:.2f} down ({case.name})."
        for hint, wrong in case.mistakes().items():
            if wrong != case.expected and abs(answer - wrong) < 1:
                return f"{hint} ({case.name}: you {answer:g}, right {case.expected})"
        return f"{case.name}: you {answer:g}, right {case.expected}."
    return None
