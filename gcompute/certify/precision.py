"""Double precision for the length of a block, under the name that this version of JAX has for it."""

from contextlib import AbstractContextManager
from typing import Any

import jax
import jax.experimental

FLOAT64, FLOAT32, BFLOAT16 = "float64", "float32", "bfloat16"
PRECISIONS = (FLOAT64, FLOAT32, BFLOAT16)


def precision_of(name: str) -> AbstractContextManager[Any]:
    """Inside it JAX holds float64 arrays if `name` is "float64", and none otherwise.

    >>> with precision_of("float64"):
    ...     jax.numpy.ones(1).dtype
    dtype('float64')
    """
    module = jax.experimental if jax.__version_info__ < (0, 8, 0) else jax
    return module.enable_x64(name == FLOAT64)  # pyright: ignore[reportAttributeAccessIssue]
