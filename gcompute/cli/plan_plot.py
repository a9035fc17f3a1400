"""The planner's pictures: operations on a roofline, and throughput against latency; a PNG, or a page that holds one."""

import io
from collections.abc import Sequence
from pathlib import Path

from matplotlib.figure import Figure

from gcompute.config.figure_text import figure_text
from gcompute.hardware.target import Target
from gcompute.plan.efficiency import device_of
from gcompute.plan.operations import Operation
from gcompute.plan.serving import Load

COLOURS = {"matmul": "#4c78a8", "attention": "#e45756", "sweep": "#72b7b2"}
# A sweep multiplies nothing worth counting; it is drawn where one operation for each value would be.
SWEEP_INTENSITY = 0.125
MOST_LABELS = 7


def plot_roofline(operations: Sequence[Operation], target: Target, precision: str, path: Path, *, title: str) -> None:
    """Every operation of a step under the roof of one device: operations a byte against operations a second.

    The size of a point is its share of the step's operations and bytes at the roof.
    """
    assert target.known is not None
    device = device_of(target.known, precision)
    figure = Figure(figsize=(9, 5.5), layout="constrained")
    axes = figure.subplots()
    grouped: dict[str, list[Operation]] = {}
    for one in operations:
        grouped.setdefault(one.name, []).append(one)
    points = []
    for name, members in grouped.items():
        flops = sum(one.flops * one.times for one in members)
        moved = sum(one.moved_bytes * one.times for one in members)
        if not moved:
            continue
        intensity = max(flops / moved, SWEEP_INTENSITY)
        roof = min(device.flops_per_s, intensity * device.hbm_bytes_per_s)
        at_roof_s = max(flops / device.flops_per_s, moved / device.hbm_bytes_per_s)
        points.append((name, members[0].kind, intensity, roof, at_roof_s))
    total = sum(point[-1] for point in points)
    low = min(point[2] for point in points) / 2
    high = max(max(point[2] for point in points), device.ridge) * 3
    xs = [low, device.ridge, high]
    axes.plot(xs, [min(device.flops_per_s, x * device.hbm_bytes_per_s) / 1e12 for x in xs], color="#333", lw=2)
    axes.axvline(device.ridge, color="#999", ls=":", lw=1)
    axes.annotate(
        f"ridge: {device.ridge:,.0f} operations a byte", (device.ridge, device.flops_per_s / 1e12 * 1.12), ha="right"
    )
    for kind, colour in COLOURS.items():
        own = [point for point in points if point[1] == kind]
        axes.scatter(
            [point[2] for point in own],
            [point[3] / 1e12 for point in own],
            s=[30 + 1500 * point[4] / total for point in own],
            color=colour,
            alpha=0.7,
            label={"matmul": "matrix products", "attention": "attention", "sweep": "sweeps (elementwise)"}[kind],
            zorder=3,
        )
    longest = sorted(points, key=lambda point: -point[4])[:MOST_LABELS]
    for index, (name, _, x, y, at_roof_s) in enumerate(sorted(longest, key=lambda point: point[2])):
        axes.annotate(
            f"{name} ({at_roof_s / total:.0%})",
            (x, y / 1e12),
            # A column below the roof's corner, where no point lies.
            xytext=(0.76, 0.74 - 0.055 * index),
            textcoords="axes fraction",
            fontsize=8.5,
            ha="right",
            va="center",
            arrowprops={"arrowstyle": "-", "color": "#bbb", "lw": 0.7, "relpos": (1, 0.5)},
        )
    axes.set(xscale="log", yscale="log", xlim=(low, high))
    axes.set_ylim(top=device.flops_per_s / 1e12 * 2)
    axes.set_xlabel("operations a byte of device memory")
    axes.set_ylabel(f"TFLOP/s a device, {precision} (datasheet)")
    axes.set_title(
        f"{figure_text(title)}\npredicted; in brackets, shares of the step if all ran at the roof", fontsize=11
    )
    legend = axes.legend(loc="lower right", fontsize=9)
    for handle in legend.legend_handles:
        if handle is not None:
            handle.set_sizes([60])  # pyright: ignore[reportAttributeAccessIssue]
    axes.grid(True, which="major", alpha=0.25)
    save(figure, path, title)


def plot_loads(loads: Sequence[Load], target: Target, path: Path, *, title: str, critical: float) -> None:
    """Tokens a second a chip against time per token, a point for each concurrency."""
    figure = Figure(figsize=(8.5, 5), layout="constrained")
    axes = figure.subplots()
    xs = [one.time_per_token_s * 1e3 for one in loads]
    ys = [one.tokens_per_s / target.num_chips for one in loads]
    axes.plot(xs, ys, marker="o", color=COLOURS["matmul"])
    for one, x, y in zip(loads, xs, ys, strict=True):
        axes.annotate(f"{one.concurrency:,}", (x, y), xytext=(6, -11), textcoords="offset points", fontsize=8.5)
    last = loads[-1]
    axes.annotate(
        "memory is full",
        (xs[-1], ys[-1]),
        xytext=(4, -28),
        textcoords="offset points",
        ha="right",
        fontsize=9,
        color="#b00",
    )
    beyond = "beyond" if critical > last.concurrency else "within"
    axes.set_xlabel("milliseconds a token, prefills of others between")
    axes.set_ylabel("output tokens a second a chip")
    axes.set_title(
        f"{figure_text(title)}\n"
        f"predicted; numbers are requests at once, the critical batch of {critical:,.0f} is {beyond} memory",
        fontsize=11,
    )
    axes.set_ylim(bottom=0)
    axes.grid(True, alpha=0.25)
    save(figure, path, title)


def save(figure: Figure, path: Path, title: str) -> None:
    """Write a figure as .png, or as a page that holds it.

    Raises:
      ValueError: the directory is not there, or the file has another ending.
    """
    if path.suffix not in (".png", ".html"):
        raise ValueError(f"--plot {path}: the file must end in .png or .html.")
    if not path.absolute().parent.is_dir():
        raise ValueError(f"--plot {path}: there is no directory {path.absolute().parent}.")
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=130)
    if path.suffix == ".png":
        path.write_bytes(buffer.getvalue())
        return
    import html

    from gcompute.cli.report import STYLE, picture

    body = f"<h1>{html.escape(title)}</h1>{picture(buffer.getvalue(), title)}"
    head = f'<meta charset="utf-8"><title>{html.escape(title)}</title><style>{STYLE}</style>'
    path.write_text(f"<!doctype html><html><head>{head}</head><body>{body}</body></html>", encoding="utf-8")
