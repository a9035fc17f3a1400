"""The OpenAI chat protocol as plain values: messages in, requests out; completions and events in, JSON out."""

import json
from typing import Any

from gcompute.serve.chat_template import ChatTemplate, Message
from gcompute.serve.engine import Engine
from gcompute.serve.parameters import EMPTY, SHARED, check_model, read_count, read_field, read_object, short
from gcompute.serve.parameters import NEUTRAL as SHARED_NEUTRAL
from gcompute.serve.protocol import Answer, Ask, check_can_fit, make_ask
from gcompute.serve.reports import chat_logprobs
from gcompute.serve.request import MAX_TOP_LOGPROBS, RequestError
from gcompute.serve.stream import Completion, Finished, Tokens

TEMPLATE_FIELDS = ("messages", "tools", "add_generation_prompt", "continue_final_message", "chat_template_kwargs")
# What asks the template for nothing.
TEMPLATE_NEUTRAL: dict[str, tuple[Any, ...]] = {"tool_choice": ("none", "auto"), "documents": ()}
KNOWN = (*SHARED, *TEMPLATE_FIELDS, "max_completion_tokens", "top_logprobs")
# As in `parameters.NEUTRAL`, of chat alone.
NEUTRAL: dict[str, tuple[Any, ...]] = {
    **SHARED_NEUTRAL,
    **TEMPLATE_NEUTRAL,
    "functions": (),
    "function_call": ("none", "auto"),
    "parallel_tool_calls": (True,),
    "modalities": (["text"],),
    "store": (),
    "service_tier": ("auto", "default"),
    "reasoning_effort": ("none",),
    "include_reasoning": (True,),
    "verbosity": ("medium",),
    # The template writes them: true would ask for them twice.
    "add_special_tokens": (),
    "echo": (),
}
ROLES = ("system", "developer", "user", "assistant", "tool")
# Of a message, beside its role and content: what the template sees as it came.
PASSED = {"name": str, "tool_call_id": str, "reasoning_content": str}
MAX_MESSAGES = 1024
MAX_TOOLS = 1024


def parse_chat(body: bytes, *, engine: Engine, model_name: str, template: ChatTemplate) -> Ask:
    """Read a chat call.

    Raises:
      HttpError: unknown model. RequestError: anything else that is wrong with it; `param` names what.
    """
    fields = read_object(body, known=KNOWN, neutral=NEUTRAL)
    check_model(fields, model_name)
    n = read_count(fields, "n", 1, 1)
    if fields.get("max_completion_tokens") is not None:
        if fields.get("max_tokens") not in (None, fields["max_completion_tokens"]):
            raise RequestError("max_tokens and max_completion_tokens differ: give one.", param="max_completion_tokens")
        fields["max_tokens"] = fields["max_completion_tokens"]
    ids = read_prompt(fields, engine=engine, template=template)
    assert engine.tokenizer is not None
    ends = [one for one in template.ends(engine.tokenizer) if one < engine.config.vocab]
    try:
        return make_ask(
            fields,
            engine=engine,
            model_name=model_name,
            prompts=[ids],
            each=n,
            shown=n,
            logprobs=_read_logprobs(fields),
            default_max_tokens=engine.max_context,
            more_stop=template.stop,
            more_ends=[one for one in ends if one != engine.tokenizer.end_of_text],
        )
    except RequestError as error:
        # The error names a field of the request.
        sent = {"prompt": "messages"}
        if fields.get("max_completion_tokens") is not None:
            sent["max_tokens"] = "max_completion_tokens"
        raise RequestError(str(error), param=sent.get(error.param or "", error.param), code=error.code) from None


def read_prompt(
    fields: dict[str, Any], *, engine: Engine, template: ChatTemplate, to_fit: bool = True
) -> tuple[int, ...]:
    """The ids of a chat's messages, by the template; `to_fit`: refused early where no context can hold them.

    Raises:
      RequestError: anything that is wrong with them; `param` names what. NotReady: the template is busy.
    """
    messages, tools = read_messages(fields), _read_tools(fields)
    opens = read_field(fields, "add_generation_prompt", bool, True)
    continues = read_field(fields, "continue_final_message", bool, False)
    if opens and continues:
        message = "continue_final_message continues the last message: set add_generation_prompt to false with it."
        raise RequestError(message, param="continue_final_message")
    if engine.tokenizer is None:
        raise RequestError("this engine has no tokenizer, and chat needs one.", param="messages")
    if to_fit:
        check_can_fit("".join(message.content or "" for message in messages), engine, param="messages")
    try:
        return template.encode(
            messages,
            engine.tokenizer,
            tools=tools,
            add_generation_prompt=opens,
            continue_final_message=continues,
            variables=read_field(fields, "chat_template_kwargs", dict, {}),
        )
    except RequestError:
        raise
    except ValueError as error:
        raise RequestError(short(str(error), 300), param="messages") from None


def _read_tools(fields: dict[str, Any]) -> list[dict[str, Any]]:
    """The tools' JSON schemas; none where the answer may call none."""
    tools = read_field(fields, "tools", list, [])
    if len(tools) > MAX_TOOLS:
        raise RequestError(f"tools holds {len(tools)}; the most is {MAX_TOOLS}.", param="tools")
    for index, tool in enumerate(tools):
        function = tool.get("function") if isinstance(tool, dict) and tool.get("type") == "function" else None
        if not isinstance(function, dict) or not isinstance(function.get("name"), str):
            message = f'tools[{index}] must be {{"type": "function", "function": {{"name": ...}}}}, got {short(tool)}.'
            raise RequestError(message, param=f"tools[{index}]")
    return [] if fields.get("tool_choice") == "none" else tools


def read_messages(fields: dict[str, Any]) -> list[Message]:
    """The messages, checked; parts of text are joined."""
    messages = read_field(fields, "messages", list, None)
    if not messages:
        raise RequestError("messages is required: a list that is not empty.", param="messages")
    if len(messages) > MAX_MESSAGES:
        raise RequestError(f"messages holds {len(messages)}; the most is {MAX_MESSAGES}.", param="messages")
    read = []
    for index, message in enumerate(messages):
        where = f"messages[{index}]"
        if not isinstance(message, dict):
            raise RequestError(f"{where} must be an object, got {short(message)}.", param=where)
        role = message.get("role")
        if role not in ROLES:
            raise RequestError(f"{where}.role must be one of {', '.join(ROLES)}, got {short(role)}.", param=where)
        more = _read_more(message, where)
        # Where an answer calls tools, it may say nothing.
        content = message.get("content")
        silent = content is None and "tool_calls" in more
        read.append(Message(role=role, content=None if silent else _read_content(content, where), more=more))
    return read


def _read_more(message: dict[str, Any], where: str) -> dict[str, Any]:
    """What a message has beside role and content, as the template sees it."""
    more: dict[str, Any] = {}
    for name, value in message.items():
        if name in ("role", "content") or value is None:
            continue
        if name in PASSED:
            if not isinstance(value, str):
                raise RequestError(f"{where}.{name} must be a string.", param=where)
            more[name] = value
        elif name == "tool_calls" and isinstance(value, list) and value:
            more[name] = [_read_call(call, where) for call in value]
        # An answer that is sent back has fields that hold nothing: `refusal`, `annotations`, and others.
        elif value not in EMPTY:
            raise RequestError(f"{where} has {short(name)!r}, which is not supported.", param=where)
    if "reasoning_content" in more:
        # The name that some templates read it by.
        more = {"thinking": more["reasoning_content"], **more}
    return more


def _read_call(call: Any, where: str) -> dict[str, Any]:
    """A tool call whose arguments, JSON as text in OpenAI's form, are an object as templates expect them."""
    function = call.get("function") if isinstance(call, dict) else None
    if not isinstance(function, dict) or not isinstance(function.get("name"), str):
        raise RequestError(f"{where}.tool_calls must name functions, got {short(call)}.", param=where)
    arguments = function.get("arguments")
    if isinstance(arguments, str):
        try:
            arguments = json.loads(arguments or "{}")
        except (ValueError, RecursionError):
            arguments = None
    if not isinstance(arguments, dict):
        raise RequestError(f"{where}.tool_calls: the arguments must be a JSON object.", param=where)
    return {**call, "function": {**function, "arguments": arguments}}


def _read_content(content: Any, where: str) -> str:
    if isinstance(content, list) and all(
        isinstance(part, dict) and part.get("type") == "text" and isinstance(part.get("text"), str) for part in content
    ):
        return "".join(part["text"] for part in content)
    if not isinstance(content, str):
        raise RequestError(f"{where}.content must be text, or parts of text; got {short(content)}.", param=where)
    return content


def _read_logprobs(fields: dict[str, Any]) -> int | None:
    wanted = read_field(fields, "logprobs", bool, False)
    num_top = read_field(fields, "top_logprobs", int, None)
    if num_top is not None and not wanted:
        raise RequestError("top_logprobs needs logprobs to be true.", param="top_logprobs")
    if num_top is not None and not 0 <= num_top <= MAX_TOP_LOGPROBS:
        raise RequestError(f"top_logprobs must be from 0 to {MAX_TOP_LOGPROBS}.", param="top_logprobs")
    return (num_top or 0) if wanted else None


class ChatAnswer(Answer):
    """Builds the JSON of one chat call, whole or in chunks."""

    kind, chunk_kind, prefix = "chat.completion", "chat.completion.chunk", "chatcmpl"

    def opening(self) -> list[dict[str, Any]]:
        role = {"role": "assistant", "content": ""}
        return [
            {
                **self._head,
                "object": self.chunk_kind,
                "choices": [{"index": index, "delta": role, "logprobs": None, "finish_reason": None}],
                **self.usage_field(None),
            }
            for index in range(len(self._ask.requests))
        ]

    def choice(self, index: int, done: Completion) -> dict[str, Any]:
        message = {"role": "assistant", "content": done.text, "refusal": None}
        logprobs = chat_logprobs(done.logprobs, self._engine.spell) if self._ask.logprobs else None
        return {"index": index, "message": message, "logprobs": logprobs, "finish_reason": done.reason}

    def delta(self, index: int, event: Tokens | Finished, echo: str) -> dict[str, Any]:
        ended = isinstance(event, Finished)
        delta = {"content": event.text} if event.text or not ended else {}
        logprobs = None
        if self._ask.logprobs and (event.logprobs or not ended):
            logprobs = chat_logprobs(event.logprobs, self._engine.spell)
        return {"index": index, "delta": delta, "logprobs": logprobs, "finish_reason": event.reason if ended else None}
