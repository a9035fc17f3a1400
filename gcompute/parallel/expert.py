"""A mixture of experts: each token goes through k of E feed-forward layers, and the experts live on different devices.

    tokens [b, t, D] --dispatch--> [E, b, C, D] --all-to-all--> [E/n, b n, C, D] --experts-->
    tokens [b, t, D] <--combine--- [E, b, C, D] <--all-to-all-- [E/n, b n, C, D] <----------

An expert has C places for the tokens of one sequence, given in the order of positions, a token's best choice first; who
comes too late is dropped and contributes nothing. A sequence is a group by itself, so results depend neither on
the mesh nor on what else is in the batch, and a later token never takes the place of an earlier one: the layer is
causal. Functions are per-device code unless they say otherwise, for `shard_map` with `check_vma` on: the gradients of
sums over an axis rely on it.

Source: Lepikhin et al. 2020 (GShard), arXiv:2006.16668, section 2.2 and algorithm 1; Fedus et al. 2021 (Switch
Transformers), arXiv:2101.03961, section 2.2.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec
from jaxtyping import Array, Float, Int

from gcompute.config.mesh import Axis
from gcompute.parallel.collectives import varying
from gcompute.parallel.einsum import accumulator, einsum
from gcompute.parallel.load_balance import Layout
from gcompute.parallel.placement import constrain_automatic
from gcompute.parallel.routing import (
    Routing,
    Slots,
    assign_shared_slots,
    assign_slots,
    balance_loss,
    is_expert,
    route,
)

# From [e, b, c, D], the tokens that each of the e experts at hand got, to as many results of the same shape.
Experts = Callable[[Array], Array]


@jax.tree_util.register_dataclass
@dataclass(frozen=True, slots=True, kw_only=True)
class RouterStats:
    """balance: the load balance loss, to be added to the loss with a weight. dropped: choices that got no place.

    load_E: choices of each expert, dropped ones among them, which sum to B T k.
    """

    balance: Float[Array, ""]
    dropped: Int[Array, ""]
    load_E: Int[Array, "E"]


@dataclass(frozen=True, slots=True, kw_only=True)
class ExpertAxes:
    """The mesh axes that `mixture` is split over, None where it is not.

    expert: experts, and sequences too. tensor: the feed-forward dim of each expert, whose results are partial sums.
    context: the tokens of a sequence, which lie as `layout` says. batch: every axis that sequences are split over.
    scatter: whether each tensor device keeps only its piece of the sequence of the result (sequence parallelism).
    """

    expert: str | None = None
    tensor: str | None = None
    context: str | None = None
    batch: tuple[str, ...] = ()
    layout: Layout = "contiguous"
    scatter: bool = False


def check_experts(num_experts: int, ways: int) -> None:
    """Refuse an expert axis that does not give every device as many experts.

    Raises:
      ValueError: `ways` does not divide the experts, with the sizes that do.
    """
    if num_experts % ways:
        legal = ", ".join(str(size) for size in range(1, num_experts + 1) if num_experts % size == 0)
        raise ValueError(
            f"mesh expert={ways} does not divide experts={num_experts}: each device needs whole experts."
            f" Legal: expert={legal}."
        )


def dispatch(
    x_btD: Float[Array, "b t D"], slots: Slots, *, num_experts: int, compute: jnp.dtype
) -> Float[Array, "E b C D"]:
    """Each expert's tokens in their places, cast to `compute`, and zeros in empty places: [E, b, C, D]."""
    b, t, dim = x_btD.shape
    k = slots.place_bi.shape[1] // t
    x_bsD: Array = _spread(x_btD, slots, k, compute, x_btD.dtype)
    return x_bsD.reshape(b, num_experts, -1, dim).swapaxes(0, 1)


def combine(y_EbCD: Float[Array, "E b C D"], slots: Slots, weight_btk: Float[Array, "b t k"]) -> Float[Array, "b t D"]:
    """y_t = sum over the token's choices of weight times its expert's result; a dropped choice adds nothing."""
    (b, t, k), dim = weight_btk.shape, y_EbCD.shape[-1]
    y_btkD = _collect(y_EbCD.swapaxes(0, 1).reshape(b, -1, dim), slots).reshape(b, t, k, dim)
    return (weight_btk[..., None] * y_btkD.astype(weight_btk.dtype)).sum(axis=2)


def mixture(
    x_btD: Float[Array, "b t D"],
    router_DE: Float[Array, "D E"],
    experts: Experts,
    *,
    k: int,
    capacity: int | None,
    compute: jnp.dtype,
    axes: ExpertAxes | None = None,
) -> tuple[Float[Array, "b t D"], RouterStats]:
    """y_t = sum over the token's k experts of weight times expert(x_t), and what the router did over the whole batch.

    Tokens and experts' results travel in `compute`, on one device too; the router's product, the weights and the sum
    over experts are in the dtype of x, float32 at least.

    Collectives: forward, an all-to-all over `expert` there and one back, and a sum over `tensor` of the result, and as
    many backward. Where a capacity binds and the sequence is split over `context`, its devices fill the same places:
    a reduce-scatter leaves each with 1/n of them before the experts (a place is filled once, so adding is exact), and
    an all-gather follows. Without one, each piece of a sequence is a group by itself and nothing is exchanged.

    Args:
      router_DE: whole. experts: this device's E/n experts; with `tensor`, partial sums over the feed-forward dim.
      capacity: places of an expert for a whole sequence, all of which it multiplies; None drops nothing, with room for
        every token, and so as much work as `dense_mixture`.

    Raises:
      ValueError: k is not between 1 and E, or the expert axis does not divide E.
    """
    axes = axes or ExpertAxes()
    num_experts, t = router_DE.shape[1], x_btD.shape[1]
    if axes.expert is not None:
        check_experts(num_experts, jax.lax.axis_size(axes.expert))
    routing = _routing(x_btD, router_DE, k)
    # The axis whose devices fill the same places, if any.
    shared = None
    if capacity is not None and axes.context is not None and capacity < t * jax.lax.axis_size(axes.context):
        shared = axes.context
        slots = assign_shared_slots(routing.expert_btk, num_experts, capacity, axis=shared, layout=axes.layout)
    else:
        slots = assign_slots(routing.expert_btk, num_experts, t if capacity is None else min(capacity, t))

    def there(x_EbCD: Array) -> Array:
        if shared is not None:
            x_EbCD = jax.lax.psum_scatter(x_EbCD, shared, scatter_dimension=2, tiled=True)
        if axes.expert is not None:
            x_EbCD = jax.lax.all_to_all(x_EbCD, axes.expert, split_axis=0, concat_axis=1, tiled=True)
        return x_EbCD

    def back(y_EbCD: Array) -> Array:
        if axes.expert is not None:
            y_EbCD = jax.lax.all_to_all(y_EbCD, axes.expert, split_axis=1, concat_axis=0, tiled=True)
        if shared is not None:
            y_EbCD = jax.lax.all_gather(y_EbCD, shared, axis=2, tiled=True)
        return y_EbCD

    weight_btk = routing.weight_btk
    if axes.tensor is not None:
        # Devices of a tensor group work on parts of the same tokens: this makes the sum of their gradients [b, t, D],
        # smaller than the buffers.
        x_btD, weight_btk = varying((x_btD, weight_btk), axes.tensor)
    y_EbCD = back(experts(there(dispatch(x_btD, slots, num_experts=num_experts, compute=compute))).astype(compute))
    y_btD = combine(y_EbCD, slots, weight_btk)
    if axes.tensor is not None and axes.scatter:
        y_btD = jax.lax.psum_scatter(y_btD, axes.tensor, scatter_dimension=1, tiled=True)
    elif axes.tensor is not None:
        y_btD = jax.lax.psum(y_btD, axes.tensor)
    return y_btD, _stats(routing, slots.dropped, context=axes.context, batch=axes.batch)


def automatic_mixture(
    x_BTD: Float[Array, "b t d"],
    router_DE: Float[Array, "d e"],
    experts: Experts,
    *,
    k: int,
    capacity: int | None,
    compute: jnp.dtype,
) -> tuple[Float[Array, "b t d"], RouterStats]:
    """`mixture` on whole arrays: two sharding constraints on the buffers, between which XLA inserts the all-to-alls.

    B is laid out over data, fsdp and expert, then E over expert, and back. Trace it under `parallel.mesh.use_mesh`.
    """
    together = PartitionSpec(None, (Axis.DATA, Axis.FSDP, Axis.EXPERT))
    apart = PartitionSpec(Axis.EXPERT, (Axis.DATA, Axis.FSDP))

    num_experts, seq = router_DE.shape[1], x_BTD.shape[1]
    routing = _routing(x_BTD, router_DE, k)
    slots = assign_slots(routing.expert_btk, num_experts, seq if capacity is None else min(capacity, seq))
    x_EBCD = constrain_automatic(dispatch(x_BTD, slots, num_experts=num_experts, compute=compute), together)
    y_EBCD = experts(constrain_automatic(x_EBCD, apart)).astype(compute)
    y_EBCD = constrain_automatic(constrain_automatic(y_EBCD, apart), together)
    return combine(y_EBCD, slots, routing.weight_btk), _stats(routing, slots.dropped)


def dense_mixture(
    x_btD: Float[Array, "b t D"], router_DE: Float[Array, "D E"], experts: Experts, *, k: int, compute: jnp.dtype
) -> tuple[Float[Array, "b t D"], RouterStats]:
    """`mixture` with nothing dropped, by every expert on every token: E/k times the work, and no table or gather.

    `experts` are all of them. It pays where sequences are short, as in decoding, and checks the rest.
    """
    routing = _routing(x_btD, router_DE, k)
    (b, t, dim), num_experts = x_btD.shape, router_DE.shape[1]
    x_EbtD = jnp.broadcast_to(x_btD.astype(compute), (num_experts, b, t, dim))
    chosen_btkE = is_expert(routing.expert_btk, num_experts)
    weight_btE = jnp.where(chosen_btkE, routing.weight_btk[..., None], 0).sum(axis=2)
    y_btD = (jnp.moveaxis(weight_btE, 2, 0)[..., None] * experts(x_EbtD)).sum(axis=0)
    return y_btD, _stats(routing, jnp.zeros((), jnp.int32))


def _routing(x_btD: Array, router_DE: Array, k: int) -> Routing:
    # Rounded logits would send tokens elsewhere: float32 whatever the other products are in. Source: Fedus et al. 2021,
    # section 2.4 (selective precision).
    return route(einsum("btd,de->bte", x_btD, router_DE, accumulator(x_btD.dtype)), k)


def _stats(routing: Routing, dropped: Array, *, context: str | None = None, batch: tuple[str, ...] = ()) -> RouterStats:
    """Over the whole batch: shards of it are equal, so the mean of their means is the mean."""
    num_experts = routing.probability_btE.shape[-1]
    load_bE = is_expert(routing.expert_btk, num_experts).sum(axis=(1, 2), dtype=jnp.int32)
    balance = balance_loss(routing.probability_btE, load_bE, context=context)
    load_E = load_bE.sum(axis=0, dtype=jnp.int32)
    if context is not None or batch:
        dropped, load_E = jax.lax.psum((dropped, load_E), (*batch, *((context,) if context is not None else ())))
    if batch:
        balance = jax.lax.pmean(balance, batch)
    return RouterStats(balance=balance, dropped=dropped, load_E=load_E)


def _take(x_bID: Array, index_bO: Array) -> Array:
    """x[b, index], and zeros where the index is out of range."""
    return jnp.take_along_axis(x_bID, index_bO[..., None], axis=1, mode="fill", fill_value=0)


# Each table undoes the other, so the gradient of a gather by one is a gather by the other; autodiff would scatter,
# which is slow on accelerators, and adds in no fixed order on GPUs.
@jax.custom_vjp
def _collect(y_bsD: Array, slots: Slots) -> Array:
    return _take(y_bsD, slots.place_bi)


def _collect_forward(y_bsD: Array, slots: Slots) -> tuple[Array, Slots]:
    return _collect(y_bsD, slots), slots


def _collect_backward(slots: Slots, dy_biD: Array) -> tuple[Array, Any]:
    return _take(dy_biD, slots.choice_bs), None


_collect.defvjp(_collect_forward, _collect_backward)


@partial(jax.custom_vjp, nondiff_argnums=(2, 3, 4))
def _spread(x_btD: Array, slots: Slots, k: int, compute: jnp.dtype, wide: jnp.dtype) -> Array:
    return _take(x_btD.astype(compute), slots.choice_bs // k)


def _spread_forward(x_btD: Array, slots: Slots, k: int, compute: jnp.dtype, wide: jnp.dtype) -> tuple[Array, Slots]:
    return _spread(x_btD, slots, k, compute, wide), slots


def _spread_backward(k: int, compute: jnp.dtype, wide: jnp.dtype, slots: Slots, dx_bsD: Array) -> tuple[Array, Any]:
    dx_biD = _take(dx_bsD, slots.place_bi).astype(wide)
    return dx_biD.reshape(dx_biD.shape[0], -1, k, dx_biD.shape[-1]).sum(axis=2), None


_spread.defvjp(_spread_forward, _spread_backward)
