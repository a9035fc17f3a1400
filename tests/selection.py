"""Which slow tests a commit calls for, the nearest to its changes first, and for how long they may run.

  pytest -m slow --changed-since=REVISION --rotate=COMMIT --minutes=15 -n 2 --dist loadfile --no-loadscope-reorder

(with "=": until this module is loaded pytest takes what stands after a space for a path to tests) runs, by test file
and in this order: those that changed or import what changed, and those of its packages; a fifth of all, another for
each commit, so that within some commits each file has run; those that depend on a change over more steps; and those
that only what all tests share (pyproject.toml, this module, the root conftest.py) concerns. When the minutes are used
up no further test begins, and each that did not run is named. Where git cannot tell what changed, all files are chosen,
that commit's fifth first. `python tests/selection.py REVISION COMMIT` prints the files alone.
"""

import hashlib
import re
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import pytest
from import_graph import ImportGraph

REPOSITORY = Path(__file__).parents[1]
FRACTION = 5
DIRECT = 1
EVERYWHERE = re.compile(r"pyproject\.toml|constraints/.*|tests/(conftest|selection|import_graph)\.py")
OUT_OF_TIME = "not run for time: the minutes of this run are used up"


@dataclass(frozen=True, slots=True, kw_only=True)
class Chosen:
    """Test files in the order in which they run, each with the reason why."""

    reasons: Mapping[str, str]
    told: str


def choose(graph: ImportGraph, changed: Sequence[str] | None, commit: str | None) -> Chosen:
    """The test files that `changed` files concern (None: unknown, all do), and the fifth that a commit's hash draws."""
    files = graph.test_files()
    turn = {path for path in files if commit and _hash(path) % FRACTION == int(commit, 16) % FRACTION}
    distance = graph.distances(path for path in changed or () if not EVERYWHERE.fullmatch(path))
    all_concerned = changed is None or any(map(EVERYWHERE.fullmatch, changed))

    def place(path: str) -> tuple[int, str]:
        if distance.get(path, DIRECT + 1) <= DIRECT:
            return distance[path], "concerned by a change"
        if path in turn:
            return DIRECT + 1, f"of the fifth of {(commit or '')[:12]}"
        if path in distance:
            return DIRECT + distance[path], f"at {distance[path]} imports from a change"
        return len(graph.files), "everything is concerned"

    wanted = [path for path in files if path in distance or path in turn or all_concerned]
    wanted.sort(key=lambda path: (place(path)[0], _hash(f"{commit}{path}")))
    count = Counter(place(path)[1] for path in wanted)
    told = "; ".join(f"{number} {reason}" for reason, number in count.items()) or "none"
    told = f"test files chosen: {told}{' (what changed is not known)' if changed is None else ''}"
    return Chosen(reasons={path: place(path)[1] for path in wanted}, told=told)


def _hash(text: str) -> int:
    return int(hashlib.sha256(text.encode()).hexdigest(), 16)


def git(*arguments: str, repository: Path = REPOSITORY) -> str | None:
    """What git prints, None where it fails or is not there."""
    try:
        done = subprocess.run(["git", "-C", repository, *arguments], capture_output=True, text=True)
    except FileNotFoundError:
        return None
    return done.stdout.strip() if done.returncode == 0 else None


def base_revision(repository: Path = REPOSITORY) -> str | None:
    """What a commit is compared with: main where it lies below, main's parent of a merge, else the last release tag."""
    head = git("rev-parse", "HEAD", repository=repository)
    for name in ("origin/main", "main"):
        main = git("rev-parse", "--verify", "--quiet", name, repository=repository)
        if (
            main
            and main != head
            and git("merge-base", "--is-ancestor", main, "HEAD", repository=repository) is not None
        ):
            return main
    if git("rev-parse", "--verify", "--quiet", "HEAD^2", repository=repository):
        return git("rev-parse", "HEAD^1", repository=repository)
    return git("describe", "--tags", "--abbrev=0", "--match", "v*", "HEAD^", repository=repository)


def changed_files(revision: str, repository: Path = REPOSITORY) -> list[str] | None:
    """What differs from a revision, in commits, in the working tree and in files that git does not know yet."""
    tracked = git("diff", "--name-only", "--no-renames", revision, "--", repository=repository)
    untracked = git("ls-files", "--others", "--exclude-standard", repository=repository)
    if tracked is None or untracked is None:
        return None
    return [*tracked.splitlines(), *untracked.splitlines()]


def chosen_for(revision: str | None, commit: str | None) -> Chosen:
    """The test files that what differs from `revision` (auto: `base_revision`) and the turn of `commit` call for."""
    base = base_revision() if revision == "auto" else revision
    changed = (changed_files(base) if base else None) if revision else []
    return choose(ImportGraph(REPOSITORY), changed, commit)


DEADLINE: pytest.StashKey[float] = pytest.StashKey()
CHOSEN: pytest.StashKey[Chosen] = pytest.StashKey()


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("selection", "tests that a commit calls for")
    group.addoption("--changed-since", metavar="REVISION", help="test what differs from it (auto: main, a tag)")
    group.addoption("--rotate", metavar="COMMIT", help="test the fifth of all files that its hash draws")
    group.addoption("--minutes", type=float, help="begin no further test after so many, and name those left")
    group.addoption("--left-file", type=Path, help="where the names of those left are written too")


def pytest_configure(config: pytest.Config) -> None:
    if hasattr(config, "workerinput"):
        return
    if minutes := config.getoption("--minutes"):
        config.stash[DEADLINE] = time.time() + 60 * minutes
    revision, commit = config.getoption("--changed-since"), config.getoption("--rotate")
    if revision or commit:
        config.stash[CHOSEN] = chosen_for(revision, commit)


@pytest.hookimpl(optionalhook=True)
def pytest_configure_node(node) -> None:
    """What the main process decided, for its workers."""
    stash = node.config.stash
    node.workerinput["deadline"] = stash.get(DEADLINE, None)
    node.workerinput["chosen"] = list(stash[CHOSEN].reasons) if CHOSEN in stash else None


def _decided(config: pytest.Config) -> tuple[list[str] | None, float | None]:
    if hasattr(config, "workerinput"):
        return config.workerinput["chosen"], config.workerinput["deadline"]
    chosen = list(config.stash[CHOSEN].reasons) if CHOSEN in config.stash else None
    return chosen, config.stash.get(DEADLINE, None)


def _file_of(item: pytest.Item) -> str:
    return item.nodeid.split("::")[0]


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    chosen, _ = _decided(config)
    if chosen is None:
        return
    place = {path: number for number, path in enumerate(chosen)}
    left = [item for item in items if _file_of(item) not in place]
    items[:] = sorted((item for item in items if _file_of(item) in place), key=lambda item: place[_file_of(item)])
    config.hook.pytest_deselected(items=left)


def pytest_sessionfinish(session: pytest.Session, exitstatus: int) -> None:
    if CHOSEN in session.config.stash and exitstatus == pytest.ExitCode.NO_TESTS_COLLECTED:
        # The files that a commit calls for need not hold a slow test.
        session.exitstatus = pytest.ExitCode.OK


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup(item: pytest.Item) -> None:
    _, deadline = _decided(item.config)
    lasts = item.get_closest_marker("lasts")
    end = time.time() + (60 * lasts.args[0] if lasts else 0)
    if deadline is not None and end > deadline:
        pytest.skip(OUT_OF_TIME)


def pytest_terminal_summary(terminalreporter, config: pytest.Config) -> None:
    """Say what was chosen, and name what did not run, so that nobody takes it for tested."""
    if CHOSEN in config.stash:
        terminalreporter.write_line(config.stash[CHOSEN].told)
    skipped = [one for one in terminalreporter.stats.get("skipped", ()) if OUT_OF_TIME in str(one.longrepr)]
    count = Counter(one.nodeid.split("::")[0] for one in skipped)
    lines = [f"{number:4} tests of {path}" for path, number in count.items()]
    if lines:
        minutes = config.getoption("--minutes")
        lines.insert(0, f"NOT RUN FOR TIME ({minutes:g} min): {len(skipped)} tests of {len(count)} files")
        terminalreporter.section("not run for time")
        terminalreporter.write_line("\n".join(lines))
    if (path := config.getoption("--left-file")) is not None:
        path.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")


if __name__ == "__main__":
    print(*chosen_for(*sys.argv[1:]).reasons, sep="\n")
