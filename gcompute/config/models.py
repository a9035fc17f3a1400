"""What MODEL may be on a command line: a preset, our own configuration, or a Hugging Face config.json."""

import json
from dataclasses import dataclass
from pathlib import Path

from gcompute.config.architecture import Architecture, architecture
from gcompute.config.huggingface import is_huggingface, read_huggingface
from gcompute.config.model import ModelConfig
from gcompute.config.presets import model_config


@dataclass(frozen=True, slots=True, kw_only=True)
class PlannedModel:
    """A model to plan for. trainable: the same for this library's trainer, None where it has no such model, for the
    reason `why_not`. unused: fields of a config.json that are not known, by name."""

    name: str
    architecture: Architecture
    trainable: ModelConfig | None
    why_not: str = ""
    unused: tuple[str, ...] = ()


def planned_model(name: str) -> PlannedModel:
    """The model that `name` stands for.

    >>> planned_model("llama3-8b").architecture.num_layers
    32

    Raises:
      ValueError: no such preset or file, or the file does not describe a model.
    """
    path = Path(name)
    if path.is_dir() and (path / "config.json").is_file():
        path = path / "config.json"
    if path.suffix == ".json" and path.is_file():
        try:
            values = json.loads(path.read_text(encoding="utf-8-sig"))
        except (ValueError, RecursionError) as error:
            raise ValueError(f"model file {path} does not parse: {error}.") from None
        if not isinstance(values, dict) or not values:
            raise ValueError(f"model file {path} holds no field of a model.")
        if is_huggingface(values):
            found = read_huggingface(path)
            return PlannedModel(
                name=name,
                architecture=found.architecture,
                trainable=found.trainable,
                why_not=found.why_not,
                unused=found.unused,
            )
    config = model_config(str(path))
    return PlannedModel(name=name, architecture=architecture(config, name), trainable=config)
