"""A benchmark's pictures: one load as distributions and over time, several as latency against throughput."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullFormatter

from gcompute.cli.bench_session import Bench, Point
from gcompute.cli.plan_plot import save
from gcompute.config.figure_text import figure_text
from gcompute.serve.load_report import Spread, tokens_over_time, under_way

BLUE, RED, ORANGE, TEAL, GREY = "#4c78a8", "#e45756", "#f58518", "#439894", "#888888"
MOST_BINS = 60
# A figure that is so many times what was measured is out of the picture.
FAR = 2.5


def plot_bench(bench: Bench, path: Path) -> None:
    """Draw it to .png, or to a page that holds the picture."""
    name = bench.model or bench.url
    title = f"{name}: {bench.prompt:,.0f} + {bench.output:,.0f} tokens a request"
    figure = _one(bench, bench.points[0], title) if len(bench.points) == 1 else _sweep(bench, title)
    save(figure, path, title)


def _one(bench: Bench, point: Point, title: str) -> Figure:
    figure = Figure(figsize=(11, 7.2), layout="constrained")
    (ttft, tpot), (tokens, requests) = figure.subplots(2, 2)
    predicted, slo = point.predicted, bench.slo
    ok = [one for one in point.run.outcomes if one.error is None]
    _distribution(
        ttft,
        "time to first token",
        [one.ttft_s for one in ok if one.ttft_s is not None],
        predicted.ttft_s if predicted else None,
        slo.ttft_s,
    )
    _distribution(
        tpot,
        "time per output token",
        [one.tpot_s for one in ok if one.tpot_s is not None],
        predicted.tpot_s if predicted else None,
        slo.tpot_s,
    )
    _over_time(tokens, point)
    _each_request(requests, point)
    measured = point.measured
    failed = f", {measured.num_failed:,} failed" if measured.num_failed else ""
    figure.suptitle(
        f"{figure_text(title)}\n{point.run.arrivals}: {measured.num_ok:,} served{failed},"
        f" {measured.output_tokens_per_s:,.0f} output tokens/s. Measured, but for what says predicted.",
        fontsize=11,
    )
    return figure


def _distribution(
    axes: Any, what: str, values_s: Sequence[float], expected_s: float | None, limit_s: float | None
) -> None:
    """The share of requests that took no longer, with the percentiles marked."""
    spread = Spread.of(values_s)
    axes.set_title(f"{what}, distribution", fontsize=10)
    axes.set_xlabel("milliseconds")
    axes.set_ylabel("share of requests")
    axes.set_ylim(0, 1.04)
    axes.yaxis.set_major_formatter(lambda value, _: f"{value:.0%}")
    axes.grid(True, alpha=0.25)
    if spread is None:
        axes.text(0.5, 0.5, "no request has one", ha="center", transform=axes.transAxes, color=GREY)
        return
    xs = np.sort(np.asarray(values_s)) * 1e3
    shares = np.arange(len(xs) + 1) / len(xs)
    axes.step(np.concatenate((xs[:1], xs)), shares, where="post", color=BLUE, lw=2, label="measured")
    marks = (("p50", spread.p50, 0.5, "o"), ("p90", spread.p90, 0.9, "s"), ("p99", spread.p99, 0.99, "^"))
    for name, value_s, share, marker in marks:
        label = f"{name}: {_ms(value_s)}"
        axes.plot([value_s * 1e3], [share], marker, color=BLUE, mec="white", ms=7, zorder=4, label=label)
    highest = spread.most
    for value_s, colour, style, name in (
        (expected_s, ORANGE, "--", "plan, predicted"),
        (limit_s, RED, ":", "limit"),
    ):
        if value_s is not None:
            axes.axvline(value_s * 1e3, color=colour, ls=style, lw=1.5, label=f"{name}: {_ms(value_s)}")
            # One that lies far off is told, and does not squeeze the rest.
            highest = value_s if highest < value_s < FAR * highest else highest
    axes.set_xlim(0, highest * 1.06e3)
    axes.legend(fontsize=8.5, loc="best")


def _over_time(axes: Any, point: Point) -> None:
    every = point.run.outcomes
    num_bins = int(np.clip(len(every) // 2, 8, MOST_BINS))
    edges, rates = tokens_over_time(every, num_bins=num_bins)
    highest = max(*rates, 1e-9)
    axes.stairs(rates, edges, fill=True, color=BLUE, alpha=0.35)
    axes.stairs(rates, edges, color=BLUE, lw=1.2, label="output tokens/s")
    if point.predicted is not None:
        expected = point.predicted.output_tokens_per_s
        axes.axhline(expected, color=ORANGE, ls="--", lw=1.5, label=f"plan, predicted: {expected:,.0f}")
        highest = expected if highest < expected < FAR * highest else highest
    axes.set_title("throughput over time", fontsize=10)
    axes.set_xlabel("seconds since the first request")
    axes.set_ylabel("output tokens a second")
    axes.set_ylim(0, 1.45 * highest)
    axes.grid(True, alpha=0.25)
    beside = axes.twinx()
    steps = under_way(every)
    beside.step([at_s for at_s, _ in steps], [num for _, num in steps], where="post", color=GREY, lw=1, alpha=0.8)
    beside.plot([], [], color=GREY, lw=1, label="requests under way (right)")
    beside.set_ylim(0, 1.45 * max((num for _, num in steps), default=1))
    beside.yaxis.get_major_locator().set_params(integer=True)
    beside.set_ylabel("requests under way", color=GREY)
    handles = [*axes.get_legend_handles_labels()[0], *beside.get_legend_handles_labels()[0]]
    axes.legend(handles=handles, fontsize=8.5, loc="upper right")


def _each_request(axes: Any, point: Point) -> None:
    """Every request where it was sent: its first token and its end, and those that failed."""
    ok = [one for one in point.run.outcomes if one.error is None]
    bad = [one for one in point.run.outcomes if one.error is not None]
    size = 14 if len(point.run.outcomes) < 300 else 5
    xs = [one.sent_s for one in ok]
    axes.vlines(xs, [one.ttft_s or 0 for one in ok], [one.e2e_s for one in ok], color=TEAL, lw=0.8, alpha=0.35)
    axes.scatter(xs, [one.e2e_s for one in ok], s=size, color=TEAL, label="in all")
    axes.scatter(xs, [one.ttft_s or 0 for one in ok], s=size, color=BLUE, label="to the first token")
    if bad:
        axes.scatter([one.sent_s for one in bad], [0] * len(bad), s=26, marker="x", color=RED, label="failed")
    axes.set_title("each request", fontsize=10)
    axes.set_xlabel("sent, seconds since the first request")
    axes.set_ylabel("seconds")
    axes.set_ylim(bottom=0 if not bad else None, top=1.25 * max((one.e2e_s for one in ok), default=1.0))
    axes.grid(True, alpha=0.25)
    axes.legend(fontsize=8.5, loc="upper right", ncols=3)


def _sweep(bench: Bench, title: str) -> Figure:
    figure = Figure(figsize=(11, 5), layout="constrained")
    left, right = figure.subplots(1, 2)
    points = [point for point in bench.points if point.measured.num_ok]
    latencies: tuple[tuple[Any, str, Callable[[Point], Spread | None], Callable[[Point], float | None]], ...] = (
        (
            left,
            "time per output token",
            lambda point: point.measured.tpot,
            lambda point: point.predicted.tpot_s if point.predicted else None,
        ),
        (
            right,
            "time to first token",
            lambda point: point.measured.ttft,
            lambda point: point.predicted.ttft_s if point.predicted else None,
        ),
    )
    for axes, what, spread_of, expected_of in latencies:
        shown = [(point, spread) for point in points if (spread := spread_of(point)) is not None]
        xs = [point.measured.output_tokens_per_s for point, _ in shown]
        for name, style, alpha in (("p50", "-o", 1.0), ("p99", ":^", 0.75)):
            ys = [1e3 * getattr(spread, name) for _, spread in shown]
            axes.plot(xs, ys, style, color=BLUE, ms=5, alpha=alpha, label=f"measured, {name}")
        for x, (point, spread) in zip(xs, shown, strict=True):
            axes.annotate(
                _short(point), (x, 1e3 * spread.p50), xytext=(5, -11), textcoords="offset points", fontsize=8.5
            )
        planned = [
            (point.predicted.output_tokens_per_s, 1e3 * expected)
            for point in bench.points
            if point.predicted is not None and (expected := expected_of(point)) is not None
        ]
        if planned:
            axes.plot(*zip(*planned, strict=True), "--s", color=ORANGE, ms=4, label="plan, predicted")
        axes.set_title(what, fontsize=10)
        axes.set_xlabel("output tokens a second")
        axes.set_ylabel("milliseconds")
        if planned and max(x for x, _ in planned) > FAR * max(xs, default=0):
            # Both curves in one picture, though they are far apart.
            axes.set(xscale="log", yscale="log")
            for axis in (axes.xaxis, axes.yaxis):
                axis.set_major_locator(LogLocator(subs=(1, 2, 5)))
                axis.set_major_formatter(lambda value, _: f"{value:,g}")
                axis.set_minor_formatter(NullFormatter())
        else:
            axes.set_ylim(bottom=0)
            axes.set_xlim(left=0)
        axes.grid(True, which="both", alpha=0.2)
    for axes, limit_s in ((left, bench.slo.tpot_s), (right, bench.slo.ttft_s)):
        if limit_s is not None:
            axes.axhline(limit_s * 1e3, color=RED, ls=":", lw=1.5, label=f"limit: {_ms(limit_s)}")
        axes.legend(fontsize=8.5)
    kind = "requests at once" if all(point.run.arrivals.rate is None for point in bench.points) else "requests a second"
    figure.suptitle(f"{figure_text(title)}\nnumbers are {kind}", fontsize=11)
    return figure


def _short(point: Point) -> str:
    arrivals = point.run.arrivals
    return f"{arrivals.concurrency}" if arrivals.rate is None else f"{arrivals.rate:g}"


def _ms(value_s: float) -> str:
    return f"{value_s * 1e3:,.3g} ms"
