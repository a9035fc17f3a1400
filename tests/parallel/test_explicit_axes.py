"""A mesh of explicit axes, as newer versions of `jax.make_mesh` give, is refused in a line that says what to do."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
import pytest
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from gcompute.config.mesh import MeshShape
from gcompute.parallel.data import jit_step, shard_map_step
from gcompute.parallel.expert import automatic_mixture
from gcompute.parallel.mesh import build_mesh, check_automatic
from gcompute.parallel.placement import Placement, constrain_automatic
from gcompute.parallel.zero import automatic_zero_step

SAID = r"explicit axes \(data\), and this needs automatic ones. Make it with gcompute.parallel.mesh.build_mesh"


def loss_fn(w: Any, batch: Any) -> Any:
    return jnp.mean((batch["x"] @ w - batch["y"]) ** 2)


@pytest.fixture
def explicit() -> Mesh:
    return jax.make_mesh((8,), ("data",), axis_types=(AxisType.Explicit,))


@pytest.mark.parametrize(
    "build",
    [
        lambda mesh: jit_step(loss_fn, optax.sgd(0.1), mesh),
        lambda mesh: automatic_zero_step(loss_fn, optax.sgd(0.1), mesh, PartitionSpec("data"), stage=1, axis="data"),
        lambda mesh: Placement(mesh=mesh, shape=MeshShape(data=8)),
    ],
    ids=["jit_step", "automatic_zero_step", "Placement"],
)
def test_what_constrains_refuses_them(build: Callable[[Mesh], Any], explicit: Mesh):
    with pytest.raises(ValueError, match=SAID):
        build(explicit)


@pytest.mark.skipif(jax.__version_info__ < (0, 8, 0), reason="jax.set_mesh is for other meshes there")
def test_constraints_without_a_mesh_of_their_own_refuse_them(explicit: Mesh):
    x, router = jnp.ones((8, 4, 2)), jnp.ones((2, 4))
    shared = {"k": 1, "capacity": None, "compute": jnp.float32}
    with jax.set_mesh(explicit):
        with pytest.raises(ValueError, match=SAID):
            jax.eval_shape(lambda: constrain_automatic(x, PartitionSpec("data")))
        with pytest.raises(ValueError, match=SAID):
            jax.eval_shape(lambda: automatic_mixture(x, router, lambda buffers: buffers, **shared))


def test_per_device_code_takes_them_and_our_meshes_are_automatic(explicit: Mesh):
    whole, rows = (NamedSharding(explicit, PartitionSpec(*axes)) for axes in ((), ("data",)))
    w = jax.device_put(jnp.ones((8, 8)), whole)
    batch = jax.device_put({"x": jnp.ones((16, 8)), "y": jnp.zeros((16, 8))}, rows)
    optimizer = optax.sgd(0.1)
    _, _, loss = jax.jit(shard_map_step(loss_fn, optimizer, explicit))(w, optimizer.init(w), batch)
    assert float(loss) == 64
    check_automatic(build_mesh(MeshShape(data=8)))
