"""Problems of the chapters "sharding" and "transformers": shards, collectives, operations and sizes of a model."""

import math

from gcompute.config.mesh import Axis, MeshShape
from gcompute.exam.models import MHA_16B, decoder
from gcompute.exam.problem import Problem
from gcompute.hardware.catalogue import find_chip
from gcompute.hardware.target import Target
from gcompute.plan.budget import checkpoint_bytes, training_flops
from gcompute.plan.collectives import all_gather_s, all_reduce_s, all_to_all_s, torus_ring
from gcompute.plan.links import routes
from gcompute.plan.parallel_bounds import contraction_depth, latency_bound_bytes
from gcompute.plan.roof import memory_roof, torus_roof
from gcompute.plan.rooflines import attention_tokens, contraction_flops, critical_batch, transfer_s
from gcompute.plan.shards import num_copies, shard_bytes
from gcompute.plan.sizes import attention_params, cache_bytes, feed_forward_params

V4, V5E, V5P = find_chip("v4"), find_chip("v5e"), find_chip("v5p")
V5E_LINK = V5E.link_bytes_per_s or 0.0
# bf16[1024, 4096] of question 2, on a v4 4x4x4 whose axes are all rings.
WHOLE_BYTES = 2 * 1024 * 4096


def _v4_routes(mesh: MeshShape):
    return routes(mesh, Target.parse("v4:4x4x4"))


def _small_gather() -> tuple[float, ...]:
    links = routes(MeshShape(fsdp=8, tensor=4), Target.parse("v5e:4x8"))
    return (all_gather_s(2 * 256 * 256, links[Axis.TENSOR]),)


def _local_int8() -> tuple[float, ...]:
    each = shard_bytes((128, 2048), (16, 1), value_bytes=1)
    return each, 32 * each


def _local_fp32() -> tuple[float, ...]:
    each = shard_bytes((1024, 4096), (16, 1), value_bytes=4)
    return each, transfer_s(each, 3.4e12)


def _idle_axis_too() -> tuple[float, ...]:
    two = _v4_routes(MeshShape(fsdp=16, tensor=4))[Axis.FSDP]
    three = _v4_routes(MeshShape(fsdp=64))[Axis.FSDP]
    return all_gather_s(WHOLE_BYTES / 4, two), all_gather_s(WHOLE_BYTES, three)


def _all_to_all_ratio() -> tuple[float, ...]:
    ring = torus_ring(V5E, 16, wraparound=True)
    return (all_gather_s(1e9, ring) / all_to_all_s(1e9, ring),)


def _layer_matrices(dim: int) -> tuple[int, int]:
    """(attention, feed-forward) parameters of a multi-head layer with F = 4 D, gated."""
    heads = dim // 128
    model = decoder(layers=1, dim=dim, width=4 * dim, heads=heads, kv_heads=heads, head_dim=128, vocab=1)
    group = model.layers[0]
    return attention_params(group.attention, dim)[0], feed_forward_params(group.feed_forward, dim)[0]


def _quadratic(dim: int) -> float:
    return attention_tokens(sum(_layer_matrices(dim)), heads=dim // 128, head_dim=128)


def _attention_share() -> tuple[float, ...]:
    attention, fed = _layer_matrices(MHA_16B.dim)
    return (attention / (attention + fed),)


SHARDING = (
    Problem(
        id="local-fp32",
        file="sharding",
        ask="fp32[1024, 4096], rows over X = 8 and Y = 2: bytes on a device; time to read them at 3.4e12 B/s, s",
        answer=(2**20, 294e-9),
        tolerance=0.05,
        solve=_local_fp32,
    ),
    Problem(
        id="local-int8",
        file="sharding",
        ask="int8[128, 2048], rows over X = 2 and Y = 8, Z = 2: bytes on a device; on all",
        answer=(16384, 512 * 1024),
        tolerance=0.02,
        solve=_local_int8,
    ),
    Problem(
        id="copies",
        file="sharding",
        ask="an array over X = 4 of a mesh X = 4, Y = 8, Z = 2: bytes on all devices over its own",
        answer=(16,),
        tolerance=0.02,
        solve=lambda: (num_copies(4 * 8 * 2, (4,)),),
    ),
    Problem(
        id="allgather-ring",
        file="sharding",
        ask="AllGather of bf16[2048, 8192] over 4 v5e, were they a ring, s",
        answer=(377e-6,),
        tolerance=0.02,
        solve=lambda: (all_gather_s(2 * 2048 * 8192, torus_ring(V5E, 4, wraparound=True)),),
    ),
    Problem(
        id="allgather-line-latency",
        file="sharding",
        ask="AllGather over Y of bf16[256, 256] on v5e, Y = 4 of X = 8, Y = 4, s",
        answer=(3e-6,),
        tolerance=0.02,
        solve=_small_gather,
    ),
    Problem(
        id="latency-bytes",
        file="sharding",
        ask="v5e: bytes of a shard below which a hop is latency bound",
        answer=(45e3,),
        tolerance=0.02,
        solve=lambda: (latency_bound_bytes(link_bytes_per_s=V5E_LINK, hop_latency_s=1e-6),),
    ),
    Problem(
        id="allreduce-3d",
        file="sharding",
        ask="v4p 4x4x4: AllReduce over Z of bf16[1024, 4096] split over X and Y, s",
        answer=(11.6e-6,),
        tolerance=0.02,
        solve=lambda: (all_reduce_s(WHOLE_BYTES / 16, _v4_routes(MeshShape(fsdp=16, tensor=4))[Axis.TENSOR]),),
    ),
    Problem(
        id="allgather-idle-axis",
        file="sharding",
        ask="v4p 4x4x4, bf16[1024, 4096] over X and Y, using idle Z too: AllGather over X; over X and Y, s",
        answer=(11.5e-6, 31e-6),
        tolerance=0.02,
        solve=_idle_axis_too,
    ),
    Problem(
        id="reduce-or-gather",
        file="sharding",
        ask="v5p, large batch: D above which summing partial results beats gathering weights",
        answer=(5100,),
        tolerance=0.02,
        solve=lambda: (contraction_depth(1, torus_roof(V5P)),),
    ),
    Problem(
        id="all-to-all-ratio",
        file="sharding",
        ask="time of an AllGather over that of an AllToAll of the same array on a ring",
        answer=(4,),
        tolerance=0.02,
        solve=_all_to_all_ratio,
    ),
    Problem(
        id="attention-share",
        file="transformers",
        ask="D 4096, F 4D, multi-head: share of attention in the matrices of a layer",
        answer=(0.25,),
        tolerance=0.02,
        solve=_attention_share,
    ),
    Problem(
        id="quadratic-tokens",
        file="transformers",
        ask="T at which attention costs what matrices do, F = 4D, multi-head: D 8192; D 4608",
        answer=(64 * 1024, 36864),
        tolerance=0.02,
        solve=lambda: (_quadratic(8192), _quadratic(4608)),
    ),
    Problem(
        id="attention-over-projections",
        file="transformers",
        ask="T at which attention costs what its projections do, D 4096, multi-head",
        answer=(8192,),
        tolerance=0.02,
        solve=lambda: (attention_tokens(_layer_matrices(4096)[0], heads=32, head_dim=128),),
    ),
    Problem(
        id="activations-no-remat",
        file="transformers",
        ask="activations of 4e6 tokens, 64 layers, D 8192, 20 values of D kept a layer; one kept a layer, bytes",
        answer=(84e12, 4.2e12),
        tolerance=0.02,
        solve=lambda: tuple(checkpoint_bytes(4e6, num_layers=64, values_per_token=kept * 8192) for kept in (20, 1)),
    ),
    Problem(
        id="remat-flops",
        file="transformers",
        ask="training FLOPs a parameter and token; with the forward pass run again",
        answer=(6, 8),
        tolerance=0.02,
        solve=lambda: (training_flops(1, 1), training_flops(1, 1, recomputed=True)),
    ),
    Problem(
        id="cache-8gib",
        file="transformers",
        ask="int8 cache of 8192 tokens, 64 layers, K H = 8192, bytes",
        answer=(8 * 2**30,),
        tolerance=0.02,
        solve=lambda: (
            cache_bytes(
                decoder(layers=64, dim=8192, width=32768, heads=64, kv_heads=64, head_dim=128, vocab=32000),
                8192,
                value_bytes=1,
            ),
        ),
    ),
    Problem(
        id="idle-axis-flops",
        file="transformers",
        ask="A[B_X, D_Y] by W[D_Y, F] on X 4, Y 8, Z 4: operations in all over B D F; on a chip, over B D F",
        answer=(8, 2 / 32),
        tolerance=0.02,
        solve=lambda: (
            contraction_flops(1, 1, 1) * num_copies(4 * 8 * 4, (4, 8)),
            contraction_flops(1, 1, 1) / math.prod((4, 8)),
        ),
    ),
    Problem(
        id="moe-batch",
        file="transformers",
        ask="DeepSeek-V3's experts, 256 of which 8, int8 weights and bf16 FLOPs on v5e: critical batch, tokens",
        answer=(3840,),
        tolerance=0.02,
        solve=lambda: (critical_batch(memory_roof(V5E), weight_bytes=1, experts=256, experts_per_token=8),),
    ),
)
