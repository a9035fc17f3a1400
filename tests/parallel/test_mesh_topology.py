"""The order of chips on TPU topologies as libtpu describes them, in a process of its own."""

import importlib.util
import itertools
import json
import os
import subprocess
import sys

import pytest

from gcompute.aot.target import target_environment
from gcompute.hardware.target import Target

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="libtpu, which describes TPUs, is missing"),
]

PROGRAM = """
import json, sys
from gcompute.aot.target import target_devices
from gcompute.hardware.target import Target
from gcompute.config.mesh import MeshShape
from gcompute.parallel.mesh import build_mesh
found = []
for target, mesh in json.loads(sys.argv[1]):
    array = build_mesh(MeshShape.parse(mesh), target_devices(Target.parse(target))).devices
    chips = [[chip.id, list(chip.coords), getattr(chip, "slice_index", 0)] for chip in array.flat]
    found.append({"shape": array.shape, "chips": chips})
print(json.dumps(found))
"""
CASES = [
    ("v5e:2x4", "fsdp=2,tensor=4"),
    ("v5e:2x4", "data=2,fsdp=2,tensor=2"),
    ("v6e:2x4", "tensor=8"),
    ("v5e:2x2", "fsdp=2,tensor=2"),
    ("v5p:2x2x2", "fsdp=2,tensor=4"),
    ("v5e:4x4", "fsdp=4,tensor=4"),
    ("v5e:4x4", "data=2,fsdp=4,tensor=2"),
    ("v6e:4x4", "fsdp=4,tensor=4"),
    ("v5p:4x4x4", "fsdp=16,tensor=4"),
    ("v5p:4x4x4", "data=4,fsdp=8,tensor=2"),
    ("v7x:2x2x4", "fsdp=16,tensor=2"),
    ("2*v5e:4x4", "data=2,fsdp=4,tensor=4"),
    ("2*v5p:2x2x2", "data=2,fsdp=4,tensor=2"),
]


@pytest.fixture(scope="module")
def meshes() -> list[dict]:
    environment = {**os.environ, **target_environment(Target.parse(CASES[0][0]))}
    command = [sys.executable, "-c", PROGRAM, json.dumps(CASES)]
    result = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120)
    assert result.returncode == 0, result.stderr
    return json.loads(result.stdout)


@pytest.mark.parametrize("index", range(len(CASES)), ids=lambda index: " ".join(CASES[index]))
def test_tensor_runs_along_links_and_data_alone_crosses_slices(index: int, meshes: list[dict]):
    target = Target.parse(CASES[index][0])
    sides = (*target.shape, 1)[:3]
    data, *_, tensor = meshes[index]["shape"]
    chips = meshes[index]["chips"]
    assert len({(where, number) for number, _, where in chips}) == len(chips) == target.num_devices
    for start in range(0, len(chips), tensor):
        line = chips[start : start + tensor]
        assert len({where for _, _, where in line}) == 1
        for (_, one, _), (_, other, _) in itertools.pairwise(line):
            steps = [min((a - b) % side, (b - a) % side) for a, b, side in zip(one, other, sides, strict=True)]
            # The two devices of one v7x chip are nearer than any link.
            assert sum(steps) == (0 if target.chip == "v7x" else 1), f"{one} and {other} are no neighbours"
    if target.slices > 1:
        # Row-major, data outermost: each of its places is a run of chips, and all of a run lie in one slice.
        run = len(chips) // data
        runs = [chips[start : start + run] for start in range(0, len(chips), run)]
        assert [{where for _, _, where in part} for part in runs] == [{0}, {1}]
