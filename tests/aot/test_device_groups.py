"""Group notations against groups written out; those of parts of axes are examples from XLA's own tests."""

import numpy as np
import pytest

from gcompute.aot.device_groups import parse_groups


def along(shape: tuple[int, ...], dims: tuple[int, ...]) -> set[frozenset[int]]:
    """Groups of positions that differ in `dims` alone, by their definition."""
    groups: dict[tuple[int, ...], set[int]] = {}
    for position, where in enumerate(np.ndindex(shape)):
        groups.setdefault(tuple(i for dim, i in enumerate(where) if dim not in dims), set()).add(position)
    return {frozenset(group) for group in groups.values()}


@pytest.mark.oldest
@pytest.mark.parametrize(
    ("text", "shape", "dims"),
    [
        ("{{0,1,2,3},{4,5,6,7}}", (2, 4), (1,)),
        ("[2,4]<=[8]", (2, 4), (1,)),
        ("[4,2]<=[2,4]T(1,0)", (2, 4), (0,)),
        ("[2,4]<=[2,2,2]T(1,0,2)", (2, 2, 2), (0, 2)),
        ("[1,8]<=[8]", (8,), (0,)),
        ("mesh['a'=2,'b'=4] {'b'}", (2, 4), (1,)),
        ("mesh['a'=2,'b'=4] {'a','b'}", (2, 4), (0, 1)),
        ("mesh['a'=2,'b'=2,'c'=2] {'c','a'}", (2, 2, 2), (0, 2)),
        ("@mesh<a=2,b=4> {a}", (2, 4), (0,)),
    ],
)
def test_whole_axes(text: str, shape: tuple[int, ...], dims: tuple[int, ...]):
    assert {frozenset(group) for group in parse_groups(text, 8)} == along(shape, dims)


@pytest.mark.parametrize(
    ("text", "first"),
    [
        ("mesh['a'=6,'b'=6] {'a':(1)2}", (0, 18)),
        ("mesh['a'=6,'b'=6] {'a':(3)2}", (0, 6)),
        ("mesh['a'=6,'b'=6] {'b':(1)3}", (0, 2, 4)),
        ("mesh['a'=6,'b'=6] {'a':(1)2,'b':(1)2}", (0, 3, 18, 21)),
        ("mesh['a'=6,'b'=6] {'b':(1)3,'a':(1)3}", (0, 12, 24, 2, 14, 26, 4, 16, 28)),
    ],
)
def test_parts_of_axes(text: str, first: tuple[int, ...]):
    groups = parse_groups(text, 36)
    assert groups[0] == first
    assert sorted(number for group in groups for number in group) == list(range(36))


def test_other_device_orders():
    assert parse_groups("mesh['x'=2,'y'=2], device_ids=(3,1,0,2) {'x'}", 4) == ((3, 0), (1, 2))
    assert parse_groups("mesh['x'=2,'y'=2], device_ids=([2,2]T(1,0)) {'y'}", 4) == ((0, 2), (1, 3))


def test_empty_means_all():
    assert parse_groups("{}", 4) == ((0, 1, 2, 3),)


def test_unknown_notation():
    with pytest.raises(ValueError, match="not known"):
        parse_groups("<0,1>", 4)
