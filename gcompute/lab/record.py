"""What one run of a lab expects, measures and draws, kept on disk as it goes."""

import importlib
import json
import math
import os
import shutil
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.figure import Figure

RESULTS = "results.jsonl"
NEAR = 1.25  # a prediction within this factor of a known mistake is taken for it


def lab_root() -> Path:
    """Where labs leave what they make: $GCOMPUTE_LAB_OUT, or runs/labs in the working directory."""
    return Path(os.environ.get("GCOMPUTE_LAB_OUT") or Path("runs", "labs"))


class Record:
    """The folder of one lab, emptied; its predictions, and results.jsonl, which grows a line at a time.

    A session that dies keeps the lines written before.
    """

    def __init__(self, name: str):
        """Raises ValueError when the folder cannot be made or emptied, or holds something else than a lab's results."""
        self.directory = lab_root() / name
        self._predicted: dict[str, float | None] = {}
        try:
            # Only what an earlier run made is ever removed: the root may have been set to any folder.
            if (self.directory / RESULTS).exists():
                shutil.rmtree(self.directory)
            elif self.directory.exists() and any(self.directory.iterdir()):
                raise ValueError(
                    f"{self.directory} holds files that no lab made. Set GCOMPUTE_LAB_OUT to another folder."
                )
            self.directory.mkdir(parents=True, exist_ok=True)
            (self.directory / RESULTS).touch()
        except OSError as error:
            raise ValueError(
                f"{self.directory} cannot be made anew: {error.strerror}. Set GCOMPUTE_LAB_OUT to another folder."
            ) from None

    def note(self, what: str, **values: Any) -> None:
        """Append one line to results.jsonl."""
        with (self.directory / RESULTS).open("a", encoding="utf-8") as file:
            file.write(json.dumps({"what": what, **values}) + "\n")

    def predict(self, **predictions: object) -> None:
        """Commit the learner's numbers: `compare` holds these, whatever the variables become later.

        What is no number above 0 counts as no prediction, and stops nothing.
        """
        self._predicted |= {name: positive_number(value) for name, value in predictions.items()}
        for name in predictions:
            value = self._predicted[name]
            print(f"{name}: {'no number yet; guess one, then run this cell again' if value is None else f'{value:g}'}")
        self.note("predicted by you", **{name: self._predicted[name] for name in predictions})

    def compare(self, name: str, *, planned: float, measured: float, mistakes: Mapping[str, float]) -> None:
        """Print the prediction of that name beside planned and measured, and, if it is a known mistake, which.

        mistakes: what a common wrong argument gives, by what is wrong with it.
        """
        mine = self._predicted.get(name)
        yours = "-" if mine is None else f"{mine:.3g}"
        print(f"{name}: yours {yours}, planned {planned:.3g}, measured {measured:.3g}")
        mistake = None if mine is None else nearest_mistake(mine, mistakes)
        if mistake is not None:
            print(f"    {mistakes[mistake]:.3g} is {mistake}")
        self.note("compared", name=name, yours=mine, planned=planned, measured=measured, mistake=mistake)

    def show(self, figure: "Figure", name: str) -> None:
        """Save a figure in the folder and, in a notebook, show it."""
        figure.savefig(self.directory / name, dpi=110)
        self.show_file(name)

    def show_file(self, name: str) -> None:
        """Name a picture in the folder and, in a notebook, show it."""
        path = self.directory / name
        print(f"picture: {path}")
        if "ipykernel" in sys.modules:
            # By name: IPython is here only where a notebook runs.
            notebook = importlib.import_module("IPython.display")
            notebook.display(notebook.Image(filename=str(path)))


def positive_number(value: object) -> float | None:
    """A number above 0 as a float, anything else as None.

    >>> positive_number(40), positive_number("40"), positive_number(-1), positive_number(True), positive_number([1, 2])
    (40.0, None, None, None, None)
    """
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return None
    return float(value) if math.isfinite(value) and value > 0 else None


def nearest_mistake(value: float, mistakes: Mapping[str, float]) -> str | None:
    """The mistake whose number is nearest to `value` in ratio, if within a factor of `NEAR`.

    >>> nearest_mistake(13.0, {"weights alone": 3.2, "no activations": 12.8})
    'no activations'
    >>> nearest_mistake(100.0, {"weights alone": 3.2}) is None
    True
    """
    if not mistakes:
        return None
    mistake = min(mistakes, key=lambda reason: abs(math.log(value / mistakes[reason])))
    ratio = value / mistakes[mistake]
    return mistake if max(ratio, 1 / ratio) <= NEAR else None
