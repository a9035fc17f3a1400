"""Compiles every tensor-parallel form for a TPU slice that is not there; a process of its own, started by a test.

Usage: python tpu_programs.py v5e:2x4, in the environment of `target_environment`. The last line is "ok".
"""

import re
import sys
from functools import partial

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from gcompute.aot.hlo import count_collectives
from gcompute.aot.target import target_devices
from gcompute.config.mesh import Axis, MeshShape
from gcompute.hardware.target import Target
from gcompute.parallel import collective_matmul, tensor
from gcompute.parallel.mesh import build_mesh
from gcompute.parallel.sequence import gather_column_parallel, row_parallel_scatter, sequence_specs
from gcompute.parallel.vocabulary import vocab_parallel_cross_entropy, vocab_parallel_embedding, vocabulary_specs

# Wide enough that a product takes about as long as a send.
B, T, D, F, V = 2, 2048, 1024, 32768, 32768
WHOLE = P()


def main(text: str) -> None:
    devices = target_devices(Target.parse(text))
    n = len(devices)
    mesh = build_mesh(MeshShape(tensor=n), devices)
    weights = tensor.feed_forward_specs(mesh, ffn=F)
    weights = {name: weights[name] for name in ("up_Df", "gate_Df", "down_fD")}
    shapes = {"up_Df": (D, F), "gate_Df": (D, F), "down_fD": (F, D)}
    lies = sequence_specs(mesh, sequence=T)
    pieces, hidden = lies["x_BtD"], lies["hidden_BTf"]

    def abstract(shape, spec, dtype=jnp.bfloat16):
        return jax.ShapeDtypeStruct(shape, dtype, sharding=NamedSharding(mesh, spec))

    def compiled(name, function, in_specs, out_spec, *arguments, gradients=True):
        sharded = jax.shard_map(function, mesh=mesh, in_specs=in_specs, out_specs=out_spec)
        return built(name, sharded, *arguments, gradients=gradients)

    def built(name, function, *arguments, gradients):
        def loss(*arguments):
            return (function(*arguments).astype(jnp.float32) ** 2).mean()

        real = tuple(i for i, one in enumerate(arguments) if jnp.issubdtype(one.dtype, jnp.floating))
        program = jax.jit(jax.grad(loss, argnums=real) if gradients else function).lower(*arguments).compile()
        print(name, count_collectives(program), f"{program.memory_analysis().temp_size_in_bytes / 2**20:.1f} MiB")
        return program

    matrices = [abstract(shapes[name], spec) for name, spec in weights.items()]
    x, piece, h = abstract((B, T, D), WHOLE), abstract((B, T, D), pieces), abstract((B, T, F), hidden)
    specs = tuple(weights.values())

    def block(module, **options):
        return lambda x, up, gate, down: module.feed_forward(x, up, down, Axis.TENSOR, gate_Df=gate, **options)

    apart = {"column": gather_column_parallel, "row": row_parallel_scatter}
    compiled("tensor", block(tensor), (WHOLE, *specs), WHOLE, x, *matrices)
    explicit = compiled("sequence", block(tensor, **apart), (pieces, *specs), pieces, piece, *matrices)
    assert count_collectives(explicit) == {"all-gather": 3, "reduce-scatter": 2}

    def automatic(x, up, gate, down):
        # A constraint holds for the gradient too: without this one dx is an all-reduce.
        x = jax.lax.with_sharding_constraint(x, NamedSharding(mesh, pieces))
        y = jax.lax.with_sharding_constraint(jax.nn.silu(x @ gate) * (x @ up), NamedSharding(mesh, hidden))
        return jax.lax.with_sharding_constraint(y @ down, NamedSharding(mesh, pieces))

    # On CPU its reduce-scatters are all-reduces. Here the compiler makes a collective matmul of one by itself.
    kinds = count_collectives(built("sequence by jit", automatic, piece, *matrices, gradients=True))
    assert "all-gather" in kinds
    assert "all-reduce" not in kinds

    for ways in (1, 2):
        options = {"axis": Axis.TENSOR, "bidirectional": ways == 2}
        column = partial(collective_matmul.all_gather_matmul, **options)
        row = partial(collective_matmul.matmul_reduce_scatter, **options)
        for name, program in (
            (
                "all_gather_matmul",
                compiled("column", column, (pieces, specs[0]), hidden, piece, matrices[0], gradients=False),
            ),
            (
                "matmul_reduce_scatter",
                compiled("row", row, (hidden, specs[2]), pieces, h, matrices[2], gradients=False),
            ),
        ):
            assert count_collectives(program) == {"collective-permute": ways * (n - 1)}
            sends, busy = sends_with_products(program.as_text())
            print(name, ways, f"{busy} of {sends} sends have a product between start and done")
            # The first sum of a scatter, or the last piece of a gather, may have no product left to hide behind.
            assert sends == ways * (n - 1)
            assert busy >= sends - ways
        both = block(collective_matmul, bidirectional=ways == 2)
        program = compiled("collective matmul", both, (pieces, *specs), pieces, piece, *matrices)
        assert set(count_collectives(program)) == {"collective-permute"}

    vocabulary = vocabulary_specs(mesh, vocab=V)
    logits, tokens = abstract((B, T, V), vocabulary["logits_BTv"]), abstract((B, T), WHOLE, jnp.int32)
    losses = partial(vocab_parallel_cross_entropy, axis=Axis.TENSOR)
    program = compiled("cross-entropy", losses, (vocabulary["logits_BTv"], WHOLE), WHOLE, logits, tokens)
    assert set(count_collectives(program)) == {"all-reduce"}
    # Not even this device's share is ever kept in float32.
    assert program.memory_analysis().temp_size_in_bytes < B * T * V // n
    embed = partial(vocab_parallel_embedding, axis=Axis.TENSOR)
    rows = abstract((V, D), vocabulary["embedding_vD"])
    program = compiled("embedding", embed, (WHOLE, vocabulary["embedding_vD"]), WHOLE, tokens, rows)
    assert set(count_collectives(program)) == {"all-reduce"}
    print("ok")


def sends_with_products(text: str) -> tuple[int, int]:
    """(sends, those between whose start and done the schedule has a product) of a compiled program's text."""
    open_sends: dict[str, bool] = {}
    sends = busy = 0
    for line in text[text.index("\nENTRY") :].splitlines():
        found = re.match(r"\s*(?:ROOT )?%?([\w.-]+) = .*?\s([\w-]+)\((?:[^%)]*%([\w.-]+))?", line)
        if found is None:
            continue
        name, opcode, operand = found.groups()
        if opcode == "collective-permute-start":
            open_sends[name] = False
        elif opcode == "collective-permute-done":
            sends += 1
            busy += open_sends.pop(operand)
        elif opcode in ("convolution", "dot") or (opcode == "fusion" and re.search("convolution|dot", line)):
            open_sends = dict.fromkeys(open_sends, True)
    return sends, busy


if __name__ == "__main__":
    main(sys.argv[1])
