"""metrics.jsonl and samples.jsonl: a JSON object per line, each of a step, cut back to a checkpoint on resume."""

import json
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Any

from gcompute.measure.whole_file import write_whole


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """All whole lines; a last line torn by a crash is left out, and so is what is not a row of metrics."""
    if not path.exists():
        return []
    rows = []
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
        try:
            row = json.loads(line)
        except (ValueError, RecursionError):
            continue
        if isinstance(row, dict) and isinstance(row.get("step"), int) and _is_whole(row):
            rows.append(row)
    return rows


def _is_whole(row: dict[str, Any]) -> bool:
    """Whether a row of a step or an evaluation has the numbers that are read again."""
    kind = row.get("kind")
    counts = [row[name] for name in ("batches", "of_batches") if name in row]
    whole = len(counts) in (0, 2) and all(isinstance(count, int) for count in counts)
    return (
        isinstance(kind, str) and whole and (kind not in ("train", "eval") or isinstance(row.get("loss"), float | int))
    )


class MetricsLog:
    """Appends rows to `path`, after dropping those beyond `last_step`. last: the newest row kept, by kind."""

    def __init__(self, path: Path, *, last_step: int):
        """Raises OSError when the file cannot be written."""
        self.path = path
        kept = [row for row in read_metrics(path) if row["step"] <= last_step]
        self.last = {row["kind"]: row for row in kept}
        try:
            write_whole(path, "".join(json.dumps(row) + "\n" for row in kept))
            self._file = path.open("a", encoding="utf-8")
        except OSError as error:
            raise self._unwritable(error) from None

    def __enter__(self) -> "MetricsLog":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        # Closing tries once more to write what could not be written before, which has been reported.
        with suppress(OSError):
            self._file.close()

    def write(self, rows: list[dict[str, Any]]) -> None:
        """Append rows and hand them to the operating system at once.

        Raises:
          OSError: they could not be written.
        """
        try:
            self._file.write("".join(json.dumps(row) + "\n" for row in rows))
            self._file.flush()
        except OSError as error:
            raise self._unwritable(error) from None

    def _unwritable(self, error: OSError) -> OSError:
        return OSError(f"{self.path} cannot be written: {error.strerror}. Make room there, then go on with --resume.")
