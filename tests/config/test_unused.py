"""A setting that changes nothing is found, and one that asks for nothing is not."""

import dataclasses

import pytest

from gcompute.config.mesh import MeshShape
from gcompute.config.presets import PRESETS
from gcompute.config.train import OPTIMIZERS, DataConfig, OptimizerConfig, RunConfig, TrainConfig
from gcompute.config.unused import OPTIMIZER_FIELDS, check_used, unused

NAMES = {
    field.name for part in (OptimizerConfig, TrainConfig, type(PRESETS["test"])) for field in dataclasses.fields(part)
}


def run_of(
    mesh: str | None = "data=1",
    experts: int | None = None,
    optimizer: dict | None = None,
    model: dict | None = None,
    **train,
) -> RunConfig:
    shape = MeshShape.parse(mesh) if mesh is not None else None
    return RunConfig(
        model=dataclasses.replace(PRESETS["test"], experts=experts, **(model or {})),
        optimizer=OptimizerConfig(**(optimizer or {})),
        train=TrainConfig(mesh=shape, **train),
        data=DataConfig(),
    )


@pytest.mark.parametrize(
    ("run", "name", "said"),
    [
        (run_of(optimizer={"optimizer": "adam", "weight_decay": 0.5}), "weight_decay", "only with adamw, muon, lion"),
        (run_of(optimizer={"optimizer": "sgd", "b2": 0.5}), "b2", "b2=0.5 has no effect with optimizer=sgd"),
        (run_of(optimizer={"optimizer": "lion", "eps": 0.1}), "eps", "eps=0.1 has no effect with optimizer=lion"),
        (run_of(optimizer={"optimizer": "adafactor", "b1": 0.5}), "b1", "b1=0.5 has no effect"),
        (run_of(optimizer={"schedule": "constant"}), "final_fraction", "schedule=constant, which never decays"),
        (run_of(optimizer={"warmup_fraction": 0.1}), "warmup_steps", "with warmup_fraction=0.1"),
        (run_of("fsdp=2", zero=1), "zero", "zero=1 has no effect on mesh fsdp=2, where data=1"),
        (run_of(context_attention="ulysses"), "context_attention", "has no effect on mesh data=1, where context=1"),
        (run_of(pipeline_schedule="gpipe"), "pipeline_schedule", "stage=1"),
        (run_of(model={"experts_per_token": 3}), "experts_per_token", "a model without experts"),
    ],
    ids=lambda value: value if isinstance(value, str) and "_" in value else "",
)
def test_what_was_given_and_changes_nothing_is_refused(run: RunConfig, name: str, said: str):
    with pytest.raises(ValueError, match=said):
        check_used(run, {name})
    # Only where it was given.
    check_used(run, NAMES - {name} - set(unused(run, NAMES, run.train.mesh)))


@pytest.mark.parametrize(
    ("run", "names"),
    [
        (run_of(optimizer={"optimizer": "adam", "weight_decay": 0}), {"weight_decay"}),
        (run_of(optimizer={"schedule": "constant", "final_fraction": 1.0}), {"final_fraction"}),
        (run_of(), NAMES),
        (run_of("data=2", zero=1), {"zero"}),
        (run_of(experts=4), {"experts_per_token", "balance_weight"}),
        (run_of(None, zero=1), {"zero", "context_attention"}),
    ],
)
def test_what_has_an_effect_or_asks_for_nothing_is_taken(run: RunConfig, names: set[str]):
    check_used(run, names)


def test_every_optimizer_says_what_it_reads():
    assert OPTIMIZER_FIELDS.keys() == set(OPTIMIZERS)
