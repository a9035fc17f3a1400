"""Double precision for the length of a block, under the name that this version of JAX has for it."""

import jax

if jax.__version_info__ < (0, 8, 0):
    from jax.experimental import enable_x64 as float64
else:
    from jax import enable_x64 as float64

__all__ = ["float64"]
