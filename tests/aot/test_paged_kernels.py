"""Programs over pages through the TPU compiler, for slices that are not here: the kernels are in them, no copy is."""

import importlib.util
import json
import subprocess
import sys
from functools import cache
from typing import Any

import pytest

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="the TPU compiler, libtpu, is not installed"),
]

LAYERS, SLOTS, CONTEXT, PAGE = 2, 64, 2048, 16
NAMES = {"ragged": "ragged_paged_attention_kernel", "paged": "paged_attention"}
DEVICES = {"v5e:2x2": 4, "v6e:2x2": 4, "v5p:2x2x1": 4, "v5e:4x4": 16}


@cache
def compiled(on: str, mesh: str, attention: str, program: str, *more: str) -> dict[str, Any]:
    """The report on one program of a llama3-8b of two layers."""
    done = subprocess.run(
        [
            *(sys.executable, "-m", "gcompute", "compile", "serve", "llama3-8b", "--layers", str(LAYERS), "--on", on),
            *("--mesh", mesh, "--attention", attention, "--program", program, "--slots", str(SLOTS)),
            *("--context", str(CONTEXT), "--json", *more),
        ],
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)["programs"][program]


def layer_bytes(tensor: int, data: int = 1) -> int:
    """One layer's keys and values on a device, page 0 too, in bfloat16."""
    pages = SLOTS // data * CONTEXT // PAGE + 1
    return pages * PAGE * 2 * max(1, 8 // tensor) * 128 * 2


@pytest.mark.parametrize(
    ("on", "mesh", "attention", "program"),
    [
        ("v5e:2x2", "tensor=4", "ragged", "decode"),
        ("v5e:2x2", "tensor=4", "paged", "decode"),
        ("v5e:2x2", "tensor=4", "ragged", "mixed"),
        ("v6e:2x2", "tensor=4", "ragged", "decode"),
        ("v6e:2x2", "tensor=4", "ragged", "mixed"),
        ("v6e:2x2", "tensor=4", "paged", "decode"),
        ("v5p:2x2x1", "tensor=4", "ragged", "decode"),
        ("v5p:2x2x1", "tensor=4", "ragged", "mixed"),
        # Two devices keep the same head.
        ("v5e:4x4", "tensor=16", "ragged", "decode"),
    ],
)
def test_each_layer_calls_the_kernel_and_pages_stay_where_they_are(on: str, mesh: str, attention: str, program: str):
    report = compiled(on, mesh, attention, program, "--tokens", "128")
    tensor = DEVICES[on]
    assert report["fits"]
    assert report["kernels"] == {NAMES[attention]: LAYERS}
    # The pools take their own place: nothing of them is copied, turned or gathered.
    assert report["memory"]["aliased_bytes"] == LAYERS * layer_bytes(tensor)
    assert report["memory"]["temporaries_bytes"] < layer_bytes(tensor) / 2
    assert sum(one["sent_bytes"] for one in report["collectives"]) < layer_bytes(tensor) / 2


def test_rows_split_over_data_have_pages_of_their_own():
    report = compiled("v5e:2x2", "data=2,tensor=2", "ragged", "decode")
    assert report["kernels"] == {NAMES["ragged"]: LAYERS}
    assert report["memory"]["aliased_bytes"] == LAYERS * layer_bytes(2, 2)
    assert report["memory"]["temporaries_bytes"] < layer_bytes(2, 2) / 2


def test_gathering_copies_what_a_kernel_reads_in_place():
    gathered = compiled("v5e:2x2", "tensor=4", "xla", "decode")
    kernel = compiled("v5e:2x2", "tensor=4", "ragged", "decode", "--tokens", "128")
    assert gathered["kernels"] == {}
    assert gathered["memory"]["aliased_bytes"] == kernel["memory"]["aliased_bytes"]
    more = gathered["memory"]["temporaries_bytes"] - kernel["memory"]["temporaries_bytes"]
    assert more > layer_bytes(4) / 2
