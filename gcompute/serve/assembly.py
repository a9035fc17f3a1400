"""From a configuration to an engine's shape: its limits, and as many pages as all slots need or memory leaves."""

from dataclasses import dataclass

import jax
import jax.numpy as jnp

from gcompute.config.architecture import architecture
from gcompute.config.mesh import MeshShape
from gcompute.config.model import ModelConfig
from gcompute.config.serve import ServeConfig
from gcompute.measure.machine import host_memory_bytes
from gcompute.model.transformer import Execution
from gcompute.plan.serve_workspace import decode_workspace, prefill_workspace, weights_here
from gcompute.plan.sizes import cache_bytes
from gcompute.serve.buckets import make_buckets
from gcompute.serve.limits import Limits
from gcompute.serve.state import EngineShape

COMPUTE = {"float32": jnp.float32, "bfloat16": jnp.bfloat16}
# Of the memory that is there: fragments, the host's buffers and other users have the rest.
USABLE = 0.9


@dataclass(frozen=True, slots=True, kw_only=True)
class Budget:
    """Where a device's memory goes, in bytes. available: what the device, or the host that is one, has left.

    workspace: predicted, of the largest program. page: of one page.
    """

    available: int
    weights: float
    workspace: float
    page: float

    @property
    def num_pages(self) -> int:
        """Pages that fit."""
        return int((self.available * USABLE - self.weights - self.workspace) // self.page)


def engine_shape(config: ModelConfig, serve: ServeConfig) -> EngineShape:
    """The shape of an engine on this process's first device.

    Raises:
      ValueError: the context does not fit the model, or the pages of one request do not fit the memory.
    """
    max_context = serve.max_context or config.context
    if max_context > config.context:
        raise ValueError(f"max_context={max_context} exceeds the model's context. Use at most {config.context}.")
    if max_context < 2:
        raise ValueError("max_context must be at least 2: one token of prompt and one of output.")
    longest = make_buckets(max_context, serve.page)[-1]
    num_pages = _num_pages(config, serve, longest)
    limits = Limits(
        slots=serve.slots,
        max_queue=serve.max_queue,
        max_context=max_context,
        decode_steps=serve.decode_steps,
        page=serve.page,
        num_pages=num_pages,
        chunk=min(serve.chunk, longest),
        token_budget=serve.token_budget,
        prefix_cache=serve.prefix_cache,
        swap=serve.preemption == "swap" or serve.deterministic,
        deterministic=serve.deterministic,
    )
    compute = COMPUTE[serve.precision]
    return EngineShape(
        model=config, execution=Execution(compute=compute, unroll=config.layers), limits=limits, kv=compute
    )


def _num_pages(config: ModelConfig, serve: ServeConfig, longest: int) -> int:
    """As asked for; else what all slots need at their longest, or fewer where memory lacks."""
    a_row = longest // serve.page
    if serve.kv_tokens is not None:
        num_pages = serve.kv_tokens // serve.page
        if num_pages < a_row:
            raise ValueError(
                f"kv_tokens={serve.kv_tokens} cannot hold one request of max_context={longest}. "
                f"Use at least {a_row * serve.page}, or a smaller max_context."
            )
        return num_pages
    budget = memory_budget(config, serve, longest)
    if budget.num_pages < a_row:
        raise ValueError(
            f"the model and one request of max_context={longest} need "
            f"{(budget.weights + budget.workspace + a_row * budget.page) / 2**30:.2f} GiB (predicted), and "
            f"{budget.available * USABLE / 2**30:.2f} GiB are usable. Use a smaller max_context or fewer slots."
        )
    return min(serve.slots * a_row, budget.num_pages)


def memory_budget(config: ModelConfig, serve: ServeConfig, longest: int) -> Budget:
    """The plan's account of weights and workspace, and what the device has."""
    model, mesh = architecture(config), MeshShape()
    value_bytes = float(jnp.dtype(COMPUTE[serve.precision]).itemsize)
    workspace = max(
        decode_workspace(
            model, mesh, rows=serve.slots, cells=longest, weight_bytes=value_bytes, cache_bytes=value_bytes
        ),
        prefill_workspace(model, mesh, tokens=min(serve.chunk, longest), cache_bytes=value_bytes, chip=None),
    )
    # A decode dispatch works on a copy of its rows' pages.
    workspace += cache_bytes(model, serve.slots * longest, value_bytes=value_bytes)
    return Budget(
        available=device_bytes(),
        weights=weights_here(model, mesh).num_bytes(value_bytes),
        workspace=workspace,
        page=cache_bytes(model, serve.page, value_bytes=value_bytes),
    )


def device_bytes() -> int:
    """Bytes that the first device's allocator may hand out; where it keeps no count (CPU), what the host has left."""
    stats = jax.local_devices()[0].memory_stats() or {}
    limit = stats.get("bytes_limit")
    return int(limit) if limit else host_memory_bytes()[1]
