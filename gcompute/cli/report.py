"""One self-contained HTML page that sets predicted beside measured."""

import base64
import html
import io
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from gcompute.cli.progress import duration, share_of_ceiling

STYLE = """
:root { color-scheme: light dark; --ink: #1a1a1a; --soft: #666; --line: #ddd; --paper: #fff; --panel: #f6f7f9; }
@media (prefers-color-scheme: dark) {
  :root { --ink: #e8e8e8; --soft: #9a9a9a; --line: #3a3a3a; --paper: #16181c; --panel: #1f2228; }
  img { background: #fff; }
}
body { font: 16px/1.55 system-ui, sans-serif; color: var(--ink); background: var(--paper);
       max-width: 60rem; margin: 2rem auto; padding: 0 1rem; }
h1 { margin-bottom: 0; } h2 { margin-top: 2.2rem; border-bottom: 1px solid var(--line); padding-bottom: .2rem; }
p.lead { color: var(--soft); margin-top: .2rem; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; margin: .8rem 0; min-width: 60%; }
th, td { text-align: right; padding: .28rem .8rem; border-bottom: 1px solid var(--line); }
th:first-child, td:first-child { text-align: left; } thead th { color: var(--soft); font-weight: 600; }
td { font-variant-numeric: tabular-nums; }
img { max-width: 100%; border-radius: 6px; }
pre { background: var(--panel); padding: .8rem 1rem; border-radius: 6px; overflow-x: auto; white-space: pre-wrap;
      overflow-wrap: anywhere; font-size: 14px; line-height: 1.4; }
pre b { color: #4c78a8; } .note { color: var(--soft); font-size: 14px; }
"""


@dataclass(frozen=True, slots=True, kw_only=True)
class ReportData:
    """All that the page shows, as plain values, so that a page can be made again from what a run left behind."""

    machine: dict[str, Any]
    session: dict[str, Any]
    baselines: dict[str, float]
    serving: dict[str, Any]


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """An HTML table; every cell is escaped."""
    header = "".join(f"<th>{html.escape(cell)}</th>" for cell in head)
    body = "".join("<tr>" + "".join(f"<td>{html.escape(cell)}</td>" for cell in row) + "</tr>" for row in rows)
    return f'<div class="scroll"><table><thead><tr>{header}</tr></thead><tbody>{body}</tbody></table></div>'


def picture(png: bytes, alt: str) -> str:
    """A PNG inside the page."""
    return f'<img alt="{html.escape(alt)}" src="data:image/png;base64,{base64.b64encode(png).decode()}">'


def _png(figure: Figure) -> bytes:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png")
    return buffer.getvalue()


def memory_picture(predicted: dict[str, int], compiled_bytes: int | None, peak: dict[str, Any]) -> bytes:
    """Predicted memory by component as one stacked bar, what the compiler reserves and the measured peak as others."""
    figure = Figure(figsize=(8, 2.8), dpi=120, layout="constrained")
    axes = figure.subplots()
    left = 0.0
    for name, value in predicted.items():
        if name != "total_bytes" and value:
            axes.barh(2, value / 2**20, left=left, label=name.removesuffix("_bytes").replace("_", " "))
            left += value / 2**20
    if compiled_bytes:
        axes.barh(1, compiled_bytes / 2**20, color="#777777", label="compiled program")
    axes.barh(0, peak["largest_peak_bytes"] / 2**20, color="#bbbbbb", label=peak["source"])
    axes.set_yticks([2, 1, 0], ["predicted", "compiled", "measured"])
    axes.set_xlabel("MiB")
    axes.legend(frameon=False, fontsize=8, loc="center left", bbox_to_anchor=(1.0, 0.5))
    return _png(figure)


def requests_picture(requests: list[dict[str, Any]]) -> bytes:
    """When each request waited for its first token, and when it was writing."""
    figure = Figure(figsize=(8, 0.6 + 0.34 * max(len(requests), 2)), dpi=120, layout="constrained")
    axes = figure.subplots()
    for row, request in enumerate(requests):
        first, total = request["first_token_s"], request["total_s"]
        axes.barh(row, first, color="#f2b36b", label="until the first token" if not row else None)
        axes.barh(row, total - first, left=first, color="#4c78a8", label="writing" if not row else None)
    axes.set_yticks(range(len(requests)), [f"request {i + 1}" for i in range(len(requests))])
    axes.invert_yaxis()
    axes.set_xlabel("seconds since the request was sent")
    axes.legend(frameon=False, fontsize=8)
    return _png(figure)


def _ratio(measured: float, predicted: float) -> str:
    return f"{measured / predicted:.2f}"


def _training_rows(session: dict[str, Any]) -> list[tuple[str, str, str, str]]:
    predicted, measured = session["predicted"], session["measured"]
    rows = [("parameters", f"{predicted['num_params']:,}", f"{measured['num_params']:,}", "")]
    if measured["step_s"]:
        rows += [
            (
                "step time",
                duration(predicted["step_s"]),
                duration(measured["step_s"]),
                _ratio(measured["step_s"], predicted["step_s"]),
            ),
            (
                "tokens/s",
                f"{predicted['tokens_per_s']:,.0f}",
                f"{measured['tokens_per_s']:,.0f}",
                _ratio(measured["tokens_per_s"], predicted["tokens_per_s"]),
            ),
        ]
    if measured["compiled_bytes"]:
        total, compiled = predicted["memory_bytes"]["total_bytes"], measured["compiled_bytes"]
        sizes = (f"{total / 2**20:,.0f} MiB", f"{compiled / 2**20:,.0f} MiB")
        rows.append(("memory of a step (compiled, not measured)", *sizes, _ratio(compiled, total)))
    if measured["mfu"]:
        rows.append(("MFU of the measured roofline", "", share_of_ceiling(measured["mfu"]), ""))
    if measured["time_to_first_step_s"]:
        rows.append(("time to first step", "", duration(measured["time_to_first_step_s"]), ""))
    return rows


def render(data: ReportData, curve_png: bytes) -> str:
    """The page as one string."""
    session, serving = data.session, data.serving
    measured, roofline = session["measured"], session["measured"]["roofline"]
    model, training = session["run"]["model"], session["run"]["train"]
    memory = session["predicted"]["memory_bytes"]
    peak = measured["memory"]
    losses = [(name, f"{loss:.4f}", f"{2.718281828459045**loss:,.1f}") for name, loss in data.baselines.items()]
    losses.append(("this model", f"{measured['val_loss']:.4f}", f"{2.718281828459045 ** measured['val_loss']:,.1f}"))
    machine_rows = [
        (name.replace("_", " "), f"{value / 2**30:.1f} GiB" if name.endswith("_bytes") else str(value))
        for name, value in data.machine.items()
        if value is not None
    ]
    ceilings = [
        (f"matmul, {dtype}", f"{rate / 1e9:,.0f} GFLOP/s") for dtype, rate in roofline["matmul_flops_per_s"].items()
    ]
    ceilings.append(("memory, read", f"{roofline['memory_bytes_per_s'] / 1e9:,.1f} GB/s"))
    texts = "".join(
        f"<pre><b>{html.escape(request['prompt'])}</b>{html.escape(request['text'])}</pre>"
        for request in serving["requests"]
    )
    summary = serving["summary"]
    return f"""<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">
<title>gcompute demo</title><style>{STYLE}</style></head><body>
<h1>gcompute demo</h1>
<p class="lead">A {measured["num_params"]:,}-parameter transformer ({model["layers"]} layers, {model["dim"]} wide,
context {model["context"]}) trained for {measured["step"]:,} steps of {training["batch"]} x {model["context"]} tokens
on the source text of Python's standard library, then served over HTTP, all on this machine.</p>
<h2>Predicted beside measured</h2>
{table(("training", "predicted", "measured", "measured / predicted"), _training_rows(session))}
<p class="note">Predicted: from formulae and the two ceilings below, before the first step ran. Measured: medians over
the run, compilation left out. The prediction lets every matmul reach the ceiling and sends all other traffic to main
memory, so the ratio says how far the program is from that.</p>
<h2>Loss</h2>
{picture(curve_png, "loss by step")}
{table(("validation, same tokens", "loss, nats a token", "perplexity"), losses)}
<h2>Memory</h2>
{picture(memory_picture(memory, measured["compiled_bytes"], peak), "memory by component")}
<p class="note">Predicted: arrays of one train step, from formulae. Compiled: what XLA reserves for that step.
Measured: {html.escape(peak["source"])}, which on a CPU
holds the whole process: Python, the compiler and the corpus too.</p>
<h2>What it wrote</h2>
{texts}
<h2>Serving</h2>
{picture(requests_picture(serving["requests"]), "requests over time")}
{table(("serving", "measured"), [(name.replace("_", " "), value) for name, value in summary.items()])}
<h2>This machine</h2>
{table(("measured roofline", ""), ceilings)}
{table(("machine", ""), machine_rows)}
</body></html>
"""


def write_report(data: ReportData, curve: Path, path: Path) -> None:
    """Render and write the page; it is whole or absent."""
    from gcompute.measure.whole_file import write_whole

    write_whole(path, render(data, curve.read_bytes()))
