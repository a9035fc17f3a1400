"""The TPU compiler on slices that are not here: small programs on every chip, then the trainer's real steps.

Each compiles in a process of its own, for libtpu reads its environment once.
"""

import importlib.util
import json
import subprocess
import sys
from typing import Any

import pytest

from gcompute.aot.target import GIB, TPU_NAMES
from gcompute.hardware.catalogue import find_chip
from gcompute.hardware.target import Target

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="the TPU compiler, libtpu, is not installed"),
]

# An update of L matrices sharded over all devices, gathered a layer at a time; prints its report.
SMALL = """
import json, os, sys
from gcompute.aot.target import target_devices, target_environment
from gcompute.hardware.target import Target

target, width = Target.parse(sys.argv[1]), int(sys.argv[2])
os.environ.update(target_environment(target))
import jax, jax.numpy as jnp, numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec as P
from gcompute.aot.report import compile_report

mesh = Mesh(np.array(target_devices(target)), ("fsdp",), axis_types=(AxisType.Auto,))
split, rows = NamedSharding(mesh, P(None, "fsdp")), NamedSharding(mesh, P("fsdp"))
w = jax.ShapeDtypeStruct((8, width, width), jnp.float32, sharding=split)
x = jax.ShapeDtypeStruct((8 * width, width), jnp.bfloat16, sharding=rows)

def loss(w, x):
    x, _ = jax.lax.scan(lambda x, w: (jnp.tanh(x @ w.astype(jnp.bfloat16)), None), x, w)
    return x.astype(jnp.float32).sum()

step = jax.jit(lambda w, x: w - jax.grad(loss)(w, x), donate_argnums=0, out_shardings=split)
print(json.dumps(compile_report(step.lower(w, x), target, mesh=mesh)[0].to_dict()))
"""
WIDTH = 1024


def start_small(target: str, width: int) -> subprocess.Popen:
    return subprocess.Popen([sys.executable, "-c", SMALL, target, str(width)], stdout=subprocess.PIPE, text=True)


def small(target: str, width: int) -> dict[str, Any]:
    with start_small(target, width) as process:
        out, _ = process.communicate(timeout=300)
    assert process.returncode == 0
    return json.loads(out.splitlines()[-1])


@pytest.mark.parametrize("target", ["v4:2x2x1", "v5e:2x2", "v5p:2x2x2", "v6e:2x4", "v7x:2x2x1", "2*v5e:2x2"])
def test_every_chip(target: str):
    report = small(target, WIDTH)
    known = Target.parse(target)
    assert report["fits"]
    assert report["unreadable"] is None
    shard = 8 * WIDTH * WIDTH * 4 // known.num_devices
    assert report["memory"]["aliased_bytes"] == shard
    rows_bytes = 8 * WIDTH * WIDTH * 2 // known.num_devices
    assert report["memory"]["arguments_bytes"] == shard + rows_bytes
    assert {tuple(one["axes"]) for one in report["collectives"]} == {("fsdp",)}
    # Both passes gather every matrix in bfloat16, and the backward pass reduces its gradient, which costs a device as
    # much as a gather, or twice that where the compiler keeps the whole sum and slices it.
    n, whole = known.num_devices // known.slices, 8 * WIDTH * WIDTH * 2
    sent = sum(one["sent_bytes"] for one in report["collectives"] if not one["between_slices"])
    assert 3 <= sent / ((n - 1) / n * whole) <= 4.2
    assert any(one["between_slices"] for one in report["collectives"]) == (known.slices > 1)


@pytest.mark.parametrize("chip", TPU_NAMES)
def test_usable_memory_is_what_the_compiler_says(chip: str):
    target = f"{chip}:2x2" if find_chip(chip).torus_dims == 2 else f"{chip}:2x2x1"
    report = small(target, 2**17)
    assert not report["fits"]
    assert report["limit_bytes"] == pytest.approx(find_chip(chip).usable_hbm_bytes, abs=0.02 * GIB)
    assert report["needed_bytes"] == report["memory"]["arguments_bytes"] + report["memory"]["temporaries_bytes"]
    assert report["needed_bytes"] > report["limit_bytes"]
    assert report["largest"]


def test_two_at_once():
    with start_small("v5e:2x2", WIDTH) as one, start_small("v5e:2x2", WIDTH) as other:
        reports = [json.loads(process.communicate(timeout=300)[0].splitlines()[-1]) for process in (one, other)]
    assert reports[0]["memory"] == reports[1]["memory"]


# The 8 v6e are a published configuration of MaxText, whose recipe keeps activations in bfloat16 and turns collective
# matmul off, too.
STEPS = {
    "llama3-8b on 16 v5e": ("llama3-8b", "v5e:4x4", "fsdp=16", 16, 2048),
    "llama3-8b on 8 v6e": ("llama3-8b", "v6e:2x4", "fsdp=8", 24, 8192, "--no-collective-matmul"),
    "llama3-70b on 1,024 v5p": ("llama3-70b", "v5p:8x8x16", "fsdp=256,tensor=4", 1024, 8192),
    "llama3-405b on 6,144 v5p": ("llama3-405b", "v5p:16x16x24", "data=3,fsdp=512,tensor=4", 1536, 8192),
    "mixtral-8x7b on 64 v5p": ("mixtral-8x7b", "v5p:4x4x4", "fsdp=8,expert=8", 64, 8192),
    "llama3-8b in stages": ("llama3-8b", "v5p:2x2x4", "stage=4,fsdp=4", 64, 4096, "--layers", "4"),
    "llama3-8b on two slices": ("llama3-8b", "2*v6e:4x4", "data=2,fsdp=16", 64, 4096),
}


@pytest.mark.parametrize("name", STEPS)
def test_the_trainers_step_fits(name: str):
    model, target, mesh, batch, seq, *flags = STEPS[name]
    ended = subprocess.run(
        [
            *(sys.executable, "-m", "gcompute", "compile", "train", model, "--on", target, "--mesh", mesh),
            *("--batch", str(batch), "--seq", str(seq), "--remat", "full", "--residual", "bfloat16", "--json"),
            *flags,
        ],
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )
    assert ended.returncode == 0, ended.stderr + ended.stdout
    report = json.loads(ended.stdout)
    assert report["fits"]
    assert report["needed_bytes"] < report["limit_bytes"]
    assert report["unreadable"] is None
    along = {axis for one in report["collectives"] for axis in one["axes"] or ()}
    assert along >= {part.partition("=")[0] for part in mesh.split(",")}
