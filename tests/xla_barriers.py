"""How often XLA on CPU sends x where a backward pass asks for it once more, behind an optimization barrier.

`sequence.gather_column_parallel` and `collective_matmul.all_gather_matmul` keep only a device's own piece of x for the
backward pass and gather the others again; a barrier ties that to dy, so that compilers do not see the forward pass's
gather once more and keep its result. TPUs have always done as asked. On CPU, jaxlib up to 0.11.0 expanded barriers
(the pass `cse_barrier_expander`) before its last common subexpression elimination, which then merged the two gathers;
from 0.11.1 on they are expanded after scheduling, and both are left. The bytes, for a piece of s bytes on n devices: a
device sends (n - 1) s more and holds (n - 1) s less between the passes.

Layers in a scan, as in every model here, are not concerned: their passes are two loops, which no version merges.
"""

import jax

BARRIERS_HOLD = jax.__version_info__ >= (0, 11, 1)
# Of x in the forward and the backward pass of one program.
GATHERS_OF_X = 2 if BARRIERS_HOLD else 1
