"""Snapshots from successive stats, with a clock of the test's own."""

import dataclasses
import json

import pytest

from gcompute.config.model import ModelConfig
from gcompute.config.serve import ServeConfig
from gcompute.hardware.catalogue import find_chip
from gcompute.serve.position import decode_roofline
from gcompute.serve.stats import EngineStats, SlotStats, Status
from gcompute.serve.stream import Finished, Reason, Timing, Usage
from gcompute.serve.watch import RECENT, Watch, percentiles, share, times_of

pytestmark = pytest.mark.oldest

STATS = EngineStats(
    status=Status.READY,
    slots=4,
    num_running=0,
    num_waiting=0,
    num_cells=256,
    num_cells_used=0,
    num_programs=3,
    num_late_compilations=0,
    num_dispatches=0,
    num_decode_steps=0,
    num_prompt_tokens=0,
    num_output_tokens=0,
)


class Bench:
    """A watch whose clock and stats the test sets."""

    def __init__(self, roofline=None):
        self.now_s, self.stats = 100.0, STATS
        about = {"model": "tiny"}
        self.watch = Watch(lambda: self.stats, about=about, roofline=roofline, clock=lambda: self.now_s)

    def after(self, seconds: float, **changes):
        self.now_s += seconds
        self.stats = dataclasses.replace(self.stats, **changes)
        return self.watch.look()


def finished(first_s: float | None = 0.2, total_s: float = 1.2, tokens: int = 11, reason=Reason.LENGTH) -> Finished:
    return Finished(
        reason=reason,
        text="secret",
        usage=Usage(prompt_tokens=3, completion_tokens=tokens),
        timing=Timing(queued_s=0.1, first_token_s=first_s, total_s=total_s),
    )


def test_rates_are_over_the_window_and_unknown_at_first():
    bench = Bench()
    first = bench.after(0)["rates"]
    assert set(first.values()) == {None}
    bench.after(1.0, num_output_tokens=50, num_decode_steps=10)
    rates = bench.after(1.0, num_output_tokens=200, num_decode_steps=20, num_prompt_tokens=30)["rates"]
    assert rates == {
        "window_s": 2.0,
        "output_tokens_per_s": 100.0,
        "prompt_tokens_per_s": 15.0,
        "decode_steps_per_s": 10.0,
    }
    # The first second has left the window.
    assert bench.after(1.0)["rates"]["output_tokens_per_s"] == 75.0
    assert bench.after(2.5)["rates"]["output_tokens_per_s"] == 0.0


def test_after_a_pause_without_watchers_rates_begin_anew():
    bench = Bench()
    bench.after(0)
    assert bench.after(3600.0, num_output_tokens=10**6)["rates"]["output_tokens_per_s"] is None
    assert bench.after(0.5, num_output_tokens=10**6 + 20)["rates"]["output_tokens_per_s"] == 40.0


def test_many_looks_at_once_neither_pile_up_nor_spoil_the_rates():
    bench = Bench()
    bench.after(0)
    bench.after(1.0, num_output_tokens=100)
    for _ in range(1000):
        assert bench.after(0.0001)["rates"]["output_tokens_per_s"] == pytest.approx(100.0, rel=0.11)
    assert len(bench.watch._samples) < 10


def test_shares_and_pages_and_slots_are_the_engines():
    running = SlotStats(slot=2, request_id=9, phase="decode", num_prompt=5, num_cached=8, num_output=4, max_tokens=20)
    seen = Bench().after(
        0,
        num_prompt_tokens=200,
        num_hit_tokens=50,
        num_drafted=8,
        num_accepted=6,
        page_tokens=16,
        num_pages=10,
        num_pages_free=3,
        num_pages_cached=2,
        num_pages_used=5,
        running=(running,),
        num_running=1,
        num_waiting=7,
    )
    assert (seen["hit_share"], seen["accepted_share"]) == (0.25, 0.75)
    assert seen["pages"] == {"tokens": 16, "num": 10, "free": 3, "cached": 2, "used": 5}
    assert seen["slots"] == {"num": 4, "running": [dataclasses.asdict(running)]}
    assert (seen["num_running"], seen["num_waiting"], seen["status"]) == (1, 7, "ready")
    assert share(0, 0) is None


def test_recent_times_are_of_requests_that_were_served_and_bounded():
    bench = Bench()
    assert bench.after(0)["recent"] == {"num": 0, "queued_s": None, "first_token_s": None, "per_token_s": None}
    bench.watch.finished(finished(reason=Reason.CANCELLED, first_s=None))
    bench.watch.finished(finished(first_s=9.0, total_s=10.0))
    for index in range(RECENT):
        bench.watch.finished(finished(first_s=0.001 * (index + 1), total_s=1.0 + 0.001 * (index + 1)))
    seen = bench.after(0)
    # The one of 9 s is no longer recent.
    assert seen["recent"]["num"] == RECENT
    assert seen["recent"]["first_token_s"] == pytest.approx({"p50": 0.064, "p90": 0.116, "p99": 0.127})
    assert seen["recent"]["per_token_s"]["p50"] == pytest.approx(0.1)
    assert seen["totals"]["num_finished"] == RECENT + 2
    assert "secret" not in json.dumps(seen)


def test_requests_of_one_token_have_no_time_per_token():
    times = times_of([finished(tokens=1)])
    assert times["num"] == 1
    assert times["per_token_s"] is None
    assert times["first_token_s"]["p99"] == 0.2


@pytest.mark.parametrize("num", [1, 2, 99, 100, 101])
def test_percentiles_are_values_that_so_many_do_not_exceed(num):
    values = [float(index) for index in range(num)]
    for name, value in (percentiles(values[::-1]) or {}).items():
        part = int(name[1:]) / 100
        assert sum(one <= value for one in values) >= part * num
        assert sum(one < value for one in values) < part * num


def test_the_decode_batch_is_set_beside_its_prediction():
    model = ModelConfig(vocab=256, layers=2, dim=64, heads=4, ffn=128, context=64)
    roofline = decode_roofline(model, ServeConfig(precision="bfloat16"), find_chip("v5e"))
    bench = Bench(roofline)
    idle = bench.after(0)["decode"]
    assert (idle["live"], idle["measured"], idle["predicted"]) == (False, None, None)
    assert [one["cells"] for one in idle["path"]] == [16] * len(idle["path"])
    running = SlotStats(slot=0, request_id=1, phase="decode", num_prompt=5, num_cached=8, num_output=4, max_tokens=20)
    last = {"decode_batch": 3, "decode_cells": 44, "last_decode_step_s": 0.002, "decode_tokens_per_s": 1400.0}
    seen = bench.after(1, **last, running=(running,))["decode"]
    position = roofline.at(3, 44)
    assert seen["live"]
    assert seen["measured"] == {"step_s": 0.002, "tokens_per_s": 1400.0, "flops_per_s": position.flops / 0.002}
    assert seen["predicted"]["intensity"] == position.intensity
    assert {one["cells"] for one in seen["path"]} == {48}
    guessing = bench.after(1, decode_speculated=True)["decode"]
    assert (guessing["measured"]["tokens_per_s"], guessing["predicted"]) == (1400.0, None)
    without = Bench().after(0, **last)
    assert without["roofline"] is None
    assert without["decode"]["measured"]["tokens_per_s"] == 1400.0
    assert (without["decode"]["predicted"], without["decode"]["path"]) == (None, [])


def test_a_snapshot_is_json_without_infinities():
    json.dumps(Bench().after(0), allow_nan=False)
