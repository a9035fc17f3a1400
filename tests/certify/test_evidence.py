"""Verdicts: what makes a row red."""

import json
import math

import numpy as np
import pytest

from gcompute.certify.collectives import Found, breaches, expect
from gcompute.certify.evidence import Check, Row, Verdict, compare, relative_errors

LARGE, SMALL = {"w": np.ones(4)}, {"w": np.ones(4), "bias": np.zeros(2)}


def check(error, limit=1e-11, **fields):
    return Check(quantity="loss", precision="float64", error=error, limit=limit, **fields)


def row(**fields):
    return Row(name="data=2", form="trainer", strategies=("data",), **fields)


@pytest.mark.oldest
def test_an_error_within_its_limit_is_green_and_nan_never():
    assert check(1e-12).passed
    assert not check(1e-10).passed
    assert not check(math.nan).passed
    assert not check(math.inf).passed


@pytest.mark.oldest
def test_a_row_is_red_for_a_number_or_a_fault_and_says_why():
    assert row(checks=(check(0.0),)).verdict is Verdict.EQUAL
    red = row(checks=(check(1e-3, where="blocks/mlp/up_DF"),))
    assert red.verdict is Verdict.DIFFERS
    assert red.reasons == ["loss in float64 is off by 1.0e-03, and 1.0e-11 is the most (worst: blocks/mlp/up_DF)"]
    assert row(faults=("no all-gather",)).verdict is Verdict.DIFFERS
    assert row(refusal="heads=4").verdict is Verdict.REFUSED
    assert row(refusal="heads=4", faults=("of another thing",)).verdict is Verdict.DIFFERS


@pytest.mark.parametrize(
    ("found", "error"),
    [
        (LARGE, math.inf),
        ({**SMALL, "extra": np.zeros(1)}, math.inf),
        ({"w": np.ones(3), "bias": np.zeros(2)}, math.inf),
        ({"w": np.ones(4), "bias": np.full(2, np.nan)}, math.nan),
        ({"w": np.array([1, 1, 1, 1.5]), "bias": np.zeros(2)}, 0.5),
        # A leaf of zeros is held against the scale of its tree: a hundredth of the largest entry.
        ({"w": np.ones(4), "bias": np.full(2, 1e-12)}, 1e-10),
        (SMALL, 0.0),
    ],
)
def test_the_worst_leaf_counts(found, error):
    worst = compare("gradients", found, SMALL, precision="float64", limit=1e-9)
    np.testing.assert_allclose(worst.error, error, rtol=1e-12)
    assert worst.passed == (error <= 1e-9)


def test_a_tree_of_zeros_must_be_zeros():
    assert relative_errors({"x": [0.0, 3.0]}, {"x": [0.0, 0.0]}) == {"x": 3.0}


@pytest.mark.oldest
def test_json_holds_what_json_can():
    text = json.dumps(row(checks=(check(math.nan), check(1.0, band=0.0))).to_dict(), allow_nan=False)
    errors = [one["error"] for one in json.loads(text)["checks"]]
    assert errors == ["nan", 1.0]


@pytest.mark.oldest
def test_collectives_missing_foreign_and_of_no_axis():
    wanted = {"fsdp": expect("all-gather", "all-reduce|reduce-scatter")}
    assert (
        breaches(
            Found({"fsdp": {"all-gather": 2}, "data+fsdp": {"all-reduce": 1}}),
            {**wanted, "data": expect("all-reduce")},
            "cpu",
        )
        == []
    )
    assert breaches(Found({"fsdp": {"all-gather": 2}}), wanted, "cpu") == [
        "on cpu nothing along fsdp is all-reduce or reduce-scatter"
    ]
    (foreign,) = breaches(Found({"fsdp": {"all-gather": 1, "reduce-scatter": 1, "all-to-all": 1}}), wanted, "cpu")
    assert "all-to-all along fsdp" in foreign
    (stray,) = breaches(Found({"fsdp": {"all-gather": 1, "all-reduce": 1}, "tensor": {"all-reduce": 1}}), wanted, "cpu")
    assert "tensor, which splits nothing" in stray
    # A permutation over two axes is XLA's way from a split over one to a split over the other.
    assert (
        breaches(
            Found({"fsdp": {"all-gather": 1, "all-reduce": 1}, "fsdp+tensor": {"collective-permute": 1}}),
            {**wanted, "tensor": expect()},
            "cpu",
        )
        == []
    )
    # Half of an axis is that axis.
    assert breaches(Found({"fsdp": {"all-reduce": 1}, "fsdp in parts": {"all-gather": 1}}), wanted, "cpu") == []
