"""A picture of a schedule: stages as rows, time to the right, idle time left blank."""

from pathlib import Path

from matplotlib.figure import Figure
from matplotlib.patches import Patch, Rectangle
from matplotlib.ticker import MaxNLocator

from gcompute.parallel.pipeline.cost import Timeline
from gcompute.parallel.pipeline.schedule import Kind, Schedule

COLOURS = {Kind.FORWARD: "#4C78A8", Kind.BACKWARD: "#54A24B", Kind.WEIGHT: "#E8A33D"}
LABELS = {Kind.FORWARD: "F  forward", Kind.BACKWARD: "B  backward", Kind.WEIGHT: "W  weights"}
MAX_WIDTH_INCHES, INCHES_A_UNIT, INCHES_A_ROW, POINTS_AN_INCH = 24.0, 0.24, 0.42, 72


def draw(schedule: Schedule, timeline: Timeline, *, clock: str = "") -> Figure:
    """A Gantt chart of a timeline: each bar holds its microbatch, and later chunks of a stage are lighter.

    `timeline` is `lockstep_timeline(schedule)` or `asynchronous_timeline(schedule)`; `clock` names it in the title.
    """
    total, stages = timeline.total_time, schedule.num_stages
    digits = len(str(schedule.num_microbatches - 1))
    width = min(MAX_WIDTH_INCHES, max(5.0, total * INCHES_A_UNIT))
    figure = Figure(figsize=(width + 0.9, stages * INCHES_A_ROW + 1.15), layout="constrained")
    axes = figure.add_subplot()
    for bar in timeline.bars:
        span = bar.end - bar.start
        colour = _lighter(COLOURS[bar.kind], bar.work.chunk / schedule.num_chunks)
        axes.add_patch(
            Rectangle((bar.start, bar.stage + 0.04), span, 0.92, facecolor=colour, edgecolor="white", lw=0.8)
        )
        # A number that does not fit its bar would run into the next.
        size = min(8.5, span * width / total * POINTS_AN_INCH * 0.85 / digits)
        if size >= 4:
            text = (bar.start + span / 2, bar.stage + 0.52, str(bar.work.microbatch))
            axes.text(*text, ha="center", va="center", fontsize=size, color="black" if bar.work.chunk else "white")
    axes.set(xlim=(0, total), ylim=(stages, 0))
    axes.set_xlabel("time", loc="left")
    axes.set_yticks([stage + 0.5 for stage in range(stages)], [f"stage {stage}" for stage in range(stages)])
    axes.tick_params(length=0)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.set_facecolor("#F1F1F1")
    for side in axes.spines.values():
        side.set_visible(False)
    chunks = f", {schedule.num_chunks} chunks a stage" if schedule.num_chunks > 1 else ""
    about = f"{schedule.num_microbatches} microbatches{chunks}, bubble {timeline.bubble_fraction:.1%}"
    axes.set_title(", ".join(filter(None, [schedule.name, clock, about])), loc="left", fontsize=10)
    kinds = [kind for kind in Kind if any(bar.kind is kind for bar in timeline.bars)]
    legend = [Patch(facecolor=COLOURS[kind], label=LABELS[kind]) for kind in kinds]
    # Below the ticks, in the row of the time label.
    below = {"loc": "upper right", "bbox_to_anchor": (1, 0), "borderaxespad": 2.2}
    axes.legend(handles=legend, ncols=len(kinds), frameon=False, fontsize=8, **below)
    return figure


def save(figure: Figure, path: Path | str) -> None:
    """Write a PNG, or the format that the name ends in."""
    figure.savefig(path, dpi=150)


def _lighter(colour: str, share: float) -> tuple[float, ...]:
    channels = [int(colour[at : at + 2], 16) / 255 for at in (1, 3, 5)]
    return tuple(channel + (1 - channel) * min(0.7, share) for channel in channels)
