"""Plain values, as TOML and JSON hold them, to arguments of a configuration."""

import dataclasses
import types
import typing
from collections.abc import Mapping
from typing import Any

from gcompute.config.fields import nearest
from gcompute.config.mesh import MeshShape, OpenMesh, parse_mesh


def value_type(config_type: type, name: str) -> type:
    """The type of a field, without its `| None`."""
    hint = typing.get_type_hints(config_type)[name]
    if isinstance(hint, types.UnionType):
        hint = next(part for part in typing.get_args(hint) if part is not type(None))
    return hint


def _may_be_absent(config_type: type, name: str) -> bool:
    return type(None) in typing.get_args(typing.get_type_hints(config_type)[name])


def from_plain(config_type: type, values: Any, *, source: str) -> dict[str, Any]:
    """Plain values as arguments of `config_type`: a mesh from its text, a whole number where a float is meant.

    A mesh with an axis of -1 stays open: `gcompute.config.mesh.mesh_over` fills it once the devices are known.

    Raises:
      ValueError: a field is unknown or has the wrong type; the message names the source and the nearest field.
    """
    if not isinstance(values, Mapping):
        raise ValueError(f"{source}: fields and their values are wanted, got {values!r}.")
    legal = [field.name for field in dataclasses.fields(config_type)]
    converted: dict[str, Any] = {}
    for name, value in values.items():
        if name not in legal:
            raise ValueError(f"{source}: {name!r} is not known. {nearest(name, legal)}")
        kind = value_type(config_type, name)
        if kind is MeshShape and isinstance(value, str):
            value = parse_mesh(value)
        elif kind is float and isinstance(value, int) and not isinstance(value, bool):
            value = float(value)
        if value is None and not _may_be_absent(config_type, name):
            raise ValueError(f"{source}: {name} must be of type {kind.__name__}, got null.")
        if isinstance(value, OpenMesh):
            converted[name] = value
            continue
        if value is not None and (not isinstance(value, kind) or (isinstance(value, bool) and kind is not bool)):
            raise ValueError(f"{source}: {name} must be of type {kind.__name__}, got {value!r}.")
        converted[name] = value
    return converted
