"""Mixed and decode programs over pages give what the whole sequence gives at once, on one device and on meshes."""

import dataclasses
from functools import cache, partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gcompute.config.mesh import MeshShape
from gcompute.config.model import ModelConfig
from gcompute.model.transformer import Execution, forward, init
from gcompute.parallel.mesh import build_mesh
from gcompute.serve.adjustments import NO_TOKEN
from gcompute.serve.paged_lowered import lower_paged
from gcompute.serve.paged_model import (
    DecodeRows,
    MixedRows,
    PagedShape,
    decode_steps,
    empty_pools,
    mixed_step,
    no_rows,
)
from gcompute.serve.weights import Layout, serving_weights

ROWS, CONTEXT, PAGE, TOKENS, STEPS = 4, 32, 8, 12, 3
EXECUTION = Execution(compute=jnp.float32, unroll=2)
DENSE = ModelConfig(vocab=64, layers=2, dim=32, heads=4, kv_heads=2, ffn=64, context=CONTEXT, tied=False)
MODELS = {"dense": DENSE, "experts": dataclasses.replace(DENSE, experts=4, ffn=32)}
PROMPTS = ((3, 9, 27, 17, 51, 25, 11), (5,), (60, 2, 33, 8, 19, 44, 7, 7, 1, 30))
TABLES = np.array([[5, 2, 9, 0], [1, 7, 0, 0], [4, 3, 8, 0], [0, 0, 0, 0]], np.int32)
# The tokens that each dispatch reads of each prompt: the second decodes row 1 beside chunks of the others.
CHUNKS = ((5, 1, 4), (2, 1, 6))


@cache
def params_of(name: str):
    config = MODELS[name]
    # Larger than the usual initial values, so that choices are far from ties.
    params = jax.tree.map(lambda leaf: 4 * leaf if leaf.ndim > 1 else leaf, init(config, jax.random.key(0)))
    return serving_weights(params, config, compute=jnp.float32, layout=Layout.PLAIN)


def paged_shape(name: str, *, num_pages: int = 10) -> PagedShape:
    return PagedShape(
        model=MODELS[name],
        execution=EXECUTION,
        kernel="xla",
        rows=ROWS,
        pages_per_row=TABLES.shape[1],
        num_pages=num_pages,
        page=PAGE,
    )


@cache
def greedy(name: str, num: int) -> list[list[int]]:
    """Each prompt continued by its most likely tokens, the whole sequence computed anew for each."""
    run = jax.jit(partial(forward, config=MODELS[name], execution=EXECUTION))
    out = []
    for prompt in PROMPTS:
        tokens = list(prompt)
        for _ in range(num):
            padded = np.zeros((1, 16), np.int32)
            padded[0, : len(tokens)] = tokens
            tokens.append(int(jnp.argmax(run(params_of(name), padded)[0][0, len(tokens) - 1])))
        out.append(tokens[len(prompt) :])
    return out


def mixed_rows(shape: PagedShape, lengths: list[int], counts: list[int]) -> MixedRows:
    spare = [0] * (ROWS - len(lengths))
    return dataclasses.replace(
        no_rows(shape, MixedRows),
        tables=TABLES,
        lengths=np.array(lengths + spare, np.int32),
        cu_q_lens=np.cumsum([0, *counts, *spare]).astype(np.int32),
        num_rows=np.int32(len(lengths)),
    )


def serve(run_mixed, run_decode, shape: PagedShape, name: str, *, data: int = 1):
    """Prompts in two mixed dispatches, then decoding; the tokens of each row."""
    pools, read, out = empty_pools(shape), [list(prompt) for prompt in PROMPTS], [[] for _ in PROMPTS]
    if data > 1:
        pools = jax.tree.map(lambda pages: jnp.concatenate([pages] * data), pools)
    lengths = [0] * len(PROMPTS)
    for counts in CHUNKS:
        tokens = np.zeros(TOKENS, np.int32)
        tokens[: sum(counts)] = [t for row, count in zip(read, counts, strict=True) for t in row[:count]]
        lengths = [length + count for length, count in zip(lengths, counts, strict=True)]
        pools, chosen, *_ = run_mixed(params_of(name), pools, tokens, mixed_rows(shape, lengths, list(counts)))
        for row, (left, count) in enumerate(zip(read, counts, strict=True)):
            del left[:count]
            if not left:
                left.append(int(chosen[row]))
                out[row].append(int(chosen[row]))
        assert int(chosen[-1]) == NO_TOKEN
    rows = dataclasses.replace(
        no_rows(shape, DecodeRows),
        tables=TABLES,
        lengths=np.array([*lengths, 0], np.int32),
        token=np.array([*(row[-1] for row in out), 0], np.int32),
        running=np.array([True] * 3 + [False]),
    )
    pools, chosen_BS = run_decode(params_of(name), pools, rows, np.int32(STEPS))
    assert (np.asarray(chosen_BS)[3] == NO_TOKEN).all()
    return [row + np.asarray(chosen_BS)[index].tolist() for index, row in enumerate(out)], pools


def expected_tokens(name: str) -> list[list[int]]:
    # Row 1 had its first token a dispatch before the others.
    return [row[:num] for row, num in zip(greedy(name, STEPS + 2), (STEPS + 1, STEPS + 2, STEPS + 1), strict=True)]


@pytest.mark.oldest
@pytest.mark.parametrize("name", ["dense", pytest.param("experts", marks=pytest.mark.slow)])
def test_chunks_and_steps_side_by_side_are_the_whole_sequence(name: str):
    shape = paged_shape(name)
    run_mixed = jax.jit(partial(mixed_step, shape=shape))
    run_decode = jax.jit(partial(decode_steps, shape=shape, most_steps=STEPS))
    found, pools = serve(run_mixed, run_decode, shape, name)
    assert found == expected_tokens(name)
    for layer in pools:
        for pages in layer:
            np.testing.assert_array_equal(pages[0], 0)


def placed(lowered):
    compiled = lowered.compile()
    return lambda *args: compiled(*jax.tree.map(jax.device_put, args, compiled.input_shardings[0]))


@pytest.mark.parametrize(
    ("name", "text"),
    [
        pytest.param("dense", "tensor=2", marks=pytest.mark.slow),
        ("dense", "tensor=4"),
        pytest.param("experts", "expert=2", marks=pytest.mark.slow),
    ],
)
def test_a_mesh_serves_what_one_device_does(name: str, text: str):
    mesh = build_mesh(MeshShape.parse(text))
    sizes = {"slots": ROWS, "max_context": CONTEXT, "tokens": TOKENS, "page": PAGE, "num_pages": 10}
    lower = partial(lower_paged, MODELS[name], mesh, kernel="xla", precision="float32", most_steps=STEPS, **sizes)
    shape = paged_shape(name)
    heads = max(DENSE.num_kv_heads, mesh.shape["tensor"])
    wide = dataclasses.replace(shape, model=dataclasses.replace(shape.model, kv_heads=heads, head_dim=8))
    found, _ = serve(placed(lower(program="mixed")), placed(lower(program="decode")), wide, name)
    assert found == expected_tokens(name)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"kernel": "paged", "precision": "bfloat16"}, "a mixed step needs ragged or xla attention"),
        ({"kernel": "paged", "program": "decode"}, "rounds keys and values to bfloat16"),
        ({"mesh": "data=2"}, "a mixed step is of one share of the rows, and the mesh has data=2"),
        ({"tokens": 3}, "tokens=3 are fewer than slots=4"),
        ({"max_context": 64}, "context=64 exceeds the model's context"),
    ],
)
def test_refusals(changes: dict, said: str):
    values = {"mesh": "tensor=2", "program": "mixed", "kernel": "xla", "precision": "float32", **changes}
    values = {"slots": ROWS, "max_context": CONTEXT, "tokens": TOKENS, **values}
    mesh = build_mesh(MeshShape.parse(values.pop("mesh")))
    with pytest.raises(ValueError, match=said):
        lower_paged(DENSE, mesh, **values)
