"""The two ends of a language model with the vocabulary split over devices: embedding and cross-entropy.

Both are per-device code, called inside `jax.shard_map`: `v` is this device's share of V, the tokens from
`axis_index * v` on. No device ever has a whole row of logits: of [B, T, V] numbers, three of [B, T] are reduced.
Source: Shoeybi et al. 2019 (Megatron-LM), section 3.
"""

from functools import partial

import jax
import jax.numpy as jnp
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Bool, Float, Int

from gcompute.config.mesh import Axis
from gcompute.parallel.collectives import axis_index, varying, varying_axes
from gcompute.parallel.einsum import accumulator
from gcompute.parallel.sequence import SEQUENCE_DIM, check_sequence
from gcompute.parallel.tensor import check_divides


def vocab_parallel_embedding(
    tokens_BT: Int[Array, "b t"], embedding_vD: Float[Array, "v d"], axis: str, *, scatter_sequence: bool = False
) -> Float[Array, "b t d"]:
    """Row `token` of the embedding for each token: the device that has it looks it up, the others add zeros.

    One all-reduce of [B, T, D], or with `scatter_sequence` one reduce-scatter after which each device has its piece of
    T. One term of each sum is not zero, so the result is exact in any dtype. The gradient of a token's row arrives at
    the device that has it. A token outside [0, V) gives zeros.

    >>> from gcompute.config.mesh import MeshShape
    >>> from gcompute.parallel.mesh import build_mesh
    >>> mesh = build_mesh(MeshShape(tensor=4))
    >>> embed = jax.jit(jax.shard_map(
    ...     lambda tokens, rows: vocab_parallel_embedding(tokens, rows, Axis.TENSOR), mesh=mesh,
    ...     in_specs=(P(), vocabulary_specs(mesh, vocab=8)["embedding_vD"]), out_specs=P()))
    >>> embed(jnp.array([[5, 0]]), 10.0 * jnp.arange(8)[:, None]).ravel().tolist()
    [50.0, 0.0]

    Raises:
      ValueError: with `scatter_sequence`, the devices along `axis` do not divide T.
    Source: Shoeybi et al. 2019, section 3 ("input embedding").
    """
    local_BT, mine_BT = _local(tokens_BT, embedding_vD.shape[0], axis)
    rows_BTD = jnp.where(mine_BT[..., None], jnp.take(embedding_vD, local_BT, axis=0, mode="clip"), 0)
    if not scatter_sequence:
        return jax.lax.psum(rows_BTD, axis)
    check_sequence(tokens_BT.shape[SEQUENCE_DIM], axis)
    return jax.lax.psum_scatter(rows_BTD, axis, scatter_dimension=SEQUENCE_DIM, tiled=True)


def vocab_parallel_cross_entropy(
    logits_BTv: Float[Array, "b t v"], targets_BT: Int[Array, "b t"], axis: str
) -> Float[Array, "b t"]:
    """Cross-entropy of each target in nats, logsumexp(logits) - logits[target], from each device's share of the logits.

    Three all-reduces of [B, T]: the greatest logit, the sum of exp(logit - greatest), the target's logit. The gradient,
    softmax(logits) - onehot(target), needs nothing sent, and of the forward pass it keeps the logits in their own
    dtype and two numbers a token. Losses are in `accumulator(logits.dtype)`. A target outside [0, V) gives NaN.

    >>> from gcompute.config.mesh import MeshShape
    >>> from gcompute.parallel.mesh import build_mesh
    >>> mesh = build_mesh(MeshShape(tensor=4))
    >>> losses = jax.jit(jax.shard_map(
    ...     lambda logits, targets: vocab_parallel_cross_entropy(logits, targets, Axis.TENSOR), mesh=mesh,
    ...     in_specs=(vocabulary_specs(mesh, vocab=8)["logits_BTv"], P()), out_specs=P()))
    >>> float(losses(jnp.zeros((1, 1, 8)), jnp.array([[3]]))[0, 0]) == float(jnp.log(8.0))
    True

    Source: Shoeybi et al. 2019, section 3 ("output embedding").
    """
    # The targets stay as they are: made to vary along `axis`, they would make the losses vary too.
    return _cross_entropy(varying(logits_BTv, (axis, *sorted(varying_axes(targets_BT)))), targets_BT, axis)


def vocabulary_specs(mesh: Mesh, *, vocab: int, axis: str = Axis.TENSOR) -> dict[str, P]:
    """Where the embedding, the output matrix and the logits lie.

    Raises:
      ValueError: `axis` does not divide `vocab`.
    """
    check_divides(mesh, axis, vocab=vocab)
    return {"embedding_vD": P(axis, None), "head_Dv": P(None, axis), "logits_BTv": P(None, None, axis)}


@partial(jax.custom_vjp, nondiff_argnums=(2,))
def _cross_entropy(logits_BTv: Array, targets_BT: Array, axis: str) -> Array:
    return _cross_entropy_forward(logits_BTv, targets_BT, axis)[0]


def _cross_entropy_forward(logits_BTv: Array, targets_BT: Array, axis: str) -> tuple[Array, tuple[Array, ...]]:
    wide_BTv = logits_BTv.astype(accumulator(logits_BTv.dtype))
    greatest_BT = jax.lax.pmax(wide_BTv.max(axis=-1), axis)
    local_BT, mine_BT = _local(targets_BT, logits_BTv.shape[-1], axis)
    logit_BT = jnp.take_along_axis(logits_BTv, local_BT[..., None], axis=-1, mode="clip")[..., 0]
    # One call: a compiler can make one all-reduce of the two sums.
    total_BT, target_BT = jax.lax.psum(
        (
            jnp.exp(wide_BTv - greatest_BT[..., None]).sum(axis=-1),
            jnp.where(mine_BT, logit_BT.astype(wide_BTv.dtype), 0),
        ),
        axis,
    )
    # Large logits cancel before the small logarithm is added.
    losses_BT = jnp.log(total_BT) + (greatest_BT - target_BT)
    inside_BT = _inside(targets_BT, logits_BTv.shape[-1], axis)
    return jnp.where(inside_BT, losses_BT, jnp.nan), (logits_BTv, targets_BT, greatest_BT, total_BT)


def _cross_entropy_backward(axis: str, saved: tuple[Array, ...], dloss_BT: Array) -> tuple[Array, None]:
    logits_BTv, targets_BT, greatest_BT, total_BT = saved
    if axis not in varying_axes(logits_BTv):
        # check_vma is off: each device then has a part of the cotangent, and psum's own transpose would add them up.
        dloss_BT = jax.lax.psum(dloss_BT, axis)
    dloss_BT = jnp.where(_inside(targets_BT, logits_BTv.shape[-1], axis), dloss_BT, 0)
    local_BT, _ = _local(targets_BT, logits_BTv.shape[-1], axis)
    target_BTv = local_BT[..., None] == jnp.arange(logits_BTv.shape[-1])
    p_BTv = jnp.exp(logits_BTv.astype(total_BT.dtype) - greatest_BT[..., None]) / total_BT[..., None]
    return (dloss_BT[..., None] * (p_BTv - target_BTv)).astype(logits_BTv.dtype), None


_cross_entropy.defvjp(_cross_entropy_forward, _cross_entropy_backward)


def _local(tokens_BT: Int[Array, "b t"], v: int, axis: str) -> tuple[Int[Array, "b t"], Bool[Array, "b t"]]:
    """Each token counted from the start of this device's share of V, and whether it lies in it."""
    local_BT = tokens_BT - v * axis_index(axis)
    return local_BT, (local_BT >= 0) & (local_BT < v)


def _inside(tokens_BT: Int[Array, "b t"], v: int, axis: str) -> Bool[Array, "b t"]:
    """Whether each token lies in any device's share."""
    return (tokens_BT >= 0) & (tokens_BT < v * jax.lax.axis_size(axis))
