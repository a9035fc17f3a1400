"""RMSNorm on CPU, together with the sum that it is of."""

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from gcompute.serve.native.build import target


def add_rms_norm(
    x_MD: Float[Array, "m d"],
    added_MD: Float[Array, "m d"],
    scale_D: Float[Array, "d"],
    eps: float,
    dtype: jnp.dtype,
    suffix: str = "",
) -> tuple[Float[Array, "m d"], Float[Array, "m d"]]:
    """(s, s / sqrt(mean(s^2) + eps) * scale) with s = x + added, in float32; the norm is rounded to `dtype` at the end.

    A row's numbers do not depend on the other rows. `dtype` is float32 or bfloat16.
    """
    results = (jax.ShapeDtypeStruct(x_MD.shape, jnp.float32), jax.ShapeDtypeStruct(x_MD.shape, dtype))
    call = jax.ffi.ffi_call(target("norm_add_rms", suffix), results)
    total_MD, normed_MD = call(x_MD, added_MD, scale_D, eps=np.float32(eps))
    return total_MD, normed_MD
