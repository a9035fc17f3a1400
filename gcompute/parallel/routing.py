"""Which experts each token goes to, and in which place of theirs: tables of integers, and the loss that balances them.

Per-device code; only what takes an axis communicates.
"""

from dataclasses import dataclass

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from gcompute.parallel.collectives import axis_index
from gcompute.parallel.load_balance import Layout, inverse_order, to_sequence, to_shards


@jax.tree_util.register_dataclass
@dataclass(frozen=True, slots=True, kw_only=True)
class Routing:
    """Where each token wants to go: its k experts, the best first, their weights, and all router probabilities."""

    expert_btk: Int[Array, "b t k"]
    weight_btk: Float[Array, "b t k"]
    probability_btE: Float[Array, "b t E"]


@jax.tree_util.register_dataclass
@dataclass(frozen=True, slots=True, kw_only=True)
class Slots:
    """The places given out, as two tables that are each other's inverse.

    A choice is t k + rank, of this device's tokens; a slot is e C + place. place_bi[choice] is its slot, E C if the
    choice was dropped; choice_bs[slot] is the choice in it, t k if it is empty or held by another device's token.
    """

    place_bi: Int[Array, "b i"]
    choice_bs: Int[Array, "b s"]

    @property
    def dropped(self) -> Int[Array, ""]:
        """How many choices got no place."""
        return (self.place_bi == self.choice_bs.shape[1]).sum(dtype=jnp.int32)


def route(logits_btE: Float[Array, "b t E"], k: int) -> Routing:
    """Choose the k experts of each token with the largest logits; of equal ones, the first.

    p = softmax(logits);  weight_j = p_j / (sum of p over the chosen), which is the softmax over the chosen logits

    With k = 1 that weight would be 1 whatever the router says, and the router would not learn from the loss: the weight
    is then p itself.

    >>> chosen = route(jnp.log(jnp.array([[[0.1, 0.6, 0.3]]])), 2)
    >>> chosen.expert_btk.tolist(), [f"{weight:.3f}" for weight in chosen.weight_btk[0, 0]]
    ([[[1, 2]]], ['0.667', '0.333'])

    Raises:
      ValueError: k is not between 1 and E.
    Source: Jiang et al. 2024 (Mixtral), arXiv:2401.04088, section 2.1; k = 1: Fedus et al. 2021, arXiv:2101.03961,
      equation 2.
    """
    num_experts = logits_btE.shape[-1]
    if not 1 <= k <= num_experts:
        raise ValueError(f"k={k} experts a token, of {num_experts} experts. Legal: k=1 to {num_experts}.")
    # Not lax.top_k: the compiler would gather the logits of all devices for it.
    order_btE = jax.lax.broadcasted_iota(jnp.int32, logits_btE.shape, 2)
    expert_btk = jax.lax.sort((-jax.lax.stop_gradient(logits_btE), order_btE), num_keys=1)[1][..., :k]
    probability_btE = jax.nn.softmax(logits_btE, axis=-1)
    # A mask, and not the values of top_k: its gradient is a mask again instead of a scatter.
    values_btE = probability_btE if k == 1 else logits_btE
    chosen_btkE = is_expert(expert_btk, num_experts)
    chosen_btk = jnp.where(chosen_btkE, values_btE[..., None, :], 0).sum(axis=-1)
    weight_btk = chosen_btk if k == 1 else jax.nn.softmax(chosen_btk, axis=-1)
    return Routing(expert_btk=expert_btk, weight_btk=weight_btk, probability_btE=probability_btE)


def assign_slots(
    expert_btk: Int[Array, "b t k"], num_experts: int, capacity: int, *, places: int | None = None
) -> Slots:
    """Give out each expert's `capacity` places for whole sequences, in the order of (position, rank).

    A stable sort of the choices by expert puts those of one expert side by side in that order: the first `capacity` of
    each run get a place. `places` is the room that an expert has in the buffers, if that is more (the rest is empty).

    >>> slots = assign_slots(jnp.array([[[0, 1], [0, 2], [0, 1]]]), num_experts=3, capacity=2)
    >>> slots.place_bi.tolist(), int(slots.dropped)  # the third token comes too late for expert 0
    ([[0, 2, 1, 4, 6, 3]], 1)
    """
    b, t, k = expert_btk.shape
    places = capacity if places is None else places
    expert_bi = expert_btk.reshape(b, t * k)
    choices_bi = jax.lax.broadcasted_iota(jnp.int32, (b, t * k), 1)
    by_expert_bi = jax.lax.sort((expert_bi, choices_bi), num_keys=1)[1]
    turn_bi = jax.lax.sort((by_expert_bi, choices_bi), num_keys=1)[1]
    load_bE = is_expert(expert_bi, num_experts).sum(axis=1, dtype=jnp.int32)
    first_bE = jnp.cumsum(load_bE, axis=1, dtype=jnp.int32) - load_bE
    taken_bi = turn_bi - jnp.take_along_axis(first_bE, expert_bi, axis=1)
    place_bi = jnp.where(taken_bi < capacity, expert_bi * places + taken_bi, num_experts * places)

    place_c = jnp.arange(places, dtype=jnp.int32)
    sought_bs = jnp.minimum(first_bE[..., None] + place_c, t * k - 1).reshape(b, -1)
    filled_bs = (place_c < jnp.minimum(load_bE, capacity)[..., None]).reshape(b, -1)
    choice_bs = jnp.where(filled_bs, jnp.take_along_axis(by_expert_bi, sought_bs, axis=1), t * k)
    return Slots(place_bi=place_bi.astype(jnp.int32), choice_bs=choice_bs)


def assign_shared_slots(
    expert_btk: Int[Array, "b t k"], num_experts: int, capacity: int, *, axis: str, layout: Layout = "contiguous"
) -> Slots:
    """`assign_slots` for sequences that are split over `axis`: this device's choices, among all of the sequence.

    The choices, 4 k bytes a token, are gathered, and every device gives out the places of the whole sequence. An expert
    has room for `capacity`, rounded up to a multiple of the axis size.

    Collectives: one all-gather of b T k integers.
    """
    n, shard, (b, t, k) = jax.lax.axis_size(axis), axis_index(axis), expert_btk.shape
    seq = n * t
    all_bTk = to_sequence(jax.lax.all_gather(expert_btk, axis, axis=1, tiled=True), n, layout)
    whole = assign_slots(all_bTk, num_experts, capacity, places=-(-capacity // n) * n)
    place_bTk = to_shards(whole.place_bi.reshape(b, seq, k), n, layout)
    mine_btk = jax.lax.dynamic_slice_in_dim(place_bTk, shard * t, t, axis=1)
    # Where a choice stands among the shards joined end to end, then among this one's.
    stands_T = jnp.asarray(inverse_order(seq, n, layout), jnp.int32)
    position, rank = jnp.divmod(whole.choice_bs, k)
    here_bs = (stands_T[jnp.minimum(position, seq - 1)] - shard * t) * k + rank
    is_here = (position < seq) & (here_bs >= 0) & (here_bs < t * k)
    return Slots(place_bi=mine_btk.reshape(b, t * k), choice_bs=jnp.where(is_here, here_bs, t * k))


def balance_loss(
    probability_btE: Float[Array, "b t E"], load_bE: Int[Array, "b E"], *, context: str | None = None
) -> Float[Array, ""]:
    """The load balance loss, a sequence at a time: mean over sequences of E sum_e f_e P_e, 1 at perfect balance.

    f_e is the share of the sequence's T k choices that went to expert e, dropped ones among them, and P_e the mean of
    its router probability over the sequence. Gradients flow through P. With choices split over `context`, pass this
    device's: both sums run over the axis. (The loss of a whole batch instead would not be a mean over sequences, and
    microbatches would change it. Libraries that do not divide f by k have k times this.)

    Source: Fedus et al. 2021, arXiv:2101.03961, equations 4 to 6; a sequence at a time: DeepSeek-AI 2024 (DeepSeek-V2),
      arXiv:2405.04434, section 2.2.3.
    """
    sum_bE, num_tokens, num_experts = probability_btE.sum(axis=1), *probability_btE.shape[1:]
    if context is not None:
        # One at a time: JAX 0.7 does not differentiate a sum of floats and integers together.
        sum_bE, load_bE = jax.lax.psum(sum_bE, context), jax.lax.psum(load_bE, context)
        num_tokens *= jax.lax.axis_size(context)
    share_bE = load_bE.astype(sum_bE.dtype) / load_bE.sum(axis=1, keepdims=True)
    return num_experts * (share_bE * sum_bE / num_tokens).sum(axis=1).mean()


def is_expert(expert: Int[Array, "..."], num_experts: int) -> Bool[Array, "... E"]:
    """Which of the experts each number means: a row of E with one True."""
    return expert[..., None] == jnp.arange(num_experts, dtype=expert.dtype)
