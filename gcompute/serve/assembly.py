"""From a configuration to an engine's shape: mesh, limits, and as many pages as all slots need or memory leaves."""

from dataclasses import dataclass

import jax
import jax.numpy as jnp

from gcompute.config.architecture import architecture
from gcompute.config.mesh import MeshShape
from gcompute.config.model import ModelConfig
from gcompute.config.serve import ServeConfig
from gcompute.measure.machine import host_memory_bytes
from gcompute.model.transformer import Execution
from gcompute.parallel.mesh import build_mesh
from gcompute.plan.serve_workspace import decode_workspace, in_place_workspace, prefill_workspace, weights_here
from gcompute.plan.serving import ServeRun, cache_of_one
from gcompute.serve.buckets import make_buckets
from gcompute.serve.limits import Limits
from gcompute.serve.placement import check_mesh, place
from gcompute.serve.precision import settle
from gcompute.serve.state import EngineShape
from gcompute.serve.weights import choose_layout

COMPUTE = {"float32": jnp.float32, "bfloat16": jnp.bfloat16}
# Of the memory that is there: fragments, the host's buffers and other users have the rest.
USABLE = 0.9


@dataclass(frozen=True, slots=True, kw_only=True)
class Budget:
    """Where a device's memory goes, in bytes. available: what the device, or the host that is one, can give.

    weights and workspace are predicted: see `plan.serve_workspace`. page: of one page.
    """

    available: int
    weights: float
    workspace: float
    page: float

    @property
    def num_pages(self) -> int:
        """Pages that fit."""
        return max(0, int((self.available * USABLE - self.weights - self.workspace) // self.page))


def engine_shape(config: ModelConfig, serve: ServeConfig, draft: ModelConfig | None = None) -> EngineShape:
    """The shape of an engine on this process's devices: the first, or those of `serve.mesh`.

    Raises:
      ValueError: the context or the mesh does not fit the model, the pages of one request do not fit the memory, or the
        draft model is not one for this model.
    """
    serve, _ = settle(serve)
    max_context = serve.max_context or config.context
    if max_context > config.context:
        raise ValueError(f"max_context={max_context} exceeds the model's context. Use at most {config.context}.")
    if max_context < 2:
        raise ValueError("max_context must be at least 2: one token of prompt and one of output.")
    _check_draft(config, serve, draft, max_context)
    mesh = serve.mesh or MeshShape()
    check_mesh(config, mesh, slots=serve.slots)
    if draft is not None:
        check_mesh(draft, mesh, slots=serve.slots)
    placement = None if mesh.num_devices == 1 else place(config, build_mesh(mesh))
    drafts = 0 if serve.speculate == "none" else serve.draft_tokens
    longest = make_buckets(max_context + drafts, serve.page)[-1]
    limits = Limits(
        slots=serve.slots,
        max_queue=serve.max_queue,
        max_context=max_context,
        decode_steps=serve.decode_steps,
        page=serve.page,
        num_pages=_num_pages(config, serve, longest, mesh, draft),
        chunk=min(serve.chunk, longest),
        token_budget=serve.token_budget,
        shares=mesh.data * mesh.fsdp,
        drafts=drafts,
        draft_batch=min(serve.draft_batch, serve.slots),
        prefix_cache=serve.prefix_cache,
        swap=serve.preemption == "swap" or serve.deterministic,
        deterministic=serve.deterministic,
    )
    compute = COMPUTE[serve.precision]
    return EngineShape(
        model=config,
        draft=draft,
        execution=Execution(compute=compute, unroll=config.layers, placement=placement),
        limits=limits,
        kv=serve.kv or compute,
        layout=choose_layout(placement, jax.default_backend(), compute),
        int8=serve.weights == "int8",
    )


def _check_draft(config: ModelConfig, serve: ServeConfig, draft: ModelConfig | None, max_context: int) -> None:
    if (draft is None) == (serve.speculate == "draft"):
        raise ValueError("speculate=draft and a draft model go together: give both or neither.")
    if draft is not None and (draft.vocab != config.vocab or draft.context < max_context):
        raise ValueError(
            f"the draft model has vocab={draft.vocab} and context={draft.context}; it needs vocab={config.vocab} and "
            f"a context of at least {max_context}."
        )


def _num_pages(
    config: ModelConfig, serve: ServeConfig, longest: int, mesh: MeshShape, draft: ModelConfig | None
) -> int:
    """As asked for; else what all slots need at their longest, or fewer where memory lacks. Equal for all shares."""
    a_row, shares = longest // serve.page, mesh.data * mesh.fsdp
    if serve.kv_tokens is not None:
        per_share = serve.kv_tokens // serve.page // shares
        if per_share < a_row:
            raise ValueError(
                f"kv_tokens={serve.kv_tokens} cannot hold one request of max_context={longest} in each of {shares} "
                f"share{'s' * (shares > 1)}. Use at least {a_row * serve.page * shares}, or a smaller max_context."
            )
        return per_share * shares
    budget = memory_budget(config, serve, longest, mesh, draft)
    if budget.num_pages < a_row:
        need = budget.weights + budget.workspace + a_row * budget.page
        raise ValueError(
            f"the model and one request of max_context={longest} need {need / 2**30:.2f} GiB a device (predicted), and "
            f"{budget.available * USABLE / 2**30:.2f} GiB are usable. Use a smaller max_context, fewer slots or a mesh."
        )
    return shares * min(serve.slots // shares * a_row, budget.num_pages)


def memory_budget(
    config: ModelConfig, serve: ServeConfig, longest: int, mesh: MeshShape, draft: ModelConfig | None = None
) -> Budget:
    """The plan's account of one device: weights and the workspace of the largest program, for both models; a page."""
    value = serve.precision
    rows, weights, workspace, page = serve.slots // (mesh.data * mesh.fsdp), 0.0, 0.0, 0.0
    for one in (config, draft):
        if one is None:
            continue
        run = ServeRun(
            model=architecture(one),
            prompt=1,
            output=1,
            context=longest,
            mesh=mesh,
            weights=serve.weights or value,
            cache=serve.kv or value,
        )
        weights += weights_here(run.model, mesh).num_bytes(run.weight_bytes)
        page += cache_of_one(run, serve.page)
        # Asked last, for it compiles the kernels, which a mesh does not use.
        if mesh.num_devices == 1 and choose_layout(None, jax.default_backend(), COMPUTE[value]).native:
            judged = 0 if serve.speculate == "none" else min(serve.draft_batch, rows) * (serve.draft_tokens + 1)
            workspace += in_place_workspace(run.model, rows=max(rows, judged), tokens=min(serve.chunk, longest))
            continue
        workspace += max(
            decode_workspace(
                run.model,
                mesh,
                rows=rows,
                cells=longest,
                weight_bytes=run.weight_bytes,
                cache_bytes=jnp.dtype(COMPUTE[value]).itemsize,
            ),
            prefill_workspace(
                run.model,
                mesh,
                tokens=min(serve.chunk, longest),
                rows=rows,
                cells=longest,
                cache_bytes=jnp.dtype(COMPUTE[value]).itemsize,
                chip=None,
            ),
        )
    return Budget(available=device_bytes(), weights=weights, workspace=workspace, page=page)


def device_bytes() -> int:
    """Bytes that a device's allocator may hand out; where it keeps no count (CPU), what the host has left."""
    stats = jax.local_devices()[0].memory_stats() or {}
    limit = stats.get("bytes_limit")
    return int(limit) if limit else host_memory_bytes()[1]
