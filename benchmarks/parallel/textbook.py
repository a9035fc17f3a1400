"""What each strategy sends by the textbook: bytes of one device, by collective, from sizes alone.

n devices share an axis; a size is that of a whole array in bytes. Each function gives {kind: bytes} for one forward and
backward pass, or for one train step where it says so.
"""

Bytes = dict[str, float]

ALL_REDUCE, ALL_GATHER, REDUCE_SCATTER = "all-reduce", "all-gather", "reduce-scatter"
ALL_TO_ALL, PERMUTE = "all-to-all", "collective-permute"


def gathered(size: float, n: int) -> float:
    """(n - 1) / n of the array, for an all-gather, a reduce-scatter or an all-to-all.

    Source: Chan et al. 2007, "Collective communication: theory, practice, and experience", section 4.
    """
    return (n - 1) / n * size


def reduced(size: float, n: int) -> float:
    """2 (n - 1) / n of the array, for an all-reduce: a reduce-scatter and an all-gather. Source: as `gathered`."""
    return 2 * gathered(size, n)


def total(*parts: Bytes, times: float = 1) -> Bytes:
    """The sum of the parts, `times` over."""
    sums: Bytes = {}
    for part in parts:
        for kind, num_bytes in part.items():
            sums[kind] = sums.get(kind, 0) + times * num_bytes
    return sums


def data_parallel(gradient: float, n: int) -> Bytes:
    """A step of any number of microbatches: the gradient, once. Source: Li et al. 2020 (PyTorch DDP), section 3."""
    return {ALL_REDUCE: reduced(gradient, n)}


def zero(stage: int, params: float, n: int, microbatches: int = 1) -> Bytes:
    """A step of ZeRO: gradients scattered, and parameters gathered once, or in stage 3 for each pass that uses them.

    Source: Rajbhandari et al. 2020 (ZeRO), section 7: 2 sizes of the parameters in stages 1 and 2, 3 in stage 3. Each
    microbatch scatters from stage 2 on; Zhao et al. 2023 (PyTorch FSDP), section 3.
    """
    return {
        REDUCE_SCATTER: (1 if stage == 1 else microbatches) * gathered(params, n),
        ALL_GATHER: (2 * microbatches if stage == 3 else 1) * gathered(params, n),
    }


def tensor_block(activation: float, n: int) -> Bytes:
    """A column-parallel and a row-parallel product: operators f and g. Source: Shoeybi et al. 2019, section 3."""
    return {ALL_REDUCE: 2 * reduced(activation, n)}


def sequence_block(activation: float, n: int, *, gathers_again: bool) -> Bytes:
    """`tensor_block` between pieces of the sequence: g and its conjugate, both ways, and for little memory one more.

    Source: Korthikanti et al. 2022, section 4.2.2: four collectives in place of two all-reduces, and the all-gather
    of the backward pass that brings x again rather than keep it.
    """
    return {
        ALL_GATHER: (3 if gathers_again else 2) * gathered(activation, n),
        REDUCE_SCATTER: 2 * gathered(activation, n),
    }


def collective_matmul_block(activation: float, n: int) -> Bytes:
    """`sequence_block` as rings: each of its five collectives is n - 1 sends of a piece, in one direction or two.

    Source: Wang et al. 2023, section 5.
    """
    return {PERMUTE: sum(sequence_block(activation, n, gathers_again=True).values())}


def vocab_embedding(activation: float, n: int, *, scatters: bool) -> Bytes:
    """The sum of looked-up rows, of which all terms but one are zero. Source: Shoeybi et al. 2019, section 3.

    scatters: into pieces of the sequence; then the backward pass gathers.
    """
    if scatters:
        return {REDUCE_SCATTER: gathered(activation, n), ALL_GATHER: gathered(activation, n)}
    return {ALL_REDUCE: reduced(activation, n)}


def vocab_cross_entropy(num_tokens: int, n: int, itemsize: int = 4) -> Bytes:
    """Three numbers a token: the greatest logit, the sum of exponentials, the target's logit.

    Source: Shoeybi et al. 2019, section 3, "B x S numbers in place of B x S x V".
    """
    return {ALL_REDUCE: 3 * reduced(num_tokens * itemsize, n)}


def ring_attention(keys_and_values: float, n: int) -> Bytes:
    """k and v go round forward and again backward, and their gradients once: n - 1 sends of a shard each.

    Source: Liu et al. 2023 (Ring Attention), algorithm 1.
    """
    return {PERMUTE: 3 * gathered(keys_and_values, n)}


def ulysses_attention(queries: float, keys_and_values: float, n: int) -> Bytes:
    """q, k, v and o, 4 all-to-alls forward and 4 backward, each of a device's 1 / n of the array.

    Source: Jacobs et al. 2023 (DeepSpeed Ulysses), section 3.2.
    """
    return {ALL_TO_ALL: 2 * gathered(2 * queries + keys_and_values, n) / n}


def gathered_attention(keys_and_values: float, n: int) -> Bytes:
    """k and v gathered, their gradients scattered. Source: Llama 3 herd of models 2024, section 3.3.2."""
    return {ALL_GATHER: gathered(keys_and_values, n), REDUCE_SCATTER: gathered(keys_and_values, n)}


def ring_all_reduce(size: float, n: int) -> Bytes:
    """The fewest bytes of any all-reduce. Source: Patarasuk and Yuan 2009, theorem 1 and section 4."""
    return {PERMUTE: reduced(size, n)}


def experts(buffers: float, n: int) -> Bytes:
    """The places of all experts, there and back, forward and backward. Source: Lepikhin et al. 2020, section 3.

    buffers: E C D numbers for each sequence of one device.
    """
    return {ALL_TO_ALL: 4 * gathered(buffers, n)}


def pipeline(activation: float, microbatches: int, chunks: int = 1) -> Bytes:
    """A stage between others sends each microbatch's activation on, and its gradient back, for each of its chunks.

    Source: Narayanan et al. 2021, section 3.2 (2 B T D a microbatch), and 2.2.2 for chunks.
    """
    return {PERMUTE: 2 * chunks * microbatches * activation}
