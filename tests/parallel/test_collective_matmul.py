"""Collective matmuls against one device, to the last bit, and what their programs send: neighbours' pieces only."""

import os
import subprocess
import sys
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P
from jax_versions import GATHERS_OF_X
from per_device import (
    assert_same_bits,
    detected,
    forward_collectives,
    pulled_back,
    run,
    sent,
    small_integers,
    tensor_mesh,
)
from tiers import mostly_slow

from gcompute.aot.target import check_installed, target_environment
from gcompute.config.mesh import Axis
from gcompute.hardware.target import Target
from gcompute.parallel import collective_matmul
from gcompute.parallel.collective_matmul import all_gather_matmul, feed_forward, matmul_reduce_scatter
from gcompute.parallel.tensor import feed_forward_specs

T, D, F = 16, 4, 16
PIECES = P(Axis.DATA, Axis.TENSOR, None)
COLUMN = ((PIECES, P(None, Axis.TENSOR)), P(Axis.DATA, None, Axis.TENSOR))
ROW = ((P(Axis.DATA, None, Axis.TENSOR), P(Axis.TENSOR)), PIECES)
column, row = partial(all_gather_matmul, axis=Axis.TENSOR), partial(matmul_reduce_scatter, axis=Axis.TENSOR)
x_BTD, w_DF = small_integers(0, 2, T, D), small_integers(1, D, F)
x_BTF, w_FD = small_integers(2, 2, T, F), small_integers(3, F, D)
WEIGHTS = {"up_Df": w_DF, "down_fD": w_FD, "gate_Df": small_integers(5, D, F), "down_bias_D": small_integers(6, D)}
WAYS = pytest.mark.parametrize("bidirectional", [False, True], ids=["one way", "both ways"])


def assert_product(ran, x, w):
    """By the textbook, in numpy: y = x w, dx = dy w^T, dw = x^T dy."""
    np.testing.assert_array_equal(ran.y, x @ w)
    np.testing.assert_array_equal(ran.gradients[0], ran.dy @ w.T)
    np.testing.assert_array_equal(ran.gradients[1], np.einsum("bti,bto->io", x, ran.dy))


@pytest.mark.parametrize(
    ("size", "bidirectional"),
    mostly_slow([(1, True), (2, False), (2, True), (4, True), (8, False), (8, True)], (2, False), (4, True)),
)
def test_products_equal_one_device_and_send_n_minus_1_times(size, bidirectional):
    mesh, sends = tensor_mesh(size), (size - 1) * (2 if bidirectional else 1)
    ran = run(partial(column, bidirectional=bidirectional), mesh, *COLUMN, x_BTD, w_DF)
    assert_product(ran, x_BTD, w_DF)
    # Rings of x, and one of the sums that are dx.
    assert ran.collectives == ({"collective-permute": (GATHERS_OF_X + 1) * sends} if sends else {})
    ran = run(partial(row, bidirectional=bidirectional), mesh, *ROW, x_BTF, w_FD)
    assert_product(ran, x_BTF, w_FD)
    assert ran.collectives == ({"collective-permute": 2 * sends} if sends else {})


@WAYS
@pytest.mark.parametrize(
    ("function", "layout", "x", "w"), [(column, COLUMN, x_BTD, w_DF), (row, ROW, x_BTF, w_FD)], ids=["column", "row"]
)
def test_each_send_goes_to_a_neighbour_along_the_axis(function, layout, x, w, bidirectional):
    mesh = tensor_mesh(4, data=2)
    ran = run(partial(function, bidirectional=bidirectional), mesh, *layout, x, w)
    assert_product(ran, x, w)
    sends = sent(ran.compiled, mesh)
    rings = [{target % 4 - source % 4 for source, target in one.pairs} for one in sends if one.pairs]
    forward, backward, num = {1, -3}, {-1, 3}, 3 * (GATHERS_OF_X + 1 if function is column else 2)
    assert rings.count(forward) == num
    assert rings.count(backward) == (num if bidirectional else 0)
    assert {one.axes for one in sends if one.pairs} == {(Axis.TENSOR,)}
    assert [one.axes for one in sends if not one.pairs] == [(Axis.DATA,)]  # dw
    piece_bytes = {one.operand_bytes for one in sends if one.pairs}
    assert piece_bytes == {x.shape[1] // 4 * D * 4 // (2 if bidirectional else 1)}


@pytest.mark.oldest
def test_gradients_are_rings_too_and_x_goes_round_again():
    sharded = jax.shard_map(column, mesh=tensor_mesh(4), in_specs=COLUMN[0], out_specs=COLUMN[1])
    kept = jax.tree.leaves(jax.eval_shape(lambda *a: jax.vjp(sharded, *a)[1], x_BTD, w_DF))
    assert max(leaf.size for leaf in kept) == max(x_BTD.size, w_DF.size)  # summed over devices: no [T, D] on each
    dy = np.ones((2, T, F), np.float32)
    program = jax.jit(lambda dy, *a: pulled_back(sharded, dy, a)).lower(dy, x_BTD, w_DF).as_text()
    assert program.count("stablehlo.collective_permute") == 9
    assert "stablehlo.all_gather" not in program


@pytest.mark.parametrize(("size", "length"), [(4, 4), (2, 6)])
def test_halves_of_pieces_of_odd_length(size, length):
    mesh, both_ways = tensor_mesh(size), {"bidirectional": True}
    x = x_BTD[:, :length]
    assert_product(run(partial(column, **both_ways), mesh, *COLUMN, x, w_DF), x, w_DF)
    x = x_BTF[:, :length]
    assert_product(run(partial(row, **both_ways), mesh, *ROW, x, w_FD), x, w_FD)


def test_without_types_of_what_varies():
    mesh = tensor_mesh(2, data=2)
    assert_product(run(column, mesh, *COLUMN, x_BTD, w_DF, check_vma=False), x_BTD, w_DF)
    assert_product(run(row, mesh, *ROW, x_BTF, w_FD, check_vma=False), x_BTF, w_FD)


def one_device_feed_forward(x, w):
    hidden = jnp.maximum(x @ w["gate_Df"], 0) * (x @ w["up_Df"])
    return hidden @ w["down_fD"] + w["down_bias_D"]


@pytest.mark.oldest("2-1-both ways")
@WAYS
@pytest.mark.parametrize(("size", "data"), mostly_slow([(2, 1), (4, 2)], (2, 1)))
def test_feed_forward_equals_one_device_and_sends_to_neighbours_only(size, data, bidirectional):
    mesh = tensor_mesh(size, data)
    specs = {name: feed_forward_specs(mesh, ffn=F)[name] for name in WEIGHTS}

    def split(x, w):
        relu = {"act": lambda h: jnp.maximum(h, 0)}
        return feed_forward(x, axis=Axis.TENSOR, bidirectional=bidirectional, **relu, **w)

    sends = (size - 1) * (2 if bidirectional else 1)
    layout = ((PIECES, specs), PIECES)
    assert forward_collectives(split, mesh, *layout, x_BTD, WEIGHTS) == {"collective-permute": 2 * sends}
    ran = run(split, mesh, *layout, x_BTD, WEIGHTS)
    assert_same_bits(ran, one_device_feed_forward, x_BTD, WEIGHTS)
    # Beside the rings, the gradients of what is replicated: the bias over both axes, the matrices over data.
    over_tensor = {one.kind for one in sent(ran.compiled, mesh) if one.axes == (Axis.TENSOR,)}
    assert over_tensor <= {"collective-permute", "all-reduce"}
    # Rings of x, of the sums that are y, of dy and of the sums that are dx.
    assert ran.collectives["collective-permute"] == (GATHERS_OF_X + 3) * sends


def test_what_is_copied_is_narrow_and_what_is_summed_is_wide():
    # 257 needs nine bits: a bfloat16 result or partial result could not hold it.
    ones, mesh = partial(np.ones, dtype=np.float32), tensor_mesh(2)
    bfloat16 = {"compute": jnp.dtype("bfloat16")}
    ran = run(partial(row, **bfloat16), mesh, *ROW, ones((1, 2, 514)), ones((514, 2)))
    np.testing.assert_array_equal(ran.y, np.full((1, 2, 2), 514))
    x, w = ones((1, 2, 2)), ones((2, 514))
    sharded = jax.shard_map(partial(column, **bfloat16), mesh=mesh, in_specs=COLUMN[0], out_specs=COLUMN[1])
    program = jax.jit(lambda *a: pulled_back(sharded, ones((1, 2, 514)), a)).lower(x, w)
    dx, dw = program.compile()(x, w)[1]
    np.testing.assert_array_equal(dx, np.full((1, 2, 2), 514))
    assert dx.dtype == dw.dtype == jnp.float32
    lines = [line for line in program.as_text().splitlines() if "stablehlo.collective_permute" in line]
    assert sorted("bf16" in line for line in lines) == [False, True, True]  # dx; x, twice


def test_one_compilation():
    mesh = tensor_mesh(4)
    sharded = jax.jit(jax.shard_map(column, mesh=mesh, in_specs=COLUMN[0], out_specs=COLUMN[1]))
    sharded(x_BTD, w_DF)
    sharded(x_BTD + 1, w_DF)
    assert sharded._cache_size() == 1


def test_sequences_that_do_not_divide_are_refused():
    with pytest.raises(ValueError, match=r"tensor=4 does not divide a sequence of 6: .* Pad it to 8\."):
        run(row, tensor_mesh(4), *ROW, x_BTF[:, :6], w_FD)


# Each breaks one function of the rings.
def two_steps_a_send(n, step):
    return [(device, (device + 2 * step) % n) for device in range(n)]


def the_other_way_round(n, step):
    return [(device, (device - step) % n) for device in range(n)]


def to_nobody_at_the_end(n, step):
    return [(device, device + step) for device in range(n) if 0 <= device + step < n]


def both_the_same_half(t, bidirectional):
    return [(0, t // 2, -1), (0, t - t // 2, 1)]


MUTANTS = [two_steps_a_send, the_other_way_round, to_nobody_at_the_end, both_the_same_half]


@pytest.mark.parametrize("mutant", mostly_slow(MUTANTS, two_steps_a_send))
def test_mutants_are_detected(mutant, monkeypatch):
    monkeypatch.setattr(collective_matmul, "_lanes" if mutant is both_the_same_half else "_ring", mutant)
    mesh, multiply = tensor_mesh(4), lambda x, w: x @ w
    assert detected(lambda: run(column, mesh, *COLUMN, x_BTD, w_DF), multiply, x_BTD, w_DF)
    assert detected(lambda: run(row, mesh, *ROW, x_BTF, w_FD), multiply, x_BTF, w_FD)


def test_a_piece_put_one_row_off_is_detected(monkeypatch):
    right = collective_matmul._put
    monkeypatch.setattr(collective_matmul, "_put", lambda x, rows, start: right(x, rows, start + 1))
    assert detected(lambda: run(column, tensor_mesh(2), *COLUMN, x_BTD, w_DF), lambda x, w: x @ w, x_BTD, w_DF)


@pytest.mark.slow
def test_tpu_programs_multiply_while_they_send():
    """The TPU compiler keeps each send open (start, product, done), and compiles every form in this folder."""
    target = Target.parse("v5e:2x4")
    try:
        check_installed(target)
    except ValueError as missing:
        pytest.skip(str(missing))
    script = Path(__file__).with_name("tpu_programs.py")
    environment = {name: value for name, value in os.environ.items() if name != "XLA_FLAGS"}
    environment |= {**target_environment(target), "PYTHONPATH": str(Path(collective_matmul.__file__).parents[2])}
    done = subprocess.run(
        [sys.executable, script, str(target)], env=environment, capture_output=True, text=True, timeout=900
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.split("\n")[-2] == "ok", done.stdout
