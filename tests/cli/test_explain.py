"""gcompute explain: meshes far larger than this machine, as a table, JSON and a picture."""

import json
from pathlib import Path

import pytest
from command_line import Command

from gcompute.config.presets import PRESETS
from gcompute.plan.params import count_params


def test_a_mesh_of_1024_chips_as_json(gcompute: Command):
    shown = gcompute("explain", "llama3-70b", "--mesh", "data=4,fsdp=64,tensor=4", "--optimizer", "adamw", "--json")
    assert shown.status == 0, shown.err
    document = json.loads(shown.out)
    assert document["num_devices"] == 1024
    parameters, optimizer = document["parameters"], document["optimizer"]
    assert parameters["total_bytes"] == 4 * count_params(PRESETS["llama3-70b"]).total
    # Two moments a parameter, and two counts of steps, which all devices hold.
    assert optimizer["total_bytes"] == 2 * parameters["total_bytes"] + 8
    assert optimizer["whole_bytes"] == 8
    query = next(row for row in parameters["tensors"] if row["path"].endswith("q_DNH"))
    assert query["split"] == [[], ["fsdp"], ["tensor"], []]
    assert query["piece"] == [80, 8192 // 64, 64 // 4, 128]
    assert (query["copies"], query["copied_over"]) == (4, ["data"])


def test_the_optimizer_that_zero_splits(gcompute: Command):
    arguments = ("explain", "test", "--mesh", "data=4", "--optimizer", "adamw", "--json")
    whole, split = (json.loads(gcompute(*arguments, "--zero", stage).out)["optimizer"] for stage in ("0", "1"))
    assert whole["bytes_per_device"] == whole["total_bytes"]
    assert split["bytes_per_device"] - 8 == (whole["bytes_per_device"] - 8) // 4


@pytest.mark.oldest
def test_a_table_and_a_picture(gcompute: Command, tmp_path: Path):
    picture = tmp_path / "mlp.png"
    shown = gcompute("explain", "test", "--mesh", "fsdp=2,tensor=2", "--tensor", "mlp.", "--plot", picture)
    assert shown.status == 0, shown.err
    lines = shown.out.splitlines()
    assert lines[1].split()[0] == "array"
    row = next(line for line in lines if line.startswith("blocks.mlp.up_DF"))
    assert row.split() == [
        "blocks.mlp.up_DF",
        "LDF",
        "2,32,64",
        "float32",
        "-,",
        "fsdp,",
        "tensor",
        "2,16,32",
        "4,096",
        "1",
    ]
    assert "attention" not in shown.out
    assert picture.read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["testt"], "Did you mean 'test'?"),
        (["test", "--mesh", "fsdp=5"], "cuts size 32 into 5"),
        (["test", "--mesh", "fspd=4"], "Did you mean 'fsdp'?"),
        (["test", "--tensor", "nothing"], "--tensor 'nothing' is in no name. Names: blocks.attention"),
        (["test", "--zero", "1"], "--zero 1 splits the optimizer's state: add --optimizer"),
        (["test", "--optimizer", "adamw", "--tensor", "count", "--plot", "x.png"], "--plot draws 1 to 24 parameters"),
    ],
)
def test_what_cannot_be_shown_is_one_line(arguments: list[str], message: str, gcompute: Command):
    assert message in gcompute("explain", *arguments).error
