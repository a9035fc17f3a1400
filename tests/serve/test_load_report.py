"""Percentiles, goodput and rates with answers that can be worked out, and the plan's prediction for a load."""

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from gcompute.config.models import planned_model
from gcompute.hardware.target import Target
from gcompute.plan.serving import ServeRun, load_of
from gcompute.serve.load import Arrivals
from gcompute.serve.load_answer import INTERRUPTED, Outcome
from gcompute.serve.load_plan import predict
from gcompute.serve.load_report import (
    Slo,
    Spread,
    outcome_json,
    sending_rate,
    summarize,
    tokens_over_time,
    under_way,
)
from gcompute.serve.load_run import Run


def outcome(index: int, *, sent_s: float, token_s: list[float], tokens: int, **more) -> Outcome:
    values = {
        "index": index,
        "due_s": None,
        "sent_s": sent_s,
        "end_s": token_s[-1] if token_s else sent_s + 0.1,
        "asked_tokens": tokens,
        "token_s": token_s,
        "prompt_tokens": 10,
        "completion_tokens": tokens,
    }
    return Outcome(**{**values, **more})


# TTFT 1, 2, 4; TPOT 1, 0.5, none; E2E 3, 3, 4.
SERVED = (
    outcome(0, sent_s=0.0, token_s=[1.0, 2.0, 3.0], tokens=3),
    outcome(1, sent_s=1.0, token_s=[3.0, 4.0], tokens=3),
    outcome(2, sent_s=4.0, token_s=[8.0], tokens=1),
)
FAILED = (
    outcome(3, sent_s=4.0, token_s=[], tokens=3, error="HTTP 429", message="full", completion_tokens=0),
    outcome(4, sent_s=5.0, token_s=[6.0], tokens=3, error="connection lost", message="gone", completion_tokens=1),
    outcome(5, sent_s=6.0, token_s=[], tokens=3, error=INTERRUPTED, completion_tokens=0),
    outcome(6, sent_s=7.0, token_s=[], tokens=3, error="HTTP 429", message="full", completion_tokens=0),
)


def run(*outcomes: Outcome) -> Run:
    wall_s = max(one.end_s for one in outcomes)
    return Run(arrivals=Arrivals(concurrency=1), outcomes=outcomes, wall_s=wall_s, client_cpu_s=0.4)


@pytest.mark.oldest
def test_percentiles_by_hand():
    spread = Spread.of(range(1, 102))
    assert spread is not None
    assert (spread.p50, spread.p90, spread.p99, spread.mean, spread.least, spread.most) == (51, 91, 100, 51, 1, 101)
    # Between two values, linearly.
    pair = Spread.of([10.0, 20.0])
    assert pair is not None
    assert (pair.p50, pair.p90, pair.p99) == pytest.approx((15, 19, 19.9))
    assert Spread.of([]) is None


@given(st.lists(st.floats(0, 1e6), min_size=1, max_size=60))
def test_percentiles_are_ordered_values_within_the_range(values):
    spread = Spread.of(values)
    assert spread is not None
    slack = 1e-9 * max(1.0, spread.most)
    assert spread.least - slack <= spread.p50 <= spread.p90 + slack <= spread.p99 + 2 * slack
    assert spread.p99 <= spread.most + slack
    # At least half of the values are no larger than the median, and half no smaller.
    assert sum(value <= spread.p50 + slack for value in values) * 2 >= len(values)
    assert sum(value >= spread.p50 - slack for value in values) * 2 >= len(values)


@pytest.mark.oldest
def test_every_figure_of_a_small_run():
    found = summarize(run(*SERVED, *FAILED), Slo(ttft_s=2.0))
    assert (found.num_sent, found.num_ok, found.num_failed, found.num_unfinished) == (7, 3, 3, 1)
    assert found.errors == {"HTTP 429": 2, "connection lost": 1}
    assert found.messages == {"HTTP 429": "full", "connection lost": "gone"}
    assert found.wall_s == 8
    assert found.ttft is not None
    assert (found.ttft.num, found.ttft.p50, found.ttft.most) == (3, 2, 4)
    assert found.tpot is not None
    assert (found.tpot.num, found.tpot.mean) == (2, 0.75)
    assert found.itl is not None
    assert (found.itl.num, found.itl.most) == (3, 1)
    assert found.e2e is not None
    assert found.e2e.p50 == 3
    assert (found.prompt_tokens, found.output_tokens) == (30, 7)
    assert (found.output_tokens_per_s, found.requests_per_s) == (7 / 8, 3 / 8)
    assert found.tokens_per_chunk == 7 / 6
    assert (found.num_good, found.goodput_per_s) == (2, 2 / 8)
    assert found.num_short == 0
    assert found.client_share == 0.05
    assert found.mean_under_way == pytest.approx((3 + 3 + 4 + 0.1 + 1 + 0.1 + 0.1) / 8)


@pytest.mark.oldest
@pytest.mark.parametrize(
    ("limits", "good"),
    [
        ({}, 3),
        ({"ttft_s": 1.0}, 1),
        ({"ttft_s": 4.0}, 3),
        ({"tpot_s": 0.6}, 2),
        ({"e2e_s": 3.0}, 2),
        ({"ttft_s": 2.0, "tpot_s": 0.6}, 1),
        ({"ttft_s": 0.5}, 0),
    ],
)
def test_goodput_counts_what_keeps_all_limits(limits, good):
    found = summarize(run(*SERVED, *FAILED), Slo(**limits))
    assert (found.num_good, found.goodput_per_s) == (good, good / 8)


@pytest.mark.parametrize("value", [0.0, -1.0, math.inf, math.nan])
def test_limits_that_make_no_sense(value):
    with pytest.raises(ValueError, match="--slo-tpot"):
        Slo(tpot_s=value)


def test_late_sends_and_the_rate_that_was_reached():
    late = [outcome(i, sent_s=i + 0.5 * (i == 2), token_s=[i + 1.0], tokens=1, due_s=float(i)) for i in range(5)]
    found = summarize(run(*late), Slo())
    assert found.num_late == 1
    assert found.late is not None
    assert found.late.most == 0.5
    assert found.sent_per_s == 1
    assert sending_rate(late[:1]) is None
    assert sending_rate([late[0], late[0]]) is None


def test_requests_under_way_and_tokens_over_time():
    assert under_way(SERVED) == [(0.0, 1), (1.0, 2), (3.0, 1), (4.0, 0), (4.0, 1), (8.0, 0)]
    edges, rates = tokens_over_time(SERVED, num_bins=4)
    assert edges == [0, 2, 4, 6, 8]
    # Request 1 has 3 tokens in 2 chunks, at 3 s and 4 s; a token at an edge is of the bin that it begins.
    assert np.multiply(rates, 2).tolist() == [1, 2 + 1.5, 1.5, 1]
    assert sum(rates) * 2 == 7
    assert tokens_over_time((), num_bins=3)[1] == [0.0]


@pytest.mark.oldest
def test_a_request_as_json():
    written = outcome_json(SERVED[1])
    assert (written["ttft_s"], written["tpot_s"], written["e2e_s"]) == (2, 0.5, 3)
    assert written["token_s"] == [3.0, 4.0]
    assert outcome_json(FAILED[0])["ttft_s"] is None


SERVE_RUN = ServeRun(model=planned_model("llama3-8b").architecture, prompt=512, output=128)
TARGET = Target.parse("h100:1")


@pytest.mark.oldest
def test_a_closed_loop_is_predicted_by_littles_law():
    few = predict(SERVE_RUN, TARGET, Arrivals(concurrency=4), slots=8, num_requests=None)
    load = load_of(SERVE_RUN, TARGET, 4)
    assert (few.together, few.ttft_s, few.tpot_s) == (4, load.ttft_s, load.time_per_token_s)
    assert few.output_tokens_per_s == load.tokens_per_s
    many = predict(SERVE_RUN, TARGET, Arrivals(concurrency=40), slots=8, num_requests=None)
    assert many.together == 8
    assert many.e2e_s == pytest.approx(40 / many.requests_per_s)
    # Four fifths of the senders wait.
    assert many.ttft_s is not None
    assert many.ttft_s > 30 / many.requests_per_s


def test_a_rate_is_predicted_with_as_many_together_as_serve_it():
    rate = 4.0
    found = predict(SERVE_RUN, TARGET, Arrivals(rate=rate), slots=64, num_requests=None)
    assert not found.saturated
    assert (found.requests_per_s, found.output_tokens_per_s) == (rate, rate * 128)
    assert load_of(SERVE_RUN, TARGET, found.together).tokens_per_s >= rate * 128
    assert load_of(SERVE_RUN, TARGET, found.together - 1).tokens_per_s < rate * 128
    # Little's law: what is under way is the rate times the stay, to within one request and the first step's share.
    assert found.e2e_s is not None
    assert abs(rate * found.e2e_s - found.together) < 1.5


def test_more_than_can_be_served_is_said_so():
    found = predict(SERVE_RUN, TARGET, Arrivals(rate=1e4), slots=8, num_requests=None)
    assert (found.saturated, found.together, found.ttft_s, found.e2e_s) == (True, 8, None, None)
    assert found.output_tokens_per_s == load_of(SERVE_RUN, TARGET, 8).tokens_per_s
    at_once = predict(SERVE_RUN, TARGET, Arrivals(rate=math.inf), slots=64, num_requests=5)
    assert (at_once.together, at_once.ttft_s) == (5, None)
    capped = predict(SERVE_RUN, TARGET, Arrivals(rate=1e4, concurrency=3), slots=64, num_requests=5)
    assert capped.together == 3
