r"""Messages to a prompt: the chat template of a tokenizer_config.json, or a plain one.

The plain template, for models that were trained on text and not on chats, writes each message as "role: content" and a
newline, then "assistant:"; unless a call has stop strings of its own, "\nuser:" ends the answer.

A template's own special tokens become their ids; the same characters in a message stay the ordinary text that they are,
so that no message can forge a turn.
"""

import importlib.util
import json
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any, ClassVar, Protocol

from gcompute.model.tokenizer import Tokenizer

CONFIG = "tokenizer_config.json"
TEMPLATE = "chat_template.jinja"
# Special tokens that a message spells out are numbers between two private characters until they are encoded as text.
MARK = "\uf8ff"
MARKED = re.compile(f"{MARK}([0-9]+){MARK}")


@dataclass(frozen=True, slots=True, kw_only=True)
class Message:
    """One turn of a chat."""

    role: str
    content: str


class ChatTemplate(Protocol):
    """How a chat becomes a prompt.

    stop: a string that ends the answer where the call has none, or None. end: a special token that ends it, or None.
    """

    @property
    def stop(self) -> str | None: ...

    @property
    def end(self) -> str | None: ...

    def encode(self, messages: Sequence[Message], tokenizer: Tokenizer) -> tuple[int, ...]:
        """The prompt's ids. Raises ValueError where the messages cannot be rendered or encoded."""
        ...


class PlainTemplate:
    """ "role: content" a message."""

    stop = "\nuser:"
    end = None

    def encode(self, messages: Sequence[Message], tokenizer: Tokenizer) -> tuple[int, ...]:
        lines = [f"{message.role}: {message.content}\n" for message in messages]
        return tuple(tokenizer.encode("".join(lines) + "assistant:"))


class JinjaTemplate:
    """A Hugging Face chat template, rendered in jinja2's sandbox.

    Raises:
      ValueError: the template does not parse.
    """

    stop = None

    def __init__(self, source: str, variables: dict[str, Any]):
        import jinja2  # pyright: ignore[reportMissingImports]
        from jinja2.ext import Extension  # pyright: ignore[reportMissingImports]
        from jinja2.sandbox import ImmutableSandboxedEnvironment  # pyright: ignore[reportMissingImports]

        class Generation(Extension):
            """What lies between `generation` and `endgeneration`, which matters to who trains on it, as it is."""

            tags: ClassVar[set[str]] = {"generation"}  # pyright: ignore[reportIncompatibleVariableOverride]

            def parse(self, parser: Any) -> Any:
                next(parser.stream)
                return parser.parse_statements(("name:endgeneration",), drop_needle=True)

        extensions = ["jinja2.ext.loopcontrols", Generation]
        environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True, extensions=extensions)
        environment.globals["raise_exception"] = _refuse
        environment.globals["strftime_now"] = lambda form: datetime.now().strftime(form)
        environment.filters["tojson"] = lambda value, indent=None: json.dumps(value, ensure_ascii=False, indent=indent)
        try:
            self._template = environment.from_string(source)
        except (jinja2.TemplateError, RecursionError) as error:
            raise ValueError(f"the chat template of {CONFIG} does not parse: {error}.") from None
        self._variables = variables
        self.end: str | None = variables.get("eos_token") or None

    def encode(self, messages: Sequence[Message], tokenizer: Tokenizer) -> tuple[int, ...]:
        specials = tokenizer.special_tokens
        names = sorted(specials, key=len, reverse=True)
        plain = re.compile("|".join(map(re.escape, names)) or r"(?!)")

        def marked(content: str) -> str:
            return plain.sub(lambda found: f"{MARK}{names.index(found[0])}{MARK}", content.replace(MARK, ""))

        def ids_of(text: str) -> Sequence[int]:
            return tokenizer.encode(MARKED.sub(lambda found: names[int(found[1])], text))

        turns = [{"role": message.role, "content": marked(message.content)} for message in messages]
        try:
            text = self._template.render(messages=turns, add_generation_prompt=True, **self._variables)
        except Exception as error:  # whatever a template of someone else's raises is about these messages
            raise ValueError(f"the chat template refuses these messages: {error}") from None
        ids: list[int] = []
        start = 0
        for found in plain.finditer(text):
            ids += [*ids_of(text[start : found.start()]), specials[found[0]]]
            start = found.end()
        return (*ids, *ids_of(text[start:]))


def _refuse(message: str) -> None:
    raise ValueError(message)


def load_template(folder: Path, notice: Callable[[str], None]) -> ChatTemplate:
    """The template beside a tokenizer, or the plain one; `notice` hears why a template there is not used.

    Raises:
      ValueError: tokenizer_config.json cannot be read.
    """
    path, own = folder / CONFIG, folder / TEMPLATE
    try:
        config = json.loads(path.read_text(encoding="utf-8-sig")) if path.is_file() else {}
        written = own.read_text(encoding="utf-8-sig") if own.is_file() else None
    except (OSError, ValueError, RecursionError) as error:
        raise ValueError(f"{folder} holds a chat template that cannot be read: {error}.") from None
    config = config if isinstance(config, dict) else {}
    # The file of its own is what transformers writes now, and wins.
    source = config.get("chat_template") if written is None else written
    path = path if written is None else own
    if isinstance(source, list):
        named = {one.get("name"): one.get("template") for one in source if isinstance(one, dict)}
        source = named.get("default")
    if not isinstance(source, str):
        return PlainTemplate()
    if importlib.util.find_spec("jinja2") is None:
        notice(f"{path} has a chat template, and jinja2 is not installed: chats use the plain template.")
        return PlainTemplate()
    tokens = {name: config.get(name) for name in ("bos_token", "eos_token", "unk_token", "pad_token")}
    variables = {name: one.get("content") if isinstance(one, dict) else one for name, one in tokens.items()}
    return JinjaTemplate(source, {name: value or "" for name, value in variables.items()})
