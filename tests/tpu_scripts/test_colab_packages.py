"""Installing gcompute into Colab's runtime changes no package that is there: every floor admits what it has."""

import re
import tomllib
from pathlib import Path

import pytest
from packaging.requirements import Requirement

ROOT = Path(__file__).parents[2]
# jaxtyping and what it needs are added, for Colab has neither.
ADDED = {"jaxtyping"}


def plain(name: str) -> str:
    """A package's name as registries compare it."""
    return re.sub(r"[-_.]+", "-", name).lower()


def colab() -> dict[str, str]:
    lines = Path(__file__).with_name("colab-2026-08.txt").read_text().splitlines()
    return dict(line.split("==") for line in lines if not line.startswith("#"))


def required() -> list[Requirement]:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"]
    return [Requirement(line) for line in (*project["dependencies"], *extras["serve"], *extras["chat"])]


@pytest.mark.parametrize("requirement", required(), ids=str)
def test_what_colab_has_is_enough(requirement):
    has = colab().get(plain(requirement.name))
    if requirement.name in ADDED:
        assert has is None
    else:
        assert has is not None
        assert requirement.specifier.contains(has)
