"""The layouts of a causal sequence: permutations, positions on each device, and what each device has to do."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from jax.sharding import PartitionSpec as P

from gcompute.config.mesh import Axis, MeshShape
from gcompute.parallel.load_balance import (
    LAYOUTS,
    inverse_order,
    local_positions,
    sequence_order,
    to_sequence,
    to_shards,
    work_shares,
)
from gcompute.parallel.mesh import build_mesh

SIZES = {"num_shards": st.integers(1, 12), "size": st.integers(1, 7), "layout": st.sampled_from(LAYOUTS)}


@given(**SIZES)
def test_an_order_is_a_permutation_of_whole_pieces_and_its_inverse_undoes_it(num_shards, size, layout):
    seq = 2 * num_shards * size
    order = sequence_order(seq, num_shards, layout)
    assert sorted(order) == list(range(seq))
    np.testing.assert_array_equal(order[inverse_order(seq, num_shards, layout)], np.arange(seq))
    for shard, places in enumerate(order.reshape(num_shards, -1)):
        first, second = places[:size], places[size:]
        assert np.all(np.diff(first) == 1)
        assert np.all(np.diff(second) == 1)
        if layout == "zigzag":
            assert (first[0], second[0]) == (shard * size, (2 * num_shards - 1 - shard) * size)
        else:
            assert (first[0], second[0]) == (2 * shard * size, (2 * shard + 1) * size)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("num_shards", [1, 2, 5])
def test_slices_permute_as_the_order_does(num_shards, layout):
    x = np.arange(2 * 6 * num_shards * 3).reshape(2, 6 * num_shards, 3)
    order = sequence_order(x.shape[1], num_shards, layout)
    np.testing.assert_array_equal(to_shards(x, num_shards, layout), x[:, order])
    np.testing.assert_array_equal(to_sequence(x[:, order], num_shards, layout), x)


@given(**SIZES)
def test_work_is_equal_in_zigzag_and_up_to_twice_the_mean_contiguous(num_shards, size, layout):
    seq = 2 * num_shards * size
    shares = work_shares(seq, num_shards, layout)
    keys = [
        [position + 1 for position in shard]
        for shard in sequence_order(seq, num_shards, layout).reshape(num_shards, -1)
    ]
    np.testing.assert_allclose(shares, [sum(row) / sum(map(sum, keys)) for row in keys], rtol=1e-15)
    assert shares.sum() == pytest.approx(1, rel=1e-15)
    if layout == "zigzag":
        np.testing.assert_allclose(shares, 1 / num_shards, rtol=1e-15)
    else:
        last_mean_keys = seq - (seq // num_shards - 1) / 2
        assert shares.max() * num_shards == pytest.approx(last_mean_keys / ((seq + 1) / 2), rel=1e-12)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_each_device_knows_its_positions_without_a_message(layout):
    mesh = build_mesh(MeshShape(context=4))
    tell = jax.jit(
        jax.shard_map(
            lambda x: local_positions(Axis.CONTEXT, x.shape[0], layout),
            mesh=mesh,
            in_specs=P(Axis.CONTEXT),
            out_specs=P(Axis.CONTEXT),
        )
    )
    np.testing.assert_array_equal(tell(jnp.zeros(24)), sequence_order(24, 4, layout))


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (partial(sequence_order, 12, 4, "zigzag"), "12 does not divide into 8 equal pieces.*multiple of 8"),
        (partial(sequence_order, 10, 4, "contiguous"), "10 does not divide into 4 equal pieces.*multiple of 4"),
        (partial(sequence_order, 0, 4, "contiguous"), "multiple of 4"),
        (partial(work_shares, 12, 4, "zigzag"), "multiple of 8"),
        (partial(to_sequence, np.zeros((1, 12)), 4, "zigzag"), "multiple of 8"),
        (partial(to_shards, np.zeros((1, 12)), 4, "zigzag"), "multiple of 8"),
        (partial(sequence_order, 16, 4, "striped"), "layout 'striped' is not known. Use one of contiguous, zigzag"),
    ],
)
def test_a_sequence_that_does_not_divide_is_refused_with_the_legal_sizes(call, words):
    with pytest.raises(ValueError, match=words):
        call()
