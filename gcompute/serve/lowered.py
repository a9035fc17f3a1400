"""The engine's prefill and decode on a mesh, lowered for devices that need not be here.

They are the programs that the engine compiles for itself, with every page that its slots can fill.
"""

from typing import Literal

import jax
from jax.sharding import Mesh

from gcompute.config.mesh import MeshShape
from gcompute.config.model import ModelConfig
from gcompute.model.transformer import Execution
from gcompute.serve.assembly import COMPUTE
from gcompute.serve.buckets import bucket_of, make_buckets, round_up
from gcompute.serve.compilation import Program, lower_program
from gcompute.serve.limits import Limits
from gcompute.serve.placement import abstract_weights, check_mesh, place
from gcompute.serve.state import EngineShape
from gcompute.serve.weights import Layout

ServeProgram = Literal["prefill", "decode"]
DECODE_STEPS = 8
PAGE = 16


def check_serve(config: ModelConfig, shape: MeshShape, *, slots: int, max_context: int, prompt: int) -> None:
    """Refuse what cannot be served together.

    Raises:
      ValueError: the mesh does not divide the model or the slots, or a length is beyond what holds it.
    """
    check_mesh(config, shape, slots=slots)
    if min(slots, prompt) < 1 or max_context < 2:
        raise ValueError(f"slots={slots} and prompt={prompt} must be at least 1, and context={max_context} at least 2.")
    if max_context > config.context:
        raise ValueError(f"context={max_context} exceeds the model's context. Use at most {config.context}.")
    if prompt > max_context:
        raise ValueError(f"prompt={prompt} does not fit context={max_context}. Use a larger --context.")


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
    page: int = PAGE,
) -> jax.stages.Lowered:
    """`prefill` of `prompt` tokens in one chunk, or `decode` of all slots over all `max_context` cells, for `mesh`.

    Raises:
      ValueError: as `check_serve`.
    """
    check_serve(config, MeshShape(**dict(mesh.shape)), slots=slots, max_context=max_context, prompt=prompt)
    placement = place(config, mesh)
    buckets = make_buckets(max_context, page)
    chunk = bucket_of(round_up(prompt, page), buckets)
    limits = Limits(
        slots=slots,
        max_queue=1,
        max_context=max_context,
        decode_steps=decode_steps,
        page=page,
        num_pages=slots * (buckets[-1] // page),
        chunk=chunk,
        token_budget=chunk,
        shares=placement.shape.data,
    )
    compute = COMPUTE[precision]
    execution = Execution(compute=compute, unroll=config.layers, placement=placement)
    shape = EngineShape(model=config, execution=execution, limits=limits, kv=compute, layout=Layout.PLAIN)
    sizes = (chunk, chunk) if program == "prefill" else (slots, buckets[-1])
    return lower_program(Program(program, sizes), abstract_weights(shape), shape)
