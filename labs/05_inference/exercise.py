"""Exercise of lab 05: how many requests does a chip hold?

It is meant to fail until you solve it. Edit `requests_that_fit`, then run: python labs/05_inference/exercise.py
"""

import sys

from check import check

from gcompute.config.model import ModelConfig


def requests_that_fit(
    config: ModelConfig, *, num_params: int, memory_bytes: int, context: int, weight_bytes: int, cache_bytes: int
) -> int:
    """How many requests of `context` tokens fit in `memory_bytes`, beside the weights.

    weight_bytes: of one parameter; cache_bytes: of one value in the key/value cache. Useful: config.layers,
    config.heads, config.num_kv_heads, config.head_size.
    """
    raise NotImplementedError


if __name__ == "__main__":
    hint = check(requests_that_fit)
    print(hint or "Right: the memory beside the weights, divided by the cache of one request.")
    sys.exit(1 if hint else 0)
