"""The engine on meshes of fake devices: its tokens are those of the engine on one device, and pages stay in place."""

import dataclasses
from collections.abc import Callable, Sequence
from functools import cache

import jax
import numpy as np
import pytest

from gcompute.aot.hlo import read_collectives
from gcompute.config.mesh import MeshShape
from gcompute.config.model import ModelConfig
from gcompute.config.serve import ServeConfig
from gcompute.model.transformer import Params, init
from gcompute.parallel.mesh import build_mesh
from gcompute.serve.assembly import engine_shape
from gcompute.serve.engine import Engine
from gcompute.serve.lowered import lower_serve
from gcompute.serve.request import Sampling
from gcompute.serve.work import Decode, Work

# One bucket, drafts within it, and one chunk, so that engines have few programs.
CONTEXT, DRAFTS, CHUNK, PAGE = 14, 2, 8, 4
# Tokens of all pages: far more than what a dispatch reads.
POOL = 2048
SERVE = ServeConfig(
    slots=1,
    max_context=CONTEXT,
    chunk=CHUNK,
    page=PAGE,
    kv_tokens=POOL,
    decode_steps=3,
    draft_tokens=DRAFTS,
    precision="float32",
)
DENSE = ModelConfig(vocab=32, layers=2, dim=16, heads=8, kv_heads=4, ffn=32, context=CONTEXT + DRAFTS, tied=False)
GPT2 = ModelConfig(
    vocab=32,
    layers=2,
    dim=16,
    heads=4,
    context=CONTEXT + DRAFTS,
    norm="layernorm",
    positions="learned",
    activation="gelu_tanh",
    bias=True,
)
MODELS = {
    "dense": DENSE,
    "gpt2": GPT2,
    "qk norm": dataclasses.replace(DENSE, qk_norm=True, tied=True),
    "experts": dataclasses.replace(DENSE, experts=4, ffn=16),
    # Tokens that share experts' places depend on each other, so a batch holds but one of them.
    "experts with places": dataclasses.replace(DENSE, experts=4, ffn=16, capacity_factor=4.0),
}
CASES = [
    ("dense", "data=2,fsdp=2,tensor=2", {"speculate": "ngram"}),
    # Two devices share each key/value head.
    ("dense", "tensor=8", {}),
    ("experts", "data=2,expert=2,tensor=2", {"kv": "int8"}),
    ("dense", "tensor=2,data=2", {}),
    ("dense", "tensor=4", {"slots": 2}),
    ("dense", "data=4", {}),
    ("dense", "data=2,fsdp=2,tensor=2", {}),
    ("dense", "tensor=8", {"speculate": "ngram"}),
    ("dense", "tensor=8", {"kv": "int8"}),
    ("dense", "tensor=2,data=2", {"deterministic": True}),
    ("gpt2", "tensor=4,data=2", {}),
    ("qk norm", "tensor=2", {}),
    ("experts", "expert=2", {}),
    ("experts with places", "expert=4,data=2", {}),
    ("experts with places", "tensor=2,data=2", {}),
]
COMMON = (3, 9, 27, 17, 5, 25, 11, 30)
PROMPTS = ((*COMMON, 1), (5,), (20, 2, 13), (31, 30, 7, 7), (8, 4, 2, 1, 2))
# After those: the first two pages of these are found.
AGAIN = ((*COMMON, 1), (*COMMON, 6, 2))


def settings(prompts: Sequence[Sequence[int]]) -> list[Sampling]:
    """Greedy and seeded in turn, each to the end of the context."""
    kinds = (
        {"temperature": 0},
        {"temperature": 0.9, "top_k": 20, "top_p": 0.95, "seed": 3, "presence_penalty": 0.5},
    )
    return [
        Sampling(max_tokens=CONTEXT - len(prompt), ignore_eos=True, **kinds[at % 2])
        for at, prompt in enumerate(prompts)
    ]


@cache
def params_of(name: str) -> Params:
    # Larger than the usual initial values, so that choices are far from ties.
    params = jax.tree.map(lambda leaf: 4 * leaf if leaf.ndim > 1 else leaf, init(MODELS[name], jax.random.key(0)))
    # As a checkpoint's are: bound to one device.
    return jax.device_put(params, jax.devices()[0])


def complete(engine: Engine) -> list[tuple[int, ...]]:
    return [done.ids for prompts in (PROMPTS, AGAIN) for done in engine.generate(prompts, settings(prompts))]


@cache
def on_one_device(name: str, kv: str | None = None) -> list[tuple[int, ...]]:
    """The tokens of the engine without a mesh, a request at a time and nothing found."""
    with Engine(params_of(name), MODELS[name], None, dataclasses.replace(SERVE, kv=kv, prefix_cache=False)) as engine:
        return complete(engine)


def make_engine(name: str, mesh: str, **changes) -> Engine:
    shape = MeshShape.parse(mesh)
    serve = dataclasses.replace(SERVE, mesh=shape, slots=shape.data * shape.fsdp)
    return Engine(params_of(name), MODELS[name], None, dataclasses.replace(serve, **changes))


def check_no_pages_move(engine: Engine) -> None:
    """No collective of a dispatch is as large as what a device holds of one layer's keys."""
    mesh = engine._runner.shape.execution.placement.mesh
    keys = engine._runner.state.pool.k[0]
    held_bytes = keys.addressable_shards[0].data.nbytes
    for program, compiled in engine._runner.compiled.items():
        if program.kind in ("prefill", "decode", "speculate"):
            found = read_collectives(compiled.as_text(), mesh)
            assert all(max(one.operand_bytes, one.result_bytes) < held_bytes / 2 for one in found), program


def check_pages_are_split(engine: Engine) -> None:
    """Each share's pages lie on its devices alone, split over tensor where that divides the heads."""
    placement, limits = engine._runner.shape.execution.placement, engine._runner.shape.limits
    data, tensor, heads = placement.shape.data, placement.shape.tensor, engine.config.num_kv_heads
    assert data == limits.shares
    pages = limits.num_pages // data + 1
    split = tensor if heads % tensor == 0 else 1
    devices = placement.mesh.devices.reshape(data, -1, tensor)
    pool = engine._runner.state.pool
    for leaf in jax.tree.leaves(pool):
        assert leaf.shape[0] == data * pages
        for shard in leaf.addressable_shards:
            ((share, _, part),) = np.argwhere(devices == shard.device)
            at, head = part % split * heads // split, shard.index[2]
            assert shard.data.shape == (pages, PAGE, heads // split, *leaf.shape[3:])
            assert shard.index[0].indices(leaf.shape[0])[:2] == (share * pages, (share + 1) * pages)
            assert head.indices(heads)[:2] == (at, at + heads // split)


def run(engine: Engine, checked_books: Callable) -> tuple[list[tuple[int, ...]], list[Work]]:
    done: list[Work] = []
    with checked_books(engine, done.append), engine:
        tokens = complete(engine)
        assert engine._scheduler.num_free_slots == engine._scheduler.limits.slots
        assert sum(blocks.num_used for blocks in engine._scheduler.blocks) == 0
        assert engine.stats().num_late_compilations == 0
    return tokens, done


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "mesh", "changes"),
    CASES,
)
def test_a_mesh_serves_what_one_device_does(name: str, mesh: str, changes: dict, checked_books):
    engine = make_engine(name, mesh, **changes)
    tokens, done = run(engine, checked_books)
    assert tokens == on_one_device(name, changes.get("kv"))
    assert [len(ids) for ids in tokens] == [CONTEXT - len(prompt) for prompt in (*PROMPTS, *AGAIN)]
    shape, stats = MeshShape.parse(mesh), engine.stats()
    # Two requests find what the first one left, in whichever share that is.
    assert stats.num_hit_tokens >= CHUNK
    assert (stats.num_accepted > 0) == ("speculate" in changes)
    decodes = [work for work in done if isinstance(work, Decode)]
    # All shares decode at once.
    assert max(sum(row is not None for row in work.rows) for work in decodes) >= shape.data * shape.fsdp
    check_pages_are_split(engine)
    check_no_pages_move(engine)


@pytest.mark.slow
def test_those_that_give_way_go_on_exactly(checked_books):
    """Each share has pages of one request and one more, and two slots; both ways to give way, with one compilation."""
    tight = {"slots": 4, "kv_tokens": 2 * (16 + PAGE)}
    swapping = make_engine("dense", "tensor=2,data=2", preemption="swap", **tight)
    tokens, done = run(swapping, checked_books)
    assert tokens == on_one_device("dense")
    kinds = [type(work).__name__ for work in done]
    assert swapping.stats().num_preemptions >= 2
    assert kinds.count("SwapIn") == kinds.count("SwapOut") >= 1
    assert not swapping._runner._saved
    check_pages_are_split(swapping)

    recomputing = make_engine("dense", "tensor=2,data=2", **tight)
    recomputing._runner.compiled.update(swapping._runner.compiled)
    assert recomputing._scheduler.limits == dataclasses.replace(swapping._scheduler.limits, swap=False)
    tokens, done = run(recomputing, checked_books)
    assert tokens == on_one_device("dense")
    assert recomputing.stats().num_preemptions >= 2
    assert recomputing.stats().num_hit_tokens >= CHUNK
    assert "SwapOut" not in [type(work).__name__ for work in done]


@pytest.mark.parametrize(
    ("program", "mesh"),
    [
        ("decode", "data=2,tensor=2"),
        *(
            pytest.param(*case, marks=pytest.mark.slow)
            for case in (
                ("prefill", "data=2,tensor=2"),
                ("decode", "tensor=8"),
                ("decode", "data=2,fsdp=2,tensor=2"),
            )
        ),
    ],
)
def test_rows_of_a_long_context_stay_where_they_are(program: str, mesh: str):
    """No collective is as large as what a device holds of a layer's keys, and the state takes its own place."""
    # Large enough that keys are larger than logits, activations and the text of all rows.
    context, slots = 512, 4
    config = dataclasses.replace(DENSE, context=context, head_dim=8)
    shape = MeshShape.parse(mesh)
    built = build_mesh(shape)
    lowered = lower_serve(
        config, built, program=program, slots=slots, max_context=context, prompt=16, precision="float32"
    )
    compiled = lowered.compile()
    split = shape.data * shape.fsdp * (shape.tensor if config.num_kv_heads % shape.tensor == 0 else 1)
    keys_bytes = 4 * slots * context * config.num_kv_heads * config.head_size // split
    found = read_collectives(compiled.as_text(), built)
    assert found
    assert all(max(one.operand_bytes, one.result_bytes) < keys_bytes / 2 for one in found)
    assert compiled.memory_analysis().alias_size_in_bytes >= 2 * config.layers * keys_bytes


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"mesh": "tensor=3"}, "mesh tensor=3 does not divide heads=8"),
        ({"mesh": "context=2"}, "mesh context=2 does not serve"),
        ({"mesh": "expert=2"}, "mesh expert=2 needs a model with experts"),
        ({"slots": 3}, "slots=3 does not divide over data=2 x fsdp=1. Use a multiple of 2."),
        ({"vocab": 33}, "mesh tensor=2 does not divide vocab=33. Legal: tensor=1."),
        ({"mesh": "data=16", "slots": 16}, "mesh data=16 needs 16 devices and there are 8"),
        (
            {"kv_tokens": 31},
            "kv_tokens=31 cannot hold one request of max_context=16 in each of 2 shares. Use at least 32",
        ),
    ],
)
def test_refusals(changes: dict, said: str):
    values = {"mesh": "data=2,tensor=2", "slots": 4, **changes}
    config = dataclasses.replace(DENSE, vocab=values.pop("vocab", DENSE.vocab))
    mesh = MeshShape.parse(values.pop("mesh"))
    with pytest.raises(ValueError, match=said):
        engine_shape(config, dataclasses.replace(SERVE, mesh=mesh, **values))


def test_int8_weights_are_for_one_device():
    with pytest.raises(ValueError, match="int8 weights are served on one device, not on a mesh"):
        make_engine("dense", "tensor=2", weights="int8")
