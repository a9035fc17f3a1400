"""metrics.jsonl: one JSON object a line, one line a training step or evaluation, cut back to a checkpoint on resume."""

import json
import os
from pathlib import Path
from types import TracebackType
from typing import Any


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """All whole lines; a last line torn by a crash is left out."""
    if not path.exists():
        return []
    rows = []
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            rows.append(json.loads(line))
        except ValueError:
            continue
    return rows


class MetricsLog:
    """Appends rows to `path`, after dropping those beyond `last_step`."""

    def __init__(self, path: Path, *, last_step: int):
        kept = [row for row in read_metrics(path) if row["step"] <= last_step]
        temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")
        temporary.write_text("".join(json.dumps(row) + "\n" for row in kept), encoding="utf-8")
        os.replace(temporary, path)
        self._file = path.open("a", encoding="utf-8")

    def __enter__(self) -> "MetricsLog":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._file.close()

    def write(self, rows: list[dict[str, Any]]) -> None:
        """Append rows and hand them to the operating system at once."""
        self._file.write("".join(json.dumps(row) + "\n" for row in rows))
        self._file.flush()
