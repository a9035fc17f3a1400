"""The loss curve as a picture."""

import io
import math
from pathlib import Path
from typing import Any

from gcompute.config.figure_text import figure_text
from gcompute.measure.whole_file import write_whole

TRAIN_COLOUR, VAL_COLOUR, BASELINE_COLOUR = "#4c78a8", "#d62728", "#777777"


def smoothed(values: list[float], weight: float) -> list[float]:
    """Exponential moving average, corrected for its start.

    >>> smoothed([2.0, 2.0], 0.9)
    [2.0, 2.0]
    """
    total = norm = 0.0
    out = []
    for value in values:
        total, norm = weight * total + (1 - weight) * value, weight * norm + (1 - weight)
        out.append(total / norm)
    return out


def plot_loss(rows: list[dict[str, Any]], path: Path, *, title: str, baselines: dict[str, float] | None = None) -> None:
    """Write a PNG of training and validation loss by step, with horizontal lines for baselines (nats per token)."""
    from matplotlib.figure import Figure

    train = [(row["step"], row["loss"]) for row in rows if row["kind"] == "train" and math.isfinite(row["loss"])]
    # The last evaluation is over more of the split than those on the way; a run that was made longer has several.
    rated = [row for row in rows if row["kind"] == "eval" and "batches" in row]
    most = max((row["batches"] for row in rated), default=0)
    final = [row for row in rated if row["batches"] == most][-1:]
    val = [(row["step"], row["loss"]) for row in rated if row["batches"] < most]
    figure = Figure(figsize=(8, 4.5), dpi=120, layout="constrained")
    axes = figure.subplots()
    if train:
        steps, losses = zip(*train, strict=True)
        axes.plot(steps, losses, color=TRAIN_COLOUR, alpha=0.25, linewidth=1)
        axes.plot(steps, smoothed(list(losses), 0.95), color=TRAIN_COLOUR, linewidth=1.8, label="training (smoothed)")
    if val:
        axes.plot(*zip(*val, strict=True), color=VAL_COLOUR, marker="o", markersize=4, label="validation, a sample")
    for row in final:
        step, loss = row["step"], row["loss"]
        label = f"validation, {row['batches']:,} of {row['of_batches']:,} batches"
        axes.plot(step, loss, color=VAL_COLOUR, marker="*", markersize=11, linestyle="", label=label)
        place = {"textcoords": "offset points", "xytext": (0, 9), "ha": "right"}
        axes.annotate(f"{loss:.3f}", (step, loss), color=VAL_COLOUR, fontweight="bold", **place)
    right = axes.get_yaxis_transform()
    for name, loss in (baselines or {}).items():
        axes.axhline(loss, color=BASELINE_COLOUR, linestyle="--", linewidth=1)
        axes.text(0.99, loss, f"{name} {loss:.2f} ", transform=right, ha="right", va="bottom", color=BASELINE_COLOUR)
    axes.set(xlabel="step", ylabel="loss, nats per token", title=figure_text(title))
    axes.grid(alpha=0.25)
    if train or val or final:
        axes.legend(frameon=False)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png")
    write_whole(path, buffer.getvalue())
