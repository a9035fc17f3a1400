import dataclasses
import json
import tomllib

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gcompute.config.fields import nearest
from gcompute.config.mesh import Axis, MeshShape
from gcompute.config.model import ModelConfig
from gcompute.config.plain import from_plain, value_type
from gcompute.config.presets import PRESETS, model_config, model_from_dict
from gcompute.config.train import DataConfig, OptimizerConfig, RunConfig, TrainConfig

CONFIGS = (ModelConfig, OptimizerConfig, TrainConfig, DataConfig)


@pytest.mark.oldest
@pytest.mark.parametrize("name", PRESETS)
def test_a_run_survives_json(name: str):
    run = RunConfig(
        model=PRESETS[name],
        optimizer=OptimizerConfig(learning_rate=1 / 3),
        train=TrainConfig(mesh=MeshShape.parse("data=2,tensor=4"), seq=16),
        data=DataConfig(),
    )
    plain = json.loads(json.dumps(run.to_dict()))
    kinds = dict(zip(("model", "optimizer", "train", "data"), CONFIGS, strict=True))
    assert RunConfig(**{key: kind(**from_plain(kind, plain[key], source=key)) for key, kind in kinds.items()}) == run
    assert model_from_dict(plain["model"], source="test") == PRESETS[name]


@given(st.dictionaries(st.sampled_from(list(Axis)), st.integers(1, 10**6)))
def test_a_mesh_survives_its_text(sizes: dict[Axis, int]):
    shape = MeshShape(**{axis.value: size for axis, size in sizes.items()})
    assert MeshShape.parse(str(shape)) == shape


@pytest.mark.parametrize(
    "text", ["data", "data=", "=2", "data=-1", "data=1.5", "data=2,data=2", "data=2;fsdp=2", "data=²"]
)
def test_a_mesh_that_is_none(text: str):
    with pytest.raises(ValueError, match="mesh axis"):
        MeshShape.parse(text)


WRONG = {
    int: ["3", 3.5, True, [3], float("nan")],
    float: ["fast", True, [1.0]],
    bool: ["yes", 1],
    str: [3, True, ["a"]],
}


@pytest.mark.parametrize("config", CONFIGS)
def test_every_field_refuses_the_wrong_type(config: type):
    for field in dataclasses.fields(config):
        for value in WRONG.get(value_type(config, field.name), [3]):
            with pytest.raises(ValueError, match=rf"here: {field.name} must be of type"):
                from_plain(config, {field.name: value}, source="here")


@pytest.mark.parametrize("config", CONFIGS)
def test_every_number_refuses_what_is_not_finite_and_what_is_below_zero(config: type):
    for field in dataclasses.fields(config):
        kind = value_type(config, field.name)
        for value in {int: [-1], float: [-1.0, float("nan"), float("inf")]}.get(kind, []):
            with pytest.raises(ValueError, match=field.name):
                config(**{field.name: value})


def test_a_whole_number_stands_for_a_float():
    values = from_plain(OptimizerConfig, tomllib.loads("learning_rate = 1\nclip = 0"), source="here")
    assert values == {"learning_rate": 1.0, "clip": 0.0}
    assert all(type(value) is float for value in values.values())


def test_the_nearest_name_is_plain_text():
    assert nearest("dta", list(Axis)) == "Did you mean 'data'?"
    with pytest.raises(ValueError, match=r"Did you mean 'llama3-8b'\?"):
        model_config("llama3-8")


def test_limits_that_would_fail_far_away():
    with pytest.raises(ValueError, match="seed must be at most 4294967295"):
        TrainConfig(seed=2**32)
    parts = {"model": PRESETS["test"], "optimizer": OptimizerConfig(), "data": DataConfig()}
    with pytest.raises(ValueError, match="seq=33 is longer than the model's context=32"):
        RunConfig(train=TrainConfig(seq=33), **parts)
    with pytest.raises(ValueError, match="tokens a step"):
        RunConfig(train=TrainConfig(batch=2**31), **parts)
