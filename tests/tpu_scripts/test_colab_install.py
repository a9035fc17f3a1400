"""Installing gcompute in a copy of Colab's environment changes nothing that is there: `pip list` before and after."""

import re
import subprocess
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).parents[2]
COLAB = REPOSITORY / "constraints" / "colab-tpu-2026-08.txt"
# What Colab's runtime lacks, and what that depends on.
ADDED = {"gcompute", "jaxtyping", "wadler-lindig"}
PYTHON = "3.13"


def frozen(python: Path) -> dict[str, str]:
    """Versions of what an environment has."""
    command = [python, "-m", "pip", "list", "--format=freeze", "--disable-pip-version-check"]
    lines = subprocess.run(command, check=True, capture_output=True, text=True).stdout.splitlines()
    return {re.sub(r"[-_.]+", "-", name).lower(): version for name, version in (line.split("==") for line in lines)}


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
