"""The files of a folder and of the folders that it links to, and what is left out of them, with the reason."""

import os
from collections.abc import Sequence
from pathlib import Path

INSTALLED = frozenset({"site-packages", "dist-packages", "__pycache__"})
AGAIN = "link to what is read already"
NUM_NAMED = 3  # files named for each reason

Skipped = tuple[tuple[str, str], ...]  # name and reason of each file or folder left out


def walk(root: Path, *, follow: bool) -> tuple[dict[str, Path], Skipped]:
    """Every file under `root` by its relative name, and what is left out, both sorted.

    follow: enter linked folders too. Links come after everything else, and one to what is there already is left out: so
    no text is read twice, and no circle is entered.
    """
    found: dict[str, Path] = {}
    skipped: list[tuple[str, str]] = []
    entered: set[tuple[int, int]] = set()
    folders, linked_folders, linked_files = [root], [], []

    def leave_out(path: Path, reason: str) -> None:
        skipped.append((path.relative_to(root).as_posix(), reason))

    while folders or linked_folders:
        folder = (folders or linked_folders).pop()
        try:
            if (identity := _identity(folder)) in entered:
                leave_out(folder, AGAIN)
                continue
            entered.add(identity)
            entries = list(os.scandir(folder))
        except OSError as error:
            if folder == root:
                raise
            leave_out(folder, f"not readable: {error.strerror}")
            continue
        for entry in entries:
            path = folder / entry.name
            is_link = entry.is_symlink()
            if entry.name.startswith("."):
                continue
            if os.path.isdir(path):
                if entry.name not in INSTALLED and (follow or not is_link):
                    (linked_folders if is_link else folders).append(path)
            elif not os.path.isfile(path):
                leave_out(path, "pipe, device or socket" if os.path.exists(path) else "broken link")
            elif follow and is_link:
                linked_files.append(path)
            else:
                found[path.relative_to(root).as_posix()] = path
        linked_folders.sort(reverse=True)  # which of two links to one folder is entered depends on their names alone
    files = {_identity(path) for path in found.values()} if linked_files else set()
    for path in sorted(linked_files):
        if (identity := _identity(path)) in files:
            leave_out(path, AGAIN)
        else:
            files.add(identity)
            found[path.relative_to(root).as_posix()] = path
    return dict(sorted(found.items())), tuple(sorted(skipped))


def _identity(path: Path) -> tuple[int, int]:
    """What tells a file or folder from any other, whatever link leads to it."""
    status = path.stat()
    return status.st_dev, status.st_ino


def by_reason(skipped: Sequence[tuple[str, str]]) -> str:
    """Counts and first names for each reason.

    >>> by_reason([("a.bin", "binary"), ("b.txt", "not UTF-8"), ("c.bin", "binary")])
    '2 binary (a.bin, c.bin), 1 not UTF-8 (b.txt)'
    """
    names: dict[str, list[str]] = {}
    for name, reason in skipped:
        names.setdefault(reason, []).append(name)
    parts = []
    for reason, these in sorted(names.items(), key=lambda item: -len(item[1])):
        named = [*these[:NUM_NAMED], *(["..."] if len(these) > NUM_NAMED else [])]
        parts.append(f"{len(these)} {reason} ({', '.join(named)})")
    return ", ".join(parts)
