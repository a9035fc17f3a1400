"""Which programs an engine has, and their compilation ahead of time."""

import re
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array

from gcompute.config.model import ModelConfig
from gcompute.model.transformer import Params, unstack
from gcompute.serve import programs
from gcompute.serve.adjustments import NO_TOKEN
from gcompute.serve.limits import Limits
from gcompute.serve.request import Sampling
from gcompute.serve.state import EngineShape, Rows, empty_state, new_row

MATMUL_WEIGHT = re.compile(r"(q|k|v|o|up|gate|down|head|embedding)_[A-Z]+")


@dataclass(frozen=True, slots=True)
class Program:
    """The name of one compiled program."""

    kind: str
    sizes: tuple[int, ...] = ()

    def __str__(self) -> str:
        return f"{self.kind}[{','.join(map(str, self.sizes))}]" if self.sizes else self.kind


def list_programs(limits: Limits) -> tuple[Program, ...]:
    """Every program that an engine can run."""
    chunks = {
        (chunk, limits.prefill_bucket(start, chunk))
        for chunk in limits.chunks
        for start in range(0, limits.buckets[-1], limits.page)
    }
    swaps = limits.buckets if limits.swap else ()
    return (
        Program("init"),
        Program("admit"),
        *(Program("prefill", sizes) for sizes in sorted(chunks)),
        *(Program("decode", (batch, bucket)) for batch in limits.batches for bucket in limits.buckets),
        *(Program(kind, (bucket,)) for bucket in swaps for kind in ("swap_out", "swap_in")),
    )


def serving_params(params: Params, config: ModelConfig, compute: Any) -> Params:
    """One dict of parameters a layer, with matmul weights in the compute dtype, so that no step converts them again."""

    def cast(path: tuple[Any, ...], leaf: Array) -> Array:
        return leaf.astype(compute) if MATMUL_WEIGHT.fullmatch(path[-1].key) else leaf

    return jax.tree_util.tree_map_with_path(cast, unstack(params, config))


def compile_program(program: Program, params: Params, shape: EngineShape) -> Callable[..., Any]:
    """Compile one program for concrete or abstract `params`; the state that it changes is donated."""
    state = jax.eval_shape(partial(empty_state, shape))
    number, flag = jax.ShapeDtypeStruct((), jnp.int32), jax.ShapeDtypeStruct((), bool)

    def numbers(*sizes: int) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(sizes, jnp.int32)

    match program.kind, program.sizes:
        case "init", ():
            return jax.jit(partial(empty_state, shape)).lower().compile()
        case "admit", ():
            lowered = jax.jit(programs.admit, donate_argnums=0).lower(state, number, abstract_row(shape))
        case "prefill", (chunk, bucket):
            run = partial(programs.prefill, shape=shape, chunk=chunk)
            table = numbers(bucket // shape.limits.page)
            lowered = jax.jit(run, donate_argnums=1).lower(params, state, number, table, number, number, flag)
        case "decode", (batch, bucket):
            run = partial(programs.decode, shape=shape)
            table = numbers(batch, bucket // shape.limits.page)
            lowered = jax.jit(run, donate_argnums=1).lower(params, state, numbers(batch), table, number, flag)
        case "swap_out", (bucket,):
            lowered = jax.jit(programs.swap_out).lower(state, numbers(bucket // shape.limits.page))
        case "swap_in", (bucket,):
            table = numbers(bucket // shape.limits.page)
            saved = jax.eval_shape(programs.swap_out, state, table)
            lowered = jax.jit(programs.swap_in, donate_argnums=0).lower(state, table, saved)
        case _:
            raise AssertionError(program)
    return lowered.compile()


def abstract_row(shape: EngineShape) -> Rows:
    """The row of a request, without its values."""
    row = partial(new_row, Sampling(), (0,), num_prompt=1, length=0, end=NO_TOKEN, seed=0)
    return jax.eval_shape(partial(row, num_cells=shape.num_cells))
