"""Refuse numbers that make no sense, in one line that names them."""

import math


def above_zero(**values: float) -> None:
    """Raise ValueError where a named value is not a finite number above 0.

    >>> above_zero(batch=1)
    >>> above_zero(batch=-1)
    Traceback (most recent call last):
    ValueError: batch must be a number above 0, got -1.
    """
    for name, value in values.items():
        if not (math.isfinite(value) and value > 0):
            raise ValueError(f"{name} must be a number above 0, got {value}.")


def at_least_zero(**values: float) -> None:
    """Raise ValueError where a named value is not a finite number of at least 0."""
    for name, value in values.items():
        if not (math.isfinite(value) and value >= 0):
            raise ValueError(f"{name} must be a number of at least 0, got {value}.")


def share(**values: float) -> None:
    """Raise ValueError where a named value is not above 0 and at most 1."""
    for name, value in values.items():
        if not 0 < value <= 1:
            raise ValueError(f"{name} must be a share above 0 and at most 1, got {value}.")
