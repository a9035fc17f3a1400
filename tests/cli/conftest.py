"""The command line in this process, a tiny run for it, and one finished training that tests copy and damage."""

import random
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
from command_line import TINY, Command, Ended

from gcompute.cli.main import main
from gcompute.measure.roofline import load_or_measure

WORDS = ("the", "of", "and", "to", "in", "is", "that", "it", "was", "for", "on", "are", "with", "as", "his", "they")


@pytest.fixture(scope="session")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A cache with a roofline in it, measured in a moment, for no test here reads its figures."""
    directory = tmp_path_factory.mktemp("cache")
    load_or_measure(directory / "roofline.json", seconds=0.05)
    return directory


@pytest.fixture(scope="session")
def words(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("words") / "words.txt"
    path.write_text(" ".join(random.Random(0).choices(WORDS, k=2000)), encoding="utf-8")
    return path


@pytest.fixture(scope="session")
def environment(cache: Path) -> Iterator[pytest.MonkeyPatch]:
    """The cache in its place."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("GCOMPUTE_CACHE", str(cache))
        patch.setenv("COLUMNS", "100")
        yield patch


@pytest.fixture
def gcompute(environment, capfd: pytest.CaptureFixture[str]) -> Command:
    """Run a command line in this process."""

    def run(*args: str | Path) -> Ended:
        capfd.readouterr()
        with pytest.raises(SystemExit) as ended:
            main([str(arg) for arg in args])
        out, err = capfd.readouterr()
        return Ended(status=ended.value.code, out=out, err=err)

    return run


@pytest.fixture(scope="session")
def finished(environment, words: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run directory of six steps, with checkpoints 2, 4 and 6."""
    out = tmp_path_factory.mktemp("finished") / "run"
    with pytest.raises(SystemExit) as ended:
        main([*TINY, "--data", str(words), "--out", str(out)])
    assert ended.value.code == 0
    return out


@pytest.fixture
def run_copy(finished: Path, tmp_path: Path) -> Path:
    """That run directory, to damage."""
    return Path(shutil.copytree(finished, tmp_path / "run"))
