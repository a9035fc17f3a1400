"""The sets of packages in constraints/ are ones that pyproject.toml admits, so that pip can install them."""

import re
import tomllib
from pathlib import Path

import pytest
from packaging.requirements import Requirement

REPOSITORY = Path(__file__).parents[1]
SETS = sorted((REPOSITORY / "constraints").glob("*.txt"))
# What a notebook there has: what runs tests is in colab-tests.
COLAB = "colab-tpu-2026-08"


def project() -> dict:
    return tomllib.loads((REPOSITORY / "pyproject.toml").read_text(encoding="utf-8"))["project"]


def plain(name: str) -> str:
    """A package's name as registries compare it."""
    return re.sub(r"[-_.]+", "-", name).lower()


def pins(path: Path) -> dict[str, str]:
    """Names and versions in a file, and in those that it includes."""
    found: dict[str, str] = {}
    for line in path.read_text(encoding="utf-8").splitlines():
        if line.startswith("-c "):
            found |= pins(path.parent / line.removeprefix("-c "))
        elif not line.startswith("#"):
            name, version = line.split("==")
            assert name not in found, f"{name} is pinned twice"
            found[name] = version
    return found


@pytest.mark.parametrize("path", SETS, ids=lambda path: path.stem)
def test_every_pin_is_one_that_the_project_admits(path: Path):
    extras = project()["optional-dependencies"]
    pinned = pins(path)
    assert pinned == {plain(name): version for name, version in pinned.items()}
    wanted = map(Requirement, (*project()["dependencies"], *extras["serve"], *extras["chat"], *extras["dev"]))
    for requirement in wanted:
        if (version := pinned.get(plain(requirement.name))) is not None:
            assert requirement.specifier.contains(version), f"{requirement} is pinned at {version}"
    assert {"jax", "jaxlib", "flax", "numpy"} <= set(pinned)


def test_there_is_a_set_for_each_python_that_the_project_is_tested_on():
    assert {path.stem for path in SETS} >= {"python3.11", "python3.12", "python3.13", COLAB, "colab-tests"}


@pytest.mark.parametrize("path", [path for path in SETS if path.stem != COLAB], ids=lambda path: path.stem)
def test_a_set_that_tests_run_with_pins_what_runs_them(path: Path):
    tools = {plain(Requirement(line).name) for line in project()["optional-dependencies"]["dev"]} - {"gcompute"}
    assert tools <= set(pins(path))
