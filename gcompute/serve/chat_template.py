r"""Messages to a prompt: a tokenizer's chat template, or a plain one.

The plain template, for models that were trained on text and not on chats, writes each message as "role: content" and a
newline, then "assistant:"; unless a call has stop strings of its own, "\nuser:" ends the answer.

A Hugging Face template is rendered as transformers renders it, in a process of its own with bounded memory and time,
and encoded as its tokenizer encodes the whole text. Only the characters that the template wrote may spell its special
tokens, whatever it does with those of messages: no message can forge a turn.
"""

import secrets
import threading
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from gcompute.model.prompt_encoder import PromptEncoder
from gcompute.model.tokenizer import Tokenizer
from gcompute.serve.bounded_process import BoundedPool, OutOfTime
from gcompute.serve.request import NotReady, RequestError

WORKER = "gcompute.serve.chat_worker"
RENDER_S = 4.0
RENDER_BYTES = 1 << 30
MAX_RENDERED_CHARS = 1 << 23
DEFAULT, TOOL_USE = "default", "tool_use"
# What transformers hands to every template; other names are `chat_template_kwargs`.
RESERVED = ("messages", "tools", "documents", "add_generation_prompt")
# Rendered once: added tokens that a template puts around messages are its control tokens, though not called special.
PROBES = (("system", "user", "assistant", "user"), ("user", "assistant", "user"))


@dataclass(frozen=True, slots=True, kw_only=True)
class Message:
    """One turn of a chat.

    content: None where tool calls are all there is. more: what the template sees beside them, such as tool_calls.
    """

    role: str
    content: str | None
    more: Mapping[str, Any] = field(default_factory=dict)

    def plain(self) -> dict[str, Any]:
        """As a template sees it: what is null is left out, as transformers does."""
        content = {} if self.content is None else {"content": self.content}
        return {"role": self.role, **content, **self.more}


class ChatTemplate(Protocol):
    """How a chat becomes a prompt. stop: a string that ends the answer where the call has none, or None."""

    @property
    def stop(self) -> str | None: ...

    def ends(self, tokenizer: Tokenizer) -> tuple[int, ...]:
        """The ids that end an answer beside the tokenizer's end of text."""
        ...

    def encode(
        self,
        messages: Sequence[Message],
        tokenizer: Tokenizer,
        *,
        tools: Sequence[Mapping[str, Any]] | None = None,
        add_generation_prompt: bool = True,
        continue_final_message: bool = False,
        variables: Mapping[str, Any] | None = None,
    ) -> tuple[int, ...]:
        """The prompt's ids.

        tools: JSON schemas of functions. add_generation_prompt: begin the answer's turn. continue_final_message: leave
        the last message open instead. variables: more that the template reads.

        Raises:
          ValueError: the messages cannot be rendered or encoded. NotReady: others' templates take too long.
        """
        ...


class PlainTemplate:
    """ "role: content" per message."""

    stop = "\nuser:"

    def __init__(self, ends: Sequence[int] = ()):
        self._ends = tuple(ends)

    def ends(self, tokenizer: Tokenizer) -> tuple[int, ...]:
        return self._ends

    def encode(
        self,
        messages: Sequence[Message],
        tokenizer: Tokenizer,
        *,
        tools: Sequence[Mapping[str, Any]] | None = None,
        add_generation_prompt: bool = True,
        continue_final_message: bool = False,
        variables: Mapping[str, Any] | None = None,
    ) -> tuple[int, ...]:
        if tools or any("tool_calls" in message.more for message in messages):
            raise RequestError("this model has no chat template, and so knows no tools: leave them out.", param="tools")
        for name in variables or {}:
            raise RequestError(_unknown(name, "this model has no chat template"), param="chat_template_kwargs")
        text = "".join(f"{message.role}: {message.content or ''}\n" for message in messages)
        text = text.removesuffix("\n") if continue_final_message else text
        return tuple(tokenizer.encode(text + ("assistant:" if add_generation_prompt else "")))


class JinjaTemplate:
    """Hugging Face chat templates, one or several by name.

    special: the special tokens by their names, such as bos_token. where: what messages call the template. ends: ids and
    tokens that end an answer. control, flags: as in `PromptEncoder`. time_s: the longest that one rendering may take.

    Raises:
      ValueError: a template does not parse, or no process can be started for it.
    """

    stop = None

    def __init__(
        self,
        source: str | Mapping[str, str],
        special: Mapping[str, str],
        *,
        where: str = "the tokenizer",
        ends: Sequence[int | str] = (),
        control: Collection[str] = (),
        flags: Mapping[str, Mapping[str, bool]] | None = None,
        time_s: float | None = None,
    ):
        self._sources = {DEFAULT: source} if isinstance(source, str) else dict(source)
        self._what = f"the chat template of {where}"
        self._ends, self._control, self._flags = tuple(ends), tuple(control), flags
        self._time_s = min(RENDER_S, time_s or RENDER_S)
        self._making = threading.Lock()
        self._encoder: tuple[Tokenizer, PromptEncoder] | None = None
        first = {"templates": self._sources, "special": dict(special), "memory_bytes": RENDER_BYTES}
        try:
            self._pool = BoundedPool(WORKER, first, wait_s=time_s)
        except ValueError as error:
            raise ValueError(f"{self._what} cannot be used: {error}") from None
        if "error" in self._pool.hello:
            raise ValueError(f"{self._what} does not parse: {self._pool.hello['error']}.")
        self._names: dict[str, list[str]] = self._pool.hello["names"]

    def ends(self, tokenizer: Tokenizer) -> tuple[int, ...]:
        ids = (tokenizer.id_of(one) if isinstance(one, str) else one for one in self._ends)
        return tuple(dict.fromkeys(one for one in ids if one is not None))

    def encode(
        self,
        messages: Sequence[Message],
        tokenizer: Tokenizer,
        *,
        tools: Sequence[Mapping[str, Any]] | None = None,
        add_generation_prompt: bool = True,
        continue_final_message: bool = False,
        variables: Mapping[str, Any] | None = None,
    ) -> tuple[int, ...]:
        turns = [message.plain() for message in messages]
        name = TOOL_USE if tools and TOOL_USE in self._sources else DEFAULT
        if tools and "tools" not in self._names[name]:
            raise RequestError(f"{self._what} knows no tools: leave tools out.", param="tools")
        for given in variables or {}:
            if given in RESERVED or given not in self._names[name]:
                raise RequestError(_unknown(given, self._what), param="chat_template_kwargs")
        values = {**(variables or {}), "tools": tools or None, "documents": None}
        values["add_generation_prompt"] = add_generation_prompt
        if continue_final_message:
            text, spans = self._open(name, turns, values)
        else:
            text, spans = self._render(name, {**values, "messages": turns})
        return tuple(self.prepare(tokenizer).encode(text, spans))

    def prepare(self, tokenizer: Tokenizer) -> PromptEncoder:
        """Make what encodes, once for a tokenizer.

        Raises:
          ValueError: the tokenizer does not take the control tokens.
        """
        with self._making:
            if self._encoder is None or self._encoder[0] is not tokenizer:
                self._encoder = (tokenizer, self._make(tokenizer))
            return self._encoder[1]

    def _make(self, tokenizer: Tokenizer) -> PromptEncoder:
        ends = set(self.ends(tokenizer))
        names = tokenizer.added_tokens
        control = {*self._control, *(name for name, token_id in names.items() if token_id in ends)}
        encoder = PromptEncoder(tokenizer, control, self._flags)
        for roles in PROBES:
            turns = [{"role": role, "content": "x"} for role in roles]
            values = {"messages": turns, "tools": None, "documents": None, "add_generation_prompt": False}
            try:
                around = encoder.written(*self._render(DEFAULT, values))
            except (ValueError, NotReady):
                continue
            more = {one for one in around if not one.isspace()} - encoder.control.keys()
            return PromptEncoder(tokenizer, control | more, self._flags) if more else encoder
        return encoder

    def _open(self, name: str, turns: list[dict[str, Any]], values: dict[str, Any]) -> tuple[str, list[Any]]:
        """The text up to the end of the last message, as transformers finds it: by a mark at its end."""
        mark = secrets.token_hex(16) + " "
        *before, last = turns
        if "content" not in last:
            raise RequestError("the last message has no content to continue.", param="continue_final_message")
        text, spans = self._render(name, {**values, "messages": [*before, {**last, "content": last["content"] + mark}]})
        at = text.rfind(mark.strip())
        if at < 0 or last["content"].strip() not in text:
            message = f"{self._what} does not write the last message as it is, and so cannot leave it open."
            raise RequestError(message, param="continue_final_message")
        # A template that trims messages trims this one.
        kept = text[:at] if text.startswith(mark, at) else text[:at].rstrip()
        return kept, [(start, min(end, len(kept))) for start, end in spans if start < len(kept)]

    def _render(self, name: str, values: Mapping[str, Any]) -> tuple[str, list[Any]]:
        question = {"template": name, "variables": values, "time_s": self._time_s, "max_chars": MAX_RENDERED_CHARS}
        try:
            answer = self._pool.ask(question, time_s=self._time_s)
        except OutOfTime as error:
            raise ValueError(f"{self._what} was stopped: {error}.") from None
        except RecursionError:
            raise ValueError("the messages or tools are nested too deeply.") from None
        except (ValueError, TimeoutError) as error:
            raise NotReady(f"{self._what} cannot be rendered now: {error}") from None
        if "error" in answer:
            raise ValueError(f"{self._what} refuses these messages: {answer['error']}.")
        return answer["text"], answer["spans"]


def _unknown(name: str, what: str) -> str:
    return f"chat_template_kwargs has {name[:60]!r}, which is not known: {what} does not read it."
