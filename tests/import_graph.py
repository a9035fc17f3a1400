"""Which files a test file depends on, read from the imports alone: nothing is run.

A file depends on the modules that it imports anywhere, in functions and in strings of code too, for tests start
programs with `python -c`; a test file depends on the conftest.py of its folder and of those above as well. The distance
of a file from a change is the number of such steps to the nearest changed file: 0 for a test that changed itself, 1 for
one that imports what changed. A package's __init__.py counts only for those that take a name from it: every import of a
module below runs it, and by that all files would be two steps apart.
"""

import ast
import re
import warnings
from collections import deque
from collections.abc import Iterable, Iterator
from pathlib import Path, PurePosixPath

PACKAGE = "gcompute"
MENTION = re.compile(rf"\b{PACKAGE}(?:\.[A-Za-z_]\w*)+")


class ImportGraph:
    """The Python files of a repository and what each depends on; paths are relative to it, with slashes.

    Its folders are the package, tests/, and each folder `x` beside them whose programs are tested in tests/x.
    """

    def __init__(self, repository: Path):
        tested = (folder.name for folder in (repository / "tests").iterdir() if folder.is_dir())
        self.programs = {name for name in tested if (repository / name).is_dir()}
        roots = (PACKAGE, "tests", *sorted(self.programs))
        found = sorted(path for root in roots for path in (repository / root).rglob("*.py"))
        self.files = {path.relative_to(repository).as_posix(): path for path in found}
        # Helpers of tests are imported by their bare names: pytest has their folders on its path.
        self._helpers = {PurePosixPath(path).stem: path for path in self.files if path.startswith("tests/")}
        self._dependents: dict[str, set[str]] = {path: set() for path in self.files}
        with warnings.catch_warnings(action="ignore"):
            for path, file in self.files.items():
                tree = ast.parse(file.read_text(encoding="utf-8"))
                for other in {*self._imported(path, tree), *self._conftests(path)} - {path}:
                    self._dependents[other].add(path)

    def test_files(self) -> list[str]:
        return [path for path in self.files if path.startswith("tests/") and "/test_" in path]

    def dependents(self, path: str) -> frozenset[str]:
        """The files that import `path` themselves."""
        return frozenset(self._dependents[path])

    def distances(self, changed: Iterable[str]) -> dict[str, int]:
        """The distance of each file that a changed one reaches.

        A changed file that is no module here (data, C++, a page, what was deleted) stands for the modules beside it;
        the tests of a package (tests/serve for gcompute/serve) are at most one step from whatever changes in it.
        """
        changed = list(changed)
        distance = {path: 0 for name in changed for path in ([name] if name in self.files else self._beside(name))}
        waiting = deque(distance)
        for name in changed:
            for path in self._tests_of_its_package(name):
                if path not in distance:
                    distance[path] = 1
        while waiting:
            path = waiting.popleft()
            for dependent in self._dependents[path]:
                if distance.get(dependent, len(self.files)) > distance[path] + 1:
                    distance[dependent] = distance[path] + 1
                    waiting.append(dependent)
        return distance

    def _beside(self, name: str) -> list[str]:
        for folder in PurePosixPath(name).parents[:-1]:
            found = [path for path in self.files if PurePosixPath(path).parent == folder]
            if found and folder != PurePosixPath("tests"):
                return found
        return []

    def _tests_of_its_package(self, name: str) -> list[str]:
        parts = PurePosixPath(name).parts
        package = parts[1] if parts[0] == PACKAGE and len(parts) > 2 else parts[0]
        return [path for path in self.test_files() if path.startswith(f"tests/{package}/")]

    def _imported(self, path: str, tree: ast.AST) -> Iterator[str]:
        folder = PurePosixPath(path).parent
        for node in ast.walk(tree):
            if isinstance(node, ast.Import):
                for alias in node.names:
                    yield from self._resolve(alias.name, folder)
            elif isinstance(node, ast.ImportFrom):
                above = folder.parts[: len(folder.parts) - node.level + 1] if node.level else ()
                base = ".".join([*above, *([node.module] if node.module else [])])
                for alias in node.names:
                    yield from self._resolve(f"{base}.{alias.name}", folder)
            elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                yield from self._mentioned(path, node.value)

    def _mentioned(self, path: str, text: str) -> Iterator[str]:
        """What a string names: the program, a module, or code for another process."""
        folder = PurePosixPath(path).parent
        if text == PACKAGE:
            if path.startswith(f"{PACKAGE}/"):  # the name of a folder, not of the program
                return
            yield from self._resolve(f"{PACKAGE}.__main__", folder)
        elif PACKAGE in text:
            for name in MENTION.findall(text):
                yield from self._resolve(name, folder)
            if MENTION.fullmatch(text.removesuffix(".")) and text.endswith("."):
                # f"gcompute.cli.{name}": any module of that folder.
                beginning = text.replace(".", "/")
                yield from (path for path in self.files if PurePosixPath(path).parent == PurePosixPath(beginning))
            if "import" in text:
                try:
                    yield from self._imported(path, ast.parse(text))
                except (SyntaxError, ValueError):
                    return

    def _resolve(self, dotted: str, folder: PurePosixPath) -> Iterator[str]:
        """The file of the longest part of a dotted name that is a module here."""
        parts = dotted.split(".")
        for length in range(len(parts), 0, -1):
            name = "/".join(parts[:length])
            for candidate in (f"{name}.py", f"{name}/__init__.py", f"{folder}/{name}.py", self._helpers.get(name)):
                if candidate in self.files:
                    yield candidate
                    return

    def _conftests(self, path: str) -> Iterator[str]:
        for folder in PurePosixPath(path).parents:
            if (conftest := (folder / "conftest.py").as_posix()) in self.files:
                yield conftest
