"""The tests marked `oldest`, which also run on the oldest set supported: every package has some."""

import ast
from pathlib import Path

import gcompute

# What no test imports by itself, and the file whose tests run it.
REACHED_BY = {"certify.cases": "cli/test_certify.py"}
TESTS, PACKAGE = Path(__file__).parent, Path(gcompute.__file__).parent


def is_mark(node: ast.AST) -> bool:
    """Whether an expression is `pytest.mark.oldest`, or a list with it."""
    return any(ast.unparse(inner) == "pytest.mark.oldest" for inner in ast.walk(node))


def marked(source: str) -> list[str]:
    """The names of the tests of a file that are marked, one by one or all by `pytestmark`."""
    body = ast.parse(source).body
    tests = [node for node in body if isinstance(node, ast.FunctionDef) and node.name.startswith("test_")]
    whole = any(
        isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "pytestmark" and is_mark(node.value)
        for node in body
    )
    return [node.name for node in tests if whole or any(map(is_mark, node.decorator_list))]


def packages_imported(source: str) -> set[str]:
    """The packages of gcompute that a file's imports name, as in "parallel" and "parallel.pipeline"."""
    found = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.ImportFrom) and node.module:
            names = [node.module, *(f"{node.module}.{alias.name}" for alias in node.names)]
        elif isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        else:
            continue
        found |= {name.removeprefix("gcompute.") for name in names if name.startswith("gcompute.")}
    return found & packages() | {package for package in packages() for name in found if name.startswith(f"{package}.")}


def packages() -> set[str]:
    """The folders of gcompute that hold modules."""
    return {
        ".".join(path.parent.relative_to(PACKAGE).parts)
        for path in PACKAGE.rglob("*.py")
        if path.name != "__init__.py" and path.parent != PACKAGE
    }


def test_every_package_has_a_marked_test():
    sources = {
        path.relative_to(TESTS).as_posix(): path.read_text(encoding="utf-8") for path in TESTS.rglob("test_*.py")
    }
    covered = set().union(*(packages_imported(source) for source in sources.values() if marked(source)))
    covered |= {package for package, path in REACHED_BY.items() if marked(sources[path])}
    assert {"parallel.pipeline", "serve"} <= packages()
    assert packages() - covered == set()


def test_marks_and_imports_are_read():
    source = "\n".join(
        (
            "import pytest",
            "from gcompute.train import loop",
            "@pytest.mark.oldest",
            "@pytest.mark.parametrize('n', [1])",
            "def test_a(n): ...",
            "def test_b(): ...",
        )
    )
    assert marked(source) == ["test_a"]
    assert marked(f"pytestmark = [pytest.mark.slow, pytest.mark.oldest]\n{source}") == ["test_a", "test_b"]
    assert packages_imported(source) == {"train"}
