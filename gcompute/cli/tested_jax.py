"""Which JAX versions the tests pass on, and a line for who has a newer one."""

import sys
from functools import cache

OLDEST_TESTED_JAX = "0.7.2"
# The newest minor version on which the default tests were run as a whole.
NEWEST_TESTED_JAX = "0.12"


def untested(version: str) -> str | None:
    """What to say of a JAX of this version; None where it is not newer than those that are tested.

    >>> untested("0.12.3") is None
    True
    >>> untested("0.13.0")
    'JAX 0.13.0 is newer than any that gcompute is tested with (0.7.2 to 0.12).'
    """
    if _minor(version) <= _minor(NEWEST_TESTED_JAX):
        return None
    return f"JAX {version} is newer than any that gcompute is tested with ({OLDEST_TESTED_JAX} to {NEWEST_TESTED_JAX})."


def _minor(version: str) -> tuple[int, ...]:
    return tuple(int(part) for part in version.split(".")[:2])


@cache
def warn_if_untested() -> None:
    """One line on standard error, once per process, where the JAX at hand is newer than any tested."""
    from importlib.metadata import version

    told = untested(version("jax"))
    if told is not None:
        print(f"warning: {told}", file=sys.stderr, flush=True)
