"""Problems of the chapter "gpus": units, nodes of eight, the network between them, the bounds they set.

The book gives a B200 8e12 bytes a second of memory and a node of them 400e9 of network: where the catalogue differs,
the problem states the figure.
"""

from gcompute.exam.problem import Problem
from gcompute.hardware.catalogue import find_chip
from gcompute.plan.budget import compute_s, days, fewest_chips, state_bytes, training_flops
from gcompute.plan.collectives import Network, Switch, all_gather_s
from gcompute.plan.fat_tree import Level, gather_beside_inner_s, in_network_reduce_s, tree_gather_s
from gcompute.plan.parallel_bounds import (
    data_parallel_tokens,
    expert_parallel_width,
    tensor_parallel_ways,
    tensor_parallel_width,
)
from gcompute.plan.pods import clock_of, vector_flops_per_s
from gcompute.plan.roof import Roof, across_nodes_roof, memory_roof, node_roof, peak_of
from gcompute.plan.rooflines import elementwise, product, roofline_s

H100, B200 = find_chip("h100"), find_chip("b200")
NODE, ACROSS = node_roof(H100), across_nodes_roof(H100)
H100_LANES = 132 * 4 * 32
B200_MEMORY = Roof(flops_per_s=2.3e15, bytes_per_s=8e12)
H800_NODE = Roof(flops_per_s=990e12, bytes_per_s=300e9)
# GPUs of a node, nodes of a leaf, leaves of a spine.
LEVELS = (
    Level(degree=8, bytes_per_s=450e9),
    Level(degree=32, bytes_per_s=400e9),
    Level(degree=4, bytes_per_s=12.8e12),
)
TWO_NODES = Level(degree=2, bytes_per_s=400e9)
OF_A_NODE = Switch(num_devices=8, bytes_per_s=450e9)


def _adds(values: float) -> tuple[float, float]:
    """(intensity, seconds) of adding two fp32 vectors on an H100."""
    vectors = Roof(flops_per_s=vector_flops_per_s(H100_LANES, 1.98e9), bytes_per_s=H100.hbm_bytes_per_s)
    adding = elementwise(values, operands=2, value_bytes=4)
    return adding.intensity, roofline_s(adding, vectors)


def _l70_on_h100() -> tuple[float, ...]:
    state = state_bytes(70e9)
    seconds = compute_s(training_flops(70e9, 15e12), num_chips=4096, flops_per_s=peak_of(H100), mfu=0.45)
    return fewest_chips(state, H100.hbm_bytes), days(seconds), state / 8


GPUS = (
    Problem(
        id="h100-vectors",
        file="gpus",
        ask="H100, 132 x 4 x 32 lanes, one fp32 operation a cycle: FLOP/s at 1.59 GHz; at 1.98",
        answer=(26.9e12, 33.5e12),
        tolerance=0.02,
        solve=lambda: tuple(vector_flops_per_s(H100_LANES, clock_hz) for clock_hz in (1.59e9, 1.98e9)),
    ),
    Problem(
        id="b200-clock",
        file="gpus",
        ask="B200, 18944 lanes of two operations a cycle and 80e12 FLOP/s: clock, Hz",
        answer=(2.1e9,),
        tolerance=0.02,
        solve=lambda: (clock_of(80e12, 18944, flops_per_cycle=2),),
    ),
    Problem(
        id="gpu-intensities",
        file="gpus",
        ask="FLOPs a byte of memory: H100 bf16; fp8; B200 with 8e12 B/s bf16; fp8",
        answer=(295, 590, 281, 562),
        tolerance=0.02,
        solve=lambda: (
            memory_roof(H100).ridge,
            memory_roof(H100, "float8").ridge,
            *(Roof(flops_per_s=peak_of(B200, dtype), bytes_per_s=8e12).ridge for dtype in ("bfloat16", "float8")),
        ),
    ),
    Problem(
        id="b200-matmul",
        file="gpus",
        ask="B200 of 2.3e15 FLOP/s and 8e12 B/s, fp16[B, 4096] by [4096, 8192]: time at B = 64; 512, s",
        answer=(8.6e-6, 15e-6),
        tolerance=0.02,
        solve=lambda: tuple(roofline_s(product(rows, 4096, 8192), B200_MEMORY) for rows in (64, 512)),
    ),
    Problem(
        id="vector-add",
        file="gpus",
        ask="adding two fp32[N] on H100: intensity; time at N = 65536; at 2^30, s",
        answer=(1 / 12, 0.23e-6, 3.84e-3),
        tolerance=0.03,
        solve=lambda: (*_adds(65536), _adds(2**30)[1]),
    ),
    Problem(
        id="node-gather",
        file="gpus",
        ask="AllGather of bf16[4096, 65536] over 8 H100, s; of bf16[1024, 16384]",
        answer=(1.04e-3, 65e-6),
        tolerance=0.02,
        solve=lambda: (all_gather_s(2 * 4096 * 65536, OF_A_NODE), all_gather_s(2 * 1024 * 16384, OF_A_NODE)),
    ),
    Problem(
        id="two-nodes-gather",
        file="gpus",
        ask="AllGather of 514e9 bytes over two nodes of H100, s",
        answer=(1,),
        tolerance=0.02,
        solve=lambda: (all_gather_s(514e9, OF_A_NODE, Network(num_groups=2, bytes_per_s=50e9)),),
    ),
    Problem(
        id="gather-beside-tensor",
        file="gpus",
        ask="256 H100, AllGather over X of bf16[D_X, F_Y], D 8192, F 32768, Y inner: time at Y = 8; 16; 32; 64, s",
        answer=(1.34e-3, 0.67e-3, 0.34e-3, 0.17e-3),
        tolerance=0.02,
        solve=lambda: tuple(
            gather_beside_inner_s(
                2 * 8192 * 32768, inner=inner, node_chips=8, chip_bytes_per_s=450e9, node_bytes_per_s=400e9
            )
            for inner in (8, 16, 32, 64)
        ),
    ),
    Problem(
        id="levels",
        file="gpus",
        ask="bytes a second of an AllGather inside a node of H100; between 32 nodes of a leaf; 4 leaves; all",
        answer=(514e9, 413e9, 17.1e12, 413e9),
        tolerance=0.02,
        solve=lambda: (*(1 / tree_gather_s(1, (level,)) for level in LEVELS), 1 / tree_gather_s(1, LEVELS)),
    ),
    Problem(
        id="two-node-tree",
        file="gpus",
        ask="AllGather over exactly two nodes of H100: bytes a second between them; in all",
        answer=(800e9, 514e9),
        tolerance=0.02,
        solve=lambda: (1 / tree_gather_s(1, (TWO_NODES,)), 1 / tree_gather_s(1, (LEVELS[0], TWO_NODES))),
    ),
    Problem(
        id="in-network",
        file="gpus",
        ask="AllReduce by switches that add up: bytes a second inside a node of H100; across nodes",
        answer=(450e9, 400e9),
        tolerance=0.02,
        solve=lambda: tuple(1 / in_network_reduce_s(1, levels) for levels in (LEVELS[:1], LEVELS)),
    ),
    Problem(
        id="gpu-data-parallel",
        file="gpus",
        ask="H100: tokens a GPU for data parallelism or FSDP inside a node; across nodes; a step of 16000 GPUs",
        answer=(2200, 2475, 39.6e6),
        tolerance=0.02,
        solve=lambda: (
            data_parallel_tokens(NODE),
            data_parallel_tokens(ACROSS),
            16_000 * data_parallel_tokens(ACROSS),
        ),
    ),
    Problem(
        id="h800-data-parallel",
        file="gpus",
        ask="2048 H800 of 990e12 FLOP/s and 300e9 B/s: tokens a step for data parallelism",
        answer=(6.7e6,),
        tolerance=0.02,
        solve=lambda: (2048 * data_parallel_tokens(H800_NODE),),
    ),
    Problem(
        id="gpu-moe-data-parallel",
        file="gpus",
        ask="H100 across nodes, 128 experts of which 4: tokens a GPU for data parallelism",
        answer=(79200,),
        tolerance=0.02,
        solve=lambda: (data_parallel_tokens(ACROSS, experts=128, experts_per_token=4),),
    ),
    Problem(
        id="two-nodes-data-parallel",
        file="gpus",
        ask="H100, data parallel over exactly two nodes: tokens a GPU",
        answer=(1237,),
        tolerance=0.02,
        solve=lambda: (data_parallel_tokens(ACROSS, groups=2),),
    ),
    Problem(
        id="gpu-tensor-ways",
        file="gpus",
        ask="H100, F 28e3: the most ways of tensor parallelism inside a node; were links the network's; over two nodes",
        answer=(12.7, 11.3, 19),
        tolerance=0.02,
        solve=lambda: (
            tensor_parallel_ways(28e3, NODE),
            tensor_parallel_ways(28e3, ACROSS),
            tensor_parallel_ways(28e3, ACROSS, node_chips=8),
        ),
    ),
    Problem(
        id="gpu-expert-width",
        file="gpus",
        ask="H100, experts over many nodes and few a token: width F of one from which it is compute bound",
        answer=(19800,),
        tolerance=0.02,
        solve=lambda: (expert_parallel_width(4096, 1, ACROSS),),
    ),
    Problem(
        id="b200-bounds",
        file="gpus",
        ask="B200: F for each way of tensor parallelism in a node; tokens a GPU across nodes of 400e9 B/s",
        answer=(2500, 5625),
        tolerance=0.02,
        solve=lambda: (
            tensor_parallel_width(1, node_roof(B200)),
            data_parallel_tokens(Roof(flops_per_s=peak_of(B200), bytes_per_s=400e9)),
        ),
    ),
    Problem(
        id="l70-h100",
        file="gpus",
        ask="70e9 parameters on H100: GPUs to hold state; days for 15e12 tokens on 4096 at 45 % MFU; bytes a GPU of"
        " tensor 8 and data parallelism",
        answer=(9, 40, 87.5e9),
        tolerance=0.02,
        solve=_l70_on_h100,
    ),
    Problem(
        id="pipeline-helps-data",
        file="gpus",
        ask="H100, a copy of the model over 2 nodes; over 8: tokens a GPU for FSDP",
        answer=(1237, 309),
        tolerance=0.02,
        solve=lambda: tuple(data_parallel_tokens(across_nodes_roof(H100, nodes)) for nodes in (2, 8)),
    ),
)
