"""Flags from dataclasses: every field of a configuration is an option, and a TOML file says the same."""

import dataclasses
import os
import re
import tomllib
from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from typing import Any, TypeVar

import click

from gcompute.config.fields import nearest
from gcompute.config.mesh import MeshShape, OpenMesh, parse_mesh
from gcompute.config.plain import from_plain, value_type

URL = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*://")
Command = TypeVar("Command", bound=Callable[..., Any])


class MeshType(click.ParamType):
    """A mesh such as data=2,fsdp=4; devices: some will be known, so that one axis may be -1 until then."""

    name = "mesh"

    def __init__(self, *, devices: bool = True):
        self.devices = devices

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> MeshShape | OpenMesh:
        if isinstance(value, MeshShape | OpenMesh):
            return value
        try:
            return parse_mesh(value) if self.devices else MeshShape.parse(value)
        except ValueError as error:
            self.fail(str(error), param, ctx)


class PathType(click.Path):
    """A path on this machine, as a Path; see `local_path`."""

    def __init__(self, *, dir_okay: bool = True):
        super().__init__(path_type=Path, dir_okay=dir_okay)

    def convert(self, value: str | os.PathLike[str], param: click.Parameter | None, ctx: click.Context | None) -> Any:
        return super().convert(_converted(self, os.fspath(value), param, ctx), param, ctx)


class NameOrPath(click.ParamType):
    """A name, or a path on this machine, as text; urls: or a URL, which is left as it is."""

    name = "text"

    def __init__(self, *, urls: bool = False):
        self.urls = urls

    def convert(self, value: str, param: click.Parameter | None, ctx: click.Context | None) -> str:
        return value if self.urls and URL.match(value) else _converted(self, value, param, ctx)


PATH, FILE = PathType(), PathType(dir_okay=False)
# MODEL: a preset, or a file that describes a model.
MODEL = NAME_OR_PATH = NameOrPath()


def local_path(text: str) -> str:
    """A path on this machine, with the home directory in place of a leading ~.

    Raises:
      ValueError: it is a URL, as of a bucket, or there is no home directory.
    """
    if URL.match(text):
        raise ValueError(
            f"{text} is not a path on this machine, and only such are read and written. Mount the bucket (gcsfuse,"
            " s3fs), or give a local directory and copy it (gcloud storage cp -r)."
        )
    expanded = os.path.expanduser(text)
    if text.partition("/")[0] == "~" and (expanded == text or os.environ.get("HOME") == ""):
        raise ValueError(f"{text}: ~ stands for no directory, as HOME is not set. Write the path out.")
    return expanded


def _converted(kind: click.ParamType, text: str, param: click.Parameter | None, ctx: click.Context | None) -> str:
    try:
        return local_path(text)
    except ValueError as error:
        kind.fail(str(error), param, ctx)


class SectionedCommand(click.Command):
    """Lists options under the configuration that they belong to, and its examples at the end."""

    examples: tuple[str, ...] = ()

    def format_options(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        sections: dict[str, list[tuple[str, str]]] = {}
        for param in self.get_params(ctx):
            record = param.get_help_record(ctx) if isinstance(param, click.Option) else None
            if record:
                sections.setdefault(getattr(param, "section", "Options"), []).append(record)
        for name in ("Options", *(name for name in sections if name != "Options")):
            with formatter.section(name):
                formatter.write_dl(sections.get(name, []))

    def format_epilog(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        if self.examples:
            with formatter.section("Examples"):
                for example in self.examples:
                    formatter.write(f"  $ {example}\n")


class ExampleGroup(click.Group):
    """Shows the examples of its commands, and names the legal ones where one is not known."""

    @property
    def examples(self) -> tuple[str, ...]:
        return tuple(example for one in self.commands.values() for example in getattr(one, "examples", ()))

    def format_epilog(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        with formatter.section("Examples"):
            for example in self.examples:
                formatter.write(f"  $ {example}\n")

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in self.commands:
            raise click.UsageError(f"{ctx.info_name} {cmd_name!r} is not known. {nearest(cmd_name, self.commands)}")
        return super().get_command(ctx, cmd_name)


class SectionedOption(click.Option):
    """An option that knows its section of the help."""

    def __init__(self, *args: Any, section: str, **kwargs: Any):
        super().__init__(*args, **kwargs)
        self.section = section


def config_options(
    config_type: type, section: str, without: Collection[str] = (), /, **defaults: Any
) -> Callable[[Command], Command]:
    """A decorator that gives a click command one option for each field of `config_type` but those in `without`.

    An option that is not given stays None, so that a file can supply it; `defaults` are what the help shows where the
    command's default is not the field's.
    """
    options = []
    for field in (field for field in dataclasses.fields(config_type) if field.name not in without):
        kind = value_type(config_type, field.name)
        flag = "--" + field.name.replace("_", "-")
        default = defaults.get(field.name, field.default)
        help_text = field.metadata["help"]
        if default is not None and "default" not in help_text:
            help_text += f"  [{str(default).lower() if isinstance(default, bool) else default}]"
        choices = field.metadata.get("choices")
        settings: dict[str, Any] = {"default": None, "help": help_text, "section": section, "cls": SectionedOption}
        if kind is bool:
            options.append(click.option(f"{flag}/--no-{flag[2:]}", **settings))
        else:
            parsed = MeshType() if kind is MeshShape else click.Choice(choices) if choices else kind
            parsed = NAME_OR_PATH if field.metadata.get("path") else parsed
            options.append(click.option(flag, type=parsed, **settings))

    def decorate(command: Command) -> Command:
        for option in reversed(options):
            command = option(command)
        return command

    return decorate


def given(config_type: type, values: Mapping[str, Any]) -> dict[str, Any]:
    """Those of a command's values that are fields of `config_type` and were given."""
    names = {field.name for field in dataclasses.fields(config_type)}
    return {name: value for name, value in values.items() if name in names and value is not None}


def read_toml(path: Path, sections: Mapping[str, type]) -> dict[str, dict[str, Any]]:
    """The sections of a TOML file as arguments for the configuration that each stands for.

    Raises:
      ValueError: the file cannot be read or parsed, or holds an unknown section or field.
    """
    try:
        document = tomllib.loads(path.read_text(encoding="utf-8-sig"))
    except OSError as error:
        raise ValueError(f"config file {path} cannot be read: {error.strerror}.") from None
    except (ValueError, RecursionError) as error:
        raise ValueError(f"config file {path} does not parse as TOML: {error}.") from None
    read: dict[str, dict[str, Any]] = {}
    for name, values in document.items():
        if name not in sections or not isinstance(values, dict):
            raise ValueError(f"{path}: section {name!r} is not known. {nearest(name, sections)}")
        read[name] = from_plain(sections[name], values, source=f"{path} [{name}]")
        for field in dataclasses.fields(sections[name]):
            if field.metadata.get("path") and read[name].get(field.name) is not None:
                read[name][field.name] = local_path(read[name][field.name])
    return read
