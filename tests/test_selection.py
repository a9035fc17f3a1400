"""Which slow tests are chosen for a commit: on a small tree made for it, on this repository, and by pytest itself."""

import re
import subprocess
import sys
from pathlib import Path

import pytest
from import_graph import ImportGraph
from selection import FRACTION, REPOSITORY, base_revision, changed_files, choose

TREE = {
    "gcompute/__init__.py": "",
    "gcompute/__main__.py": "from gcompute.cli.main import main",
    "gcompute/config/size.py": "SIZE = 1",
    "gcompute/model/__init__.py": "",
    "gcompute/model/layer.py": "def width():\n    from gcompute.config.size import SIZE\n    return SIZE",
    "gcompute/model/weights.json": "{}",
    "gcompute/serve/engine.py": "import gcompute.model.layer as layer",
    "gcompute/serve/native/kernel.cc": "",
    "gcompute/cli/main.py": "from gcompute.serve import engine\nfrom . import show",
    "gcompute/cli/show.py": "",
    "labs/one.py": "from side import f",
    "labs/side.py": "from gcompute.model import layer",
    "tests/conftest.py": "",
    "tests/serve/conftest.py": "from tiny import T",
    "tests/serve/tiny.py": "from gcompute.config import size",
    "tests/serve/test_engine.py": "import gcompute.serve.engine",
    "tests/serve/test_words.py": "",
    "tests/model/test_layer.py": "from gcompute.model.layer import width",
    "tests/model/test_apart.py": "CODE = 'import json; from gcompute.config.size import SIZE'",
    "tests/cli/test_run.py": "COMMAND = ['-m', 'gcompute', 'serve']",
    "tests/labs/test_labs.py": "LABS = 'labs'",
    "tests/plan/test_alone.py": "import json",
}


def plant(folder: Path, tree: dict[str, str]) -> Path:
    for name, text in tree.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text, encoding="utf-8")
    return folder


@pytest.fixture
def graph(tmp_path: Path) -> ImportGraph:
    return ImportGraph(plant(tmp_path, TREE))


def test_files_depend_on_what_they_import_mention_and_run(graph: ImportGraph):
    assert graph.dependents("gcompute/config/size.py") == {
        "gcompute/model/layer.py",
        "tests/serve/tiny.py",
        "tests/model/test_apart.py",
    }
    assert graph.dependents("gcompute/cli/show.py") == {"gcompute/cli/main.py"}
    assert graph.dependents("gcompute/__main__.py") == {"tests/cli/test_run.py"}
    assert graph.dependents("labs/side.py") == {"labs/one.py"}
    assert graph.dependents("tests/serve/conftest.py") == {
        f"tests/serve/{name}.py" for name in ("tiny", "test_engine", "test_words")
    }
    # What runs a package's __init__.py without a name of its own from it does not depend on it.
    assert graph.dependents("gcompute/model/__init__.py") == frozenset()


def steps_to(graph: ImportGraph, *changed: str) -> dict[str, int]:
    distances = graph.distances(changed)
    return {path.split("/test_")[1]: distances[path] for path in graph.test_files() if path in distances}


def test_distances_count_imports_and_the_tests_of_a_package_are_near(graph: ImportGraph):
    assert steps_to(graph, "gcompute/config/size.py") == {
        "apart.py": 1,
        "layer.py": 2,
        "engine.py": 3,
        "words.py": 3,
        "run.py": 5,
    }
    assert steps_to(graph, "gcompute/model/layer.py") == {"layer.py": 1, "apart.py": 1, "engine.py": 2, "run.py": 4}
    assert steps_to(graph, "tests/plan/test_alone.py") == {"alone.py": 0}
    assert steps_to(graph, "tests/serve/test_words.py") == {"words.py": 0}
    assert steps_to(graph, "README.md", "Makefile") == {}


def test_files_that_are_no_modules_stand_for_those_beside_them(graph: ImportGraph):
    assert steps_to(graph, "gcompute/model/weights.json") == steps_to(
        graph, "gcompute/model/layer.py", "gcompute/model/__init__.py"
    )
    # A folder of C++ alone: the modules of the folder above.
    assert steps_to(graph, "gcompute/serve/native/kernel.cc") == {"engine.py": 1, "words.py": 1, "run.py": 3}
    assert steps_to(graph, "gcompute/serve/deleted.py")["engine.py"] == 1
    assert steps_to(graph, "labs/notebook.ipynb") == {"labs.py": 1}


def test_near_files_come_first_then_the_fifth_then_far_ones(graph: ImportGraph):
    commit = "c0ffee"
    chosen = choose(graph, ["gcompute/config/size.py", "pyproject.toml"], commit)
    order = list(chosen.reasons)
    assert set(order) == set(graph.test_files())
    assert order[0] == "tests/model/test_apart.py"
    reasons = list(chosen.reasons.values())
    ranks = ["concerned by", "of the fifth", "imports from", "everything"]
    found = [next(rank for rank, words in enumerate(ranks) if words in reason) for reason in reasons]
    assert found == sorted(found)
    # Without what all tests share, nothing else is chosen than what depends on the change and the fifth.
    fewer = choose(graph, ["gcompute/config/size.py"], commit)
    assert list(fewer.reasons) == [path for path in order if "everything" not in chosen.reasons[path]]


def test_within_some_commits_every_file_has_its_turn_and_none_twice(graph: ImportGraph):
    turns = [list(choose(graph, [], f"{commit:x}").reasons) for commit in range(100, 100 + FRACTION)]
    assert sorted(path for turn in turns for path in turn) == sorted(graph.test_files())
    assert turns[0] == list(choose(graph, [], f"{100 + FRACTION:x}").reasons) or len(turns[0]) > 1


def test_where_nothing_is_known_everything_is_chosen(graph: ImportGraph):
    chosen = choose(graph, None, "abc")
    assert set(chosen.reasons) == set(graph.test_files())
    assert set(choose(graph, [], None).reasons) == set()


def test_in_this_repository_an_engine_change_concerns_its_tests_and_not_the_planner():
    graph = ImportGraph(REPOSITORY)
    distances = graph.distances(["gcompute/serve/engine.py"])
    assert distances["tests/serve/test_engine.py"] == 1
    assert distances["tests/cli/test_interrupt.py"] > 1
    assert "tests/plan/test_sizes.py" not in distances
    # Every module is reached by some test, so no change goes untested.
    lost = [path for path in graph.files if path.startswith("gcompute/") and not _reaches_a_test(graph, path)]
    assert [path for path in lost if not path.endswith("__init__.py")] == []


def _reaches_a_test(graph: ImportGraph, path: str) -> bool:
    return any("/test_" in other for other in graph.distances([path]))


def git(folder: Path, *arguments: str) -> None:
    who = ("-c", "user.name=a", "-c", "user.email=a@b.c", "-c", "init.defaultBranch=main", "-c", "commit.gpgsign=false")
    subprocess.run(["git", *who, "-C", folder, *arguments], check=True, capture_output=True)


def test_a_branch_is_compared_with_main_a_merge_with_its_parent_and_main_with_the_last_tag(tmp_path: Path):
    assert changed_files("HEAD", tmp_path) is None
    assert base_revision(tmp_path) is None
    git(tmp_path, "init")
    for number in range(3):
        plant(tmp_path, {f"{number}.txt": "", "shared.txt": str(number)})
        git(tmp_path, "add", ".")
        git(tmp_path, "commit", "-m", str(number))
        if number == 0:
            assert base_revision(tmp_path) is None
            git(tmp_path, "tag", "v1")
    assert base_revision(tmp_path) == "v1"
    assert changed_files("v1", tmp_path) == ["1.txt", "2.txt", "shared.txt"]
    git(tmp_path, "checkout", "-b", "branch")
    plant(tmp_path, {"new.txt": ""})
    assert changed_files("HEAD", tmp_path) == ["new.txt"]
    git(tmp_path, "add", ".")
    git(tmp_path, "commit", "-m", "branch")
    assert changed_files(base_revision(tmp_path), tmp_path) == ["new.txt"]
    git(tmp_path, "checkout", "main")
    git(tmp_path, "merge", "--no-ff", "branch", "-m", "merge")
    assert changed_files(base_revision(tmp_path), tmp_path) == ["new.txt"]
    assert changed_files("no such revision", tmp_path) is None


# Every look at the clock finds that a minute has passed.
CONFTEST = """
import itertools
import types

import selection
from selection import *

minutes = itertools.count()
selection.time = types.SimpleNamespace(time=lambda: 60 * next(minutes))
"""
LONG_TEST = "import pytest\n\n@pytest.mark.lasts(5)\ndef test_long():\n    pass\n\n"
THREE_TESTS = "import pytest\n\n@pytest.mark.parametrize('n', range(3))\ndef test_it(n):\n    pass\n"


def test_pytest_runs_the_chosen_in_order_and_names_what_its_minutes_did_not_reach(tmp_path: Path, tmp_path_factory):
    here = REPOSITORY / "tests"
    plant(
        tmp_path,
        {
            "pyproject.toml": "[tool.pytest.ini_options]\npythonpath = ['tests', 'tests/b']\ntestpaths = ['tests']\n",
            "gcompute/a.py": "",
            "tests/conftest.py": CONFTEST,
            **{
                f"tests/{name}": (here / name).read_text(encoding="utf-8")
                for name in ("selection.py", "import_graph.py")
            },
            "tests/a/test_near.py": "NAME = 'gcompute.a'\n" + LONG_TEST + THREE_TESTS,
            "tests/b/near.py": "NAME = 'gcompute.a'\n",
            "tests/b/test_far.py": "import near\n" + THREE_TESTS,
            "tests/c/test_other.py": THREE_TESTS,
        },
    )
    git(tmp_path, "init")
    git(tmp_path, "add", ".")
    git(tmp_path, "commit", "-m", "all")
    git(tmp_path, "tag", "v1")
    plant(tmp_path, {"gcompute/a.py": "changed = True"})
    command = "-m pytest -v -p no:cacheprovider -n 1 --dist loadfile --no-loadscope-reorder --import-mode=importlib"
    # As CI gives them: the file is there, and elsewhere.
    left = tmp_path_factory.mktemp("elsewhere") / "left.txt"
    left.touch()
    choice = f"--changed-since=v1 --minutes=3.5 --left-file={left}"
    done = subprocess.run(
        [sys.executable, *command.split(), *choice.split()], cwd=tmp_path, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "1 concerned by a change; 1 at 2 imports from a change" in done.stdout
    assert re.findall(r"PASSED (?:\[ *\d+%\] )?(tests/\S+?)::", done.stdout) == ["tests/a/test_near.py"] * 3
    assert re.findall(r"SKIPPED (?:\[ *\d+%\] )?(tests/\S+?)::", done.stdout) == [
        "tests/a/test_near.py",
        *["tests/b/test_far.py"] * 3,
    ]
    told = [
        "NOT RUN FOR TIME (3.5 min): 4 tests of 2 files",
        "   1 tests of tests/a/test_near.py",
        "   3 tests of tests/b/test_far.py",
    ]
    assert left.read_text(encoding="utf-8").splitlines() == told
    assert "\n".join(told) in done.stdout


def test_ci_gives_the_choice_in_a_form_that_pytest_takes_before_it_knows_the_options():
    """`--left-file PATH` would be a path to tests for it, whose folder it takes for the project."""
    script = (Path(__file__).parents[1] / ".ci" / "run").read_text(encoding="utf-8")
    (choice,) = re.findall(r'choice="(.*)"', script)
    assert all(re.fullmatch(r"--[a-z-]+=\S+", word) for word in choice.split())
