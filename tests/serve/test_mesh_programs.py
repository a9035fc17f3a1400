"""Prefill and decode on a mesh of fake devices: the tokens and the cache of one device."""

import dataclasses
from functools import cache, partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gcompute.aot.hlo import read_collectives
from gcompute.config.mesh import MeshShape
from gcompute.config.model import ModelConfig
from gcompute.model.transformer import Execution, init
from gcompute.parallel.mesh import build_mesh
from gcompute.serve.lowered import lower_serve
from gcompute.serve.programs import NO_TOKEN, EngineShape, admission, decode, empty_state, prefill, serving_params
from gcompute.serve.request import Request, Sampling

SLOTS, CONTEXT, BUCKET, STEPS = 4, 32, 16, 5
EXECUTION = Execution(compute=jnp.float32, unroll=2)
DENSE = ModelConfig(vocab=64, layers=2, dim=32, heads=8, kv_heads=4, ffn=64, context=CONTEXT, tied=False)
MODELS = {
    "dense": DENSE,
    "gpt2": ModelConfig(
        vocab=64,
        layers=2,
        dim=32,
        heads=4,
        context=CONTEXT,
        norm="layernorm",
        positions="learned",
        activation="gelu_tanh",
        bias=True,
    ),
    "qk norm": dataclasses.replace(DENSE, qk_norm=True, tied=True),
    "experts": dataclasses.replace(DENSE, experts=4, ffn=32),
    "experts with places": dataclasses.replace(DENSE, experts=4, ffn=32, capacity_factor=1.25),
}
CASES = [
    ("dense", "tensor=2,data=2"),
    ("dense", "tensor=4"),
    # Two devices share each key/value head.
    ("dense", "tensor=8"),
    ("dense", "data=2,fsdp=2,tensor=2"),
    ("dense", "data=4"),
    ("gpt2", "tensor=4,data=2"),
    ("qk norm", "tensor=2"),
    ("experts", "expert=2"),
    ("experts", "data=2,expert=2,tensor=2"),
    ("experts with places", "expert=4,data=2"),
    ("experts with places", "tensor=2,data=2"),
]
PROMPTS = ((3, 9, 27, 17, 51, 25, 11), (5,), (60, 2, 33))


def arguments(config: ModelConfig):
    """The engine's parameters, an empty state, and what prefills and a decode are given beside them."""
    params = init(config, jax.random.key(0))
    # Larger than the usual initial values, so that choices are far from ties.
    params = jax.tree.map(lambda leaf: 4 * leaf if leaf.ndim > 1 else leaf, params)
    shape = EngineShape(model=config, execution=EXECUTION, slots=SLOTS, max_context=CONTEXT, decode_steps=STEPS)
    sampled = Sampling(max_tokens=20, temperature=0.8, top_k=20, top_p=0.9, seed=3)
    settings = (Sampling(max_tokens=20, temperature=0), sampled, Sampling(max_tokens=20, temperature=0))
    admitted = [
        admission(Request(prompt=prompt, sampling=one), slot=slot, bucket=BUCKET, end=NO_TOKEN, seed=7)
        for slot, (prompt, one) in enumerate(zip(PROMPTS, settings, strict=True))
    ]
    decoded = (np.ones(SLOTS, bool), np.int32(STEPS), np.bool_(False))
    return serving_params(params, config, jnp.float32), empty_state(shape), admitted, decoded


def serve(run_prefill, run_decode, config: ModelConfig):
    """Three prefills, the last of which shares its data shard with an empty slot, then two decodes."""
    params, state, admitted, decoded = arguments(config)
    firsts, rows = [], []
    for new in admitted:
        state, first = run_prefill(params, state, new)
        firsts.append(int(first.token[0, 0]))
    for _ in range(2):
        state, choices = run_decode(params, state, *decoded)
        rows.append(np.asarray(choices.token))
    return firsts, np.concatenate(rows, axis=1), state


@cache
def on_one_device(name: str):
    config = MODELS[name]
    static = {"model": config, "execution": EXECUTION}
    return serve(
        jax.jit(partial(prefill, **static)),
        jax.jit(partial(decode, **static, bucket=CONTEXT, decode_steps=STEPS)),
        config,
    )


def compile_on(mesh, config: ModelConfig, program: str, *, max_context: int = CONTEXT):
    return lower_serve(
        config,
        mesh,
        program=program,
        slots=SLOTS,
        max_context=max_context,
        prompt=BUCKET - 2,
        precision="float32",
        decode_steps=STEPS,
    ).compile()


def placed(compiled):
    """`compiled`, given arrays that lie anywhere."""
    return lambda *args: compiled(*jax.tree.map(jax.device_put, args, compiled.input_shardings[0]))


@pytest.mark.parametrize(("name", "text"), CASES)
def test_a_mesh_serves_what_one_device_does(name: str, text: str):
    config = MODELS[name]
    mesh = build_mesh(MeshShape.parse(text))
    programs = [compile_on(mesh, config, program) for program in ("prefill", "decode")]
    firsts, tokens_BN, state = serve(*map(placed, programs), config)
    expected_firsts, expected_BN, expected = on_one_device(name)
    assert firsts == expected_firsts
    np.testing.assert_array_equal(tokens_BN, expected_BN)
    assert (expected_BN[: len(PROMPTS)] >= 0).all()
    for got, wanted in zip(jax.tree.leaves(state), jax.tree.leaves(expected), strict=True):
        # Sums over devices are in another order: a few units in the last place, over two layers.
        np.testing.assert_allclose(np.asarray(got), np.asarray(wanted), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("text", ["data=2,tensor=2", "tensor=8", "data=2,fsdp=2,tensor=2"])
def test_caches_stay_where_they_are(text: str):
    """No collective of one pass is as large as a layer's keys, and the state takes its own place."""
    shape = MeshShape.parse(text)
    mesh = build_mesh(shape)
    split = shape.data * shape.fsdp * (shape.tensor if DENSE.num_kv_heads % shape.tensor == 0 else 1)
    # Long enough that keys are larger than the logits, which reporting log-probabilities gathers.
    config = dataclasses.replace(DENSE, context=16 * CONTEXT)
    cache_bytes = 4 * SLOTS * config.context * DENSE.num_kv_heads * DENSE.head_size // split
    for program in ("prefill", "decode"):
        compiled = compile_on(mesh, config, program, max_context=config.context)
        gathered = [one for one in read_collectives(compiled.as_text(), mesh) if one.kind != "all-reduce"]
        assert all(one.sent_bytes < cache_bytes / 2 for one in gathered)
        assert compiled.memory_analysis().alias_size_in_bytes >= 2 * DENSE.layers * cache_bytes


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"mesh": "tensor=3"}, "mesh tensor=3 does not divide heads=8"),
        ({"mesh": "context=2"}, "mesh context=2 does not serve"),
        ({"mesh": "expert=2"}, "mesh expert=2 needs a model with experts"),
        ({"slots": 3}, "slots=3 does not divide over data=2 x fsdp=1. Use a multiple of 2."),
        ({"max_context": 64}, "context=64 exceeds the model's context. Use at most 32."),
        ({"prompt": 33}, "prompt=33 does not fit context=32."),
        ({"vocab": 65}, "mesh tensor=2 does not divide vocab=65. Legal: tensor=1."),
    ],
)
def test_refusals(changes: dict, said: str):
    values = {"mesh": "data=2,tensor=2", "slots": SLOTS, "max_context": CONTEXT, "prompt": BUCKET, **changes}
    config = dataclasses.replace(DENSE, vocab=values.pop("vocab", DENSE.vocab))
    mesh = build_mesh(MeshShape.parse(values.pop("mesh")))
    with pytest.raises(ValueError, match=said):
        lower_serve(config, mesh, program="decode", **values)
