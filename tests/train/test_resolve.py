"""What "decide for me" becomes: pure functions of the run, the mesh, the backend and the caches."""

import pytest
from tiny_run import make_run

from gcompute.config.mesh import MeshShape
from gcompute.train.resolve import LEAST_TOKENS, resolve_accumulation, resolve_execution, resolve_query_blocks

ONE = MeshShape()
BABY = {"layers": 6, "dim": 384, "heads": 6, "kv_heads": 6, "ffn": 1536, "context": 256}


def baby(**training):
    return make_run(model=BABY, **{"batch": 64, **training})


@pytest.mark.parametrize(
    ("cache_mib", "expected"),
    # 2 MiB: 682 tokens of F = 1536, so 2 sequences of 256; 4 MiB: 1365, so 4; 64 MiB: all 64.
    [(1, 32), (2, 32), (4, 16), (8, 8), (64, 1)],
)
def test_microbatches_follow_the_cache(cache_mib, expected):
    assert resolve_accumulation(baby(), ONE, "cpu", cache_bytes=cache_mib * 2**20) == expected


def test_a_microbatch_keeps_a_matmul_busy():
    run = baby(batch=3)
    assert 3 * run.seq // resolve_accumulation(run, ONE, "cpu", cache_bytes=1) >= LEAST_TOKENS


def test_what_is_configured_and_other_backends_do_not_ask_the_cache():
    assert resolve_accumulation(baby(accumulation=4), ONE, "cpu", cache_bytes=2**20) == 4
    assert resolve_accumulation(baby(), ONE, "tpu", cache_bytes=2**20) == 1


def test_microbatches_are_chosen_where_nobody_tells_the_cache(monkeypatch):
    monkeypatch.setattr("gcompute.train.resolve.data_caches", tuple)
    monkeypatch.setattr("gcompute.train.resolve.usable_cores", lambda: 8)
    assert resolve_accumulation(baby(), ONE, "cpu") == 16


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({}, 4),
        ({"context": 128}, 2),
        ({"context": 64}, 1),
        ({"context": 130}, 2),
        ({"context": 129}, 1),
    ],
)
def test_blocks_of_queries_divide_the_sequence(changes, expected):
    assert resolve_query_blocks(make_run(model={**BABY, **changes}), ONE, "cpu") == expected


def test_forms_of_one_cpu_are_for_one_cpu():
    run = baby()
    here = resolve_execution(run, ONE, "cpu")
    assert (here.query_blocks, here.one_projection, here.output_major) == (4, True, True)
    narrow = resolve_execution(baby(precision="bfloat16"), ONE, "cpu")
    assert (narrow.query_blocks, narrow.one_projection, narrow.output_major) == (1, True, False)
    for mesh, backend in ((MeshShape(tensor=2), "cpu"), (ONE, "tpu"), (ONE, "gpu")):
        there = resolve_execution(run, mesh, backend)
        assert (there.one_projection, there.output_major) == (False, False)
    assert resolve_execution(run, ONE, "gpu").query_blocks == 1
    ring = baby(mesh=MeshShape(context=2))
    assert resolve_query_blocks(ring, MeshShape(context=2), "cpu") == 1
