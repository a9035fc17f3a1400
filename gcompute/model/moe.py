"""The feed-forward layer of a mixture of experts."""

from dataclasses import replace
from functools import partial

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from gcompute.config.mesh import Axis
from gcompute.config.model import ModelConfig
from gcompute.model.layers import INIT_STD, activation, matrix
from gcompute.model.matmul import expert_linear
from gcompute.parallel.collectives import varying, varying_axes
from gcompute.parallel.expert import ExpertAxes, Experts, RouterStats, check_experts, mixture
from gcompute.parallel.placement import Placement, manual_axes

STATS_DIMS = RouterStats(balance="", dropped="", load_E="")  # pyright: ignore[reportArgumentType]


def expert_axes(placement: Placement) -> ExpertAxes:
    """The axes that experts and their tokens are split over, without those that the code is already inside of."""
    free = [axis for axis in Axis if placement.shape.size(axis) > 1 and axis not in manual_axes()]
    rows = jax.tree.leaves(tuple(placement.spec("B")))

    def if_free(axis: Axis) -> Axis | None:
        return axis if axis in free else None

    return ExpertAxes(
        expert=if_free(Axis.EXPERT),
        tensor=if_free(Axis.TENSOR),
        context=if_free(Axis.CONTEXT),
        batch=tuple(axis for axis in (Axis.DATA, Axis.FSDP, Axis.EXPERT) if axis in free and axis in rows),
        layout=placement.layout,
        scatter=placement.sequence_parallel,
    )


def experts_forward(
    x_EBCD: Float[Array, "e b c d"],
    up_EDF: Float[Array, "e d f"],
    gate_EDF: Float[Array, "e d f"] | None,
    down_EFD: Float[Array, "e f d"],
    *,
    act: str,
    compute: jnp.dtype,
) -> Float[Array, "e b c d"]:
    """Every expert on its own rows: down(act(up(x))), or down(act(gate(x)) * up(x)) when gated.

    With a part of F the result is a partial sum. Source: Shazeer 2020, equation 6 (SwiGLU).
    """
    up_EBCF = expert_linear(x_EBCD, up_EDF, compute)
    if gate_EDF is None:
        hidden_EBCF = activation(act)(up_EBCF)
    else:
        hidden_EBCF = activation(act)(expert_linear(x_EBCD, gate_EDF, compute)) * up_EBCF
    return expert_linear(hidden_EBCF, down_EFD, compute)


def mixture_of_shared_tokens(
    x_btD: Float[Array, "b t d"],
    router_DE: Float[Array, "d e"],
    experts: Experts,
    *,
    num_own: int,
    k: int,
    capacity: int | None,
    compute: jnp.dtype,
    axes: ExpertAxes,
) -> tuple[Float[Array, "b t d"], RouterStats]:
    """`mixture` where every device of the expert axis has the same tokens, as serving does: nothing is exchanged.

    Each device gives the tokens to its own `num_own` experts, and one sum over expert and tensor adds the results.
    """
    assert axes.expert is not None
    first = jax.lax.axis_index(axes.expert) * num_own

    def own_experts(x_EbCD: Array) -> Array:
        y_ebCD = experts(jax.lax.dynamic_slice_in_dim(x_EbCD, first, num_own)).astype(compute)
        others_EbCD = varying(jnp.zeros(x_EbCD.shape, compute), tuple(varying_axes(y_ebCD)))
        return jax.lax.dynamic_update_slice_in_dim(others_EbCD, y_ebCD, first, axis=0)

    alone = replace(axes, expert=None, tensor=None)
    y_btD, stats = mixture(x_btD, router_DE, own_experts, k=k, capacity=capacity, compute=compute, axes=alone)
    return jax.lax.psum(y_btD, tuple(axis for axis in (axes.expert, axes.tensor) if axis is not None)), stats


class MoE(nnx.Module):
    """y = sum of weight times expert over the k experts that a router chooses for each token, and RouterStats.

    Nothing crosses from one sequence to another: see `gcompute.parallel.expert`. Its router is computed in float32.
    Source: Jiang et al. 2024 (Mixtral), arXiv:2401.04088, section 2.1.
    """

    def __init__(self, config: ModelConfig, *, rngs: nnx.Rngs):
        self.config = config
        e, d, f = config.num_experts, config.dim, config.ffn_size
        self.router_DE = matrix("DE", (d, e), rngs)
        self.up_EDF = matrix("EDF", (e, d, f), rngs)
        self.gate_EDF = matrix("EDF", (e, d, f), rngs) if config.gated else None
        self.down_EFD = matrix("EFD", (e, f, d), rngs, std=INIT_STD / (2 * config.layers) ** 0.5)

    def __call__(
        self, x_BTD: Float[Array, "b t d"], compute: jnp.dtype, placement: Placement | None = None
    ) -> tuple[Float[Array, "b t d"], RouterStats]:
        """Over a mesh, the layer is an island of per-device code: the compiler cannot split routing by itself."""
        config, seq = self.config, x_BTD.shape[1]

        def layer(
            axes: ExpertAxes | None, x_btD: Array, router_DE: Array, up_eDf: Array, down_efD: Array, *gate_eDf: Array
        ) -> tuple[Array, RouterStats]:
            gate = gate_eDf[0] if gate_eDf else None

            def experts(x_ebCD: Array) -> Array:
                return experts_forward(x_ebCD, up_eDf, gate, down_efD, act=config.activation, compute=compute)

            # Tokens that the expert axis does not split are the same on all its devices.
            shared = axes is not None and axes.expert is not None and axes.expert not in axes.batch
            mix = partial(mixture_of_shared_tokens, num_own=up_eDf.shape[0]) if shared else mixture
            return mix(
                x_btD,
                router_DE,
                experts,
                k=config.experts_per_token,
                capacity=None if config.capacity_factor is None else config.capacity(seq),
                compute=compute,
                axes=axes or ExpertAxes(),
            )

        gates = () if self.gate_EDF is None else (self.gate_EDF[...],)
        arrays = (x_BTD, self.router_DE[...], self.up_EDF[...], self.down_EFD[...], *gates)
        if placement is None or placement.is_local:
            return layer(None, *arrays)
        check_experts(config.num_experts, placement.shape.expert)
        in_dims = ("BTD", "D_", "EDF", "EFD", *("EDF" for _ in gates))
        return placement.island(partial(layer, expert_axes(placement)), in_dims, ("BRD", STATS_DIMS))(*arrays)
