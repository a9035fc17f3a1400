"""Faults that the certificate must see: each is one piece of the library's text, and turns its row red."""

import dataclasses
from dataclasses import dataclass

import pytest
from mutation import mutated

from gcompute.certify.certificate import select
from gcompute.certify.evidence import Row, Verdict
from gcompute.certify.explicit import explicit_row
from gcompute.certify.precision import FLOAT64
from gcompute.certify.recipes import Recipe
from gcompute.certify.session import Session
from gcompute.certify.trainer import trainer_row


@dataclass(frozen=True, slots=True, kw_only=True)
class Mutant:
    """`old` becomes `new` in gcompute.`module`, and the row named `row` has to notice."""

    what: str
    module: str
    old: str
    new: str
    row: str
    slow: bool = True


def explicit(what: str, module: str, old: str, new: str, row: str, *, slow: bool = True) -> Mutant:
    return Mutant(what=what, module=f"parallel.{module}", old=old, new=new, row=row, slow=slow)


FUNCTIONS = [
    explicit(
        "a ring that starts one place off",
        "collectives",
        "jnp.roll(shards, place - up_hops, axis=0)",
        "jnp.roll(shards, place - up_hops + 1, axis=0)",
        "ring_all_gather one way",
        slow=False,
    ),
    explicit(
        "a device's own block is lost",
        "collectives",
        "return up + down + blocks[0]",
        "return up + down",
        "ring_reduce_scatter both ways",
    ),
    explicit(
        "a sum for a mean",
        "data",
        'all_reduce(mine, axis, "mean")',
        'all_reduce(mine, axis, "sum")',
        "data.shard_map_step 4 microbatches",
        slow=False,
    ),
    explicit(
        "microbatches are added and not averaged",
        "data",
        "(leaf / accumulation).astype(shape.dtype)",
        "leaf.astype(shape.dtype)",
        "data.jit_step 4 microbatches",
    ),
    explicit(
        "each shard's gradient is left a sum",
        "zero",
        "return (all_reduce(gradient, summed) if summed else gradient) / size",
        "return all_reduce(gradient, summed) if summed else gradient",
        "zero.zero_step stage 2, 2 microbatches",
        slow=False,
    ),
    explicit(
        "replicas do not talk",
        "zero",
        "summed = everywhere if split_dim(spec, axis) is None else replicas",
        "summed = everywhere if split_dim(spec, axis) is None else ()",
        "zero.zero_step stage 3, hybrid, 2 microbatches",
    ),
    explicit(
        "the all-reduce of a row-parallel product is missing",
        "tensor",
        "jax.lax.psum(partial_BTD, axis)",
        "jax.lax.pmax(partial_BTD, axis)",
        "tensor.row_parallel",
        slow=False,
    ),
    explicit(
        "the bias of a row-parallel product counts once a device",
        "tensor",
        "return _add(row(hidden_BTf, down_fD, axis, compute=compute), down_bias_D)",
        "return _add(row(hidden_BTf, down_fD, axis, compute=compute), down_bias_D * jax.lax.axis_size(axis))",
        "tensor.feed_forward",
    ),
    explicit(
        "a gradient is gathered in another order than it was scattered",
        "sequence",
        "    dy_BTD = _gather(dy_BtD, axis, compute)",
        "    dy_BTD = _gather(dy_BtD, axis, compute)[:, ::-1]",
        "sequence.row_parallel_scatter",
        slow=False,
    ),
    explicit(
        "a piece is written where its neighbour's belongs",
        "collective_matmul",
        '[_put(y, einsum("btd,df->btf", piece, w_Df, compute), start)',
        '[_put(y, einsum("btd,df->btf", piece, w_Df, compute), (start + t) % length)',
        "collective_matmul.all_gather_matmul one way",
    ),
    explicit(
        "every device takes tokens for its own",
        "vocabulary",
        "local_BT = tokens_BT - v * axis_index(axis)",
        "local_BT = tokens_BT % v + 0 * axis_index(axis)",
        "vocabulary.vocab_parallel_embedding",
        slow=False,
    ),
    explicit(
        "a query does not see its own key",
        "ring_attention",
        "first + jnp.arange(num_keys) <= (",
        "first + jnp.arange(num_keys) < (",
        "ring_attention.ring_attention contiguous",
    ),
    explicit(
        "keys are masked as if the layout were another",
        "ulysses",
        "visible_tS = key_positions_S <= local_positions(axis, t, layout)[:, None]",
        'visible_tS = key_positions_S <= local_positions(axis, t, "contiguous")[:, None]',
        "ulysses.gathered_attention zigzag",
        slow=False,
    ),
    explicit(
        "sums over microbatches are not averaged",
        "pipeline.executor",
        "lambda leaf: leaf / count, (loss, aux,",
        "lambda leaf: leaf * 1, (loss, aux,",
        "pipeline.executor.run_pipeline gpipe, 2 stages",
    ),
    explicit(
        "the last microbatch of each stage is lost",
        "pipeline.executor",
        "sum_ + jnp.where(entry.active, leaf, 0).astype(sum_.dtype)",
        "sum_ + jnp.where(entry.active & (entry.microbatch > 0), leaf, 0).astype(sum_.dtype)",
        "pipeline.executor.run_pipeline 1f1b, 2 stages",
    ),
    explicit(
        "an expert has one place too many",
        "routing",
        "jnp.where(taken_bi < capacity,",
        "jnp.where(taken_bi <= capacity,",
        "expert.mixture places for 3/4",
    ),
    explicit(
        "results come back with the wrong sign",
        "expert",
        "y_EbCD = back(experts(",
        "y_EbCD = -back(experts(",
        "expert.mixture nothing dropped",
    ),
]


def trainer(what: str, module: str, old: str, new: str, row: str, *, slow: bool = True) -> Mutant:
    return Mutant(what=what, module=module, old=old, new=new, row=row, slow=slow)


TRAINER = [
    trainer(
        "the gradient is not reduced over data",
        "train.gradients",
        "total = jax.lax.psum(gradient, Axis.DATA)",
        "total = gradient * jax.lax.axis_size(Axis.DATA)",
        "data=2",
    ),
    trainer(
        "the gradient is reduced over another axis",
        "train.gradients",
        "total = jax.lax.psum(gradient, Axis.DATA)",
        "total = jax.lax.psum(gradient, Axis.STAGE) * jax.lax.axis_size(Axis.DATA)",
        "data=2,stage=2",
    ),
    trainer(
        "the mean over data is left a sum",
        "train.gradients",
        "return total / num_shards",
        "return total",
        "data=4 zero 2",
    ),
    trainer(
        "microbatches are added and not averaged",
        "train.gradients",
        "gradients = jax.tree.map(lambda value: value / accumulation, gradients)",
        "gradients = jax.tree.map(lambda value: value, gradients)",
        "fsdp=2 4 microbatches",
    ),
    trainer(
        "the gradients of two layers are swapped",
        "model.transformer",
        'layers = [params["blocks"][layer] for layer in range(config.layers)]',
        'layers = [params["blocks"][layer] for layer in reversed(range(config.layers))]',
        "fsdp=2",
    ),
    trainer(
        "a query does not see its own key",
        "model.attention",
        "(slots_T <= slots_T[:, None])[None]",
        "((slots_T < slots_T[:, None]) | (slots_T == 0))[None]",
        "tensor=2",
    ),
    trainer(
        "a ring's query does not see its own key",
        "parallel.ring_attention",
        "first + jnp.arange(num_keys) <= (",
        "first + jnp.arange(num_keys) < (",
        "context=2",
    ),
    trainer(
        "tokens lie in zigzag and positions do not",
        "train.objective",
        "jnp.asarray(order)[None]",
        "jnp.arange(len(order))[None]",
        "context=2",
    ),
    trainer(
        "an expert has one place too many",
        "parallel.routing",
        "jnp.where(taken_bi < capacity,",
        "jnp.where(taken_bi <= capacity,",
        "expert=2",
    ),
    trainer(
        "the balance loss is dropped",
        "train.objective",
        "loss + config.balance_weight * stats.balance, ",
        "loss + 0 * stats.balance, ",
        "expert=2",
    ),
    trainer(
        "a stage's microbatches are not averaged",
        "parallel.pipeline.executor",
        "lambda leaf: leaf / count, (loss, aux,",
        "lambda leaf: leaf / 1, (loss, aux,",
        "stage=2",
    ),
    trainer(
        "biases and norms decay too",
        "train.optimizer",
        'return "bias" not in name and "scale" not in name',
        "return True",
        "data=2 GPT-2",
    ),
    trainer(
        "one device's part of the output layer's gradient is all that is kept",
        "model.vocabulary",
        "jax.lax.psum_scatter(gradient, Axis.FSDP,",
        "jax.lax.psum_scatter(jnp.where(jax.lax.axis_index(Axis.FSDP) == 0, gradient, 0), Axis.FSDP,",
        "fsdp=2",
    ),
    trainer(
        "parameters are not split at all",
        "parallel.rules",
        '    "D": (Axis.FSDP,),\n',
        '    "D": (),\n',
        "fsdp=2",
    ),
    trainer(
        "another way to attend than was asked for",
        "model.attention",
        'elif placement.context_attention == "ring":',
        'elif placement.context_attention == "ulysses":',
        "context=2",
    ),
]


def parameters(mutants: list[Mutant]) -> list:
    return [
        pytest.param(mutant, id=f"{mutant.row}: {mutant.what}", marks=[pytest.mark.slow] if mutant.slow else [])
        for mutant in mutants
    ]


def run(row: str, form: type, session: Session) -> Row:
    """The row of that name, in float64 alone, built anew so that it sees the library as it is now."""
    (subject,) = (
        one for one in select(devices=8).subjects if one.name == row and isinstance(one, Recipe) == (form is Recipe)
    )
    if isinstance(subject, Recipe):
        return trainer_row(dataclasses.replace(subject, precisions=(FLOAT64,)), session)
    return explicit_row(subject, session)


@pytest.mark.parametrize("mutant", parameters(FUNCTIONS))
def test_a_fault_in_a_function_turns_its_row_red(mutant: Mutant, session: Session):
    with mutated(f"gcompute.{mutant.module}", mutant.old, mutant.new):
        row = run(mutant.row, object, session)
    assert row.verdict is Verdict.DIFFERS, row
    assert row.reasons


@pytest.mark.parametrize("mutant", parameters(TRAINER))
def test_a_fault_under_the_trainer_turns_its_row_red(mutant: Mutant, session: Session):
    # The reference and what it starts from are made of the sound library.
    for subject in select(devices=8).subjects:
        if subject.name == mutant.row and isinstance(subject, Recipe):
            session.truths.run(subject.model, subject.optimizer)
    with mutated(f"gcompute.{mutant.module}", mutant.old, mutant.new):
        row = run(mutant.row, Recipe, session)
    assert row.verdict is Verdict.DIFFERS, row
    assert row.reasons


def test_every_strategy_has_a_mutant():
    subjects = {(one.name, isinstance(one, Recipe)): one for one in select(devices=8).subjects}
    caught = {strategy for mutant in FUNCTIONS for strategy in subjects[mutant.row, False].strategies}
    caught |= {strategy for mutant in TRAINER for strategy in subjects[mutant.row, True].strategies}
    assert caught >= {strategy for one in subjects.values() for strategy in one.strategies} - {"one device"}
    assert len(TRAINER) >= 10


def test_what_a_mutant_changed_is_put_back(session):
    name = "ring_all_gather one way"
    with mutated("gcompute.parallel.collectives", "place - up_hops, axis=0", "place, axis=0"):
        assert run(name, object, session).verdict is Verdict.DIFFERS
    assert run(name, object, session).verdict is Verdict.EQUAL
