"""Problems of the chapters "training" and "applied-training": bounds of each parallelism, memory, days."""

from gcompute.exam.models import L70, LLAMA2_13B
from gcompute.exam.problem import Problem
from gcompute.hardware.catalogue import find_chip
from gcompute.plan.budget import checkpoint_bytes, compute_s, days, fewest_chips, state_bytes, training_flops
from gcompute.plan.parallel_bounds import (
    best_fsdp_ways,
    data_parallel_tokens,
    mixed_tokens,
    power_of_two_split,
    tensor_parallel_ways,
    tensor_parallel_width,
)
from gcompute.plan.roof import network_roof, peak_of, torus_roof
from gcompute.plan.sizes import attention_params, feed_forward_params, sizes

V5P = find_chip("v5p")
ONE_AXIS, ALL_AXES = torus_roof(V5P, 1), torus_roof(V5P, 3)
# The book gives a v5p 96e9 bytes; the catalogue has 95 GiB.
BOOK_HBM_BYTES = 96e9
DAYS_PER_YEAR = 365.25


def _parts(model) -> tuple[float, float, float]:
    """(feed-forward, attention, embedding and output) parameters."""
    group = model.layers[0]
    fed = group.num * feed_forward_params(group.feed_forward, model.dim)[0]
    return fed, group.num * attention_params(group.attention, model.dim)[0], 2 * model.vocab * model.dim


def _at_the_bound() -> tuple[float, ...]:
    num_chips = 16e6 / data_parallel_tokens(ALL_AXES)
    seconds = compute_s(training_flops(70e9, 15e12), num_chips=num_chips, flops_per_s=peak_of(V5P), mfu=0.5)
    return num_chips, days(seconds)


def _llama_2m() -> tuple[float, ...]:
    tokens, width = 2e6, 30_000
    mixed = mixed_tokens(width, ONE_AXIS, fsdp_axes=2, tensor_axes=1)
    return tensor_parallel_ways(width, ONE_AXIS), tokens / data_parallel_tokens(ALL_AXES), mixed, tokens / mixed


def _13b_memory() -> tuple[float, ...]:
    dim, width = LLAMA2_13B.dim, LLAMA2_13B.layers[0].feed_forward.width
    kept = checkpoint_bytes(16e6, num_layers=40, values_per_token=dim + 2 * width)
    return state_bytes(sizes(LLAMA2_13B).total), kept


def _13b_fsdp() -> tuple[float, ...]:
    dim, width = LLAMA2_13B.dim, LLAMA2_13B.layers[0].feed_forward.width
    kept = checkpoint_bytes(3e6, num_layers=40, values_per_token=dim + 2 * width)
    return state_bytes(sizes(LLAMA2_13B).total) + kept, 4096 * data_parallel_tokens(ALL_AXES)


def _13b_mixed() -> tuple[float, ...]:
    width, num_chips, tokens = LLAMA2_13B.layers[0].feed_forward.width, 4096, 3e6
    ways = best_fsdp_ways(tokens, width, num_chips, fsdp_axes=2, tensor_axes=1)
    flops = training_flops(sizes(LLAMA2_13B).total, tokens)
    step_s = compute_s(flops, num_chips=num_chips, flops_per_s=peak_of(V5P), mfu=0.4)
    bound = mixed_tokens(width, ONE_AXIS, fsdp_axes=2, tensor_axes=1)
    return (bound, tokens / num_chips, ways, *power_of_two_split(num_chips, ways), step_s)


def _small_mix() -> tuple[float, ...]:
    ways = best_fsdp_ways(48_000, 32768, 64, fsdp_axes=2, tensor_axes=1)
    return (ways, *power_of_two_split(64, ways))


def _l70_bytes() -> float:
    """State and four checkpoints of D a layer, for batches of 4e6 tokens."""
    return state_bytes(70e9) + checkpoint_bytes(4e6, num_layers=80, values_per_token=4 * L70.dim)


def _l70_fewest() -> tuple[float, ...]:
    num_chips = fewest_chips(_l70_bytes(), BOOK_HBM_BYTES)
    seconds = compute_s(training_flops(70e9, 15e12), num_chips=num_chips, flops_per_s=peak_of(V5P), mfu=0.4)
    return num_chips, days(seconds)


def _l70_mixed() -> tuple[float, ...]:
    width, num_chips, tokens = L70.layers[0].feed_forward.width, 8960, 1024 * 4096
    ways = best_fsdp_ways(tokens, width, num_chips, fsdp_axes=2, tensor_axes=1)
    bound = mixed_tokens(width, ONE_AXIS, fsdp_axes=2, tensor_axes=1)
    return (tokens / num_chips, bound, ways, *power_of_two_split(num_chips, ways))


TRAINING = (
    Problem(
        id="pod-tokens",
        file="training",
        ask="a v5p pod of 8960 chips, data parallel over 3 axes: tokens a step below which it is communication bound",
        answer=(7.6e6,),
        tolerance=0.02,
        solve=lambda: (8960 * data_parallel_tokens(ALL_AXES),),
    ),
    Problem(
        id="deepseek-v2-chips",
        file="training",
        ask="batches of 40e6 tokens on v5p, FSDP over 3 axes: the most chips",
        answer=(47e3,),
        tolerance=0.02,
        solve=lambda: (40e6 / data_parallel_tokens(ALL_AXES),),
    ),
    Problem(
        id="l70-fsdp-only",
        file="training",
        ask="70e9 parameters, 15e12 tokens, 16e6 a step on v5p with FSDP alone: the most chips; days at 50 % MFU",
        answer=(18823, 17),
        tolerance=0.02,
        solve=_at_the_bound,
    ),
    Problem(
        id="tensor-width",
        file="training",
        ask="v5p, one axis: F that 8-way tensor parallelism needs",
        answer=(20e3,),
        tolerance=0.03,
        solve=lambda: (tensor_parallel_width(8, ONE_AXIS),),
    ),
    Problem(
        id="tensor-ways",
        file="training",
        ask="v5p, one axis: the most ways of tensor parallelism, F 28672; F 49152 (Gemma 7B)",
        answer=(11, 19),
        tolerance=0.03,
        solve=lambda: (tensor_parallel_ways(28672, ONE_AXIS), tensor_parallel_ways(49152, ONE_AXIS)),
    ),
    Problem(
        id="mixed-split",
        file="training",
        ask="64 chips, 48e3 tokens, F 32768, two axes for FSDP and one for tensor parallelism: best FSDP; as powers of"
        " two, FSDP and tensor",
        answer=(13.9, 16, 4),
        tolerance=0.02,
        solve=_small_mix,
    ),
    Problem(
        id="mixed-bound",
        file="training",
        ask="v5p, F 32768, FSDP over two axes and tensor parallelism over one: tokens a chip below which it is"
        " communication bound; were they to send in turn (edition of 2025)",
        answer=(99, 400),
        tolerance=0.02,
        solve=lambda: tuple(mixed_tokens(32768, ONE_AXIS, fsdp_axes=2, at_once=at_once) for at_once in (True, False)),
    ),
    Problem(
        id="mixed-batch",
        file="training",
        ask="v5p 16x16x16, F 32768, mixed FSDP and tensor parallelism: tokens a step from which it is compute bound;"
        " were they to send in turn (edition of 2025)",
        answer=(4e5, 1.6e6),
        tolerance=0.03,
        solve=lambda: tuple(
            4096 * mixed_tokens(32768, ONE_AXIS, fsdp_axes=2, at_once=at_once) for at_once in (True, False)
        ),
    ),
    Problem(
        id="between-slices",
        file="training",
        ask="v5p slices joined by the data centre's network, 6.25e9 B/s a chip: tokens a slice for data parallelism",
        answer=(73440,),
        tolerance=0.02,
        solve=lambda: (data_parallel_tokens(network_roof(V5P)),),
    ),
    Problem(
        id="l70-2m-batch",
        file="training",
        ask="F 30e3, 2e6 tokens a step on v5p: tensor ways on one axis; chips with FSDP over 3; mixed, tokens a chip;"
        " mixed, chips",
        answer=(11.8, 2400, 108, 18e3),
        tolerance=0.03,
        solve=_llama_2m,
    ),
    Problem(
        id="13b-params",
        file="training",
        ask="LLaMA-2 13B: feed-forward; attention; embedding and output; all parameters",
        answer=(8.5e9, 4.2e9, 0.33e9, 13e9),
        tolerance=0.02,
        solve=lambda: (*_parts(LLAMA2_13B), sizes(LLAMA2_13B).total),
    ),
    Problem(
        id="13b-memory",
        file="training",
        ask="LLaMA-2 13B, 16e6 tokens: parameters and Adam's state; three checkpoints a layer (F, F, D), bytes",
        answer=(130e9, 42e12),
        tolerance=0.02,
        solve=_13b_memory,
    ),
    Problem(
        id="13b-fsdp",
        file="training",
        ask="LLaMA-2 13B, 3e6 tokens on v5p 16x16x16 with FSDP over 3 axes: bytes in all; tokens a step it needs",
        answer=(8e12, 3.48e6),
        tolerance=0.02,
        solve=_13b_fsdp,
    ),
    Problem(
        id="13b-mixed",
        file="training",
        ask="the same, FSDP over two axes and tensor over one: tokens a chip it needs; it has; best FSDP; as powers of"
        " two; step at 40 % MFU, s",
        answer=(235, 732, 1333, 1024, 4, 0.300),
        tolerance=0.04,
        solve=_13b_mixed,
    ),
    Problem(
        id="l70-parts",
        file="applied-training",
        ask="L70: feed-forward; attention; embedding and output parameters",
        answer=(56.3e9, 12e9, 2.1e9),
        tolerance=0.02,
        solve=lambda: _parts(L70),
    ),
    Problem(
        id="l70-one-chip",
        file="applied-training",
        ask="L70, 15e12 tokens on one v5p at its peak, years",
        answer=(435,),
        tolerance=0.02,
        solve=lambda: (
            days(compute_s(training_flops(sizes(L70).total, 15e12), num_chips=1, flops_per_s=peak_of(V5P)))
            / DAYS_PER_YEAR,
        ),
    ),
    Problem(
        id="l70-memory",
        file="applied-training",
        ask="70e9 parameters: bf16; Adam's float32 state; 4 checkpoints of D a layer for 4e6 tokens; all, bytes",
        answer=(140e9, 560e9, 20.9e12, 21.6e12),
        tolerance=0.02,
        solve=lambda: (
            state_bytes(70e9, bytes_per_param=2),
            state_bytes(70e9, bytes_per_param=8),
            checkpoint_bytes(4e6, num_layers=80, values_per_token=4 * L70.dim),
            _l70_bytes(),
        ),
    ),
    Problem(
        id="l70-fewest",
        file="applied-training",
        ask="the same: fewest chips of 96e9 bytes; days for 15e12 tokens on them (v5p, 40 % MFU)",
        answer=(225, 1752),
        tolerance=0.02,
        solve=_l70_fewest,
    ),
    Problem(
        id="l70-per-chip",
        file="applied-training",
        ask="the same on 8960 chips, bytes a chip",
        answer=(2.4e9,),
        tolerance=0.02,
        solve=lambda: (_l70_bytes() / 8960,),
    ),
    Problem(
        id="l70-mixed",
        file="applied-training",
        ask="L70, 1024 sequences of 4096 on 8960 v5p: tokens a chip; those that FSDP over two axes and tensor over one"
        " need; best FSDP; as powers of two",
        answer=(468, 113, 1618, 2048, 4),
        tolerance=0.02,
        solve=_l70_mixed,
    ),
)
