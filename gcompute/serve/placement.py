"""The engine on a mesh: what is split over which axis.

Tensor splits heads, feed-forward and vocabulary, expert the experts. Data, and fsdp with it, split the slots into
shares, each with pages of its own and all weights. Key/value heads that tensor does not divide are whole on every
device, and so is the one row of a prefill. What belongs to rows and is small is whole everywhere.
"""

import dataclasses
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from gcompute.config.architecture import architecture
from gcompute.config.mesh import Axis, MeshShape
from gcompute.config.model import ModelConfig
from gcompute.model.transformer import Execution, Params, abstract_params, param_dims
from gcompute.parallel.mesh import AXIS_TYPES, NAMES, shape_of
from gcompute.parallel.placement import Placement
from gcompute.parallel.rules import ACTIVATION_RULES, Rules, param_shardings
from gcompute.plan.serving import check_serving_mesh
from gcompute.serve.kv_pool import PAGE_DIMS, PAGE_SCALE_DIMS
from gcompute.serve.state import EngineShape, EngineState, Weights, empty_state
from gcompute.serve.weights import Layout, serving_weights


@dataclass(frozen=True, slots=True, kw_only=True)
class ServingPlacement(Placement):
    """A placement whose rows and pages are split over data alone, and whose dims in `whole` are not split at all."""

    whole: str = ""

    def spec(self, dims: str, rules: Rules = ACTIVATION_RULES) -> PartitionSpec:
        shares = {"B": (Axis.DATA,), "P": (Axis.DATA,)}
        return Placement.spec(self, dims, {**rules, **shares, **dict.fromkeys(self.whole, ())})


def serving_mesh(mesh: Mesh) -> Mesh:
    """The same devices with fsdp's share of them in data: served weights are not gathered for each layer."""
    shape = MeshShape(**dict(mesh.shape))
    # No stage lies between the two axes, so devices keep their order.
    merged = dataclasses.replace(shape, data=shape.data * shape.fsdp, fsdp=1)
    return Mesh(mesh.devices.reshape(shape_of(merged)), NAMES, AXIS_TYPES)


def place(config: ModelConfig, mesh: Mesh) -> ServingPlacement:
    """The placement of an engine for `config` on a mesh."""
    mesh = serving_mesh(mesh)
    shape = MeshShape(**dict(mesh.shape))
    return ServingPlacement(mesh=mesh, shape=shape, whole="K" if config.num_kv_heads % shape.tensor else "")


def one_row(execution: Execution) -> Execution:
    """The same for a batch of one row, which no axis splits."""
    placement = execution.placement
    if not isinstance(placement, ServingPlacement):
        return execution
    alone = dataclasses.replace(placement, whole=placement.whole + "B")
    return dataclasses.replace(execution, placement=alone)


def check_mesh(config: ModelConfig, shape: MeshShape, *, slots: int) -> None:
    """Refuse a mesh that cannot serve a model.

    Raises:
      ValueError: it does not divide the model or the slots.
    """
    check_serving_mesh(architecture(config), shape)
    if config.vocab % shape.tensor:
        legal = ", ".join(str(n) for n in range(1, config.heads + 1) if config.heads % n == config.vocab % n == 0)
        raise ValueError(f"mesh tensor={shape.tensor} does not divide vocab={config.vocab}. Legal: tensor={legal}.")
    rows = shape.data * shape.fsdp
    if slots % rows:
        raise ValueError(
            f"slots={slots} does not divide over data={shape.data} x fsdp={shape.fsdp}. Use a multiple of {rows}."
        )


def spread(shape: EngineShape, config: ModelConfig, params: Params) -> Params:
    """A model's parameters laid out on the mesh by their rules, on whatever device they lie."""
    placement = _placement(shape)
    shardings = param_shardings(
        _without(param_dims(config), placement.whole),
        placement.mesh,
        placement.shape,
        abstract=abstract_params(config),
    )
    return jax.device_put(params, shardings)


def weight_shardings(shape: EngineShape, config: ModelConfig) -> Any:
    """The tree of one model's weights with the sharding of each: see `abstract_weights`."""
    return jax.tree.map(lambda leaf: leaf.sharding, _placed_weights(shape, config))


def abstract_weights(shape: EngineShape) -> Weights:
    """The weights as the engine keeps them on a mesh, each laid out by its rule, without their values."""
    draft = None if shape.draft is None else _placed_weights(shape, shape.draft)
    return Weights(model=_placed_weights(shape, shape.model), draft=draft)


def _placed_weights(shape: EngineShape, config: ModelConfig) -> Any:
    return placed_weights(config, shape.execution.compute, _placement(shape))


def placed_weights(config: ModelConfig, compute: Any, placement: ServingPlacement) -> Any:
    """One model's weights in the plain layout, each with its sharding, without their values."""
    lay_out = partial(serving_weights, config=config, compute=compute, layout=Layout.PLAIN)
    abstract = jax.eval_shape(lay_out, abstract_params(config))
    dims = param_dims(config)
    block = jax.tree.map(lambda letters: letters.removeprefix("L"), dims["blocks"])
    dims = {**dims, "blocks": dict.fromkeys(range(config.layers), block)}
    dims = _without(dims, placement.whole)
    shardings = param_shardings(dims, placement.mesh, placement.shape, abstract=abstract)
    return jax.tree.map(
        lambda leaf, sharding: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding), abstract, shardings
    )


def _placement(shape: EngineShape) -> ServingPlacement:
    placement = shape.execution.placement
    assert isinstance(placement, ServingPlacement)
    return placement


def _without(dims: Any, whole: str) -> Any:
    """The tree of dims with no letter for those that are not split."""
    return jax.tree.map(lambda letters: "".join("_" if letter in whole else letter for letter in letters), dims)


def abstract_state(shape: EngineShape) -> EngineState:
    """The state of `empty_state` without its values; on a mesh, laid out."""
    state = jax.eval_shape(partial(empty_state, shape))
    placement = shape.execution.placement
    if placement is None:
        return state

    def laid(leaf: jax.ShapeDtypeStruct, dims: str) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(
            leaf.shape, leaf.dtype, sharding=NamedSharding(placement.mesh, placement.spec(dims))
        )

    def pages(leaf: jax.ShapeDtypeStruct) -> jax.ShapeDtypeStruct:
        return laid(leaf, PAGE_DIMS if len(leaf.shape) == len(PAGE_DIMS) else PAGE_SCALE_DIMS)

    return EngineState(
        pool=jax.tree.map(pages, state.pool),
        draft_pool=jax.tree.map(pages, state.draft_pool),
        rows=jax.tree.map(lambda leaf: laid(leaf, "_" * len(leaf.shape)), state.rows),
    )
