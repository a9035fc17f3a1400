"""gcompute exam, as it is called."""

import json

import pytest
from click.testing import CliRunner

from gcompute.cli.exam import command


@pytest.mark.oldest
def test_json():
    done = CliRunner().invoke(command, ["--json"])
    assert done.exit_code == 0, done.output
    told = json.loads(done.output)
    assert {part["kind"] for part in told["parts"]} >= {
        "worked problems",
        "train step, TPU",
        "train memory, TPU compiler",
    }
    assert all(part["passed"] for part in told["parts"])
    assert len(told["headline"]) == 10


def test_a_table_and_every_case():
    done = CliRunner().invoke(command, ["--cases"])
    assert done.exit_code == 0
    assert "the planner's exam" in done.output
    assert "roofline-v5e" in done.output
    assert "llama3-405b on v5p:16x16x24" in done.output
