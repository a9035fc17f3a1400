"""Who goes to which expert and which place: against definitions in numpy, and invariants of any routing."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from float64 import float64
from hypothesis import given, settings
from hypothesis import strategies as st

from gcompute.parallel.routing import Slots, assign_slots, balance_loss, route

B, T, E = 2, 6, 4
# Compiled once each: hypothesis varies the choices, not the shapes.
ASSIGN = {
    (k, capacity): jax.jit(partial(assign_slots, num_experts=E, capacity=capacity, places=capacity + extra))
    for k, capacity, extra in [(1, 1, 0), (2, 3, 0), (2, 2, 3), (3, 6, 0)]
}


@st.composite
def choices(draw):
    k, capacity = draw(st.sampled_from(sorted(ASSIGN)))
    token = st.permutations(range(E)).map(lambda order: order[:k])
    rows = draw(st.lists(st.lists(token, min_size=T, max_size=T), min_size=B, max_size=B))
    return np.array(rows, np.int32), k, capacity


@settings(max_examples=150, deadline=None)
@given(choices())
def test_places_go_to_the_first_come_and_to_nobody_twice(drawn):
    expert_btk, k, capacity = drawn
    slots = jax.tree.map(np.asarray, ASSIGN[k, capacity](jnp.asarray(expert_btk)))
    num_slots = slots.choice_bs.shape[1]
    places, dropped = num_slots // E, 0
    for b in range(B):
        flat, place_i, choice_s = expert_btk[b].reshape(-1), slots.place_bi[b], slots.choice_bs[b]
        kept = place_i < num_slots
        dropped += (~kept).sum()
        # No slot is used twice, each belongs to the expert chosen, and the two tables undo each other.
        assert len(set(place_i[kept])) == kept.sum()
        np.testing.assert_array_equal(place_i[kept] // places, flat[kept])
        np.testing.assert_array_equal(choice_s[place_i[kept]], np.flatnonzero(kept))
        assert (choice_s < T * k).sum() == kept.sum()
        for e in range(E):
            wanted = np.flatnonzero(flat == e)
            # The first of them, in order, and no other: a choice is dropped only when the expert is full.
            np.testing.assert_array_equal(place_i[wanted[:capacity]], e * places + np.arange(len(wanted[:capacity])))
            assert (place_i[wanted[capacity:]] == num_slots).all()
    assert slots.place_bi.dtype == slots.choice_bs.dtype == np.int32
    assert Slots(place_bi=slots.place_bi, choice_bs=slots.choice_bs).dropped == dropped


@pytest.mark.oldest
@pytest.mark.parametrize("k", [1, 2, 5])
def test_weights_are_those_of_the_chosen_probabilities(k):
    with float64(True):
        logits = jax.random.normal(jax.random.key(k), (2, 3, 5), jnp.float64)
        routing = jax.tree.map(np.asarray, jax.jit(partial(route, k=k))(logits))
    p = np.exp(logits) / np.exp(logits).sum(-1, keepdims=True)
    np.testing.assert_allclose(routing.probability_btE, p, rtol=1e-13)
    np.testing.assert_array_equal(routing.expert_btk, np.argsort(-p, axis=-1)[..., :k])
    chosen = np.take_along_axis(p, routing.expert_btk, axis=-1)
    np.testing.assert_allclose(routing.weight_btk, chosen / (chosen.sum(-1, keepdims=True) if k > 1 else 1), rtol=1e-13)


def test_of_equal_logits_the_first_wins():
    assert route(jnp.array([[[0.0, 1.0, -0.0, 1.0, 0.0]]]), 4).expert_btk.tolist() == [[[1, 3, 0, 2]]]


def test_a_single_choice_still_teaches_the_router():
    logits = jnp.array([[[0.0, 1.0, 2.0]]])
    for k in (1, 2):
        gradient = jax.jit(jax.grad(lambda z, k=k: route(z, k).weight_btk[..., 0].sum()))(logits)
        assert jnp.abs(gradient).max() > 0.01


@pytest.mark.oldest
def test_the_balance_loss_is_one_at_balance_and_the_number_of_experts_at_worst():
    load = jnp.array([[4, 4, 4, 4]])
    assert balance_loss(jnp.full((1, 8, 4), 0.25), load) == 1.0
    alone = jnp.array([[8, 0, 0, 0]])
    assert balance_loss(jnp.zeros((1, 8, 4)).at[..., 0].set(1.0), alone) == 4.0


def test_the_balance_loss_of_a_batch_is_the_mean_of_its_sequences():
    p = np.random.default_rng(0).dirichlet(np.ones(E), (4, 8)).astype(np.float32)
    load = np.random.default_rng(1).multinomial(16, np.full(E, 1 / E), 4)
    alone = [balance_loss(p[b : b + 1], load[b : b + 1]) for b in range(4)]
    np.testing.assert_allclose(balance_loss(p, load), np.mean(alone), rtol=1e-6)


@pytest.mark.parametrize("k", [0, 4])
def test_more_choices_than_experts_are_refused(k):
    with pytest.raises(ValueError, match=rf"k={k} experts a token, of 3 experts. Legal: k=1 to 3."):
        route(jnp.zeros((1, 1, 3)), k)
