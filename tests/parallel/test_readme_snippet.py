"""The ten lines of the README that shard somebody's own function, run as they stand there."""

import re
from pathlib import Path

import numpy as np
import pytest

README = Path(__file__).parents[2] / "README.md"
SNIPPET = """\
import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding

from gcompute.config.mesh import MeshShape
from gcompute.parallel.explain import explain
from gcompute.parallel.mesh import build_mesh
from gcompute.parallel.rules import param_shardings, partition_spec


def loss(w, x):  # your own function, written for one device
    return jnp.mean((jax.nn.relu(x @ w["up"]) @ w["down"] - x) ** 2)


shape = MeshShape.parse("data=2,fsdp=2,tensor=2")
mesh = build_mesh(shape)
dims = {"up": "DF", "down": "FD"}  # a letter for each dim; one table says which mesh axes split it
w = {"up": jnp.ones((64, 256)), "down": jnp.ones((256, 64))}
placed = param_shardings(dims, mesh, shape, abstract=w)
w = jax.device_put(w, placed)
x = jax.device_put(jnp.ones((32, 64)), NamedSharding(mesh, partition_spec("B_", shape)))
step = jax.jit(jax.value_and_grad(loss), out_shardings=(None, placed))
value, gradient = step(w, x)
print(explain(gradient, dims=dims))
"""
OUTPUT = """\
array    shape   dtype    split over    piece   bytes a device  copies
down FD  256,64  float32  tensor, fsdp  128,32  16,384          2 (data)
up DF    64,256  float32  fsdp, tensor  32,128  16,384          2 (data)
bytes a device: 32,768 of 131,072, 0 of them in arrays that all 8 devices hold whole
"""


@pytest.mark.oldest
def test_the_snippet_shards_a_function_and_its_values_are_those_of_one_device(capsys: pytest.CaptureFixture[str]):
    names: dict = {}
    exec(SNIPPET, names)
    assert capsys.readouterr().out == OUTPUT
    # The terms of each sum are equal and a power of two in number: no order of adding them rounds.
    up, down, x = np.ones((64, 256)), np.ones((256, 64)), np.ones((32, 64))
    hidden = np.maximum(x @ up, 0)
    error = hidden @ down - x
    d_error = 2 * error / error.size
    expected = {"up": x.T @ ((d_error @ down.T) * (hidden > 0)), "down": hidden.T @ d_error}
    assert float(names["value"]) == np.mean(error**2).astype(np.float32)
    for name, leaf in names["gradient"].items():
        np.testing.assert_array_equal(leaf, expected[name].astype(np.float32))
        assert leaf.sharding == names["placed"][name]


def test_the_readme_shows_these_lines():
    blocks = re.findall(r"```python\n(.*?)```", README.read_text(encoding="utf-8"), re.DOTALL)
    assert all(block == SNIPPET for block in blocks if "build_mesh" in block)
