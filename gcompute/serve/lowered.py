"""The engine's two programs on a mesh, lowered for devices that need not be here.

Both are `programs.prefill` and `programs.decode`, the code that the engine runs. Tensor splits heads, feed-forward and
vocabulary, expert the experts; data, and fsdp with it, split the slots and their caches, each share having all weights.
Key/value heads that tensor does not divide are whole on every device, and so is the one row of a prefill.
"""

import dataclasses
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from gcompute.config.architecture import architecture
from gcompute.config.mesh import Axis, MeshShape
from gcompute.config.model import ModelConfig
from gcompute.model.transformer import Execution, abstract_params, param_dims
from gcompute.parallel.mesh import AXIS_TYPES, NAMES, shape_of, use_mesh
from gcompute.parallel.placement import Placement
from gcompute.parallel.rules import ACTIVATION_RULES, Rules, param_shardings
from gcompute.plan.serving import check_serving_mesh
from gcompute.serve.programs import (
    NO_TOKEN,
    EngineShape,
    EngineState,
    admission,
    decode,
    empty_state,
    prefill,
    serving_params,
)
from gcompute.serve.request import Request
from gcompute.serve.scheduler import make_buckets

ServeProgram = Literal["prefill", "decode"]
COMPUTE = {"float32": jnp.float32, "bfloat16": jnp.bfloat16}
DECODE_STEPS = 8


@dataclass(frozen=True, slots=True, kw_only=True)
class ServingPlacement(Placement):
    """A placement whose rows are split over data alone, and whose dims in `whole` are not split at all."""

    whole: str = ""

    def spec(self, dims: str, rules: Rules = ACTIVATION_RULES) -> PartitionSpec:
        return Placement.spec(self, dims, {**rules, "B": (Axis.DATA,), **dict.fromkeys(self.whole, ())})


def serving_mesh(mesh: Mesh) -> Mesh:
    """The same devices with fsdp's share of them in data: served weights are not gathered for each layer."""
    shape = MeshShape(**dict(mesh.shape))
    # No stage lies between the two axes, so devices keep their order.
    merged = dataclasses.replace(shape, data=shape.data * shape.fsdp, fsdp=1)
    return Mesh(mesh.devices.reshape(shape_of(merged)), NAMES, AXIS_TYPES)


def check_serve(config: ModelConfig, shape: MeshShape, *, slots: int, max_context: int, prompt: int) -> None:
    """Refuse what cannot be served together.

    Raises:
      ValueError: the mesh does not divide the model or the slots, or a length is beyond what holds it.
    """
    check_serving_mesh(architecture(config), shape)
    if config.vocab % shape.tensor:
        legal = ", ".join(str(n) for n in range(1, config.heads + 1) if config.heads % n == config.vocab % n == 0)
        raise ValueError(f"mesh tensor={shape.tensor} does not divide vocab={config.vocab}. Legal: tensor={legal}.")
    if min(slots, prompt) < 1 or max_context < 2:
        raise ValueError(f"slots={slots} and prompt={prompt} must be at least 1, and context={max_context} at least 2.")
    if max_context > config.context:
        raise ValueError(f"context={max_context} exceeds the model's context. Use at most {config.context}.")
    if prompt > max_context:
        raise ValueError(f"prompt={prompt} does not fit context={max_context}. Use a larger --context.")
    rows = shape.data * shape.fsdp
    if slots % rows:
        raise ValueError(
            f"slots={slots} does not divide over data={shape.data} x fsdp={shape.fsdp}. Use a multiple of {rows}."
        )


def lower_serve(
    config: ModelConfig,
    mesh: Mesh,
    *,
    program: ServeProgram,
    slots: int,
    max_context: int,
    prompt: int,
    precision: str = "bfloat16",
    decode_steps: int = DECODE_STEPS,
) -> jax.stages.Lowered:
    """`prefill` of the bucket that holds `prompt` tokens, or `decode` over all `max_context` cells, lowered for `mesh`.

    Arguments are as `programs.compile_program` has them; the state is donated and comes back laid out as it came.

    Raises:
      ValueError: as `check_serve`.
    """
    check_serve(config, MeshShape(**dict(mesh.shape)), slots=slots, max_context=max_context, prompt=prompt)
    mesh = serving_mesh(mesh)
    shape = MeshShape(**dict(mesh.shape))
    placement = ServingPlacement(mesh=mesh, shape=shape, whole="K" if config.num_kv_heads % shape.tensor else "")
    execution = Execution(compute=COMPUTE[precision], unroll=config.layers, placement=placement)
    engine = EngineShape(
        model=config, execution=execution, slots=slots, max_context=max_context, decode_steps=decode_steps
    )
    replicated = NamedSharding(mesh, PartitionSpec())
    params = _abstract_params(engine, placement)
    state = _abstract_state(engine, placement)
    state_shardings = jax.tree.map(lambda leaf: leaf.sharding, state)

    def whole(dtype: Any) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct((), dtype, sharding=replicated)

    if program == "prefill":
        bucket = next(size for size in make_buckets(max_context) if size >= prompt)
        new = jax.eval_shape(lambda: admission(Request(prompt=(0,)), slot=0, bucket=bucket, end=NO_TOKEN, seed=0))
        new = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=replicated), new)
        one_row = dataclasses.replace(execution, placement=dataclasses.replace(placement, whole=placement.whole + "B"))
        function, arguments, chosen = partial(prefill, model=config, execution=one_row), (new,), replicated
    else:
        function = partial(decode, model=config, execution=execution, bucket=max_context, decode_steps=decode_steps)
        by_row = NamedSharding(mesh, placement.spec("B"))
        running_B = jax.ShapeDtypeStruct((slots,), bool, sharding=by_row)
        arguments, chosen = (running_B, whole(jnp.int32), whole(bool)), by_row
    with use_mesh(mesh):
        return jax.jit(function, donate_argnums=1, out_shardings=(state_shardings, chosen)).lower(
            params, state, *arguments
        )


def _abstract_params(engine: EngineShape, placement: ServingPlacement) -> Any:
    """The parameters as the engine keeps them, each laid out by its rule."""
    config = engine.model
    abstract = jax.eval_shape(
        partial(serving_params, config=config, compute=engine.execution.compute), abstract_params(config)
    )
    dims = param_dims(config)
    block = jax.tree.map(lambda letters: letters.removeprefix("L"), dims["blocks"])
    dims = {**dims, "blocks": dict.fromkeys(range(config.layers), block)}
    for letter in placement.whole:
        dims = jax.tree.map(lambda letters, letter=letter: letters.replace(letter, "_"), dims)
    shardings = param_shardings(dims, placement.mesh, placement.shape, abstract=abstract)
    return jax.tree.map(
        lambda leaf, sharding: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding), abstract, shardings
    )


def _abstract_state(engine: EngineShape, placement: ServingPlacement) -> EngineState:
    """The state of `empty_state`, its rows over data and key/value heads over tensor."""

    def place(leaf: jax.ShapeDtypeStruct) -> jax.ShapeDtypeStruct:
        spec = placement.spec("BSKH" if len(leaf.shape) == 4 else "B")
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=NamedSharding(placement.mesh, spec))

    return jax.tree.map(place, jax.eval_shape(partial(empty_state, engine)))
