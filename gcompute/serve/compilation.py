"""Which programs an engine has, and their compilation ahead of time."""

from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding, PartitionSpec

from gcompute.parallel.mesh import use_mesh
from gcompute.serve import few_rows, programs, speculation
from gcompute.serve.adjustments import NO_TOKEN
from gcompute.serve.buckets import bucket_of
from gcompute.serve.grammar import mask_words
from gcompute.serve.limits import Limits
from gcompute.serve.placement import abstract_state
from gcompute.serve.request import Sampling
from gcompute.serve.state import EngineShape, Rows, Weights, empty_state, new_row
from gcompute.serve.weights import Layout


@dataclass(frozen=True, slots=True)
class Program:
    """The name of one compiled program."""

    kind: str
    sizes: tuple[int, ...] = ()

    def __str__(self) -> str:
        return f"{self.kind}[{','.join(map(str, self.sizes))}]" if self.sizes else self.kind


def list_programs(limits: Limits) -> tuple[Program, ...]:
    """Every program that an engine runs for requests that ask for no log-probabilities of their prompt."""
    chunks = {
        (chunk, limits.prefill_bucket(start, chunk))
        for chunk in limits.chunks
        for start in range(0, limits.buckets[-1], limits.page)
    }
    swaps = limits.buckets if limits.swap else ()
    return (
        Program("init"),
        Program("admit"),
        Program("bind"),
        *(Program("prefill", sizes) for sizes in sorted(chunks)),
        *(
            Program("speculate" if batch in limits.draft_batches else "decode", (batch, bucket))
            for batch in limits.batches
            for bucket in limits.buckets
        ),
        *(Program(kind, (bucket,)) for bucket in swaps for kind in ("swap_out", "swap_in")),
    )


def scoring_programs(limits: Limits, num_prompt: int) -> list[Program]:
    """The programs that prefill a prompt of `num_prompt` tokens without the prefix cache and return its logprobs."""
    found = []
    for start in range(0, num_prompt, limits.chunk):
        chunk = bucket_of(min(num_prompt - start, limits.chunk), limits.chunks)
        found.append(Program("score", (chunk, limits.prefill_bucket(start, chunk))))
    return found


def compile_program(program: Program, weights: Weights, shape: EngineShape) -> Callable[..., Any]:
    """Compile one program for concrete or abstract `weights`; the state that it changes is donated."""
    few = shape.layout is Layout.PAIRED and _num_rows(program, shape) <= few_rows.MOST_ROWS
    return lower_program(program, weights, shape).compile(few_rows.compiler_options() if few else None)


def lower_program(program: Program, weights: Weights, shape: EngineShape) -> jax.stages.Lowered:
    """One program, not compiled yet; on a mesh the state comes back laid out as it came."""
    state, placement = abstract_state(shape), shape.execution.placement
    whole = None if placement is None else NamedSharding(placement.mesh, PartitionSpec())
    laid = None if placement is None else jax.tree.map(lambda leaf: leaf.sharding, state)

    def numbers(*sizes: int, dtype: Any = jnp.int32) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(sizes, dtype, sharding=whole)

    def table(bucket: int, *rows: int) -> jax.ShapeDtypeStruct:
        return numbers(*rows, bucket // shape.limits.page)

    def like(tree: Any) -> Any:
        return jax.tree.map(lambda leaf: numbers(*leaf.shape, dtype=leaf.dtype), tree)

    number, flag = numbers(), numbers(dtype=bool)
    with nullcontext() if placement is None else use_mesh(placement.mesh):
        match program.kind, program.sizes:
            case "init", ():
                return jax.jit(partial(empty_state, shape), out_shardings=laid).lower()
            case "admit", ():
                admit = jax.jit(programs.admit, donate_argnums=0, out_shardings=laid)
                return admit.lower(state, number, like(_row(shape)))
            case "bind", ():
                bind = jax.jit(programs.bind, donate_argnums=0, out_shardings=laid)
                slots, words = shape.limits.slots, mask_words(shape.model.vocab)
                return bind.lower(state, numbers(slots), numbers(slots, words, dtype=jnp.uint32))
            case ("prefill" | "score") as kind, (chunk, bucket):
                reads = programs.score if kind == "score" else programs.prefill
                run = partial(reads, shape=shape, chunk=chunk)
                prefill = jax.jit(run, donate_argnums=1, out_shardings=laid and (laid, whole))
                return prefill.lower(weights, state, number, table(bucket), number, number, flag)
            case ("decode" | "speculate") as kind, (batch, bucket):
                run = partial(speculation.speculate if kind == "speculate" else programs.decode, shape=shape)
                decode = jax.jit(run, donate_argnums=1, out_shardings=laid and (laid, whole))
                return decode.lower(weights, state, numbers(batch), table(bucket, batch), number, flag)
            case "swap_out", (bucket,):
                return jax.jit(programs.swap_out, out_shardings=whole).lower(state, table(bucket))
            case "swap_in", (bucket,):
                saved = like(jax.eval_shape(programs.swap_out, state, table(bucket)))
                swap_in = jax.jit(programs.swap_in, donate_argnums=0, out_shardings=laid)
                return swap_in.lower(state, table(bucket), saved)
    raise AssertionError(program)


def _row(shape: EngineShape) -> Rows:
    """The row of a request, without its values."""
    row = partial(new_row, Sampling(), (0,), num_prompt=1, length=0, end=NO_TOKEN, seed=0)
    return jax.eval_shape(partial(row, num_cells=shape.num_cells, num_words=mask_words(shape.model.vocab)))


def _num_rows(program: Program, shape: EngineShape) -> int:
    """Rows of a program's products."""
    match program.kind, program.sizes:
        case (("prefill" | "score"), (chunk, _)):
            return chunk
        case "decode", (batch, _):
            return batch
        case "speculate", (batch, _):
            return batch * (1 + shape.limits.drafts)
    return few_rows.MOST_ROWS + 1
