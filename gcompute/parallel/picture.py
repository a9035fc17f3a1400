"""Pictures of shardings: how an array is cut, and which devices hold each piece."""

import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from jax.sharding import NamedSharding, Sharding

from gcompute.config.figure_text import figure_text
from gcompute.measure.whole_file import write_whole
from gcompute.parallel.explain import cut_axes, holders

PANELS_A_ROW = 4
# What fits into a panel of 4 x 3.4 inches in the small font.
PANEL_CHARACTERS, PANEL_LINES = 56, 20
MOST_BORDERS = 32


def plot_sharding(
    array: Any, sharding: Sharding | None, path: Path, *, name: str = "array", dims: str | None = None
) -> None:
    """Write a PNG of one array's pieces, as `plot_shardings` draws them; by default it is drawn where it is."""
    plot_shardings({name: (array, sharding or array.sharding, dims)}, path)


def plot_shardings(arrays: Mapping[str, tuple[Any, Sharding, str | None]], path: Path, *, title: str = "") -> None:
    """Write a PNG with a panel for each (array, sharding, dims): a colour for each piece, named by its devices.

    A panel shows two dims, down and across: the largest, those that are cut before others; of a third that is cut, the
    first piece.
    Arrays may be abstract, and meshes too; the devices of an abstract mesh go by their place in it.

    Raises:
      ValueError: nothing to draw, or a mesh does not divide its array.
    """
    from matplotlib.figure import Figure

    if not arrays:
        raise ValueError("there is no array to draw.")
    columns = min(PANELS_A_ROW, len(arrays))
    rows = -(-len(arrays) // columns)
    figure = Figure(figsize=(1 + 4 * columns, 0.6 + 3.4 * rows), dpi=110, layout="constrained")
    panels = list(figure.subplots(rows, columns, squeeze=False).flat)
    for axes in panels:
        axes.set_axis_off()
    for axes, (name, (array, sharding, dims)) in zip(panels, arrays.items(), strict=False):
        _draw(axes, name, tuple(array.shape), sharding, dims)
    figure.suptitle(
        "\n".join(filter(None, [figure_text(title), "numbers: the devices that hold a piece"])), fontsize="medium"
    )
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png")
    write_whole(path, buffer.getvalue())


def piece_label(devices: Sequence[int], *, characters: int, lines: int) -> str:
    """The devices that hold a piece, runs joined, as many as fit, and how many copies those are; "" if none fits.

    >>> piece_label([0, 1, 2, 5], characters=12, lines=2)
    '0-2, 5\\n4 copies'
    >>> piece_label(range(0, 40, 2), characters=16, lines=1)
    '0, 2, ... (20)'
    """
    runs: list[list[int]] = []
    for device in devices:
        if runs and device == runs[-1][-1] + 1:
            runs[-1].append(device)
        else:
            runs.append([device])
    texts = [str(run[0]) if len(run) == 1 else f"{run[0]}-{run[-1]}" for run in runs]
    num = len(devices)
    copies = "" if num == 1 else f"\n{num} copies" if lines > 1 else f" ({num})"
    for shown in range(len(texts), 0, -1):
        label = ", ".join(texts[:shown] + (["..."] if shown < len(texts) else [])) + copies
        if lines and max(map(len, label.split("\n"))) <= characters:
            return label
    return ""


def shown_dims(shape: Sequence[int], counts: Sequence[int]) -> tuple[int, ...]:
    """The one or two dims to draw, in their order: those that are cut (count above 1) before others, then the largest.

    >>> shown_dims((2, 64, 4, 16), (1, 4, 2, 1))
    (1, 2)
    """
    first = sorted(range(len(shape)), key=lambda dim: (counts[dim] == 1, -shape[dim]))[:2]
    return tuple(sorted(first))


def _draw(axes: Any, name: str, shape: tuple[int, ...], sharding: Sharding, dims: str | None) -> None:
    from matplotlib import colormaps

    held = holders(sharding, shape)
    counts = [max(place[dim] for place in held) + 1 for dim in range(len(shape))]
    shown = shown_dims(shape, counts)
    num_across = counts[shown[-1]] if shown else 1
    num_down = counts[shown[0]] if len(shown) == 2 else 1
    visible = {
        place: devices
        for place, devices in held.items()
        if all(place[dim] == 0 for dim in range(len(shape)) if dim not in shown)
    }
    # Colours go round the wheel by the golden ratio, so that neighbours differ however many there are.
    hues = np.arange(len(visible)) * 0.618034 % 1
    colours, labelled = np.zeros((num_down, num_across, 4)), False
    for hue, (place, devices) in zip(hues, visible.items(), strict=True):
        down, across = (0, 0, *(place[dim] for dim in shown))[-2:]
        colours[down, across] = (*colormaps["hsv"](0.05 + 0.9 * hue)[:3], 0.45)
        label = piece_label(devices, characters=PANEL_CHARACTERS // num_across, lines=PANEL_LINES // num_down)
        if label:
            labelled = True
            axes.text(across + 0.5, down + 0.5, label, ha="center", va="center", fontsize="small")
    axes.imshow(colours, extent=(0, num_across, num_down, 0), aspect="auto", interpolation="nearest")
    if max(num_across, num_down) <= MOST_BORDERS:
        axes.hlines(range(1, num_down), 0, num_across, colors="white")
        axes.vlines(range(1, num_across), 0, num_down, colors="white")
    axes.set(xlim=(0, num_across), ylim=(num_down, 0), xticks=[], yticks=[])
    axes.set_axis_on()
    axes.spines[:].set_visible(False)
    labels = _labels(shape, sharding, dims, counts)
    axes.set_xlabel(labels[shown[-1]] if shown else "scalar")
    if len(shown) == 2:
        axes.set_ylabel(labels[shown[0]])
    rest = [f"{labels[dim]}: first piece" for dim in range(len(shape)) if dim not in shown and counts[dim] > 1]
    if not labelled:
        rest.append(f"each piece on {len(held[min(held)])} of {sharding.num_devices} devices")
    axes.set_title(figure_text("\n".join([f"{name} {dims or ''}".strip(), *rest])), fontsize="medium")


def _labels(shape: tuple[int, ...], sharding: Sharding, dims: str | None, counts: list[int]) -> list[str]:
    cuts = cut_axes(sharding, len(shape)) if isinstance(sharding, NamedSharding) else [()] * len(shape)
    labels = []
    for dim, (size, count, axes) in enumerate(zip(shape, counts, cuts, strict=True)):
        over = f" over {', '.join(axes)}" if axes else ""
        cut = f", cut in {count}{over}" if count > 1 else ""
        labels.append(f"{dims[dim] if dims else f'dim {dim}'} = {size:,}{cut}")
    return labels
