"""Problems of the chapters "roofline", "tpus" and "profiling": products, memories, units, paths."""

from gcompute.exam.problem import Problem
from gcompute.hardware.catalogue import find_chip
from gcompute.hardware.target import Target
from gcompute.plan.budget import compute_s
from gcompute.plan.collectives import reduce_scatter_s, torus_ring
from gcompute.plan.efficiency import device_of
from gcompute.plan.parallel_bounds import contraction_depth
from gcompute.plan.pods import matrix_unit_flops_per_s, pod, vector_flops_per_s
from gcompute.plan.roof import Roof, memory_roof, peak_of, torus_roof
from gcompute.plan.rooflines import (
    attention_product,
    contraction_flops,
    critical_batch,
    dot_product,
    exact_critical_batch,
    product,
    transfer_s,
)
from gcompute.plan.torus_paths import gather_to_one_s, send_s

V2, V5E, V6E, H100 = find_chip("v2"), find_chip("v5e"), find_chip("v6e"), find_chip("h100")
CORNER = (0, 0)


def _v5p_pod() -> tuple[float, ...]:
    whole = pod(Target.parse("v5p:16x20x28"))
    return float(whole.hosts or 0), whole.cores, whole.flops_per_s


def _beside_hbm() -> tuple[float, ...]:
    memory = memory_roof(V5E, "int8")
    # Vector memory is 22 times as fast.
    inside = Roof(flops_per_s=memory.flops_per_s, bytes_per_s=22 * memory.bytes_per_s)
    return tuple(
        exact_critical_batch(4096, 16384, roof, weight_bytes=1, activation_bytes=1) for roof in (memory, inside)
    )


def _from_host() -> tuple[float, ...]:
    whole_bytes, side = 16e9, 128 * 1024
    return (
        transfer_s(whole_bytes, 1.6e10, num_chips=16),
        gather_to_one_s(whole_bytes, Target.parse("v5e:4x4"), CORNER),
        transfer_s(whole_bytes, V5E.hbm_bytes_per_s),
        compute_s(product(8, side, side).flops, num_chips=1, flops_per_s=peak_of(V5E)),
    )


HARDWARE = (
    Problem(
        id="flops-time",
        file="roofline",
        ask="time of 1e12 bf16 FLOPs on H100; on v6e, s",
        answer=(1.01e-3, 1.1e-3),
        tolerance=0.02,
        solve=lambda: tuple(compute_s(1e12, num_chips=1, flops_per_s=peak_of(chip)) for chip in (H100, V6E)),
    ),
    Problem(
        id="critical-intensity",
        file="roofline",
        ask="FLOPs a byte at which v5e turns from memory to compute bound, bf16; H100",
        answer=(240, 295),
        tolerance=0.02,
        solve=lambda: (memory_roof(V5E).ridge, memory_roof(H100).ridge),
    ),
    Problem(
        id="dot-product",
        file="roofline",
        ask="intensity of a dot product of two bf16[4096], FLOPs a byte",
        answer=(0.5,),
        tolerance=0.02,
        solve=lambda: (dot_product(4096, value_bytes=2).intensity,),
    ),
    Problem(
        id="vector-ridge",
        file="roofline",
        ask="FLOPs a byte at which vector units of 7e12 FLOP/s over 2.5e12 B/s of HBM turn",
        answer=(2.8,),
        tolerance=0.02,
        solve=lambda: (Roof(flops_per_s=7e12, bytes_per_s=2.5e12).ridge,),
    ),
    Problem(
        id="two-chip-contraction",
        file="roofline",
        ask="bf16 product on two v5e split on the contracted dim, 4.5e10 B/s each way: D that is compute bound",
        answer=(8755,),
        tolerance=0.02,
        solve=lambda: (contraction_depth(2, torus_roof(V5E)),),
    ),
    Problem(
        id="exact-crossover",
        file="roofline",
        ask="v5e, int8 weights, bf16 activations and FLOPs, all bytes counted: critical batch at D = F = 4096; 1024",
        answer=(136, 226),
        tolerance=0.02,
        solve=lambda: tuple(
            exact_critical_batch(dim, dim, memory_roof(V5E), weight_bytes=1, activation_bytes=2) for dim in (4096, 1024)
        ),
    ),
    Problem(
        id="own-matrix",
        file="roofline",
        ask="int8[B, D] by int8[B, D, F], a matrix for each row: intensity for large D and F, OPs a byte",
        answer=(2,),
        tolerance=0.02,
        solve=lambda: (product(64, 4096, 4096, weight_bytes=1, activation_bytes=1, num_weights=64).intensity,),
    ),
    Problem(
        id="h100-batch",
        file="roofline",
        ask="H100 SXM, bf16: critical batch, tokens",
        answer=(295,),
        tolerance=0.02,
        solve=lambda: (critical_batch(memory_roof(H100), weight_bytes=2),),
    ),
    Problem(
        id="matrix-unit",
        file="tpus",
        ask="FLOP/s of a 128x128 matrix unit at 1.5 GHz; of four",
        answer=(5e13, 2e14),
        tolerance=0.03,
        solve=lambda: (matrix_unit_flops_per_s(128, 1.5e9), matrix_unit_flops_per_s(128, 1.5e9, units=4)),
    ),
    Problem(
        id="vector-units",
        file="tpus",
        ask="FLOP/s of a core's vector unit: 8 x 128 lanes, 4 operations each a cycle, 1.75 GHz",
        answer=(7e12,),
        tolerance=0.03,
        solve=lambda: (vector_flops_per_s(8 * 128, 1.75e9, flops_per_cycle=4),),
    ),
    Problem(
        id="v5p-pod",
        file="tpus",
        ask="a v5p pod of 8960 chips: hosts, TensorCores, bf16 FLOP/s",
        answer=(2240, 17920, 4.1e18),
        tolerance=0.02,
        solve=_v5p_pod,
    ),
    Problem(
        id="v5e-pod-cores",
        file="tpus",
        ask="a v5e pod: TensorCores",
        answer=(256,),
        tolerance=0.02,
        solve=lambda: (pod(Target.parse("v5e:16x16")).cores,),
    ),
    Problem(
        id="host-batch",
        file="tpus",
        ask="bf16 weights streamed from the host to a v6e of 9.2e14 FLOP/s at 1.6e10 B/s; at 1.5e10 (edition of 2025):"
        " critical batch, tokens",
        answer=(57500, 61000),
        tolerance=0.02,
        solve=lambda: tuple(
            critical_batch(Roof(flops_per_s=9.2e14, bytes_per_s=bus), weight_bytes=2) for bus in (1.6e10, 1.5e10)
        ),
    ),
    Problem(
        id="vmem-batch",
        file="tpus",
        ask="int8[B, 4096] by int8[4096, 16384] on v5e: critical batch from HBM; from VMEM, 22 times as fast",
        answer=(267, 11),
        tolerance=0.04,
        solve=_beside_hbm,
    ),
    Problem(
        id="corner-to-corner",
        file="tpus",
        ask="bf16[8, 128, 8192] from one corner of a v5e 4x4 to the other: first byte; in all, s",
        answer=(6e-6, 194e-6),
        tolerance=0.02,
        solve=lambda: tuple(
            send_s(num_bytes, Target.parse("v5e:4x4"), CORNER, (3, 3)) for num_bytes in (0, 2 * 8 * 128 * 8192)
        ),
    ),
    Problem(
        id="from-host-to-corner",
        file="tpus",
        ask="16e9 bytes, int8[128Ki, 128Ki], from the hosts' memory of a v5e 4x4 (1.6e10 B/s a chip) to one corner, by"
        " bf16[8, 128Ki]: host bus; ICI; HBM; FLOPs, s",
        answer=(0.063, 0.167, 0.020, 1.4e-3),
        tolerance=0.03,
        solve=_from_host,
    ),
    Problem(
        id="mha-intensity",
        file="inference",
        ask="multi-head attention of 480 queries and keys, bf16: intensity; of 1 query and 8192 keys, FLOPs a byte",
        answer=(240, 1),
        tolerance=0.02,
        solve=lambda: tuple(
            attention_product(queries, keys, heads=64, kv_heads=64, head_dim=128).intensity
            for queries, keys in ((480, 480), (1, 8192))
        ),
    ),
    Problem(
        id="gqa-intensity",
        file="transformers",
        ask="attention with 8 query heads a key head, 1 query and 8192 keys, bf16: intensity, FLOPs a byte",
        answer=(8,),
        tolerance=0.02,
        solve=lambda: (attention_product(1, 8192, heads=64, kv_heads=8, head_dim=128).intensity,),
    ),
    Problem(
        id="v2-matmul",
        file="profiling",
        ask="bf16[32, 1024, 8192] by [8192, 32768] on 8 TPU v2 cores, s",
        answer=(0.0956,),
        tolerance=0.02,
        solve=lambda: (
            compute_s(contraction_flops(32, 1024, 8192, 32768), num_chips=8, flops_per_s=device_of(V2).flops_per_s),
        ),
    ),
    Problem(
        id="v2-reduce-scatter",
        file="profiling",
        ask="ReduceScatter of bf16[32, 1024, 8192], batch split 4 ways, over one hop of v2, s",
        answer=(1.1e-3,),
        tolerance=0.02,
        solve=lambda: (reduce_scatter_s(2 * 32 * 1024 * 8192 / 4, torus_ring(V2, 2, wraparound=False)),),
    ),
)
