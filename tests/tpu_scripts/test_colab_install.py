"""Installing gcompute in a copy of Colab's environment changes nothing that is there: by every floor, and by pip."""

import re
import subprocess
import tomllib
from pathlib import Path

import pytest
from packaging.requirements import Requirement

REPOSITORY = Path(__file__).parents[2]
COLAB = REPOSITORY / "constraints" / "colab-tpu-2026-08.txt"
# What Colab's runtime lacks, and what that depends on.
ADDED = {"gcompute", "jaxtyping", "wadler-lindig"}
PYTHON = "3.13"


def plain(name: str) -> str:
    """A package's name as registries compare it."""
    return re.sub(r"[-_.]+", "-", name).lower()


def versions(lines: list[str]) -> dict[str, str]:
    return {plain(name): version for name, version in (line.split("==") for line in lines if not line.startswith("#"))}


def required() -> list[Requirement]:
    project = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"]
    return [Requirement(line) for line in (*project["dependencies"], *extras["serve"], *extras["chat"])]


@pytest.mark.parametrize("requirement", required(), ids=str)
def test_what_colab_has_is_enough(requirement):
    has = versions(COLAB.read_text().splitlines()).get(plain(requirement.name))
    if requirement.name in ADDED:
        assert has is None
    else:
        assert has is not None
        assert requirement.specifier.contains(has)


def frozen(python: Path) -> dict[str, str]:
    """Versions of what an environment has."""
    command = [python, "-m", "pip", "list", "--format=freeze", "--disable-pip-version-check"]
    lines = subprocess.run(command, check=True, capture_output=True, text=True).stdout.splitlines()
    return versions(lines)


@pytest.mark.slow
def test_installing_changes_nothing_that_is_there(tmp_path: Path):
    found = subprocess.run([REPOSITORY / ".ci" / "find_python", PYTHON], capture_output=True, text=True)
    if found.returncode:
        pytest.skip(found.stderr.strip())
    subprocess.run([found.stdout.strip(), "-m", "venv", tmp_path], check=True)
    python = tmp_path / "bin" / "python"
    pip = [python, "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
    subprocess.run([*pip, "--no-deps", "-r", COLAB], check=True)
    before = frozen(python)
    assert before["jax"] == "0.7.2"
    subprocess.run([*pip, REPOSITORY], check=True)
    after = frozen(python)
    assert {name: after.get(name) for name in before} == before
    assert set(after) - set(before) == ADDED
