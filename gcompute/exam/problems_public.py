"""A first problem of each kind."""

from gcompute.config.mesh import Axis, MeshShape
from gcompute.exam.models import L70, MHA_16B
from gcompute.exam.problem import Problem
from gcompute.hardware.catalogue import find_chip
from gcompute.hardware.target import Target
from gcompute.plan.budget import compute_s, days, training_flops, utilization
from gcompute.plan.collectives import all_gather_s
from gcompute.plan.decoding import Served, decode_step_s, prefill_s
from gcompute.plan.links import routes
from gcompute.plan.parallel_bounds import data_parallel_tokens
from gcompute.plan.pods import pod
from gcompute.plan.roof import memory_roof, peak_of, torus_roof
from gcompute.plan.rooflines import critical_batch, transfer_s
from gcompute.plan.sizes import cache_bytes, sizes

V4, V5E, V5P = find_chip("v4"), find_chip("v5e"), find_chip("v5p")


def _roofline_v5e() -> tuple[float, ...]:
    return (
        critical_batch(memory_roof(V5E, "bfloat16"), weight_bytes=2),
        critical_batch(memory_roof(V5E, "bfloat16"), weight_bytes=1),
        critical_batch(memory_roof(V5E, "int8"), weight_bytes=1),
    )


def _v5e_pod() -> tuple[float, ...]:
    whole = pod(Target.parse("v5e:16x16"))
    return float(whole.hosts or 0), whole.flops_per_s, whole.hbm_bytes


def _allgather_y() -> tuple[float, ...]:
    links = routes(MeshShape(fsdp=8, tensor=4), Target.parse("v5e:4x8"))
    return (all_gather_s(2 * 2048 * 8192, links[Axis.TENSOR]),)


def _allgather_small() -> tuple[float, ...]:
    links = routes(MeshShape(fsdp=16, tensor=4), Target.parse("v4:4x4x4"))
    return (all_gather_s(256, links[Axis.TENSOR]),)


def _allgather_3d() -> tuple[float, ...]:
    # Axes of 4, and of the two that X and Y take together.
    links = routes(MeshShape(fsdp=16, tensor=4), Target.parse("v4:4x4x4"))
    whole_bytes = 2 * 1024 * 4096
    return all_gather_s(whole_bytes / 4, links[Axis.TENSOR]), all_gather_s(whole_bytes, links[Axis.FSDP])


def _l70_serve() -> tuple[float, ...]:
    cached = cache_bytes(L70, 8192, value_bytes=1)
    served = Served(params=sizes(L70).total, weight_bytes=1, sequence_bytes=cached)
    step_s = decode_step_s(served, 32, num_chips=8, roof=memory_roof(V5E))
    return cache_bytes(L70, 1, value_bytes=1), served.total_bytes(32), step_s


def _30b_decode() -> tuple[float, ...]:
    served = Served(params=30e9, weight_bytes=1, sequence_bytes=8192 * 100e3)
    return tuple(decode_step_s(served, batch, num_chips=16, roof=memory_roof(V5E)) for batch in (4, 256))


PUBLIC = (
    Problem(
        id="roofline-v5e",
        file="roofline",
        ask="critical batch (tokens) of a matmul on v5e: bf16 x bf16; int8 weights, bf16 compute; int8 x int8",
        answer=(240, 120, 243),
        tolerance=0.02,
        solve=_roofline_v5e,
    ),
    Problem(
        id="load-200b",
        file="tpus",
        ask="time to load 200e9 bf16 parameters from HBM over 32 v4p chips, s",
        answer=(0.01,),
        tolerance=0.05,
        solve=lambda: (transfer_s(200e9 * 2, V4.hbm_bytes_per_s, num_chips=32),),
    ),
    Problem(
        id="v5e-pod",
        file="tpus",
        ask="a v5e pod: hosts, bf16 FLOP/s, HBM bytes",
        answer=(32, 5.1e16, 4e12),
        tolerance=0.05,
        solve=_v5e_pod,
    ),
    Problem(
        id="allgather-y",
        file="sharding",
        ask="AllGather over Y of bf16[2048, 8192] sharded over Y=4 (X=8) on v5e, both directions but no wraparound:"
        " time, s (ideal with wraparound 377e-6; measured 680e-6)",
        answer=(0.00056,),
        tolerance=0.05,
        solve=_allgather_y,
    ),
    Problem(
        id="allgather-small",
        file="sharding",
        ask="AllGather of 256 bytes on a v4p axis of 4: latency-bound time, s",
        answer=(2e-06,),
        tolerance=0.1,
        solve=_allgather_small,
    ),
    Problem(
        id="allgather-3d",
        file="sharding",
        ask="v4p 4x4x4, bf16[1024, 4096] sharded B over X, D over Y: AllGather over X; over X and Y, s",
        answer=(2.3e-05, 4.6e-05),
        tolerance=0.06,
        solve=_allgather_3d,
    ),
    Problem(
        id="mha-16b",
        file="transformers",
        ask="D 4096, F 16384, V 32000, L 64, multi-head attention, gated MLP, int8 cache: parameters; KV bytes a token",
        answer=(16e9, 512e3),
        tolerance=0.05,
        solve=lambda: (sizes(MHA_16B).total, cache_bytes(MHA_16B, 1, value_bytes=1)),
        note="The exact count is 17.45e9. The book multiplies with dims of 4e3 and 16e3, which gives 16.6e9, and writes"
        " 16e9; in binary units the count is 16.25 x 2^30, as its 512 kB are 512 x 2^10.",
    ),
    Problem(
        id="deepseek-util",
        file="transformers",
        ask="DeepSeek-V3: 2.79e6 H800 hours, 14.8e12 tokens, 37e9 active parameters: fp8 FLOP utilization",
        answer=(0.217,),
        tolerance=0.03,
        # An H800 does 1.513e15 operations a second in fp8.
        solve=lambda: (utilization(training_flops(37e9, 14.8e12), chip_hours=2.79e6, flops_per_s=1.513e15),),
    ),
    Problem(
        id="v5p-dp-limit",
        file="training",
        ask="v5p: tokens a chip below which data parallelism or FSDP is communication bound, 1 axis; 3 axes",
        answer=(2550, 850),
        tolerance=0.02,
        solve=lambda: (data_parallel_tokens(torus_roof(V5P, 1)), data_parallel_tokens(torus_roof(V5P, 3))),
    ),
    Problem(
        id="l70-params",
        file="applied-training",
        ask="L70: parameters; training FLOPs a token; for 15e12 tokens",
        answer=(70.4e9, 4.2e11, 6.3e24),
        tolerance=0.02,
        solve=lambda: (
            sizes(L70).total,
            training_flops(sizes(L70).total),
            training_flops(sizes(L70).total, 15e12),
        ),
    ),
    Problem(
        id="l70-days",
        file="applied-training",
        ask="L70, 15e12 tokens, a full v5p pod of 8960 chips at 40 % MFU: days",
        answer=(44,),
        tolerance=0.03,
        solve=lambda: (
            days(compute_s(training_flops(sizes(L70).total, 15e12), num_chips=8960, flops_per_s=peak_of(V5P), mfu=0.4)),
        ),
    ),
    Problem(
        id="30b-decode",
        file="inference",
        ask="30e9 int8 parameters on v5e 4x4, KV 100e3 bytes a token, 8192 context: decode step at batch 4; at batch"
        " 256, s",
        answer=(0.0025, 0.021),
        tolerance=0.05,
        solve=_30b_decode,
    ),
    Problem(
        id="l70-serve",
        file="applied-inference",
        ask="L70 int8, batch 32, context 8192: KV bytes a token; total bytes; decode step on v5e 4x2, s",
        answer=(160e3, 112e9, 0.017),
        tolerance=0.05,
        solve=_l70_serve,
    ),
    Problem(
        id="l70-prefill",
        file="applied-inference",
        ask="L70, prefill of 8192 tokens on 16 v5e at 40 % MFU, s",
        answer=(0.91,),
        tolerance=0.05,
        solve=lambda: (prefill_s(sizes(L70).total, 8192, num_chips=16, flops_per_s=peak_of(V5E), mfu=0.4),),
    ),
)
