"""Declare, check and suggest: the small vocabulary that every configuration dataclass is written in."""

import dataclasses
import difflib
import math
from collections.abc import Iterable
from typing import Any


def option(default: Any, help: str, *, choices: tuple[str, ...] | None = None, path: bool = False) -> Any:
    """A dataclass field that also carries what a command line needs: its help text, its legal values.

    path: the text may be a path, in which a leading ~ stands for the home directory.
    """
    return dataclasses.field(default=default, metadata={"help": help, "choices": choices, "path": path})


def nearest(name: str, legal: Iterable[str]) -> str:
    """A clause that names the closest legal value, or all of them when none is close.

    >>> nearest("llama3-8", ["llama3-8b", "gpt2"])
    "Did you mean 'llama3-8b'?"
    >>> nearest("zzz", ["a", "b"])
    'Legal: a, b.'
    """
    legal = [str(value) for value in legal]
    close = difflib.get_close_matches(name, legal, n=1, cutoff=0.5)
    return f"Did you mean {close[0]!r}?" if close else f"Legal: {', '.join(legal)}."


def check_choices(config: Any) -> None:
    """Raise ValueError where a field declared with `choices` holds something else."""
    for field in dataclasses.fields(config):
        choices = field.metadata.get("choices")
        value = getattr(config, field.name)
        if choices and value is not None and value not in choices:
            raise ValueError(f"{field.name}={value!r} is not known. {nearest(str(value), choices)}")


def check_numbers(config: Any, *, positive: tuple[str, ...] = (), at_least_zero: tuple[str, ...] = ()) -> None:
    """Raise ValueError where a named field is out of range or not finite; a field that is None is left alone."""
    for names, lowest, word in ((positive, 0, "above 0"), (at_least_zero, None, "at least 0")):
        for name in names:
            value = getattr(config, name)
            if value is None:
                continue
            too_low = value <= lowest if lowest is not None else value < 0
            if too_low or not math.isfinite(value):
                raise ValueError(f"{name} must be {word}, got {value}.")


def to_plain(config: Any) -> dict[str, Any]:
    """A configuration as JSON and TOML can hold it; a field whose type has a text form (a mesh) becomes that text."""
    values = {field.name: getattr(config, field.name) for field in dataclasses.fields(config)}
    return {name: str(value) if dataclasses.is_dataclass(value) else value for name, value in values.items()}
