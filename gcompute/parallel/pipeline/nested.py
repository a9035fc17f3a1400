"""A shard_map inside another one that can be differentiated: for stages that go manual over further axes.

JAX (0.7.2 to 0.10.2) cannot take the gradient of a `shard_map` in which values differ along an axis that is manual
already: what it keeps for the backward pass it would split over that axis too. Here nothing is kept but the arguments,
and the backward pass is a `shard_map` of its own, with the gradient taken inside it.
"""

from collections.abc import Callable
from typing import Any

import jax

from gcompute.config.mesh import Axis

Tree = Any


def nested_shard_map(
    function: Callable[..., Tree], *, axis_names: set[Axis], in_specs: tuple[Tree, ...], out_specs: Tree
) -> Callable[..., Tree]:
    """`jax.shard_map` over further axes of the mesh in context, with a gradient; its forward is run again for that.

    `function` takes and returns trees of floating-point arrays, and closes over no traced value.
    """

    @jax.custom_vjp
    def run(*args: Tree) -> Tree:
        return jax.shard_map(function, axis_names=axis_names, in_specs=in_specs, out_specs=out_specs)(*args)

    def forward(*args: Tree) -> tuple[Tree, tuple[Tree, ...]]:
        return run(*args), args

    def backward(args: tuple[Tree, ...], gradient: Tree) -> tuple[Tree, ...]:
        def pull(args: tuple[Tree, ...], gradient: Tree) -> tuple[Tree, ...]:
            return jax.vjp(function, *args)[1](gradient)

        specs = (in_specs, out_specs)
        return jax.shard_map(pull, axis_names=axis_names, in_specs=specs, out_specs=in_specs)(args, gradient)

    run.defvjp(forward, backward)
    return run
