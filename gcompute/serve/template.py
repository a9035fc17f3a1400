"""Reads the chat template of a model, and what belongs to it, from the files beside its tokenizer.json."""

import importlib.util
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from gcompute.model.tokenizer import Tokenizer
from gcompute.serve.chat_template import DEFAULT, ChatTemplate, JinjaTemplate, Message, PlainTemplate

__all__ = ["ChatTemplate", "JinjaTemplate", "Message", "PlainTemplate", "load_template"]

CONFIG = "tokenizer_config.json"
SPECIAL = "special_tokens_map.json"
GENERATION = "generation_config.json"
TEMPLATE = "chat_template.jinja"
NAMED = "additional_chat_templates"
NAMES = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")


def load_template(
    folder: Path,
    notice: Callable[[str], None],
    *,
    tokenizer: Tokenizer | None = None,
    time_s: float | None = None,
) -> ChatTemplate:
    """The template beside a tokenizer, or the plain one; `notice` is called with why a template there is not used.

    tokenizer: makes all that the first chat needs now. time_s: the longest that a chat may take to render.

    Raises:
      ValueError: a file cannot be read or says what no tokenizer can mean, or the template does not parse.
    """
    config, special, generation = (_read_object(folder / name) for name in (CONFIG, SPECIAL, GENERATION))
    path, sources = _sources(folder, config)
    ends = _end_ids(generation, folder / GENERATION)
    if not sources:
        return PlainTemplate(ends)
    if importlib.util.find_spec("jinja2") is None:
        notice(f"{path} has a chat template, and jinja2 is not installed: chats use the plain template.")
        return PlainTemplate(ends)
    if DEFAULT not in sources:
        raise ValueError(f"{path} has chat templates named {', '.join(sorted(sources))[:200]}, and none is 'default'.")
    given = {**special, **{name: value for name, value in config.items() if value is not None}}
    tokens = {name: _token(given.get(name), name, folder / CONFIG) for name in NAMES}
    known = {name: token for name, token in tokens.items() if token}
    declared = _declared(config)
    more = given.get("additional_special_tokens") or given.get("extra_special_tokens") or ()
    more = more.values() if isinstance(more, dict) else more if isinstance(more, list) else ()
    template = JinjaTemplate(
        sources,
        known,
        where=path.name,
        ends=[*ends, *([known["eos_token"]] if "eos_token" in known else [])],
        control={
            *known.values(),
            *(name for name, flags in declared.items() if flags.get("special")),
            *(one for one in map(_content, more) if isinstance(one, str)),
        },
        flags=declared,
        time_s=time_s,
    )
    if tokenizer is not None:
        template.prepare(tokenizer)
    return template


def _read(path: Path) -> str | None:
    try:
        return path.read_text(encoding="utf-8-sig") if path.is_file() else None
    except (OSError, ValueError) as error:
        raise ValueError(f"{path} belongs to the chat template and cannot be read: {error}.") from None


def _read_object(path: Path) -> dict[str, Any]:
    text = _read(path)
    try:
        found = {} if text is None else json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} belongs to the chat template and cannot be read: {error}.") from None
    if not isinstance(found, dict):
        raise ValueError(f"{path} belongs to the chat template and is no JSON object.")
    return found


def _sources(folder: Path, config: Mapping[str, Any]) -> tuple[Path, dict[str, str]]:
    """Where the templates are from, and their texts by name."""
    own = _read(folder / TEMPLATE)
    if own is not None:
        # The files of their own are what transformers writes now, and win.
        others = sorted((folder / NAMED).glob("*.jinja"))
        return folder / TEMPLATE, {DEFAULT: own, **{path.stem: _read(path) or "" for path in others}}
    path, source = folder / CONFIG, config.get("chat_template")
    if source is None:
        return path, {}
    if isinstance(source, list) and all(isinstance(one, dict) for one in source):
        source = {one.get("name"): one.get("template") for one in source}
    elif isinstance(source, str):
        source = {DEFAULT: source}
    if not isinstance(source, dict) or not all(isinstance(one, str) for pair in source.items() for one in pair):
        raise ValueError(f"{path}: chat_template must be text, or a list of objects with a name and a template.")
    return path, source


def _content(token: Any) -> Any:
    return token.get("content") if isinstance(token, dict) else token


def _token(value: Any, name: str, path: Path) -> str:
    """A special token, written as text or as an object of it and its flags; empty where there is none."""
    content = _content(value)
    if value is not None and not isinstance(content, str):
        raise ValueError(f"{path}: {name} must be text, or an object whose content is text; got {str(value)[:60]}.")
    return content or ""


def _declared(config: Mapping[str, Any]) -> dict[str, dict[str, bool]]:
    """The added tokens that the configuration describes, by their content, with their flags."""
    described = config.get("added_tokens_decoder")
    described = described.values() if isinstance(described, dict) else ()
    found = [one for one in described if isinstance(one, dict) and isinstance(one.get("content"), str)]
    return {one["content"]: {flag: on for flag, on in one.items() if isinstance(on, bool)} for one in found}


def _end_ids(generation: Mapping[str, Any], path: Path) -> list[int]:
    """Every id of eos_token_id, which is one or a list."""
    ids = generation.get("eos_token_id")
    ids = [] if ids is None else ids if isinstance(ids, list) else [ids]
    for one in ids:
        if isinstance(one, bool) or not isinstance(one, int) or one < 0:
            raise ValueError(f"{path}: eos_token_id must be a token id or a list of them; got {str(one)[:60]}.")
    return ids
