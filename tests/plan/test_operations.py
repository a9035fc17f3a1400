"""Operations of a step against the arithmetic of the shapes, written out here, and masks counted one by one."""

import dataclasses
import math

import pytest

from gcompute.config.architecture import Architecture, Attention, FeedForward, Layers, architecture
from gcompute.config.presets import PRESETS
from gcompute.plan.operations import Operation, Rows, backward, block_forward, output_forward
from gcompute.plan.train_run import TrainRun
from gcompute.plan.train_time import train_operations

DENSE = architecture(PRESETS["llama3-8b"])
GPT2 = architecture(PRESETS["gpt2-xl"])
ROOMY = architecture(PRESETS["mixtral-8x7b"])
TIGHT = architecture(dataclasses.replace(PRESETS["qwen3-30b-a3b"], capacity_factor=1.25))
LATENT = Architecture(
    name="latent",
    vocab=1000,
    dim=256,
    layers=(
        Layers(
            num=3,
            attention=Attention(
                heads=8, kv_heads=8, head_dim=48, value_dim=32, q_rank=96, kv_rank=64, rope_dim=16
            ),
            feed_forward=FeedForward(
                width=64, gated=True, experts=16, experts_per_token=4, capacity_factor=1.0, shared_width=128
            ),
        ),
    ),
    context=512,
    tied=False,
)  # fmt: skip
SEQ, BATCH = 256, 4


def matrices_of_a_token(model: Architecture) -> float:
    """Values that one token is multiplied by in a layer and the output, from the shapes alone."""
    total = float(model.dim * model.vocab)
    for group in model.layers:
        a, f, d = group.attention, group.feed_forward, model.dim
        if a.kv_rank is None:
            attention = d * a.heads * a.head_dim + 2 * d * a.kv_heads * a.head_dim + a.heads * a.head_dim * d
        else:
            assert a.q_rank is not None
            assert a.value_dim is not None
            plain = a.head_dim - a.rope_dim
            attention = d * a.q_rank + a.q_rank * a.heads * a.head_dim
            attention += d * (a.kv_rank + a.rope_dim) + a.kv_rank * a.heads * (plain + a.value_dim)
            attention += a.heads * a.value_dim * d
        one = (3 if f.gated else 2) * d * f.width
        if f.experts is None:
            fed = float(one)
        else:
            rows = f.experts if f.capacity_factor is None else f.experts_per_token * f.capacity_factor
            fed = rows * one + d * f.experts + (3 if f.gated else 2) * d * f.shared_width
        total += group.num * (attention + fed)
    return total


def seen(seq: int, window: int | None = None) -> int:
    """Pairs of a query and a key that it sees, one by one."""
    return sum(1 for q in range(seq) for k in range(q + 1) if window is None or q - k < window)


def total(operations: tuple[Operation, ...], kind: str) -> float:
    return sum(one.flops * one.times for one in operations if one.kind == kind)


@pytest.mark.parametrize("model", [DENSE, GPT2, ROOMY, TIGHT, LATENT], ids=["dense", "gpt2", "roomy", "tight", "mla"])
def test_a_step_is_six_operations_a_parameter_and_token(model: Architecture):
    run = TrainRun(model=model, batch=BATCH, seq=SEQ, remat="none")
    operations = train_operations(run)
    assert total(operations, "matmul") == pytest.approx(6 * matrices_of_a_token(model) * BATCH * SEQ, rel=1e-12)
    # Scores and their product with values forwards; 2.5 times that backwards, where scores are made again.
    pairs = BATCH * seen(SEQ)
    scores = sum(
        2 * g.num * pairs * g.attention.heads * (g.attention.head_dim + (g.attention.value_dim or g.attention.head_dim))
        for g in model.layers
    )
    assert total(operations, "attention") == pytest.approx(3.5 * scores, rel=1e-12)


@pytest.mark.oldest
def test_what_is_done_again():
    step = {remat: train_operations(TrainRun(model=DENSE, batch=1, seq=SEQ, remat=remat)) for remat in ("none", "dots")}
    full = train_operations(TrainRun(model=DENSE, batch=1, seq=SEQ, remat="full"))
    f, d, layers = 14336, 4096, 32
    # A block's last product is not needed again, nor is the output layer, which no policy covers.
    forward = 2 * SEQ * (matrices_of_a_token(DENSE) - d * 128256 - layers * f * d)
    assert total(full, "matmul") - total(step["none"], "matmul") == pytest.approx(forward)
    assert total(step["dots"], "matmul") == total(step["none"], "matmul")
    assert total(step["dots"], "attention") == total(full, "attention") == pytest.approx(
        total(step["none"], "attention") * 4.5 / 3.5
    )  # fmt: skip
    kept = train_operations(TrainRun(model=DENSE, batch=1, seq=SEQ, remat=("qkv", "attention", "out", "up")))
    assert total(kept, "matmul") == total(step["none"], "matmul")
    assert total(kept, "attention") == total(step["none"], "attention")


def test_backward_is_two_products_for_each():
    rows = Rows(tokens=64, keys=32.5)
    forward = block_forward(DENSE, DENSE.layers[0], rows)
    behind = backward(forward)
    assert total(behind, "matmul") == 2 * total(forward, "matmul")
    assert total(behind, "attention") == 2.5 * total(forward, "attention")

    def moved(operations: tuple[Operation, ...]) -> float:
        return sum(one.moved_bytes * one.times for one in operations)

    assert moved(behind) == 2 * moved(forward)


def test_accumulation_changes_no_operations_but_reads_weights_again():
    one = train_operations(TrainRun(model=DENSE, batch=8, seq=SEQ))
    four = train_operations(TrainRun(model=DENSE, batch=8, seq=SEQ, accumulation=4))
    assert total(four, "matmul") == total(one, "matmul")
    read = {n: sum(o.moved_bytes * o.times for o in step if o.kind == "matmul") for n, step in ((1, one), (4, four))}
    # Three more readings in each of: forward, again (all but the last product), and two products backwards.
    blocks, last = matrices_of_a_token(DENSE) - 4096 * 128256, 32 * 14336 * 4096
    assert read[4] - read[1] == pytest.approx(3 * 2 * (4 * blocks - last + 3 * 4096 * 128256))


def test_tensor_divides():
    whole = Rows(tokens=128, keys=64.5)
    for ways in (2, 8):
        split = dataclasses.replace(whole, tensor=ways)
        for model in (DENSE, GPT2) if ways == 2 else (DENSE,):
            parts = [
                (block_forward(model, model.layers[0], rows), output_forward(model, rows)) for rows in (whole, split)
            ]
            for one, piece in zip(*parts, strict=True):
                assert total(piece, "matmul") * ways == pytest.approx(total(one, "matmul"))
                assert total(piece, "attention") * ways == pytest.approx(total(one, "attention"))
    # The vectors of latent attention and the router are whole on every device of a tensor group.
    rows = dataclasses.replace(whole, tensor=8)
    forward = {one.name: one for one in block_forward(LATENT, LATENT.layers[0], whole)}
    for one in block_forward(LATENT, LATENT.layers[0], rows):
        alone = one.name in ("keys and values down", "queries down", "router") or not one.flops
        assert one.flops * (1 if alone else 8) == pytest.approx(forward[one.name].flops), one.name
    # The stream between blocks is whole too, unless it is scattered.
    norms = {rows.scattered: block_forward(DENSE, DENSE.layers[0], rows)[0].moved_bytes for rows in (
        rows, dataclasses.replace(rows, scattered=True)
    )}  # fmt: skip
    assert norms[True] * 8 == norms[False]


def test_fewer_key_value_heads_than_tensor_shares_are_copied():
    def qkv(ways: int) -> float:
        forward = block_forward(DENSE, DENSE.layers[0], Rows(tokens=1, keys=1, tensor=ways))
        return next(one.flops for one in forward if one.name == "q, k, v")

    assert qkv(8) * 8 == qkv(1)
    assert qkv(32) == 2 * 4096 * 128 * (1 + 2)


@pytest.mark.parametrize("model", [DENSE, GPT2, LATENT], ids=["dense", "gpt2", "mla"])
def test_decoding_reads_every_weight_once(model: Architecture):
    def moved(requests: int) -> float:
        rows = Rows(tokens=requests, keys=100, reads_cache=True, sequences=requests, dropless=True)
        blocks = [one.repeated(g.num) for g in model.layers for one in block_forward(model, g, rows)]
        return sum(
            one.moved_bytes * one.times for one in (*blocks, *output_forward(model, rows)) if one.kind == "matmul"
        )

    if model is not LATENT:
        # What does not grow with the requests is the weights.
        assert 2 * moved(1) - moved(2) == pytest.approx(2 * matrices_of_a_token(model))
    else:
        # Many requests meet every expert: two bytes a value, four of a router.
        fed = LATENT.layers[0].feed_forward
        held = dataclasses.replace(fed, capacity_factor=None)
        all_experts = dataclasses.replace(
            LATENT, layers=(dataclasses.replace(LATENT.layers[0], feed_forward=held),)
        )  # fmt: skip
        router = 3 * 256 * 16
        assert 2 * moved(100) - moved(200) == pytest.approx(2 * (matrices_of_a_token(all_experts) + router))
        # One request meets no more than its four, and little else is read.
        assert moved(1) == pytest.approx(2 * (matrices_of_a_token(LATENT) + router), rel=0.02)


@pytest.mark.parametrize(("model", "values"), [(DENSE, 2 * 8 * 128), (LATENT, 64 + 16)], ids=["grouped", "latent"])
def test_decoding_reads_the_cache_once(model: Architecture, values: int):
    def moved(keys: float, cache_bytes: float = 2.0) -> float:
        rows = Rows(tokens=3, keys=keys, reads_cache=True, sequences=3, cache_bytes=cache_bytes)
        return next(one.moved_bytes for one in block_forward(model, model.layers[0], rows) if one.kind == "attention")

    assert moved(1001) - moved(1000) == 3 * 2 * values
    assert moved(1001, 1.0) - moved(1000, 1.0) == 3 * values


@pytest.mark.parametrize("window", [1, 7, 64, 255, 256, 1000])
def test_windows_cap_keys(window: int):
    group = DENSE.layers[0]
    seeing = dataclasses.replace(group, attention=dataclasses.replace(group.attention, window=window))
    model = dataclasses.replace(DENSE, layers=(seeing,))
    step = train_operations(TrainRun(model=model, batch=1, seq=SEQ, remat="none"))
    assert total(step, "attention") == pytest.approx(3.5 * 4 * 32 * seen(SEQ, window) * 32 * 128)
    decoded = block_forward(model, seeing, Rows(tokens=1, keys=500, reads_cache=True, sequences=1))
    attention = next(one for one in decoded if one.kind == "attention")
    assert attention.flops == 4 * min(window, 500) * 32 * 128


def test_intensity():
    one = Operation(name="a", kind="matmul", part="up", flops=6.0, moved_bytes=2.0)
    assert one.intensity == 3
    assert dataclasses.replace(one, moved_bytes=0.0).intensity == math.inf
    assert one.repeated(3, " again") == dataclasses.replace(one, name="a again", times=3.0)
