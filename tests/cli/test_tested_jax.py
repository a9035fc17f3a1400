"""A JAX newer than any tested is named, once, and does not stop anything."""

import importlib.metadata

import pytest

from gcompute.cli import tested_jax
from gcompute.cli.environment import quiet_backends
from gcompute.cli.tested_jax import NEWEST_TESTED_JAX, OLDEST_TESTED_JAX, untested


@pytest.fixture
def newer(monkeypatch):
    """A JAX of the next minor version, in a process that has said nothing yet."""
    major, minor = map(int, NEWEST_TESTED_JAX.split("."))
    found, version = importlib.metadata.version, f"{major}.{minor + 1}.0.dev1"
    monkeypatch.setattr(importlib.metadata, "version", lambda name: version if name == "jax" else found(name))
    tested_jax.warn_if_untested.cache_clear()
    yield version
    tested_jax.warn_if_untested.cache_clear()


@pytest.mark.oldest
def test_a_newer_jax_is_named_on_standard_error_once(newer, capsys):
    quiet_backends()
    quiet_backends()
    out, err = capsys.readouterr()
    assert out == ""
    (line,) = err.splitlines()
    assert line.startswith(f"warning: JAX {newer} is newer than any")


def test_a_command_works_all_the_same(newer, gcompute):
    ended = gcompute("explain", "demo", "--mesh", "data=2")
    assert ended.status == 0
    assert ended.err.count(newer) == 1


@pytest.mark.oldest
@pytest.mark.parametrize(
    ("version", "is_told"),
    [(OLDEST_TESTED_JAX, False), ("0.10.2", False), (f"{NEWEST_TESTED_JAX}.9.1", False), ("0.99", True), ("1.0", True)],
)
def test_versions_are_compared_as_numbers(version, is_told):
    assert (untested(version) is not None) is is_told
