"""What MODEL may be: a preset, our file, a Hugging Face file or the directory that holds one."""

import dataclasses
import json
from pathlib import Path

import pytest

from gcompute.config.architecture import architecture
from gcompute.config.models import planned_model
from gcompute.config.plain import from_plain
from gcompute.config.presets import PRESETS, model_from_dict

LLAMA = {
    "model_type": "llama",
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 128,
    "vocab_size": 100,
}


def written(path: Path, values: object) -> str:
    path.write_text(json.dumps(values), encoding="utf-8")
    return str(path)


@pytest.mark.parametrize("name", PRESETS)
def test_presets(name: str):
    found = planned_model(name)
    assert (found.name, found.trainable) == (name, PRESETS[name])
    assert found.architecture == architecture(PRESETS[name], name)
    assert (found.why_not, found.unused) == ("", ())


def test_our_own_files(tmp_path: Path):
    values = {"vocab": 64, "layers": 3, "dim": 32, "heads": 4, "ffn": 64, "context": 32}
    config = model_from_dict(values, source="here")
    for content in (values, {"model": values}):
        found = planned_model(written(tmp_path / "model.json", content))
        assert found.trainable == config
        assert found.architecture.num_layers == 3
    toml = tmp_path / "model.toml"
    toml.write_text("\n".join(f"{name} = {value}" for name, value in values.items()))
    assert planned_model(str(toml)).trainable == config
    assert from_plain(type(config), values, source="here")["dim"] == 32


@pytest.mark.oldest
def test_a_hugging_face_file_or_its_directory(tmp_path: Path):
    path = written(tmp_path / "config.json", {**LLAMA, "surprise": 3})
    for name in (path, str(tmp_path)):
        found = planned_model(name)
        assert found.name == name
        assert found.architecture.dim == 64
        assert found.trainable is not None
        assert found.trainable.ffn == 128
        assert found.unused == ("surprise",)


def test_a_byte_order_mark_is_no_part_of_a_file(tmp_path: Path):
    path = tmp_path / "config.json"
    path.write_text(json.dumps(LLAMA), encoding="utf-8-sig")
    assert planned_model(str(path)).architecture.num_layers == 2


def test_what_the_trainer_has_not(tmp_path: Path):
    window = {**LLAMA, "model_type": "mistral", "num_key_value_heads": 2, "sliding_window": 16}
    found = planned_model(written(tmp_path / "config.json", window))
    assert found.trainable is None
    assert found.why_not == "it has attention in a window"
    assert found.architecture.layers[0].attention.window == 16


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("{", "does not parse"),
        ('{"model_type": "llama"}', "hidden_size is absent"),
        ('{"model_type": "lama"}', "Did you mean 'llama'"),
        (json.dumps({**LLAMA, "num_attention_heads": 5}), "does not divide into num_attention_heads=5"),
        (json.dumps({**LLAMA, "num_local_experts": 8}), "num_local_experts contradicts model_type 'llama'"),
        (json.dumps({**LLAMA, "num_hidden_layers": -2}), "must be a whole number"),
        ('{"vocab": 64, "layerz": 3}', "layerz"),
        ("[]", "model"),
        ("3", "model"),
    ],
)
def test_bad_files(tmp_path: Path, content: str, said: str):
    path = tmp_path / "config.json"
    path.write_text(content)
    with pytest.raises(ValueError, match=said) as refused:
        planned_model(str(path))
    assert "\n" not in str(refused.value)


def test_neither_preset_nor_file(tmp_path: Path):
    with pytest.raises(ValueError, match="Did you mean 'llama3-8b'"):
        planned_model("llama3-8")
    for name in ("", str(tmp_path), "/etc/passwd"):
        with pytest.raises(ValueError, match="is not a preset"):
            planned_model(name)
    with pytest.raises(ValueError, match="cannot be read"):
        planned_model(str(tmp_path / "none.json"))
    assert dataclasses.is_dataclass(planned_model("test"))
