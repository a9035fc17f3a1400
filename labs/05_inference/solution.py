"""The solution of exercise.py: what the weights leave, in whole requests."""

import sys

from check import check

from gcompute.config.model import ModelConfig


def requests_that_fit(
    config: ModelConfig, *, num_params: int, memory_bytes: int, context: int, weight_bytes: int, cache_bytes: int
) -> int:
    """floor((memory - weights) / (2 L K H context bytes)): a key and a value for each layer, head and token."""
    left_bytes = memory_bytes - num_params * weight_bytes
    request_bytes = 2 * config.layers * config.num_kv_heads * config.head_size * context * cache_bytes
    return max(0, left_bytes // request_bytes)


if __name__ == "__main__":
    hint = check(requests_that_fit)
    print(hint or "Right: the memory beside the weights, divided by the cache of one request.")
    sys.exit(1 if hint else 0)
