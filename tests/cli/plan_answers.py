"""What every answer of a planning command must be: strict JSON, or one line that says what is wrong."""

import json
import math
from collections.abc import Iterator
from typing import Any

from command_line import Ended


def leaves(value: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    if isinstance(value, dict):
        for name, inner in value.items():
            yield from leaves(inner, f"{path}/{name}")
    elif isinstance(value, list):
        for index, inner in enumerate(value):
            yield from leaves(inner, f"{path}/{index}")
    else:
        yield path, value


def sound(ended: Ended, status: int = 0) -> dict[str, Any]:
    """The document of --json: strict JSON, nothing infinite, and nothing below 0 but what is lacking of memory."""
    assert ended.status == status, ended.err
    assert ended.err == ""

    def refuse(constant: str) -> None:
        raise AssertionError(f"{constant} is no JSON")

    document = json.loads(ended.out, parse_constant=refuse)
    for path, value in leaves(document):
        if isinstance(value, float | int):
            assert math.isfinite(value), path
            assert value >= 0 or path.endswith("left_bytes"), path
    return document


def one_line(ended: Ended) -> str:
    assert (ended.status, ended.out) == (2, ""), ended.out + ended.err
    assert ended.err.count("\n") == 1, ended.err
    return ended.error
