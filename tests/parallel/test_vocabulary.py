"""Vocab-parallel embedding, to the last bit, and cross-entropy, in float64, against whole logits in numpy."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from float64 import float64
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
from per_device import count_sent, forward_collectives, run, sent, small_integers, tensor_mesh

from gcompute.config.mesh import Axis
from gcompute.parallel.mesh import use_mesh
from gcompute.parallel.vocabulary import vocab_parallel_cross_entropy, vocab_parallel_embedding, vocabulary_specs

B, T, D, V = 2, 8, 3, 16
tokens_BT = np.random.default_rng(0).integers(0, V, (B, T)).astype(np.int32)
logits_BTV = np.random.default_rng(1).normal(size=(B, T, V)) * 3
embedding_VD = small_integers(2, V, D)
EMBED = ((P(Axis.DATA), P(Axis.TENSOR)), P(Axis.DATA))
LOSSES = ((P(Axis.DATA, None, Axis.TENSOR), P(Axis.DATA)), P(Axis.DATA))
embed = partial(vocab_parallel_embedding, axis=Axis.TENSOR)
losses = partial(vocab_parallel_cross_entropy, axis=Axis.TENSOR)


def gradient_of_rows(tokens, dy, vocab=V):
    """numpy: the rows of dy, each added to the row of its token."""
    summed = np.zeros((vocab, dy.shape[-1]), dy.dtype)
    np.add.at(summed, tokens, dy)
    return summed


@pytest.mark.parametrize("scatter", [False, True], ids=["whole", "scattered"])
@pytest.mark.parametrize(("size", "data"), [(1, 1), (2, 1), (4, 2), (8, 1)])
def test_embedding_equals_one_device(size, data, scatter):
    mesh = tensor_mesh(size, data)
    layout = (EMBED[0], P(Axis.DATA, Axis.TENSOR)) if scatter else EMBED
    function = partial(embed, scatter_sequence=scatter)
    ran = run(function, mesh, *layout, tokens_BT, embedding_VD)
    np.testing.assert_array_equal(ran.y, embedding_VD[tokens_BT])
    np.testing.assert_array_equal(ran.gradients[0], gradient_of_rows(tokens_BT, ran.dy))
    if size > 1:
        forward, backward = ("reduce-scatter", ["all-gather"]) if scatter else ("all-reduce", [])
        kinds = [one.kind for one in sent(ran.compiled, mesh) if one.axes == (Axis.TENSOR,)]
        assert kinds == [forward, *backward]
        assert forward_collectives(function, mesh, *layout, tokens_BT, embedding_VD) == {forward: 1}


def test_one_row_of_the_vocabulary_a_device():
    ran = run(embed, tensor_mesh(8), *EMBED, tokens_BT % 8, embedding_VD[:8])
    np.testing.assert_array_equal(ran.y, embedding_VD[tokens_BT % 8])
    got = run(losses, tensor_mesh(8), *LOSSES, logits_BTV[..., :8].astype(np.float32), tokens_BT % 8)
    np.testing.assert_allclose(got.y, textbook(logits_BTV[..., :8], tokens_BT % 8)[0], rtol=1e-6)


@pytest.mark.parametrize("dtype", ["bfloat16", "float32", "float64"])
def test_embedding_is_exact_in_any_dtype(dtype):
    with float64(dtype == "float64"):
        values = jnp.asarray(np.random.default_rng(3).normal(size=(V, D)), dtype)
        sharded = jax.shard_map(embed, mesh=tensor_mesh(4), in_specs=EMBED[0], out_specs=EMBED[1])
        got = jax.jit(sharded)(tokens_BT, values)
        assert got.dtype == values.dtype
        np.testing.assert_array_equal(got, values[tokens_BT])


def test_tokens_outside_the_vocabulary_give_zeros():
    tokens = np.array([[-1, V, 3, V + 100]], np.int32)
    ran = run(embed, tensor_mesh(4), *EMBED, tokens, embedding_VD)
    np.testing.assert_array_equal(ran.y[0], embedding_VD[[3, 3, 3, 3]] * np.array([[0], [0], [1], [0]]))
    np.testing.assert_array_equal(ran.gradients[0], gradient_of_rows([3], ran.dy[0, 2:3]))


def textbook(logits, targets):
    """numpy: losses and softmax(logits) - onehot(target)."""
    logits = np.asarray(logits, np.float64)
    shifted = logits - logits.max(axis=-1, keepdims=True)
    p = np.exp(shifted) / np.exp(shifted).sum(axis=-1, keepdims=True)
    onehot = np.eye(logits.shape[-1])[targets]
    return np.log(np.exp(shifted).sum(axis=-1)) - (shifted * onehot).sum(axis=-1), p - onehot


def assert_losses(ran, logits, targets, **tolerance):
    expected, gradient = textbook(logits, targets)
    np.testing.assert_allclose(ran.y, expected, **tolerance)
    np.testing.assert_allclose(ran.gradients[0], ran.dy[..., None] * gradient, **tolerance)


@pytest.mark.parametrize(("size", "data"), [(1, 1), (2, 1), (4, 2), (8, 1)])
def test_cross_entropy_equals_whole_logits(size, data):
    mesh = tensor_mesh(size, data)
    with float64(True):
        ran = run(losses, mesh, *LOSSES, logits_BTV, tokens_BT)
        assert ran.y.dtype == ran.gradients[0].dtype == jnp.float64
        assert_losses(ran, logits_BTV, tokens_BT, rtol=1e-13, atol=1e-13)
        sums = sent(ran.compiled, mesh)
        # The greatest logit, and the other two sums in one: the gradient adds none, and nothing has a dim of V.
        assert [one.kind for one in sums] == (["all-reduce"] * 2 if size > 1 else [])
        local = B // data * T * 8
        assert [one.operand_bytes for one in sums] == ([local, 2 * local] if size > 1 else [])


@pytest.mark.parametrize(("dtype", "tolerance"), [("bfloat16", 2**-8), ("float32", 1e-6)])
def test_cross_entropy_of_narrow_logits_is_summed_wide(dtype, tolerance):
    logits = jnp.asarray(logits_BTV, dtype)
    ran = run(losses, tensor_mesh(4), *LOSSES, logits, tokens_BT)
    assert ran.y.dtype == jnp.float32
    assert ran.gradients[0].dtype == logits.dtype
    # Losses are those of the rounded logits to float32; gradients are rounded to the dtype of the logits.
    np.testing.assert_allclose(ran.y, textbook(logits, tokens_BT)[0], rtol=1e-6, atol=1e-6)
    gradients = np.asarray(ran.gradients[0], np.float32)
    np.testing.assert_allclose(gradients, ran.dy[..., None] * textbook(logits, tokens_BT)[1], rtol=tolerance, atol=1e-6)


@pytest.mark.parametrize("shift", [1e4, -1e4])
def test_large_logits_do_not_overflow(shift):
    with float64(True):
        ran = run(losses, tensor_mesh(4), *LOSSES, logits_BTV + shift, tokens_BT)
        # Doubles near 1e4 are 2e-12 apart.
        assert_losses(ran, logits_BTV, tokens_BT, rtol=0, atol=1e-11)


def test_large_logits_lose_nothing_in_float32():
    exact = np.round(logits_BTV * 64) / 64  # so is exact + 8192, in float32
    ran = run(losses, tensor_mesh(4), *LOSSES, (exact + 8192).astype(np.float32), tokens_BT)
    assert_losses(ran, exact, tokens_BT, rtol=1e-6, atol=1e-6)


def test_a_share_of_only_masked_logits():
    """A vocabulary padded with minus infinity up to whole shares: the last device has none that counts."""
    masked = np.where(np.arange(V) < 9, logits_BTV, -np.inf)
    with float64(True):
        ran = run(losses, tensor_mesh(4), *LOSSES, masked, tokens_BT % 9)
        expected, gradient = textbook(logits_BTV[..., :9], tokens_BT % 9)
        np.testing.assert_allclose(ran.y, expected, rtol=1e-13)
        np.testing.assert_allclose(ran.gradients[0][..., :9], ran.dy[..., None] * gradient, atol=1e-13)
        np.testing.assert_array_equal(ran.gradients[0][..., 9:], 0)


def test_a_target_outside_the_vocabulary_gives_nan_and_no_gradient():
    targets = np.array([[0, V, -1, V - 1]], np.int32)
    logits = logits_BTV[:1, :4].astype(np.float32)
    sharded = jax.shard_map(losses, mesh=tensor_mesh(4), in_specs=LOSSES[0], out_specs=LOSSES[1])
    value, pull = jax.jit(partial(jax.vjp, lambda logits: sharded(logits, targets)))(logits)
    np.testing.assert_array_equal(np.isnan(value), [[False, True, True, False]])
    (gradient,) = jax.jit(pull)(jnp.ones((1, 4)))
    np.testing.assert_array_equal(gradient[0, 1:3], 0)
    np.testing.assert_allclose(gradient[0, 0], textbook(logits, targets % V)[1][0, 0], atol=1e-6)


@pytest.mark.oldest
def test_inside_automatic_axes_and_inside_another_shard_map():
    mesh, logits = tensor_mesh(4, data=2), logits_BTV.astype(np.float32)
    expected, gradients = textbook(logits, tokens_BT)
    placed = jax.device_put(
        (logits, tokens_BT), (NamedSharding(mesh, P(Axis.DATA, None, Axis.TENSOR)), NamedSharding(mesh, P(Axis.DATA)))
    )
    over_tensor = {"in_specs": (P(None, None, Axis.TENSOR), P()), "out_specs": P(), "axis_names": {Axis.TENSOR}}

    def automatic(logits, targets):
        return jax.shard_map(losses, mesh=mesh, **over_tensor)(logits, targets).mean()

    def per_shard_of_data(logits, targets):
        def mean(logits):
            # Types of what varies do not nest in JAX: it lays what autodiff keeps out over the outer axis once more.
            return jax.shard_map(losses, check_vma=False, **over_tensor)(logits, targets).mean()

        loss, gradient = jax.value_and_grad(mean)(logits)
        return jax.lax.pmean(loss, Axis.DATA), gradient / mesh.shape[Axis.DATA]

    rows = P(Axis.DATA)
    nested = jax.shard_map(
        per_shard_of_data,
        mesh=mesh,
        in_specs=(rows, rows),
        out_specs=(P(), rows),
        axis_names={Axis.DATA},
        check_vma=False,
    )
    with use_mesh(mesh):
        for program in (jax.value_and_grad(automatic), nested):
            compiled = jax.jit(program).lower(*placed).compile()
            loss, gradient = compiled(*placed)
            np.testing.assert_allclose(loss, expected.mean(), rtol=1e-6)
            np.testing.assert_allclose(gradient, gradients / expected.size, atol=1e-7)
            assert set(count_sent(compiled)) == {"all-reduce"}


@pytest.mark.parametrize(("size", "data"), [(4, 1), (2, 2)])
def test_without_types_of_what_varies(size, data):
    """check_vma off: then autodiff gives each device a part of a replicated cotangent, which has to be summed."""
    with float64(True):
        ran = run(losses, tensor_mesh(size, data), *LOSSES, logits_BTV, tokens_BT, check_vma=False)
        assert_losses(ran, logits_BTV, tokens_BT, rtol=1e-13, atol=1e-13)
    ran = run(embed, tensor_mesh(size, data), *EMBED, tokens_BT, embedding_VD, check_vma=False)
    np.testing.assert_array_equal(ran.y, embedding_VD[tokens_BT])
    np.testing.assert_array_equal(ran.gradients[0], gradient_of_rows(tokens_BT, ran.dy))


@pytest.mark.oldest
def test_jit_with_these_shardings_does_not_gather_the_logits_either():
    mesh = tensor_mesh(4)
    placed = jax.device_put(
        logits_BTV.astype(np.float32), NamedSharding(mesh, vocabulary_specs(mesh, vocab=V)["logits_BTv"])
    )

    def automatic(logits, targets):
        chosen = jnp.where(targets[..., None] == jnp.arange(V), logits, 0).sum(axis=-1)
        return jax.nn.logsumexp(logits, axis=-1) - chosen

    compiled = jax.jit(automatic).lower(placed, tokens_BT).compile()
    np.testing.assert_allclose(compiled(placed, tokens_BT), textbook(logits_BTV, tokens_BT)[0], rtol=1e-5)
    assert set(count_sent(compiled)) == {"all-reduce"}


def test_one_compilation():
    sharded = jax.jit(jax.shard_map(losses, mesh=tensor_mesh(4), in_specs=LOSSES[0], out_specs=LOSSES[1]))
    logits = logits_BTV.astype(np.float32)
    sharded(logits, tokens_BT)
    sharded(logits + 1, tokens_BT)
    assert sharded._cache_size() == 1


# Each is wrong in one place.
def _parts(logits, targets):
    v = logits.shape[-1]
    local = targets - v * jax.lax.axis_index(Axis.TENSOR)
    mine = (local >= 0) & (local < v)
    chosen = jnp.take_along_axis(logits, jnp.clip(local, 0, v - 1)[..., None], axis=-1)[..., 0]
    return jax.lax.stop_gradient(logits.max(axis=-1)), chosen, mine


def assembled(logits, targets, *, greatest=jax.lax.pmax, total=jax.lax.psum, target=jax.lax.psum, masked=True):
    """Cross-entropy by autodiff, right as it stands: the mutants replace one of its three reductions."""
    most, chosen, mine = _parts(logits, targets)
    most = greatest(most, Axis.TENSOR)
    sums = total(jnp.exp(logits - most[..., None]).sum(axis=-1), Axis.TENSOR)
    return jnp.log(sums) + most - target(jnp.where(mine, chosen, 0) if masked else chosen, Axis.TENSOR)


def local(x, _):
    return x


def over_data(x, _):
    return jax.lax.psum(x, Axis.DATA)


MUTANTS = {
    "the greatest of each share": {"greatest": local},
    "normalised by its own share": {"total": local},
    "the target of its own share": {"target": local},
    "clipped and not masked": {"masked": False},
    "summed over the wrong axis": {"total": over_data},
    "mean for sum": {"target": jax.lax.pmean},
}


def right(options):
    """Whether losses and gradients are those of whole logits."""
    try:
        ran = run(
            partial(assembled, **options), tensor_mesh(2, data=2), *LOSSES, logits_BTV, tokens_BT, check_vma=False
        )
        assert_losses(ran, logits_BTV, tokens_BT, rtol=1e-12, atol=1e-12)
    except AssertionError:
        return False
    return True


def test_mutants_are_detected():
    with float64(True):
        assert right({})
        assert {name for name, options in MUTANTS.items() if right(options)} == set()


def test_types_refuse_what_is_not_reduced():
    """With check_vma on, a loss that differs between devices does not pass for one that does not."""
    with pytest.raises(ValueError, match=r"replicated|vary"):
        run(partial(assembled, total=local), tensor_mesh(2, data=2), *LOSSES, logits_BTV, tokens_BT)


def test_sizes_that_do_not_divide_are_refused():
    mesh = tensor_mesh(4)
    with pytest.raises(ValueError, match=r"mesh tensor=4 does not divide vocab=10: .* Legal: tensor=1, 2, 5, 10\."):
        vocabulary_specs(mesh, vocab=10)
    layout = (EMBED[0], P(Axis.DATA, Axis.TENSOR))
    with pytest.raises(ValueError, match=r"tensor=4 does not divide a sequence of 6: .* Pad it to 8\."):
        run(partial(embed, scatter_sequence=True), mesh, *layout, tokens_BT[:, :6], embedding_VD)
