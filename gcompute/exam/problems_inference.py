"""Problems of the chapters "inference" and "applied-inference": decode steps, caches, slices, cost."""

import math

from gcompute.exam.models import L70, LLAMA2_13B, inference_model
from gcompute.exam.problem import Problem
from gcompute.hardware.catalogue import find_chip
from gcompute.plan.budget import fewest_chips, flops_per_usd, smallest_slice
from gcompute.plan.collectives import all_gather_s, torus_ring
from gcompute.plan.decoding import (
    Served,
    decode_step_s,
    decode_steps,
    most_sequences,
    prefill_s,
    prefill_servers,
    queries_per_s_per_chip,
    tokens_evicted_per_step,
)
from gcompute.plan.parallel_bounds import decode_tensor_ways, latency_bound_ways, tensor_parallel_ways
from gcompute.plan.roof import memory_roof, peak_of, torus_roof
from gcompute.plan.rooflines import critical_batch, transfer_s
from gcompute.plan.sizes import cache_bytes, sizes
from gcompute.plan.weight_stationary import weight_stationary_chips

V5E, V5P, H100 = find_chip("v5e"), find_chip("v5p"), find_chip("h100")
ROOF = memory_roof(V5E)
# L70 in bf16, int8 and int4, cache alike.
VALUE_BYTES = (2.0, 1.0, 0.5)
BATCHES = (1, 8, 16, 32, 64, 240)


def _served(value_bytes: float, tokens: int) -> Served:
    """L70 with weights and caches of so many bytes a value."""
    return Served(
        params=sizes(L70).total,
        weight_bytes=value_bytes,
        sequence_bytes=cache_bytes(L70, tokens, value_bytes=value_bytes),
    )


def _table(sequence_bytes: float) -> tuple[float, ...]:
    served = Served(params=13e9, weight_bytes=2, sequence_bytes=sequence_bytes)
    rows = decode_steps(served, BATCHES, num_chips=8, roof=ROOF)
    return (*(row.step_s for row in rows), *(row.tokens_per_s for row in rows), *(row.total_bytes for row in rows))


def _long_context(kv_heads: int) -> float:
    cached = cache_bytes(inference_model(kv_heads=kv_heads), 128_000, value_bytes=1)
    served = Served(params=sizes(inference_model()).total, weight_bytes=1, sequence_bytes=cached)
    return most_sequences(served, num_chips=16, hbm_bytes=V5E.hbm_bytes)


def _mixture() -> tuple[float, ...]:
    counted = sizes(inference_model(experts=16, experts_per_token=2))
    return counted.total, counted.active, critical_batch(ROOF, experts=16, experts_per_token=2)


def _l70_long() -> tuple[float, ...]:
    served = _served(1, 32768)
    caches = 240 * served.sequence_bytes
    return served.sequence_bytes, caches, fewest_chips(served.total_bytes(240), V5E.hbm_bytes)


def _l70_throughput() -> tuple[float, ...]:
    (row,) = decode_steps(_served(1, 8192), (32,), num_chips=8, roof=ROOF)
    return row.tokens_per_s, row.tokens_per_s_per_chip


def _fitting(doubled: int) -> tuple[tuple[int, int], ...]:
    """(chips, sequences of 8192 that fit) of L70 on the smallest slices, or on `doubled` times as many chips."""
    found = []
    for value_bytes in VALUE_BYTES:
        served = _served(value_bytes, 8192)
        chips = doubled * math.prod(smallest_slice(V5E, served.param_bytes))
        found.append((chips, most_sequences(served, num_chips=chips, hbm_bytes=V5E.hbm_bytes)))
    return tuple(found)


def _queries(doubled: int) -> tuple[float, ...]:
    """Answers of 512 tokens a second and chip, a step reading all memory."""
    step_s = transfer_s(V5E.hbm_bytes, V5E.hbm_bytes_per_s)
    return tuple(
        queries_per_s_per_chip(batch, step_s=step_s, output_tokens=512, num_chips=chips)
        for chips, batch in _fitting(doubled)
    )


def _one_product() -> tuple[float, ...]:
    dim, width, batch = L70.dim, L70.layers[0].feed_forward.width, 64
    gather_s = all_gather_s(2 * batch * dim, torus_ring(V5E, 16, wraparound=True))
    return gather_s, transfer_s(2 * dim * width, V5E.hbm_bytes_per_s, num_chips=32)


def _disaggregated() -> tuple[float, ...]:
    step_s = transfer_s(V5E.hbm_bytes, V5E.hbm_bytes_per_s)
    prefill = prefill_s(sizes(L70).total, 8192, num_chips=16, flops_per_s=peak_of(V5E), mfu=0.4)
    return (prefill_servers(prefill, batch=32, step_s=step_s, output_tokens=512),)


INFERENCE = (
    Problem(
        id="13b-cache",
        file="inference",
        ask="LLaMA-2 13B in bf16: parameters; cache of 8192 tokens, bytes",
        answer=(26e9, 6.7e9),
        tolerance=0.02,
        solve=lambda: (2 * sizes(LLAMA2_13B).total, cache_bytes(LLAMA2_13B, 8192, value_bytes=2)),
    ),
    Problem(
        id="13b-table",
        file="inference",
        ask="13e9 bf16 parameters, 6.7e9 bytes of cache a sequence, 8 v5e, batch 1, 8, 16, 32, 64, 240: step, s; tokens"
        " a second; bytes",
        answer=(
            *(4.98e-3, 12.13e-3, 20.30e-3, 36.65e-3, 69.33e-3, 249.09e-3),
            *(200.61, 659.30, 787.99, 873.21, 923.13, 963.53),
            *(32.7e9, 79.6e9, 133.2e9, 240.4e9, 454.8e9, 1634e9),
        ),
        tolerance=0.02,
        solve=lambda: _table(6.7e9),
    ),
    Problem(
        id="13b-table-grouped",
        file="inference",
        ask="the same with a fifth of the cache",
        answer=(
            *(4.17e-3, 5.60e-3, 7.23e-3, 10.50e-3, 17.04e-3, 52.99e-3),
            *(239.94, 1429.19, 2212.48, 3047.62, 3756.62, 4529.34),
            *(27.34e9, 36.72e9, 47.44e9, 68.88e9, 111.76e9, 347.6e9),
        ),
        tolerance=0.02,
        solve=lambda: _table(6.7e9 / 5),
    ),
    Problem(
        id="prefill-ways",
        file="inference",
        ask="v5e: F for each way of tensor parallelism on an axis, prefill",
        answer=(2200,),
        tolerance=0.02,
        solve=lambda: (torus_roof(V5E).ridge,),
    ),
    Problem(
        id="decode-ways",
        file="inference",
        ask="decoding, HBM 8 times as fast as links, F 16384, batch 32: the most ways of tensor parallelism; F 28672,"
        " batch 64",
        answer=(64, 56),
        tolerance=0.02,
        solve=lambda: tuple(
            decode_tensor_ways(width, batch, hbm_bytes_per_s=8, link_bytes_per_s=1)
            for width, batch in ((16384, 32), (28672, 64))
        ),
    ),
    Problem(
        id="18b-params",
        file="inference",
        ask="L 64, D 4096, F 16384, N 32, K 8, H 256, V 32128, tied: parameters; int8 cache bytes a token",
        answer=(18.4e9, 262e3),
        tolerance=0.02,
        solve=lambda: (sizes(inference_model()).total, cache_bytes(inference_model(), 1, value_bytes=1)),
    ),
    Problem(
        id="18b-128k",
        file="inference",
        ask="the same in int8 on v5e 4x4, 128e3 tokens each: sequences that fit; with one key head",
        answer=(7, 56),
        tolerance=0.02,
        solve=lambda: (_long_context(8), _long_context(1)),
    ),
    Problem(
        id="18b-load",
        file="inference",
        ask="the same: time to load the int8 parameters on v5e 4x4, s",
        answer=(1.4e-3,),
        tolerance=0.02,
        solve=lambda: (transfer_s(sizes(inference_model()).total, V5E.hbm_bytes_per_s, num_chips=16),),
    ),
    Problem(
        id="18b-experts",
        file="inference",
        ask="the same with 16 experts, 2 a token: parameters; active; critical batch on v5e in bf16",
        answer=(212e9, 31.2e9, 1920),
        tolerance=0.02,
        solve=_mixture,
    ),
    Problem(
        id="weight-stationary",
        file="inference",
        ask="F = 4D, weights split in both dims: chips from which it beats splitting F over 3 axes",
        answer=(72,),
        tolerance=0.02,
        solve=lambda: (weight_stationary_chips(8192, 32768),),
    ),
    Problem(
        id="latency-ways",
        file="inference",
        ask="v5e ring: ways from which a gather of 360e3 bytes is latency bound",
        answer=(8,),
        tolerance=0.02,
        solve=lambda: (
            latency_bound_ways(360e3, link_bytes_per_s=V5E.link_bytes_per_s or 0, hop_latency_s=V5E.hop_latency_s or 0),
        ),
    ),
    Problem(
        id="flops-per-dollar",
        file="applied-inference",
        ask="bf16 FLOPs a dollar: H100 at 10.8 dollars an hour; v5p at 4.2; v5e at 1.2",
        answer=(3.3e17, 3.9e17, 5.8e17),
        tolerance=0.02,
        solve=lambda: tuple(
            flops_per_usd(peak_of(chip), price) for chip, price in ((H100, 10.8), (V5P, 4.2), (V5E, 1.2))
        ),
    ),
    Problem(
        id="l70-32k",
        file="applied-inference",
        ask="L70 int8, 32768 tokens each: cache of one; of 240; v5e chips to hold all",
        answer=(5.3e9, 1.3e12, 86),
        tolerance=0.02,
        solve=_l70_long,
    ),
    Problem(
        id="l70-slice",
        file="applied-inference",
        ask="L70 int8, 32 sequences of 8192: sides of the smallest v5e slice",
        answer=(2, 4),
        tolerance=0.02,
        solve=lambda: smallest_slice(V5E, _served(1, 8192).total_bytes(32)),
    ),
    Problem(
        id="l70-throughput",
        file="applied-inference",
        ask="the same on v5e 4x2: tokens a second; a chip",
        answer=(1882, 235),
        tolerance=0.03,
        solve=_l70_throughput,
    ),
    Problem(
        id="l70-double",
        file="applied-inference",
        ask="the same on v5e 4x4: decode step, s",
        answer=(8.5e-3,),
        tolerance=0.02,
        solve=lambda: (decode_step_s(_served(1, 8192), 32, num_chips=16, roof=ROOF),),
    ),
    Problem(
        id="l70-tensor-ways",
        file="applied-inference",
        ask="L70 on v5e, two axes: the most ways of tensor parallelism, prefill",
        answer=(26,),
        tolerance=0.02,
        solve=lambda: (tensor_parallel_ways(28672, torus_roof(V5E, 2)),),
    ),
    Problem(
        id="l70-fitting",
        file="applied-inference",
        ask="L70, weights and cache in bf16, int8, int4: chips of the smallest v5e slice, sequences of 8192 in it",
        answer=(16, 43, 8, 43, 4, 43),
        tolerance=0.03,
        solve=lambda: tuple(number for pair in _fitting(1) for number in pair),
    ),
    Problem(
        id="l70-fitting-doubled",
        file="applied-inference",
        ask="the same on twice as many chips: sequences in bf16",
        answer=(140,),
        tolerance=0.02,
        solve=lambda: (_fitting(2)[0][1],),
    ),
    Problem(
        id="full-memory-step",
        file="applied-inference",
        ask="v5e: time to read all of HBM, s; 512 such steps",
        answer=(0.0195, 10),
        tolerance=0.02,
        solve=lambda: tuple(steps * transfer_s(V5E.hbm_bytes, V5E.hbm_bytes_per_s) for steps in (1, 512)),
    ),
    Problem(
        id="l70-queries",
        file="applied-inference",
        ask="L70 on the smallest slices, full, 512 tokens an answer: answers a second and chip in bf16; int8; int4",
        answer=(0.27, 0.55, 1.11),
        tolerance=0.06,
        solve=lambda: _queries(1),
    ),
    Problem(
        id="l70-queries-doubled",
        file="applied-inference",
        ask="the same on twice as many chips",
        answer=(0.44, 0.90, 1.80),
        tolerance=0.06,
        solve=lambda: _queries(2),
    ),
    Problem(
        id="l70-one-product",
        file="applied-inference",
        ask="L70 bf16, batch 64 on 32 v5e, one feed-forward product: gather of activations on a ring; weights, s",
        answer=(11e-6, 18e-6),
        tolerance=0.06,
        solve=_one_product,
    ),
    Problem(
        id="evicted",
        file="applied-inference",
        ask="32 sequences decoding, 8192 tokens of prompt, 4096 of answer: cached tokens that leave at each step",
        answer=(96,),
        tolerance=0.02,
        solve=lambda: (tokens_evicted_per_step(32, prompt_tokens=8192, output_tokens=4096),),
    ),
    Problem(
        id="prefill-servers",
        file="applied-inference",
        ask="L70, prompts of 8192 and answers of 512, batch 32, v5e 4x4 both: prefill servers a decode server",
        answer=(3,),
        tolerance=0.04,
        solve=_disaggregated,
    ),
)
