"""The engine's programs through the TPU compiler, for a slice that is not here."""

import importlib.util
import json
import subprocess
import sys

import pytest

from gcompute.config.architecture import architecture
from gcompute.config.mesh import MeshShape
from gcompute.config.presets import PRESETS
from gcompute.hardware.target import Target
from gcompute.plan.serving import ServeRun, serve_memory

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="the TPU compiler, libtpu, is not installed"),
]


def test_prefill_and_decode_compile_and_need_what_is_predicted():
    done = subprocess.run(
        [
            *(sys.executable, "-m", "gcompute", "compile", "serve", "llama-100m", "--on", "v5e:2x2"),
            *("--mesh", "data=2,tensor=2", "--slots", "64", "--context", "2048", "--prompt", "512", "--json"),
        ],
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    answer = json.loads(done.stdout)
    run = ServeRun(
        model=architecture(PRESETS["llama-100m"]),
        mesh=MeshShape(data=2, tensor=2),
        prompt=512,
        output=1,
        context=2048,
        concurrency=64,
    )
    predicted = serve_memory(run, Target.parse("v5e:2x2"))
    for program in ("prefill", "decode"):
        report = answer["programs"][program]
        assert report["fits"]
        # The state takes its own place, and no cache goes from one device to another.
        assert report["memory"]["aliased_bytes"] == pytest.approx(predicted.cache_bytes, rel=1e-3)
        assert report["memory"]["arguments_bytes"] == pytest.approx(predicted.arguments_bytes, rel=1e-3)
        assert report["needed_bytes"] == pytest.approx(predicted.program_bytes(program), rel=0.15), program
        gathered = [one["sent_bytes"] for one in report["collectives"] if one["kind"] != "all-reduce"]
        assert sum(gathered) < predicted.cache_bytes / (2 * 12)
