"""Meshes and batches relative to the devices, from each command that knows some; run.json keeps what they became."""

import json
from pathlib import Path

from command_line import TINY, Command

from gcompute.config.mesh import MeshShape

OPEN = ("--mesh", "data=-1", "--per-device-batch", "2", "--accumulation", "1")


def without(flags: tuple[str, ...], *names: str) -> list[str]:
    """The flags without those named and their values."""
    return [flag for i, flag in enumerate(flags) if flag not in names and flags[i - 1] not in names]


def test_training_keeps_the_resolved_sizes_and_the_same_command_goes_on(gcompute: Command, words: Path, tmp_path: Path):
    out = tmp_path / "run"
    command = [*without(TINY, "--mesh", "--batch"), *OPEN, "--steps", "2", "--data", str(words), "--out", str(out)]
    ended = gcompute(*command)
    assert ended.status == 0, ended.err
    kept = json.loads((out / "run.json").read_text())["train"]
    assert (kept["mesh"], kept["batch"], kept["per_device_batch"]) == ("data=8", 16, None)
    # It describes the run that is there but for what is added: no other difference is named.
    assert "and another one: dropout is 0.0 there and 0.5 here. Go on" in gcompute(*command, "--dropout", "0.5").error


def test_targets_have_devices_too(gcompute: Command):
    compiled = gcompute(
        *("compile", "train", "test", "--on", "cpu:8", "--mesh", "fsdp=-1,tensor=2", "--per-device-batch", "2"),
        "--json",
    )
    assert compiled.status == 0, compiled.err
    train = json.loads(compiled.out)["run"]["train"]
    assert (train["mesh"], train["batch"]) == ("fsdp=4,tensor=2", 8)
    planned = gcompute("plan", "train", "llama3-8b", "--on", "v5e:4x4", "--mesh", "fsdp=-1", "--batch", "16", "--json")
    assert MeshShape.parse(json.loads(planned.out)["mesh"]) == MeshShape(fsdp=16)
    served = gcompute("plan", "serve", "llama3-8b", "--on", "v5e:2x4", "--mesh", "tensor=-1", "--json")
    assert MeshShape.parse(json.loads(served.out)["mesh"]) == MeshShape(tensor=8)


def test_where_no_devices_are_known_a_number_is_asked_for(gcompute: Command):
    assert "Give a number" in gcompute("explain", "demo", "--mesh", "data=-1").error
