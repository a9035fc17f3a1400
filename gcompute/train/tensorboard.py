"""The scalars of metrics.jsonl for TensorBoard, written with tensorboardX, which is an extra."""

from collections.abc import Iterable, Iterator
from pathlib import Path
from types import TracebackType
from typing import Any

TENSORBOARD = "tensorboard"


def summary_writer() -> Any:
    """The class that writes event files.

    Raises:
      ValueError: tensorboardX is not installed.
    """
    try:
        from tensorboardX import SummaryWriter  # pyright: ignore[reportMissingImports]
    except ImportError:
        raise ValueError(
            "--tensorboard needs tensorboardX, which is not installed. pip install 'gcompute[tensorboard]', or leave it"
            " away: metrics.jsonl has the same numbers."
        ) from None
    return SummaryWriter


def scalars(
    row: dict[str, Any], *, tokens_per_step: int, flops_per_step: float, peak_flops_per_s: float | None
) -> Iterator[tuple[str, float]]:
    """Names and values of one row of metrics.jsonl; MFU where a peak is known.

    >>> row = {"kind": "train", "step": 1, "loss": 2.5, "gradient_norm": 1.0, "learning_rate": 1e-3, "step_s": 0.5}
    >>> dict(scalars(row, tokens_per_step=100, flops_per_step=1e9, peak_flops_per_s=4e9))["tokens_per_s"]
    200.0
    """
    if row["kind"] == "eval":
        yield "loss/validation", row["loss"]
        return
    yield "loss/train", row["loss"]
    for name in ("learning_rate", "gradient_norm", "balance", "dropped"):
        if name in row:
            yield name, row[name]
    yield "tokens_per_s", tokens_per_step / row["step_s"]
    if peak_flops_per_s:
        yield "mfu", flops_per_step / row["step_s"] / peak_flops_per_s


class TensorboardLog:
    """Writes rows of metrics.jsonl to event files in `directory`. Use as a context manager.

    What an earlier process wrote past `last_step` is marked to be left out, as metrics.jsonl drops it.
    """

    def __init__(
        self,
        directory: Path,
        *,
        last_step: int,
        tokens_per_step: int,
        flops_per_step: float,
        peak_flops_per_s: float | None,
    ):
        """Raises ValueError where tensorboardX is not installed, OSError where the files cannot be written."""
        self._units: dict[str, Any] = {
            "tokens_per_step": tokens_per_step,
            "flops_per_step": flops_per_step,
            "peak_flops_per_s": peak_flops_per_s,
        }
        self._writer = summary_writer()(str(directory), purge_step=last_step + 1)

    def __enter__(self) -> "TensorboardLog":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._writer.close()

    def write(self, rows: Iterable[dict[str, Any]]) -> None:
        """Add the scalars of these rows, and hand them to the operating system."""
        for row in rows:
            for name, value in scalars(row, **self._units):
                self._writer.add_scalar(name, value, row["step"])
        self._writer.flush()
