"""What the JAX versions supported do differently, where a test counts it."""

import jax

# How often XLA on CPU sends x in one program whose backward pass asks for it once more.
#
# `sequence.gather_column_parallel` and `collective_matmul.all_gather_matmul` keep only a device's own piece of x for
# the backward pass and gather the others again; an optimization barrier ties that to dy, so that compilers do not see
# the forward pass's gather once more and keep its result. TPUs have always done as asked. On CPU, jaxlib up to 0.11.0
# expanded barriers (the pass `cse_barrier_expander`) before its last common subexpression elimination, which then
# merged the two gathers; from 0.11.1 on they are expanded after scheduling, and both are left. The bytes, for a piece
# of s bytes on n devices: a device sends (n - 1) s more and holds (n - 1) s less between the passes. Layers in a scan,
# as in every model here, are not concerned: their passes are two loops, which no version merges.
GATHERS_OF_X = 2 if jax.__version_info__ >= (0, 11, 1) else 1

# Arrays that differentiating tanh keeps: up to JAX 0.11.1 y and 1 - y, to multiply by 1 + y and by 1 - y; then y alone.
TANH_KEEPS = 1 if jax.__version_info__ >= (0, 11, 2) else 2
