"""What a benchmark shows on a terminal: a bar while it runs, then tables of measured beside predicted."""

from collections.abc import Callable
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeElapsedColumn
from rich.table import Table

from gcompute.cli.bench_session import Bench, Point
from gcompute.cli.planning import dollars, seconds, two_columns, wide_console
from gcompute.cli.progress import Shown
from gcompute.serve.load import Arrivals
from gcompute.serve.load_report import LATE_S, Spread
from gcompute.serve.load_run import Progress as Now

# Of one core, from which the client may slow a server on the same machine.
HEAVY_CLIENT = 0.25
# Below it, a 99th percentile is little more than the worst.
FEW_REQUESTS = 100


class LoadProgress(Shown):
    """A bar for the load that runs, on a terminal; elsewhere one line as each begins."""

    def __init__(self, console: Console):
        self.console = console
        self.progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(bar_width=12),
            TextColumn("{task.fields[far]}"),
            TimeElapsedColumn(),
            console=console,
            transient=True,
            refresh_per_second=4,
            disable=not console.is_terminal,
        )

    def watch(self, arrivals: Arrivals, num_requests: int | None) -> Callable[[Now], None]:
        """What hears how far the next load is."""
        if not self.console.is_terminal:
            self.console.print(f"load: {arrivals}")
        task: TaskID = self.progress.add_task(str(arrivals), total=num_requests, far="")

        def show(now: Now) -> None:
            failed = f", {now.failed} failed" if now.failed else ""
            rate = now.tokens / now.elapsed_s if now.elapsed_s > 0 else 0.0
            of = f"/{num_requests}" if num_requests else ""
            far = f"{now.done}{of}, {now.sent - now.done} open{failed}, {rate:,.0f} tokens/s"
            self.progress.update(task, completed=now.done, far=far)

        return show


def show_bench(bench: Bench) -> None:
    """Print everything: one load in full, several as a table."""
    console = wide_console()
    of = f"{bench.model} at " if bench.model else ""
    console.print(f"{of}{bench.url}: {bench.prompt:,.0f} + {bench.output:,.0f} tokens a request", soft_wrap=True)
    if len(bench.points) == 1:
        _show_one(bench, bench.points[0], console)
    elif bench.points:
        _show_sweep(bench, console)
    _show_notes(bench, console)


def _show_one(bench: Bench, point: Point, console: Console) -> None:
    measured, predicted = point.measured, point.predicted
    table = Table(title=f"latency, {point.run.arrivals} (measured; plan: predicted)", title_justify="left")
    for name in ("", "p50", "p90", "p99", "worst", "plan", "p50 / plan"):
        table.add_column(name, justify="right" if name else "left", no_wrap=True)
    foretold = {
        "TTFT": predicted.ttft_s if predicted else None,
        "TPOT": predicted.tpot_s if predicted else None,
        "ITL": None,
        "E2E": predicted.e2e_s if predicted else None,
    }
    spreads = {"TTFT": measured.ttft, "TPOT": measured.tpot, "ITL": measured.itl, "E2E": measured.e2e}
    for name, spread in spreads.items():
        expected = foretold[name]
        ratio = f"{spread.p50 / expected:.2f}" if spread and expected else "-"
        table.add_row(name, *_four(spread), seconds(expected) if expected else "-", ratio)
    console.print(table)
    table = Table(title="throughput", title_justify="left")
    for name in ("", "measured", "plan, predicted", "measured / plan"):
        table.add_column(name, justify="right" if name else "left", no_wrap=True)
    rows: list[tuple[str, float | None, float | None, Callable[[float], str]]] = [
        ("requests/s", measured.requests_per_s, predicted.requests_per_s if predicted else None, _number),
        (
            "output tokens/s",
            measured.output_tokens_per_s,
            predicted.output_tokens_per_s if predicted else None,
            _number,
        ),
        (
            "prompt tokens/s",
            measured.prompt_tokens_per_s,
            predicted.prompt_tokens_per_s if predicted else None,
            _number,
        ),
        ("requests under way", measured.mean_under_way, predicted.under_way if predicted else None, _number),
    ]
    if point.usd_measured is not None or point.usd_predicted is not None:
        rows.append(("a million output tokens", point.usd_measured, point.usd_predicted, dollars))
    for name, found, expected, shown in rows:
        ratio = f"{found / expected:.2f}" if found is not None and expected else "-"
        table.add_row(name, *(shown(value) if value is not None else "-" for value in (found, expected)), ratio)
    console.print(table)
    asked = point.run.arrivals.rate
    counts = {
        "requests sent": f"{measured.num_sent:,}",
        "served whole": f"{measured.num_ok:,}",
        "failed": f"{measured.num_failed:,}",
        "took": seconds(measured.wall_s),
        "tokens a chunk": f"{measured.tokens_per_chunk:.2f}" if measured.tokens_per_chunk else "-",
        "client, of one core": f"{measured.client_share:.1%}",
    }
    if measured.num_unfinished:
        counts["unfinished"] = f"{measured.num_unfinished:,}"
    if bench.slo.asked:
        counts[f"goodput ({bench.slo})"] = f"{_number(measured.goodput_per_s)} requests/s, {measured.num_good:,} of all"
    if asked is not None and not point.run.arrivals.all_at_once:
        sent = _number(measured.sent_per_s) if measured.sent_per_s is not None else "-"
        counts["sent a second, of asked"] = f"{sent} of {asked:g}"
        counts[f"sent more than {LATE_S * 1e3:g} ms late"] = f"{measured.num_late:,}" + (
            f", worst {seconds(max(0.0, measured.late.most))}" if measured.late else ""
        )
    two_columns("requests (measured)", counts, console)


def _show_sweep(bench: Bench, console: Console) -> None:
    priced = any(point.usd_measured is not None for point in bench.points)
    closed = all(point.run.arrivals.rate is None for point in bench.points)
    load = "at once" if closed else "requests/s"
    names = [load, "served", "failed", "req/s", "tokens/s", "plan"]
    names += ["goodput/s"] * bench.slo.asked + ["$/M out"] * priced
    throughput = _table("throughput (measured; plan: predicted)", names)
    latency = _table(
        "latency (measured; plan: predicted)", [load, "TTFT p50", "p99", "plan", "TPOT p50", "p99", "plan"]
    )
    for point in bench.points:
        measured, predicted = point.measured, point.predicted
        arrivals = point.run.arrivals
        name = f"{arrivals.concurrency:,}" if closed else f"{arrivals.rate:g}"
        row = [
            name,
            f"{measured.num_ok:,}",
            f"{measured.num_failed:,}",
            _number(measured.requests_per_s),
            _number(measured.output_tokens_per_s),
            _number(predicted.output_tokens_per_s) if predicted else "-",
        ]
        if bench.slo.asked:
            row.append(_number(measured.goodput_per_s))
        if priced:
            row.append(dollars(point.usd_measured) if point.usd_measured is not None else "-")
        throughput.add_row(*row)
        row = [name]
        for spread, expected in (
            (measured.ttft, predicted.ttft_s if predicted else None),
            (measured.tpot, predicted.tpot_s if predicted else None),
        ):
            row += [seconds(spread.p50), seconds(spread.p99)] if spread else ["-", "-"]
            row.append(seconds(expected) if expected is not None else "-")
        latency.add_row(*row)
    console.print(throughput)
    console.print(latency)
    if bench.slo.asked:
        best = max(bench.points, key=lambda point: point.measured.goodput_per_s)
        good = best.measured.goodput_per_s
        console.print(
            f"most goodput within {bench.slo}: {_number(good)} requests/s, {best.run.arrivals}"
            if good
            else f"no request kept {bench.slo}."
        )


def _table(title: str, names: list[str]) -> Table:
    table = Table(title=title, title_justify="left")
    for name in names:
        table.add_column(name, justify="right", no_wrap=True, style="dim" if name == "plan" else None)
    return table


def _show_notes(bench: Bench, console: Console) -> None:
    def note(text: str, style: str | None = None) -> None:
        console.print(text, soft_wrap=True, style=style)

    for point in bench.points:
        where = f"{point.run.arrivals}: " if len(bench.points) > 1 else ""
        for kind, num in point.measured.errors.items():
            note(f"{where}{num:,} failed with {kind}: {point.measured.messages[kind]}", "red")
        if point.measured.num_short:
            note(f"{where}{point.measured.num_short:,} answers ended before the length that was asked for.")
        if point.measured.client_share > HEAVY_CLIENT:
            share = point.measured.client_share
            note(f"{where}this client took {share:.0%} of a core: a server on the same machine had less.", "yellow")
        if not point.measured.counted:
            note(f"{where}the server does not count tokens: chunks were counted.")
        if point.predicted is not None and point.predicted.saturated:
            note(f"{where}by the plan more is sent than is served: requests wait without end, times are not predicted.")
    if any(0 < point.measured.num_ok < FEW_REQUESTS for point in bench.points):
        note(f"with fewer than {FEW_REQUESTS} requests a 99th percentile is little more than the worst.")
    planner = bench.planner
    if planner.model is not None and planner.target is not None:
        note(
            f"plan: {planner.model.name} on {planner.target}, weights {planner.weights}, keys and values {planner.kv};"
            " from formulae, which let the device reach its ceilings."
        )
    elif planner.why_not:
        note(planner.why_not)
    if planner.price is not None:
        note(f"price: {dollars(planner.price.usd_per_chip_hour)} a chip-hour ({planner.price})")
    if bench.stopped:
        note(f"stopped before its end: {bench.stopped}", "yellow")


def _four(spread: Spread | None) -> list[str]:
    if spread is None:
        return ["-"] * 4
    return [seconds(value) for value in (spread.p50, spread.p90, spread.p99, spread.most)]


def _number(value: Any) -> str:
    return f"{value:,.0f}" if value >= 1000 else f"{value:.4g}"
