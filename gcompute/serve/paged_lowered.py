"""The programs over pages on a mesh, lowered for devices that need not be here.

Tensor splits heads, feed-forward and vocabulary, expert the experts. Where there are fewer key/value heads than tensor,
each device has all their weights and keeps the cells of its own head alone. Data, and fsdp with it, split the rows of
decoding, each share with pages of its own; a mixed step is of one share, as its rows differ in size.
"""

from functools import partial
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from gcompute.config.mesh import MeshShape
from gcompute.config.model import ModelConfig
from gcompute.model.transformer import Execution
from gcompute.parallel.mesh import use_mesh
from gcompute.serve.assembly import COMPUTE
from gcompute.serve.lowered import PAGE, check_serve
from gcompute.serve.paged_attention import POOL_DIMS, Kernel, check_kernel
from gcompute.serve.paged_model import (
    DecodeRows,
    MixedRows,
    PagedShape,
    Pools,
    decode_steps,
    empty_pools,
    mixed_step,
    no_rows,
)
from gcompute.serve.placement import ServingPlacement, placed_weights, serving_mesh

PagedProgram = Literal["mixed", "decode"]


def lower_paged(
    config: ModelConfig,
    mesh: Mesh,
    *,
    program: PagedProgram,
    kernel: Kernel,
    slots: int,
    max_context: int,
    tokens: int,
    precision: str = "bfloat16",
    page: int = PAGE,
    num_pages: int | None = None,
    most_steps: int = 8,
) -> jax.stages.Lowered:
    """`mixed_step` of `tokens` flat tokens, or `decode_steps`, for `slots` rows of up to `max_context` cells.

    num_pages: of the pool, every share's; by default all that the rows can fill and a page 0 a share. The pools are
    donated and come back laid out as they came.

    Raises:
      ValueError: the mesh, the sizes and the kernel do not go together.
    """
    prompt = max(1, min(tokens, max_context))
    check_serve(config, MeshShape(**dict(mesh.shape)), slots=slots, max_context=max_context, prompt=prompt)
    mesh = serving_mesh(mesh)
    shape = MeshShape(**dict(mesh.shape))
    _check(config, shape, program=program, kernel=kernel, tokens=tokens, slots=slots, precision=precision)
    undivided = "K" * bool(config.num_kv_heads % shape.tensor) + "B" * (program == "mixed")
    placement = ServingPlacement(mesh=mesh, shape=shape, whole=undivided)
    pages_per_row = -(-max_context // page)
    paged = PagedShape(
        model=config,
        execution=Execution(compute=COMPUTE[precision], unroll=config.layers, placement=placement),
        kernel=kernel,
        rows=slots,
        pages_per_row=pages_per_row,
        num_pages=num_pages or slots * pages_per_row + shape.data,
        page=page,
    )
    params = placed_weights(config, paged.execution.compute, placement)
    pools = _abstract_pools(paged, placement)
    pool_shardings = jax.tree.map(lambda leaf: leaf.sharding, pools)
    replicated = NamedSharding(mesh, PartitionSpec())

    def whole(*sizes: int) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(sizes, jnp.int32, sharding=replicated)

    def placed(leaf: jax.ShapeDtypeStruct) -> jax.ShapeDtypeStruct:
        spec = placement.spec("B" * bool(leaf.shape) + "_" * (len(leaf.shape) - 1))
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=NamedSharding(mesh, spec))

    kind = MixedRows if program == "mixed" else DecodeRows
    rows = jax.tree.map(placed, jax.eval_shape(partial(no_rows, paged, kind)))
    if program == "mixed":
        function, arguments, chosen = partial(_mixed_tokens, shape=paged), (whole(tokens), rows), replicated
    else:
        function = partial(decode_steps, shape=paged, most_steps=most_steps)
        arguments, chosen = (rows, whole()), NamedSharding(mesh, placement.spec("B_"))
    with use_mesh(mesh):
        return jax.jit(function, donate_argnums=1, out_shardings=(pool_shardings, chosen)).lower(
            params, pools, *arguments
        )


def _mixed_tokens(params: Any, pools: Pools, tokens_T: Any, rows: MixedRows, *, shape: PagedShape) -> Any:
    """A mixed step's pools and tokens: its logits stay on the device."""
    return mixed_step(params, pools, tokens_T, rows, shape=shape)[:2]


def _check(
    config: ModelConfig, shape: MeshShape, *, program: str, kernel: Kernel, tokens: int, slots: int, precision: str
) -> None:
    if program == "mixed" and kernel == "paged":
        raise ValueError("the paged kernel takes one query a row: a mixed step needs ragged or xla attention.")
    if program == "mixed" and shape.data > 1:
        raise ValueError(
            f"a mixed step is of one share of the rows, and the mesh has data={shape.data}. Use data=1 (and fsdp=1),"
            " and as many servers as there would be shares."
        )
    if program == "mixed" and tokens < slots:
        raise ValueError(f"tokens={tokens} are fewer than slots={slots}: each row of a mixed step has one at least.")
    check_kernel(
        kernel,
        heads=config.heads,
        kv_heads=config.num_kv_heads,
        head_size=config.head_size,
        dtype=COMPUTE[precision],
        tensor=shape.tensor,
    )


def _abstract_pools(shape: PagedShape, placement: ServingPlacement) -> Any:
    """The pools, pages over data and heads over tensor."""
    shardings = [NamedSharding(placement.mesh, placement.spec(dims)) for dims in POOL_DIMS[shape.kernel]]
    return tuple(
        tuple(
            jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)
            for leaf, sharding in zip(layer, shardings, strict=True)
        )
        for layer in jax.eval_shape(partial(empty_pools, shape))
    )
